"""A conversation in the terminal with anything that can answer: the loop behind ``course.py chat``."""

from __future__ import annotations

import sys
import time

HELP = """\
/help    this list
/info    tokens used, room left, speed of the last answer
/reset   forget the conversation and begin a new one
/quit    leave (so does Ctrl-D)
Ctrl-C stops an answer. Anything else is said to the model."""


def talk(assistant, system: str | None = None) -> int:
    """Talk to ``assistant`` until /quit or the end of the input; the exit code.

    ``assistant`` has a ``name``, ``reply(messages)`` that yields pieces of text, and
    ``count_tokens(messages)`` and ``context_left(messages)`` in tokens; messages are
    ``{"role": ..., "content": ...}``. ``system`` opens every conversation. With input from a file
    or a pipe, only answers and notes are printed.
    """
    conversation = Conversation(assistant, system)
    keyboard = sys.stdin.isatty()
    _forgive_odd_characters()
    if keyboard:
        _remember_lines()
        room = assistant.context_left(conversation.opening)
        print(f"{assistant.name} · room for {room:,} tokens · /help lists the commands")
    while True:
        try:
            if keyboard:
                print()
            line = input("> " if keyboard else "").strip()
        except EOFError:
            print(end="\n" if keyboard else "")
            return 0
        except KeyboardInterrupt:
            print("\n(Nothing to stop. /quit or Ctrl-D leaves.)")
            continue
        if line == "/quit":
            return 0
        if line.startswith("/"):
            print(conversation.command(line))
        elif line:
            conversation.say(line)


class Conversation:
    """The messages so far, and what the last answer cost."""

    def __init__(self, assistant, system: str | None = None):
        self.assistant = assistant
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages, self.speed = list(self.opening), ""

    def say(self, text: str) -> None:
        """Put ``text`` to the assistant and print the answer as it comes; Ctrl-C keeps what was said so far."""
        self.messages.append({"role": "user", "content": text})
        answer, began = "", time.monotonic()
        try:
            for piece in self.assistant.reply(self.messages):
                print(piece, end="", flush=True)
                answer += piece
            print("" if answer else "(The model ended its answer at once.)")
        except KeyboardInterrupt:
            print("\n(Stopped.)")
        except ValueError as error:
            print(f"({error})")
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
            self._measure(time.monotonic() - began)
        else:
            self.messages.pop()  # as if it had not been asked

    def command(self, line: str) -> str:
        """What a line that begins with a slash prints."""
        if line == "/help":
            return HELP
        if line == "/info":
            return self._info()
        if line == "/reset":
            self.messages, self.speed = list(self.opening), ""
            return "(A new conversation.)"
        return f"There is no command {line.split()[0]}. /help lists the commands."

    def _measure(self, seconds: float) -> None:
        empty = [*self.messages[:-1], {"role": "assistant", "content": ""}]
        tokens = self.assistant.count_tokens(self.messages) - self.assistant.count_tokens(empty)
        self.speed = f"last answer {tokens:,} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):.0f} a second)"

    def _info(self) -> str:
        used = self.assistant.count_tokens(self.messages) if self.messages else 0
        room = self.assistant.context_left(self.messages)
        parts = [self.assistant.name, f"{used:,} tokens used", f"room for {room:,}"]
        return " · ".join(parts + [self.speed] * bool(self.speed))


def _forgive_odd_characters() -> None:
    """Bytes that are no text, or characters that this terminal cannot show, become a replacement sign."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _remember_lines() -> None:
    """Let the arrow keys edit the line and bring back earlier ones, where Python has readline."""
    try:
        import readline
    except ImportError:  # Windows: its console does it by itself
        return
    readline.set_history_length(1000)
