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
