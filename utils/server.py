"""An OpenAI-compatible endpoint on this machine for anything that can answer: behind ``course.py serve``.

Everything that is the model's business is the engine's, an object with

- ``name``, and ``open(messages, temperature=, top_p=, max_new_tokens=, seed=)``, which checks a conversation
  and gives an answer not yet begun (``OverflowError`` if it is too long, ``ValueError`` or ``TypeError``);
- ``add(answer)``, ``remove(answer)``, ``busy``, and ``step()``, which takes all answers a token further and
  lists (answer, new text); an answer has ``finish_reason``, ``prompt_tokens``, ``new_tokens``.

Here: one thread in which the engine works, and around it what any service needs. Limits on the size and the
number of requests, a key, errors that say what to do, and an end to the work for those who hang up.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import queue
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler, stream_request_body

HERE = "127.0.0.1"
NAMES_OF_HERE = ("127.0.0.1", "localhost", "::1", "[::1]")
LINGER = 5.0  # seconds in which a refused client may finish sending, so that it reads why
KNOWN = ("model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens",
         "max_completion_tokens", "stop", "seed")
NEUTRAL = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "top_logprobs": 0, "tools": [],
           "logit_bias": {}, "response_format": {"type": "text"}, "modalities": ["text"]}
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


class Refusal(Exception):
    """A request that is not served: HTTP status, what is wrong, and OpenAI's ``param`` and ``code``."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        self.status, self.error = status, {"message": message, "type": kind if status < 500 else "server_error",
                                           "param": param, "code": code}


# ---------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Asked:
    """A request for a chat completion, checked as far as no model is needed."""

    messages: list[dict]
    dials: dict
    stops: list[str] = field(default_factory=list)
    stream: bool = False
    usage_at_the_end: bool = False


def read_asked(body: bytes, model: str) -> Asked:
    """The body of a request -> ``Asked``; ``Refusal`` if it is no JSON, for another model, or out of bounds."""
    try:
        given = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"The body is no JSON: {error}. Send an object such as {{\"model\": \"{model}\", "
                      '"messages": [{"role": "user", "content": "Hello"}]}.') from None
    if not isinstance(given, dict):
        raise Refusal(400, f"The body is a {type(given).__name__}; it must be a JSON object with model and messages.")
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name in NEUTRAL and value != NEUTRAL[name]:
            raise Refusal(400, f"{name} is {_short(value)}; this server knows only {json.dumps(NEUTRAL[name])}. "
                          "Leave it out.", name, "unsupported_value")
        if name not in (*KNOWN, *NEUTRAL, *WITHOUT_EFFECT):
            raise Refusal(400, f"There is no parameter {_short(name)}; this server knows {', '.join(KNOWN)}.",
                          name[:80], "unknown_parameter")
    for name in ("model", "messages"):
        if name not in given:
            raise Refusal(400, f"{name} is missing; give it.", name, "missing_required_parameter")
    if given["model"] != model:
        raise Refusal(404, f"There is no model {_short(given['model'])} here; this server has {model}.", "model",
                      "model_not_found")
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise Refusal(400, f"stream_options is {_short(options)}; it must be an object.", "stream_options")
    return Asked(_messages(given["messages"]), _dials(given), _stops(given.get("stop", [])),
                 _truth("stream", given.get("stream", False)),
                 _truth("stream_options.include_usage", options.get("include_usage", False)))


def _no_number(name: str):
    raise ValueError(f"{name} is no number of JSON")


def _short(value, most: int = 60) -> str:
    said = repr(value)
    return said if len(said) <= most else said[: most - 3] + "..."


def _truth(name: str, value) -> bool:
    if not isinstance(value, bool):
        raise Refusal(400, f"{name} is {_short(value)}; it must be true or false.", name)
    return value


def _messages(given) -> list[dict]:
    """The messages; a content in OpenAI's other form, a list of texts, becomes one text."""
    if not isinstance(given, list):
        raise Refusal(400, f"messages is {_short(given)}; it must be a list of objects with role and content.",
                      "messages")
    messages = []
    for number, message in enumerate(given):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            content = _joined(content, number)
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise Refusal(400, f"Message {number} is {_short(message)}; it must be an object with the texts role and "
                          "content.", f"messages[{number}]")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise Refusal(400, f"Message {number} has half a character at place {error.start} ({content[error.start]!r}"
                          "). Send whole Unicode characters.", f"messages[{number}].content") from None
        messages.append({"role": message["role"], "content": content})
    return messages


def _joined(parts: list, number: int) -> str:
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise Refusal(400, f"Message {number} has a content that is not all text; this server reads only texts, "
                      '{"type": "text", "text": "..."}.', f"messages[{number}].content")
    return "".join(texts)


def _number(given: Mapping, name: str, low: float, high: float, whole: bool = False):
    value = given.get(name)
    kinds = (int,) if whole else (int, float)
    if value is None or (isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high):
        return value
    kind = "whole number" if whole else "number"
    raise Refusal(400, f"{name} is {_short(value)}; it must be a {kind} from {low:,} to {high:,}.", name)


def _dials(given: Mapping) -> dict:
    limits = [_number(given, name, 1, 10**9, whole=True) for name in ("max_completion_tokens", "max_tokens")]
    temperature = _number(given, "temperature", 0, 2)
    if temperature is not None and temperature < 1e-6:  # a float32 divided by less may be infinite
        temperature = 0
    return {"temperature": temperature, "top_p": _number(given, "top_p", 1e-9, 1),
            "seed": _number(given, "seed", -2**63, 2**63 - 1, whole=True),
            "max_new_tokens": next((n for n in limits if n is not None), None)}


def _stops(given) -> list[str]:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(x, str) and x for x in stops):
        raise Refusal(400, f"stop is {_short(given)}; it must be a text or a list of at most 4, none of them empty.",
                      "stop")
    return stops


class StopFinder:
    """Passes text on up to the first of some stop texts, which may come in pieces, and says if it was ``found``."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.found = stops, "", False

    def feed(self, text: str, last: bool = False) -> str:
        """New text -> what can be passed on: all but what may be the beginning of a stop, unless it is the last."""
        if self.found:
            return ""
        text = self.held + text
        places = [place for place in map(text.find, self.stops) if place >= 0]
        if places:
            self.found, self.held = True, ""
            return text[: min(places)]
        begun = [n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])]
        keep = 0 if last else max(begun, default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


# ---------------------------------------------------------------- the one who works


class Ticket:
    """One request under way. ``events`` brings texts, and at the end a finish reason's ``None`` or an error."""

    def __init__(self, answer, stops: Sequence[str]):
        self.answer, self.finder = answer, StopFinder(stops)
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.loop, self.events = asyncio.get_running_loop(), asyncio.Queue()

    def send(self, event: str | Exception | None) -> None:
        """Put an event where the server waits for it; from any thread."""
        with suppress(RuntimeError):  # the server may have closed meanwhile
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Worker(threading.Thread):
    """The one thread that touches the engine. Others leave a note, which is read before the next step."""

    def __init__(self, engine):
        super().__init__(name="engine", daemon=True)
        self.engine, self.notes, self.tickets = engine, queue.SimpleQueue(), {}

    def begin(self, ticket: Ticket) -> None:
        """Let an answer take part."""
        self.notes.put(("begin", ticket))

    def drop(self, ticket: Ticket) -> None:
        """End an answer that nobody waits for."""
        self.notes.put(("drop", ticket))

    def close(self) -> None:
        """End the thread after its present step."""
        self.notes.put(("close", None))
        self.join()

    def run(self) -> None:
        while self._read_notes():
            try:
                for answer, text in self.engine.step():
                    self._pass_on(self.tickets[answer], text)
            except Exception as error:  # the engine has forgotten all answers; the next ones may do better
                for ticket in self.tickets.values():
                    ticket.send(error)
                self.tickets.clear()

    def _read_notes(self) -> bool:
        """Do what the notes say, waiting for one if there is no work; False to close."""
        while True:
            try:
                what, ticket = self.notes.get(block=not self.engine.busy)
            except queue.Empty:
                return True
            if what == "close":
                return False
            if what == "begin":
                self.tickets[ticket.answer] = ticket
                self.engine.add(ticket.answer)
            elif self.tickets.pop(ticket.answer, None):
                self.engine.remove(ticket.answer)

    def _pass_on(self, ticket: Ticket, text: str) -> None:
        answer = ticket.answer
        text = ticket.finder.feed(text, last=answer.finish_reason is not None)
        if text:
            ticket.send(text)
        if ticket.finder.found or answer.finish_reason:
            if not answer.finish_reason:
                self.engine.remove(answer)
            ticket.finish_reason = "stop" if ticket.finder.found else answer.finish_reason
            ticket.completion_tokens = answer.new_tokens
            del self.tickets[answer]
            ticket.send(None)


# ---------------------------------------------------------------- the address


@dataclass
class House:
    """What all requests share."""

    engine: object
    worker: Worker
    key: str | None
    max_body: int
    max_clients: int
    opener: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))  # one text encoded at a time
    under_way: int = 0
    since: int = field(default_factory=lambda: int(time.time()))


@stream_request_body
class Door(RequestHandler):
    """What every address does: look who comes and how much they bring, before any of it is read."""

    method: str | None = "GET"
    open_to_all = False

    def initialize(self, house: House) -> None:
        self.house, self.body, self.refused = house, bytearray(), False

    async def prepare(self) -> None:
        try:
            self.check_head()
        except Refusal as refusal:
            await self.refuse(refusal)

    def check_head(self) -> None:
        """``Refusal`` for a name that is not this machine's, a wrong key, too long a body, or one that is no JSON."""
        head = self.request.headers
        if self.request.host_name not in NAMES_OF_HERE:  # a web page whose name was made to point here
            raise Refusal(403, f"This server answers as {HERE} or localhost, not as {_short(self.request.host_name)}.")
        if self.house.key and not self.open_to_all:
            scheme, _, given = head.get("Authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self.house.key.encode())
            if scheme.lower() != "bearer" or not right:
                raise Refusal(401, "The key is missing or wrong. Send the header Authorization: Bearer KEY, with the "
                              "key that the server was started with.", code="invalid_api_key")
        size = head.get("Content-Length", "0")
        self.check_size(int(size) if size.isdecimal() else 0)
        kind = head.get("Content-Type", "").partition(";")[0].strip().lower()
        if self.request.method == "POST" and kind != "application/json":  # so that no web page can post by a form
            raise Refusal(415, f"The Content-Type is {_short(kind)}; it must be application/json.")

    def check_size(self, size: int) -> None:
        """``Refusal`` for a body of more bytes than allowed."""
        if size > self.house.max_body:
            raise Refusal(413, f"The body has {size:,} bytes or more; at most {self.house.max_body:,} are read. Send a "
                          "shorter conversation.", code="request_too_large")

    async def data_received(self, chunk: bytes) -> None:
        if self.refused:
            return  # let it go by
        try:
            self.check_size(len(self.body) + len(chunk))
            self.body += chunk
        except Refusal as refusal:  # it came without its length
            self.body.clear()
            await self.refuse(refusal)

    async def get(self) -> None:
        await self._respond("GET")

    async def post(self) -> None:
        await self._respond("POST")

    async def _respond(self, method: str) -> None:
        if self.refused:
            return
        try:
            if self.method not in (method, None):
                raise Refusal(405, f"{self.request.path} takes {self.method}, not {method}.")
            await self.answer()
        except Refusal as refusal:
            await self.refuse(refusal)

    async def answer(self) -> None:
        """What this address does; ``Refusal`` if it cannot."""
        raise NotImplementedError

    async def refuse(self, refusal: Refusal) -> None:
        """Say why at once. What the client still sends is thrown away, for a while, and then the line is cut."""
        self.refused = True
        said = json.dumps({"error": refusal.error}).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(said))}
        headers |= {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "2"}}.get(refusal.status, {})
        self.set_status(refusal.status)
        for name, value in headers.items():
            self.set_header(name, value)
        self.write(said)
        try:
            await self.flush()
        except StreamClosedError:
            return
        if "Expect" in self.request.headers:  # it waits for leave to send, which it has not got
            self.finish()
        else:
            asyncio.get_running_loop().call_later(LINGER, self._finish_once)

    def _finish_once(self) -> None:
        if not self._finished:
            self.finish()

    def write_error(self, status_code: int, **details) -> None:
        """What Tornado itself refuses, and mistakes of this server, in the same form."""
        problem = details["exc_info"][1]
        said = problem.reason or self._reason if isinstance(problem, HTTPError) else "The server made a mistake."
        self.finish({"error": Refusal(status_code, f"{said}.").error})


class Nothing(Door):
    """Every other address."""

    method = None

    async def answer(self) -> None:
        raise Refusal(404, f"There is nothing at {_short(self.request.path)}. There are POST /v1/chat/completions, GET "
                      "/v1/models and GET /health.", code="not_found")


class Health(Door):
    """GET /health: is it there, and how much has it to do? Needs no key."""

    open_to_all = True

    async def answer(self) -> None:
        self.write({"status": "ok", "model": self.house.engine.name, "under_way": self.house.under_way})


class Models(Door):
    """GET /v1/models and /v1/models/NAME: the one model that is served."""

    async def answer(self) -> None:
        name = self.house.engine.name
        asked = self.request.path.removeprefix("/v1/models").strip("/")
        model = {"id": name, "object": "model", "created": self.house.since, "owned_by": "bytes-to-chat"}
        if asked not in ("", name):
            raise Refusal(404, f"There is no model {_short(asked)} here; this server has {name}.", "model",
                          "model_not_found")
        self.write(model if asked else {"object": "list", "data": [model]})


class ChatCompletions(Door):
    """POST /v1/chat/completions: an answer to a conversation, whole or as a stream of events."""

    method = "POST"
    ticket: Ticket | None = None

    async def answer(self) -> None:
        house = self.house
        if house.under_way >= house.max_clients:
            raise Refusal(429, f"{house.under_way} requests are under way, and no more are taken at a time. Try again "
                          "in a moment.", code="too_many_requests")
        house.under_way += 1
        try:
            await self._complete(read_asked(bytes(self.body), house.engine.name))
        except StreamClosedError:  # it has hung up
            pass
        finally:
            house.under_way -= 1
            if self.ticket:
                house.worker.drop(self.ticket)  # unless it has ended

    async def _complete(self, asked: Asked) -> None:
        open_answer = partial(self.house.engine.open, asked.messages, **asked.dials)
        try:
            answer = await asyncio.get_running_loop().run_in_executor(self.house.opener, open_answer)
        except OverflowError as error:
            raise Refusal(400, str(error), "messages", "context_length_exceeded") from None
        except (ValueError, TypeError) as error:
            raise Refusal(400, str(error), "messages") from None
        if self.request.connection.stream.closed():
            return
        self.ticket, self.form = Ticket(answer, asked.stops), _Form(self.house.engine.name)
        self.house.worker.begin(self.ticket)
        await (self._stream(asked.usage_at_the_end) if asked.stream else self._whole())

    def on_connection_close(self) -> None:
        super().on_connection_close()
        if self.ticket:
            self.ticket.events.put_nowait(StreamClosedError())

    async def _texts(self):
        """The answer's texts as they come; ``Refusal`` if the engine fails, ``StreamClosedError`` on hanging up."""
        while (event := await self.ticket.events.get()) is not None:
            if isinstance(event, StreamClosedError):
                raise event
            if isinstance(event, Exception):
                raise Refusal(500, f"The model failed: {type(event).__name__}: {event}") from event
            yield event

    async def _whole(self) -> None:
        content = "".join([text async for text in self._texts()])
        self.write(self.form.whole(content, self.ticket))

    async def _stream(self, usage_at_the_end: bool) -> None:
        self.set_header("Content-Type", "text/event-stream; charset=utf-8")
        self.set_header("Cache-Control", "no-cache")
        try:
            await self._event(self.form.chunk({"role": "assistant", "content": ""}))
            async for text in self._texts():
                await self._event(self.form.chunk({"content": text}))
            await self._event(self.form.chunk({}, self.ticket.finish_reason))
            if usage_at_the_end:
                await self._event(self.form.last(self.ticket))
        except Refusal as refusal:  # too late for a status
            await self._event({"error": refusal.error})
        await self._event("[DONE]")

    async def _event(self, data: dict | str) -> None:
        self.write(f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n")
        await self.flush()


class _Form:
    """Answers in the form of OpenAI's interface."""

    def __init__(self, model: str):
        self.about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, content: str, ticket: Ticket) -> dict:
        message = {"role": "assistant", "content": content, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": ticket.finish_reason}
        return {**self.about, "object": "chat.completion", "choices": [choice], "usage": _usage(ticket)}

    def chunk(self, delta: dict, finish_reason: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self.about, "object": "chat.completion.chunk", "choices": [choice]}

    def last(self, ticket: Ticket) -> dict:
        return {**self.about, "object": "chat.completion.chunk", "choices": [], "usage": _usage(ticket)}


def _usage(ticket: Ticket) -> dict:
    prompt, new = ticket.answer.prompt_tokens, ticket.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


# ---------------------------------------------------------------- from beginning to end


def reserve_port(port: int) -> list[socket.socket]:
    """Sockets that listen on this machine's own address; 0 takes any free port. ``OSError`` if it is taken."""
    if not 0 <= port <= 65535:
        raise ValueError(f"The port is {port}; it must be 1 to 65535, or 0 for any that is free.")
    try:
        return bind_sockets(port, HERE)
    except OSError as error:
        raise OSError(error.errno, f"Port {port} of {HERE} cannot be used ({error.strerror}). Choose another with "
                      "--port, or --port 0 for any that is free.") from None


class ChatServer:
    """The server of one engine on sockets of ``reserve_port``; ``run`` it, and ``stop`` it from any thread.

    With ``key``, only those who send it are answered. ``max_body`` bounds a request in bytes, ``max_clients`` the
    requests that are under way at once, waiting ones too. ``log`` is told of each request in a line.
    """

    def __init__(self, engine, sockets: Sequence[socket.socket], *, key: str | None = None, max_body: int = 2**20,
                 max_clients: int = 64, log: Callable[[str], None] = lambda line: None):
        if max_body < 1 or max_clients < 1:
            raise ValueError(f"max_body is {max_body} and max_clients {max_clients}; both must be at least 1.")
        self.house = House(engine, Worker(engine), key, max_body, max_clients)
        self.sockets, self.log, self.ready = sockets, log, threading.Event()
        self.address = f"http://{HERE}:{sockets[0].getsockname()[1]}/v1"
        self._loop = self._end = None

    def run(self) -> None:
        """Serve until ``stop``, or a signal to end."""
        asyncio.run(self._serve())

    def stop(self) -> None:
        """End ``run``; answers under way are cut off."""
        self._loop.call_soon_threadsafe(self._end.set)

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                try:
                    self._loop.add_signal_handler(number, self._end.set)
                except NotImplementedError:  # Windows: Ctrl-C becomes a KeyboardInterrupt
                    break
        shared = {"house": self.house}
        addresses = [("/v1/chat/completions", ChatCompletions, shared), ("/v1/models(?:/.*)?", Models, shared),
                     ("/health", Health, shared)]
        application = Application(addresses, default_handler_class=Nothing, default_handler_args=shared,
                                  log_function=self._note)
        server = HTTPServer(application, max_body_size=2**50, body_timeout=60, idle_connection_timeout=300)
        server.add_sockets(self.sockets)
        self.house.worker.start()
        self.ready.set()
        try:
            await self._end.wait()
        finally:
            server.stop()
            self.house.worker.close()
            self.house.opener.shutdown(wait=False)
            await server.close_all_connections()

    def _note(self, handler: RequestHandler) -> None:
        request = handler.request
        self.log(f"{handler.get_status()} {request.method} {request.path} {request.request_time():.2f} s")
