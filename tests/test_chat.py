"""Talking to a model: the commands of the terminal, through a real one, and the chat box of a notebook."""

import dataclasses
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from conftest import ROOT

from ch02_tokenizer.tokenizer import END_OF_TEXT, BPETokenizer
from ch04_gpt.gpt import GPT, PRESETS
from ch06_finetune.finetune import END, START, add_lora, save_adapter
from utils.chat_box import ChatBox, describe_conversation, draw_conversation
from utils.plots import bundle
from utils.terminal_chat import Conversation, read_conversation


class Echo:
    """Says back what it hears, piece by piece."""

    name, temperature, system_prompt, notify = "Echo", 0.2, "Be brief.", print

    def __init__(self, pause=0.0):
        self.pause, self.heard, self.temperatures, self.working, self.most = pause, [], [], 0, 0

    def reply(self, messages):
        text = messages[-1]["content"]
        if "too long" in text:
            raise ValueError("It makes 9,000 tokens; 8,000 fit. Shorten it.")
        self.heard.append([dict(m) for m in messages])
        self.temperatures.append(self.temperature)
        return self._pieces(text)

    def _pieces(self, text):
        self.working += 1
        self.most = max(self.most, self.working)
        try:
            if "left out" in text:
                self.notify("(Answered without the oldest 2 messages.)")
            if "broken" in text:
                raise RuntimeError("no memory")
            for piece in ("" if "silent" in text else f"You said {text}.").split(" "):
                time.sleep(self.pause)
                yield piece + " " * bool(piece)
        finally:
            self.working -= 1

    def count_tokens(self, messages):
        return sum(len(m["content"].split()) for m in messages)

    def context_left(self, messages):
        return 1000 - self.count_tokens(messages)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# ---------------------------------------------------------------- the commands


@pytest.fixture
def talking(capsys):
    conversation = Conversation(Echo(), "Sing.")
    conversation.say("Hello")
    capsys.readouterr()
    return conversation


def test_save_and_load_bring_back_the_same_conversation(talking, tmp_path):
    path = tmp_path / "deep" / "my talk.json"
    assert talking.command(f"/save {path}") == f"(Saved 2 messages in {path}.)"
    other = Conversation(Echo())
    assert "Loaded 2 messages" in other.command(f"/load {path}") and "You said Hello." in other.command("/history")
    assert other.messages == talking.messages and other.opening == [{"role": "system", "content": "Sing."}]
    other.say("On")
    assert [m["content"] for m in other.assistant.heard[0]] == ["Sing.", "Hello", "You said Hello. ", "On"]


def test_save_overwrites_nothing(talking, tmp_path):
    path = tmp_path / "talk.json"
    path.write_text("dear to me")
    assert "exists already and stays as it is" in talking.command(f"/save {path}")
    assert path.read_text() == "dear to me"
    assert "exists already" in talking.command(f"/save {tmp_path}")
    assert "Give the name of a file: /save FILE" in talking.command("/save")
    assert "nothing to save" in Conversation(Echo(), "Sing.").command(f"/save {tmp_path / 'new.json'}")
    assert os.listdir(tmp_path) == ["talk.json"]


def test_load_drops_no_conversation_that_is_not_saved(talking, tmp_path):
    kept = Conversation(Echo())
    kept.say("Kept")
    kept.command(f"/save {tmp_path / 'kept.json'}")
    before = list(talking.messages)
    assert "is not saved" in talking.command(f"/load {tmp_path / 'kept.json'}") and talking.messages == before
    talking.command(f"/save {tmp_path / 'other.json'}")
    assert "Loaded 2" in talking.command(f"/load {tmp_path / 'kept.json'}") and talking.said[0] == user("Kept")
    talking.say("more")  # said since: not saved again
    assert "is not saved" in talking.command(f"/load {tmp_path / 'other.json'}")
    talking.command("/new")
    assert "Loaded 2" in talking.command(f"/load {tmp_path / 'other.json'}")


@pytest.mark.parametrize("content", [
    "", "{", "[]", '{"messages": []}', '{"messages": [{"role": "user", "content": "x"}]}', '{"messages": 7}',
    '{"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]}',
    '{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "y"}]}', "[" * 50_000, "\udcff",
])
def test_a_file_that_is_no_conversation_changes_nothing(talking, tmp_path, content):
    path = tmp_path / "talk.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    talking.kept, before = True, list(talking.messages)
    assert "holds no conversation as /save writes it" in talking.command(f"/load {path}") and talking.messages == before
    assert "No such file" in talking.command(f"/load {tmp_path / 'none'}") and talking.messages == before


def test_system_prompt_and_temperature_change_from_the_next_answer_on(talking):
    assert "Sing." in talking.command("/system") and "0.2" in talking.command("/temperature")
    talking.command("/system Whisper, please.")
    assert talking.command("/temperature 0.7") == "(The temperature is 0.7.)"
    talking.say("Again")
    assert talking.assistant.heard[1][0] == {"role": "system", "content": "Whisper, please."}
    assert len(talking.assistant.heard[1]) == 4 and talking.assistant.temperatures == [0.2, 0.7]
    for wrong in ("-1", "warm", "nan", "inf"):
        assert "stays as it is" in talking.command(f"/temperature {wrong}") and talking.assistant.temperature == 0.7
    assert talking.command("/temperature 1e-50") == "(The temperature is 0.)"  # by less no float32 can be divided
    assert "the model's own: Be brief." in talking.command("/system off")
    talking.say("Thrice")
    assert talking.assistant.heard[2][0] == user("Hello")


def test_a_model_that_fails_ends_no_conversation(talking, capsys):
    before = list(talking.messages)
    talking.say("broken")
    assert capsys.readouterr().out == "(RuntimeError: no memory)\n" and talking.messages == before


# ---------------------------------------------------------------- a real terminal


@pytest.fixture
def terminal(tmp_path):
    """``course.py chat``'s loop in a terminal of its own: (type a line, wait for words, the process)."""
    pty = pytest.importorskip("pty")
    program = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a job may ignore it
               "import sys; sys.path[:0] = ['.', 'tests']; from pathlib import Path; from test_chat import Echo; "
               "from utils.terminal_chat import talk; "
               f"sys.exit(talk(Echo(0.05), history=Path({str(tmp_path / 'typed')!r})))")
    started = []

    def start():
        ours, theirs = pty.openpty()
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=theirs, stdout=theirs,
                                   stderr=theirs, start_new_session=True, env={**os.environ, "TERM": "dumb"},
                                   preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0))
        os.close(theirs)
        started.append((process, ours))
        heard = bytearray()

        def type_(keys):
            os.write(ours, keys.encode())

        def wait_for(words, seconds=60):
            end = time.monotonic() + seconds
            while words.encode() not in heard:
                assert time.monotonic() < end, heard.decode()
                if select.select([ours], [], [], 0.2)[0]:
                    try:
                        heard.extend(os.read(ours, 4096))
                    except OSError:  # it has left
                        assert words.encode() in heard, heard.decode()
            end = heard.index(words.encode()) + len(words.encode())
            text = heard[:end].decode()
            del heard[:end]
            return text
        return type_, wait_for, process

    yield start
    for process, ours in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(ours)


def test_a_talk_in_a_real_terminal(terminal, tmp_path):
    type_, wait_for, process = terminal()

    def enter(keys):  # keys typed before the prompt stands there may be the terminal's, not the chat's
        wait_for("> ")
        type_(keys)

    assert "Echo · room for 1,000 tokens" in wait_for("tokens")
    enter("hello there\n")
    wait_for("You said hello there.")
    enter("a long one with many words to be stopped in the middle of all of it\n")
    wait_for("You said a")
    type_("\x03")  # Ctrl-C
    wait_for("(Stopped.)")
    enter("/help\n")
    assert "/load FILE" in wait_for("Anything else is said to the model.")
    enter(f"/save {tmp_path}/talk.json\n")
    wait_for("(Saved 4 messages")
    wait_for("> ")
    for patience in (2, 2, 2, 60):  # Python's readline sleeps through a signal that comes just before it listens
        type_("\x03")
        with suppress(AssertionError):
            wait_for("(Nothing to stop.", patience)
            break
    else:
        pytest.fail("Ctrl-C at the prompt said nothing")
    enter("\x1b[A\x1b[A\x1b[A\n")  # up three times: the line before /help
    wait_for("You said a")
    enter("/quit\n")
    assert process.wait(30) == 0
    saved = read_conversation(tmp_path / "talk.json")
    assert saved[0] == user("hello there") and saved[3]["content"].startswith("You said a")

    type_, wait_for, process = terminal()
    enter("\x1b[A\x1b[A\n")  # typed in the last session, before /quit
    wait_for("You said a")
    type_("\x03")
    wait_for("(Stopped.)")
    enter("\x04")  # Ctrl-D
    assert process.wait(30) == 0


def test_the_command_talks_with_an_adapter_and_says_which(tmp_path):
    tokenizer = BPETokenizer.train("The sun shone warm upon the sea. " * 9, 262, [END_OF_TEXT, START, END])
    model = GPT(dataclasses.replace(PRESETS["storyteller"], vocab_size=262, d_model=32, d_ff=88, n_layers=2))
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save(tmp_path / "tiny" / "tokenizer.json")
    add_lora(model, 2, 4)
    save_adapter(model, tmp_path / "witch")
    command = [sys.executable, "course.py", "chat", "--model", str(tmp_path / "tiny"), "--adapter"]
    result = subprocess.run([*command, str(tmp_path / "witch")], cwd=ROOT, input="/info\n/quit\n", capture_output=True,
                            text=True)
    assert result.returncode == 0 and "tiny+witch" in result.stdout, result.stderr
    missing = subprocess.run([*command, "wich"], cwd=ROOT, input="", capture_output=True, text=True)
    assert missing.returncode == 1 and "no adapter 'wich'" in missing.stderr and "Traceback" not in missing.stderr


# ---------------------------------------------------------------- the chat box


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def settled(box):
    wait_until(lambda: not box.state["busy"])
    return box


def wish(box, **content):
    """What the browser sends."""
    box._handle_custom_msg(content, [])


def test_it_answers_in_a_thread_and_counts():
    box = ChatBox(Echo(0.02))
    assert box.state == {"busy": False, "note": "", "cost": "0 tokens used · room for 1,000"}
    grown = []
    box.observe(lambda change: grown.append((change["new"], threading.current_thread())), "answer")
    began = time.monotonic()
    wish(box, wish="say", text="  " + "word " * 20)
    assert time.monotonic() - began < 0.3 and box.state["busy"]
    settled(box)
    assert [m["role"] for m in box.messages] == ["user", "assistant"] and box.answer == ""
    assert box.messages[1]["content"].startswith("You said word word")
    texts = [text for text, thread in grown if text]
    assert len(texts) > 2 and all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    assert all(thread is not threading.main_thread() for _, thread in grown)
    assert re.fullmatch(r"42 tokens used · room for 958 · last answer 22 tokens, \d+ a second", box.state["cost"])


def test_the_stop_button_really_stops():
    echo = Echo(0.05)
    box = ChatBox(echo)
    wish(box, wish="say", text="word " * 200)
    wait_until(lambda: box.answer)
    wish(box, wish="stop")
    box.wait(5)
    settled(box)
    assert echo.working == 0 and 0 < len(box.messages[1]["content"].split()) < 100
    assert box.state["note"] == "Stopped."
    wish(box, wish="say", text="next")
    settled(box)
    assert box.messages[3]["content"] == "You said next. "


def test_temperature_and_system_prompt_come_from_the_browser():
    echo = Echo()
    box = ChatBox(echo, system="Sing.")
    assert box.temperature == 0.2 and box.usual_system == "Be brief."
    for value, used in ((0.9, 0.9), (99.0, 2.0), (-1.0, 0.0)):
        box.temperature = value
        box.say("x")
        settled(box)
        assert echo.temperatures[-1] == used
    box.system = "Whisper to me."
    assert box.state["cost"].startswith("15 tokens used")
    box.say("y")
    settled(box)
    assert [h[0]["content"] for h in echo.heard] == ["Sing.", "Sing.", "Sing.", "Whisper to me."]
    box.system = "  "
    box.say("z")
    assert settled(box) and echo.heard[-1][0] == user("x")


def test_what_is_not_answered_comes_back_with_the_reason(monkeypatch):
    box, sent = ChatBox(Echo()), []
    monkeypatch.setattr(box, "send", lambda content: sent.append(content))
    for text, note in (("too long", "It makes 9,000 tokens; 8,000 fit. Shorten it."),
                       ("broken", "RuntimeError: no memory"), ("silent", "The model ended its answer at once.")):
        box.say(text)
        settled(box)
        assert box.state["note"] == note and box.messages == [] and sent[-1] == {"give_back": text}
    box.assistant.pause = 0.2
    box.say("first")
    box.say("second, while the first is under way")
    assert sent[-1] == {"give_back": "second, while the first is under way"}
    settled(box)
    assert [m["content"] for m in box.messages] == ["first", "You said first. "]


def test_what_the_model_left_out_is_said_in_the_box(capsys):
    echo = Echo()
    box = ChatBox(echo)
    box.say("left out")
    settled(box)
    assert box.state["note"] == "Answered without the oldest 2 messages." and capsys.readouterr().out == ""
    assert echo.notify is print


def test_two_boxes_take_turns():
    echo = Echo(0.02)
    boxes = [ChatBox(echo) for _ in range(2)]
    for box in boxes:
        box.say("a few words")
    for box in boxes:
        settled(box)
        assert box.messages[1]["content"] == "You said a few words. "
    assert echo.most == 1


def test_a_new_conversation_stops_the_old_one():
    box = ChatBox(Echo(0.05), [user("a"), assistant("b")])
    wish(box, wish="say", text="word " * 200)
    wait_until(lambda: box.answer)
    wish(box, wish="new")
    wait_until(lambda: box.messages == [] and not box.state["busy"])
    assert "0 tokens used" in box.state["cost"]


@pytest.mark.parametrize("content", [None, 7, "say", {}, {"wish": "fly"}, {"wish": "say"},
                                     {"wish": "say", "text": "  "}])
def test_odd_wishes_do_nothing(content):
    box = ChatBox(Echo())
    box._handle_custom_msg(content, [])
    assert not box.busy and box.messages == []


def test_a_conversation_out_of_turn_is_refused():
    with pytest.raises(ValueError, match="roles user, user"):
        ChatBox(Echo(), [user("a"), user("b")])
    box = ChatBox(Echo(), [{"role": "system", "content": "x"}, user("a"), assistant("b")])
    assert len(box.messages) == 2


def test_the_picture_needs_no_kernel_and_warns_of_nothing(recwarn):
    messages = [user("What is <b>$x_1$</b>?\n\n鴨 🦆"), assistant("long " * 2_000)] * 2
    data, metadata = bundle(draw_conversation("Echo", messages), describe_conversation("Echo", messages))
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    assert data["text/plain"].startswith("Figure: A chat box with a conversation with Echo. You: What is <b>$x_1$</b>?")
    assert len(metadata["image/png"]["alt"]) <= 1_200 and len(data["image/png"]) < 400_000
    assert bundle(draw_conversation("Echo", []), describe_conversation("Echo", []))[0]["image/png"]


def test_the_browser_code_is_whole():
    """No text of the model or the reader ever becomes HTML, and every wish is one that Python knows."""
    code = ChatBox._esm if isinstance(ChatBox._esm, str) else str(ChatBox._esm)
    assert "innerHTML" not in code
    assert set(re.findall(r'wish: "(\w+)"', code)) == {"say", "stop", "new"}
    names = set(re.findall(r'model\.(?:get|set)\("(\w+)"', code))
    assert names <= set(ChatBox.class_trait_names(sync=True)), json.dumps(sorted(names))
