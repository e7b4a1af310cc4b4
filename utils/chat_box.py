"""A chat box for a notebook: talk to anything that answers, and see what the conversation costs.

Answers are computed in a thread of their own, so that the notebook goes on and the stop button is heard.
Where no kernel runs, the conversation so far stands as a picture.
"""

from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Sequence

import anywidget
import traitlets
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from .widgets import show_widget, themed

WARMEST = 2.0  # the slider's end
MOST_TYPED = 20_000  # characters of one message
LINE = 0.2  # inches between the lines of the picture
PAUSE = 0.08  # seconds between two updates of an answer that grows
_ONE_AT_A_TIME = threading.Lock()  # boxes may share a model, and always share the machine


def chat_box(assistant, conversation: Sequence[dict] = (), *, system: str = "") -> None:
    """Show a box to go on with a conversation, and for viewers without a kernel the conversation itself.

    ``assistant`` has a ``name``, a ``temperature``, ``reply(messages)`` that yields pieces of text, and
    ``count_tokens(messages)`` and ``context_left(messages)`` in tokens; messages are
    ``{"role": ..., "content": ...}``, of the user and the assistant in turn. ``system`` is the system prompt at
    the start. Not to be asked elsewhere while the box waits for its answer.
    """
    box = ChatBox(assistant, conversation, system=system)
    still = draw_conversation(assistant.name, box.messages)
    show_widget(box, still, describe_conversation(assistant.name, box.messages))


class ChatBox(anywidget.AnyWidget):
    """The widget. ``temperature`` and ``system`` come from the browser, as do its three wishes: say, stop, new."""

    name = traitlets.Unicode().tag(sync=True)
    messages = traitlets.List().tag(sync=True)  # without the system prompt
    answer = traitlets.Unicode().tag(sync=True)  # the one that grows
    state = traitlets.Dict().tag(sync=True)
    temperature = traitlets.Float().tag(sync=True)
    system = traitlets.Unicode().tag(sync=True)
    usual_system = traitlets.Unicode().tag(sync=True)
    limit = traitlets.Int(MOST_TYPED).tag(sync=True)

    def __init__(self, assistant, conversation: Sequence[dict] = (), *, system: str = ""):
        messages = [dict(message) for message in conversation if message["role"] != "system"]
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise ValueError(f"The conversation has the roles {', '.join(roles)}; they must be user and assistant in "
                             "turn, and the last one the assistant.")
        self.assistant = assistant
        self._stop, self._thread, self._speed = threading.Event(), None, ""
        super().__init__(name=assistant.name, messages=messages, temperature=float(assistant.temperature),
                         system=system, usual_system=getattr(assistant, "system_prompt", None) or "")
        self._tell(False)
        self.observe(lambda change: self._tell(self.busy), "system")
        self.on_msg(self._wish)

    @property
    def busy(self) -> bool:
        """Whether an answer is under way."""
        return self._thread is not None and self._thread.is_alive()

    def say(self, text: str) -> None:
        """Put a message to the assistant; returns at once. While an answer is under way, it comes back."""
        text = text.strip()[:MOST_TYPED]
        if self.busy:
            self.send({"give_back": text})
        elif text:
            self._stop.clear()
            self.messages = [*self.messages, {"role": "user", "content": text}]
            self._tell(True)
            self._thread = threading.Thread(target=self._answer, name="chat box", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the answer that is under way; what there is of it stays."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> None:
        """Return when no answer is under way, or after so many seconds."""
        if thread := self._thread:
            thread.join(seconds)

    def new(self) -> None:
        """Forget the conversation; an answer under way ends first."""
        self.stop()
        self.wait(30)
        if not self.busy:
            self._speed, self.messages = "", []
            self._tell(False)

    def _wish(self, widget, content, buffers) -> None:
        wish = content.get("wish") if isinstance(content, dict) else None
        if wish == "say":
            self.say(str(content.get("text", "")))
        elif wish == "stop":
            self.stop()
        elif wish == "new":
            threading.Thread(target=self.new, daemon=True).start()  # it may have to wait

    def _answer(self) -> None:
        """In the thread: ask, pass on what comes, and put the answer where it belongs."""
        notes, answer, asked = [], "", self.messages[-1]["content"]
        try:
            answer = self._listen(notes)
        except Exception as error:  # a message beats a widget that stands still
            notes.append(f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
        if answer:
            self.messages = [*self.messages, {"role": "assistant", "content": answer}]
        else:  # as if it had not been asked; the text goes back to where it was typed
            notes = notes or ["Stopped before the first word." if self._stop.is_set() else
                              "The model ended its answer at once."]
            self.messages = self.messages[:-1]
            self.send({"give_back": asked})
        self.answer = ""
        self._thread = None
        self._tell(False, " ".join(note.strip(" ()\n") for note in notes))

    def _listen(self, notes: list[str]) -> str:
        while not _ONE_AT_A_TIME.acquire(timeout=0.1):
            if self._stop.is_set():
                return ""
        answer, shown, began = "", 0.0, time.monotonic()
        notify = getattr(self.assistant, "notify", None)  # where it would say what it left out
        try:
            self.assistant.temperature = min(max(self.temperature, 0.0), WARMEST)
            if notify:
                self.assistant.notify = notes.append
            messages = self._with_system()
            for piece in self.assistant.reply(messages):
                answer += piece
                if time.monotonic() - shown > PAUSE:
                    self.answer, shown = answer, time.monotonic()
                if self._stop.is_set():
                    notes.append("Stopped.")
                    break
            self._measure(messages, answer, time.monotonic() - began)
        finally:
            if notify:
                self.assistant.notify = notify
            _ONE_AT_A_TIME.release()
        return answer

    def _measure(self, messages: list[dict], answer: str, seconds: float) -> None:
        with_it, without = ([*messages, {"role": "assistant", "content": text}] for text in (answer, ""))
        tokens = self.assistant.count_tokens(with_it) - self.assistant.count_tokens(without)
        self._speed = f"last answer {tokens:,} tokens, {tokens / max(seconds, 1e-9):.0f} a second"

    def _with_system(self) -> list[dict]:
        opening = [{"role": "system", "content": self.system}] if self.system.strip() else []
        return opening + self.messages

    def _tell(self, busy: bool, note: str = "") -> None:
        messages = self._with_system()
        used = self.assistant.count_tokens(messages) if messages else 0
        parts = [f"{used:,} tokens used", f"room for {self.assistant.context_left(messages):,}"]
        self.state = {"busy": busy, "note": note, "cost": " · ".join(parts + [self._speed] * bool(self._speed))}

    _esm = """
    const make = (tag, properties = {}, ...children) => {
      const node = Object.assign(document.createElement(tag), properties);
      node.append(...children);
      return node;
    };
    function render({ model, el }) {
      const log = make("div", { className: "chat-log", role: "log", tabIndex: 0, ariaLabel: "Conversation" });
      const growing = make("div", { className: "chat-said" });
      const field = make("textarea", { rows: 2, maxLength: model.get("limit"), ariaLabel: "Your message",
        placeholder: "Your message. Enter sends, Shift+Enter begins a new line, Esc stops the answer." });
      const send = make("button", { type: "button", className: "chat-send" });
      const fresh = make("button", { type: "button", textContent: "New conversation" });
      const note = make("div", { className: "chat-note", role: "status" });
      const cost = make("span", { className: "chat-cost" });
      const slider = make("input", { type: "range", min: 0, max: 2, step: 0.1 }), value = make("output");
      const system = make("textarea", { rows: 2, maxLength: model.get("limit") });
      const busy = () => model.get("state").busy;

      const message = (who, text) => make("div", { className: "chat-message chat-" + who },
        make("div", { className: "chat-who", textContent: who === "user" ? "You" : model.get("name") }),
        make("div", { className: "chat-said", textContent: text }));
      const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      function keepEnd(change) {   // follow the text, unless the reader has scrolled back
        const follow = atEnd();
        change();
        if (follow) log.scrollTop = log.scrollHeight;
      }
      const waiting = make("div", { className: "chat-message chat-assistant" },
        make("div", { className: "chat-who", textContent: model.get("name") }), growing);
      let drawn = [];
      function writeMessages() {
        keepEnd(() => {
          const all = model.get("messages");
          let same = 0;
          while (same < all.length && same < drawn.length && drawn[same] === JSON.stringify(all[same])) same += 1;
          while (log.children.length > same) log.lastChild.remove();
          for (const m of all.slice(same)) log.append(message(m.role, m.content));
          drawn = all.map((m) => JSON.stringify(m));
          if (busy()) log.append(waiting);
          if (!log.children.length) log.append(make("div", { className: "chat-empty",
            textContent: `Nothing has been said yet. ${model.get("name")} waits for your message.` }));
        });
      }
      function writeAnswer() {
        keepEnd(() => { growing.textContent = model.get("answer") || (busy() ? "…" : ""); });
      }
      function writeState() {
        const { note: said, cost: costs } = model.get("state");
        log.ariaBusy = String(busy());
        send.textContent = busy() ? "Stop" : "Send";
        send.disabled = false;
        send.classList.toggle("chat-stop", busy());
        note.textContent = busy() ? "Writing …" : said;
        cost.textContent = costs;
        writeMessages();
        writeAnswer();
      }
      function writeDials() {
        slider.value = model.get("temperature");
        value.textContent = Number(slider.value).toFixed(1);
        if (system.value !== model.get("system")) system.value = model.get("system");
      }
      function say() {
        if (busy() || !field.value.trim()) return;
        saveSystem();
        model.send({ wish: "say", text: field.value });
        field.value = "";
        log.scrollTop = log.scrollHeight;
      }
      function stop() {
        if (!busy()) return;
        send.disabled = true;   // until the state says that it is over
        note.textContent = "Stopping …";
        model.send({ wish: "stop" });
      }
      function saveSystem() {
        if (system.value === model.get("system")) return;
        model.set("system", system.value);
        model.save_changes();
      }
      function heard(content) {   // what could not be answered comes back to be changed
        if (content.give_back && !field.value) field.value = content.give_back;
      }

      el.dataset.lmSuppressShortcuts = "true";   // keys pressed here are not commands to the notebook
      for (const event of ["keydown", "keypress", "keyup"])
        el.addEventListener(event, (e) => {
          if (event === "keydown" && e.key === "Escape") stop();
          e.stopPropagation();
        });
      field.addEventListener("keydown", (e) => {
        if (e.key !== "Enter" || e.shiftKey || e.isComposing) return;
        e.preventDefault();
        say();
      });
      send.addEventListener("click", () => { if (busy()) stop(); else say(); field.focus(); });
      fresh.addEventListener("click", () => { model.send({ wish: "new" }); field.focus(); });
      slider.addEventListener("input", () => {
        value.textContent = Number(slider.value).toFixed(1);
        model.set("temperature", Number(slider.value));
        model.save_changes();
      });
      system.addEventListener("change", saveSystem);
      system.placeholder = model.get("usual_system") ? `The model's own: ${model.get("usual_system")}` : "None";
      el.classList.add("chat");
      el.role = "group";
      el.ariaLabel = `Chat with ${model.get("name")}`;
      el.append(log, make("div", { className: "chat-write" }, field, send), note,
        make("div", { className: "chat-bar" },
          make("label", {}, make("span", { textContent: "Temperature" }), slider, value), cost, fresh),
        make("details", {}, make("summary", { textContent: "System prompt" }),
          make("label", { className: "chat-system" },
            make("span", { textContent: "What the model is told before the conversation, from the next answer on" }),
            system)));
      const watched = [["change:state", writeState], ["change:answer", writeAnswer], ["change:messages", writeMessages],
        ["change:temperature", writeDials], ["change:system", writeDials], ["msg:custom", heard]];
      for (const [name, call] of watched) model.on(name, call);
      writeDials();
      writeState();
      log.scrollTop = log.scrollHeight;
      return () => { for (const [name, call] of watched) model.off(name, call); };
    }
    export default { render };
    """
    _css = themed("chat") + """
    .chat { font-family: system-ui, sans-serif; font-size: 14px; max-width: 46rem; --chat-accent: #0072B2; }
    :is([data-jp-theme-light="false"], .vscode-dark, html[theme=dark]) .chat { --chat-accent: #56B4E9; }
    .chat-log { max-height: 24rem; min-height: 5rem; overflow-y: auto; border: 1px solid #767676; border-radius: 4px;
      padding: 4px 10px 8px; background: var(--jp-layout-color1, transparent); }
    .chat-message { margin: 8px 0; padding-left: 10px; border-left: 3px solid transparent; }
    .chat-message.chat-assistant { border-left-color: var(--chat-accent); }
    .chat-message.chat-user { margin-left: 12%; }
    .chat-who { font-size: 12px; font-weight: bold; }
    .chat-said { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.45; }
    .chat-empty { padding: 1.5rem 0; opacity: 0.8; }
    .chat-write { display: flex; gap: 8px; margin-top: 8px; align-items: stretch; }
    .chat textarea { flex: 1; min-width: 0; resize: vertical; }
    .chat textarea, .chat button { font: inherit; padding: 4px 8px; color: inherit; border: 1px solid #767676;
      border-radius: 4px; background: var(--jp-layout-color1, transparent); box-sizing: border-box; }
    .chat ::placeholder { color: inherit; opacity: 0.75; }
    .chat button { cursor: pointer; }
    .chat .chat-send { min-width: 5em; font-weight: bold; border: 2px solid var(--chat-accent); }
    .chat .chat-send.chat-stop { border-style: double; border-width: 4px; }
    .chat :is(textarea, button, input, summary, .chat-log):focus-visible { outline: 2px solid var(--chat-accent);
      outline-offset: 1px; }
    .chat-note { min-height: 1.5em; margin: 4px 0; overflow-wrap: anywhere; }
    .chat-bar { display: flex; flex-wrap: wrap; gap: 6px 16px; align-items: center; }
    .chat-bar label { display: flex; gap: 6px; align-items: center; }
    .chat-bar input[type=range] { width: 120px; accent-color: var(--chat-accent); }
    .chat-cost { flex: 1 1 14em; font-variant-numeric: tabular-nums; }
    .chat output { min-width: 2em; font-variant-numeric: tabular-nums; }
    .chat details { margin-top: 6px; }
    .chat-system { display: flex; flex-direction: column; gap: 4px; margin-top: 4px; }
    """


def draw_conversation(name: str, messages: Sequence[dict], width: int = 88, most_lines: int = 40) -> Figure:
    """A conversation as a picture: the user's messages on the right, the assistant's on the left."""
    blocks = []
    for message in messages:
        lines = [part for line in message["content"].splitlines() for part in textwrap.wrap(line, width) or [""]]
        blocks.append((message["role"] == "user", lines or [""]))
    shown, left = [], most_lines
    for block in reversed(blocks):  # the latest, as a chat shows it
        if left < len(block[1]) and shown:
            break
        shown.insert(0, (block[0], block[1][:most_lines]))
        left -= len(block[1]) + 2
    height = LINE * sum(len(lines) + 2 for _, lines in shown) + 0.5
    fig = Figure(figsize=(6.6, max(height, 1.0)))
    axes = fig.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 6.6), ylim=(max(height, 1.0), 0))
    axes.set_axis_off()
    y = 0.3
    axes.text(0.1, y, f"A conversation with {name}", fontsize=11, va="center")
    for mine, lines in shown:
        x, y = 1.0 if mine else 0.2, y + 0.34
        axes.text(x, y, "You" if mine else name, fontsize=8, fontweight="bold", va="center")
        if not mine:
            axes.plot([0.1, 0.1], [y - 0.09, y + LINE * len(lines) + 0.09], color="#0072B2", linewidth=2.5,
                      linestyle="-")
        for line in lines:
            y += LINE
            axes.text(x, y, _drawable(line), fontsize=9, va="center", parse_math=False)
    return fig


def _drawable(text: str) -> str:
    """``text`` with a sign in place of each character that the figures' font does not have."""
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    return "".join(letter if ord(letter) in known else "\u25a1" for letter in text)


def describe_conversation(name: str, messages: Sequence[dict], most: int = 1_200) -> str:
    """The same in words, for those who cannot see it."""
    said = " ".join(f"{'You' if message['role'] == 'user' else name}: {' '.join(message['content'].split())}"
                    for message in messages) or "Nothing has been said yet."
    return textwrap.shorten(f"A chat box with a conversation with {name}. {said}", most, placeholder=" ...")
