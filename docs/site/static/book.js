// What scrolls sideways inside its own box can be reached and scrolled with the keyboard.
const boxes = ".scrolls, .bd-article pre, .pst-scrollable-table-container";
function reachable() {
  for (const box of document.querySelectorAll(boxes)) {
    const scrolls = box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1;
    if (scrolls) box.setAttribute("tabindex", "0");
    else box.removeAttribute("tabindex");
  }
}
new ResizeObserver(reachable).observe(document.documentElement);
document.fonts.ready.then(reachable);

// Stories and answers are printed in lines too long for a row that means something: on a telephone they may break.
for (const pre of document.querySelectorAll(".bd-article :is(div.cell_output, div.printed) pre"))
  if (Math.max(...pre.textContent.split("\n").map(line => line.length)) > 120) pre.classList.add("prose");

// A box that goes on to the right fades there (.more), since telephones show no scroll bar.
for (const box of document.querySelectorAll(boxes)) {
  const mark = () => box.classList.toggle("more", box.scrollWidth - box.clientWidth - box.scrollLeft > 2);
  box.addEventListener("scroll", mark, { passive: true });
  new ResizeObserver(mark).observe(box);
}

// The theme's scripts listen to the first button of each kind, and that lies in the bar which book.css hides.
for (const kind of ["primary", "secondary"]) {
  const [first, ...seen] = document.querySelectorAll(`.${kind}-toggle`);
  for (const button of seen) button.addEventListener("click", () => first.click());
}

// A place chosen in "On this page" is shown, and the list goes away.
document.getElementById("pst-secondary-sidebar-modal")?.addEventListener("click", event => {
  const link = event.target.closest("a[href^='#']");
  if (!link) return;
  event.preventDefault();
  event.currentTarget.close();
  setTimeout(() => { location.hash = link.hash; }, 50);  // after the focus has gone back to the button
});

// The excerpts of the search are of the page's text, not of its buttons and lists.
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;
  const plain = Search.htmlToText;
  Search.htmlToText = (text, anchor) => {
    const page = new DOMParser().parseFromString(text, "text/html");
    const around = ".bd-header-article, #jb-print-docs-body, .bd-sidebar-secondary, .launch";
    page.querySelectorAll(around).forEach(part => part.remove());
    return plain(page.documentElement.outerHTML, anchor);
  };
});
