"""A conversation in the terminal with anything that can answer: the loop behind ``course.py chat``."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .workspace import write_text

HELP = """\
/help             this list
/info             tokens used, room left, speed of the last answer
/history          the conversation so far
/new              forget the conversation and begin a new one (/reset does the same)
/save FILE        write the conversation to a file; one that exists is left alone
/load FILE        go on with a conversation that was saved
/system TEXT      the system prompt from now on; without TEXT: which one it is; /system off: none of yours
/temperature T    0 always takes the likeliest token, 1 draws as the model says; without T: which one it is
/quit             leave (so does Ctrl-D)
Ctrl-C stops an answer. Anything else is said to the model."""


def talk(assistant, system: str | None = None, history: Path | None = None) -> int:
    """Talk to ``assistant`` until /quit or the end of the input; the exit code.

    ``assistant`` has a ``name``, a ``temperature``, ``reply(messages)`` that yields pieces of text, and
    ``count_tokens(messages)`` and ``context_left(messages)`` in tokens; messages are
    ``{"role": ..., "content": ...}``. ``system`` opens every conversation. With input from a file
    or a pipe, only answers and notes are printed. ``history`` is a file that keeps what was typed, for the
    arrow keys.
    """
    conversation = Conversation(assistant, system)
    keyboard = sys.stdin.isatty()
    _forgive_odd_characters()
    remember = _remember_lines(history) if keyboard else lambda: None
    if keyboard:
        room = assistant.context_left(conversation.opening)
        print(f"{assistant.name} · room for {room:,} tokens · /help lists the commands")
    try:
        while (line := _next_line(keyboard)) is not None:
            if line.startswith("/"):
                print(conversation.command(line))
            elif line:
                conversation.say(line)
    finally:
        remember()
    return 0


def _next_line(keyboard: bool) -> str | None:
    """The next line that was typed, or None to leave."""
    while True:
        try:
            if keyboard:
                print()
            line = input("> " if keyboard else "").strip()
            return None if line == "/quit" else line
        except EOFError:
            print(end="\n" if keyboard else "")
            return None
        except KeyboardInterrupt:
            print("\n(Nothing to stop. /quit or Ctrl-D leaves.)")


class Conversation:
    """The messages so far, what the last answer cost, and the commands that begin with a slash."""

    def __init__(self, assistant, system: str | None = None):
        self.assistant = assistant
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages, self.speed, self.kept = list(self.opening), "", True

    @property
    def said(self) -> list[dict]:
        """The messages without the system prompt."""
        return [message for message in self.messages if message["role"] != "system"]

    def say(self, text: str) -> None:
        """Put ``text`` to the assistant and print the answer as it comes; Ctrl-C keeps what was said so far."""
        self.messages.append({"role": "user", "content": text})
        answer, began = "", time.monotonic()
        try:
            for piece in self.assistant.reply(self.messages):
                answer += piece  # before it is shown, so that what was seen is kept
                print(piece, end="", flush=True)
            print("" if answer else "(The model ended its answer at once.)")
        except KeyboardInterrupt:
            print("\n(Stopped.)")
        except ValueError as error:
            print(f"({error})")
        except RuntimeError as error:  # no memory, say: what was said before is not lost with it
            print("\n" * bool(answer) + f"({type(error).__name__}: {error})")
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
            self.kept = False
            self._measure(time.monotonic() - began)
        else:
            self.messages.pop()  # as if it had not been asked

    def command(self, line: str) -> str:
        """What a line that begins with a slash prints."""
        name, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], str]] = {
            "/help": lambda _: HELP, "/info": self._info, "/history": self._history, "/new": self._new,
            "/reset": self._new, "/save": self._save, "/load": self._load, "/system": self._system,
            "/temperature": self._temperature}
        if name not in commands:
            return f"There is no command {name}. /help lists the commands."
        try:
            return commands[name](rest.strip())
        except (OSError, ValueError) as error:
            return f"({error})"

    def _measure(self, seconds: float) -> None:
        empty = [*self.messages[:-1], {"role": "assistant", "content": ""}]
        tokens = self.assistant.count_tokens(self.messages) - self.assistant.count_tokens(empty)
        self.speed = f"last answer {tokens:,} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):.0f} a second)"

    def _info(self, _: str) -> str:
        used = self.assistant.count_tokens(self.messages) if self.messages else 0
        room = self.assistant.context_left(self.messages)
        parts = [self.assistant.name, f"{used:,} tokens used", f"room for {room:,}"]
        return " · ".join(parts + [self.speed] * bool(self.speed))

    def _history(self, _: str) -> str:
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages) or "(Nothing yet.)"

    def _new(self, _: str) -> str:
        self.messages, self.speed, self.kept = list(self.opening), "", True
        return "(A new conversation.)"

    def _save(self, name: str) -> str:
        path = _file(name, "/save")
        if not self.said:
            raise ValueError("Nothing has been said yet, so there is nothing to save.")
        if path.exists():
            raise ValueError(f"{path} exists already and stays as it is. Choose another name.")
        text = json.dumps({"model": self.assistant.name, "messages": self.messages}, indent=1, ensure_ascii=False)
        write_text(path, text + "\n")
        self.kept = True
        return f"(Saved {len(self.said)} messages in {path}.)"

    def _load(self, name: str) -> str:
        path = _file(name, "/load")
        messages = read_conversation(path)
        if not self.kept:
            raise ValueError("This conversation is not saved. Keep it with /save FILE, or drop it with /new, and load "
                             "again.")
        self.messages, self.speed = messages, ""
        self.opening = [message for message in messages[:1] if message["role"] == "system"]
        last = f" The last one: {messages[-1]['content']}" if self.said else ""
        return f"(Loaded {len(self.said)} messages from {path}.{last})"

    def _system(self, text: str) -> str:
        if text:
            self.opening = [] if text == "off" else [{"role": "system", "content": text}]
            self.messages = self.opening + self.said
        if self.opening:
            return f"(The system prompt is: {self.opening[0]['content']})"
        usual = getattr(self.assistant, "system_prompt", None)
        return f"(The system prompt is the model's own: {usual})" if usual else "(There is no system prompt.)"

    def _temperature(self, text: str) -> str:
        if text:
            self.assistant.temperature = _temperature(text)
        return f"(The temperature is {self.assistant.temperature:g}.)"


def _file(name: str, command: str) -> Path:
    if not name:
        raise ValueError(f"Give the name of a file: {command} FILE.")
    return Path(name).expanduser()


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"The temperature {text} is no number of at least 0. It stays as it is.")
    return 0.0 if value < 1e-6 else value  # a float32 divided by less may be infinite


def read_conversation(path: Path) -> list[dict]:
    """The messages that ``/save`` wrote; ``ValueError`` if the file holds no conversation."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        messages = [{"role": message["role"], "content": message["content"]} for message in found["messages"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        messages = []
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    whole = turns == ["user", "assistant"] * (len(turns) // 2) and turns
    if not whole or not all(isinstance(message["content"], str) for message in messages):
        raise ValueError(f"{path} holds no conversation as /save writes it: an object with messages, of the user and "
                         "the assistant in turn.")
    return messages


def _forgive_odd_characters() -> None:
    """Bytes that are no text, or characters that this terminal cannot show, become a replacement sign."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _remember_lines(history: Path | None) -> Callable[[], None]:
    """Let the arrow keys edit the line and bring back earlier ones; what to call at the end, to keep them."""
    try:
        import readline
    except ImportError:  # Windows: its console does it by itself
        return lambda: None
    readline.set_history_length(1000)
    if history is None:
        return lambda: None
    try:
        if history.exists():
            readline.read_history_file(str(history))
    except OSError:  # not of this kind of readline
        return lambda: None

    def keep() -> None:
        try:
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(str(history))
        except OSError as error:
            print(f"(What was typed could not be kept: {error})")

    return keep
