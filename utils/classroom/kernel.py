"""A fresh Jupyter kernel in the sandbox, and the runner outside that sends it one cell at a time.

The runner talks to the kernel over sockets in a folder of its own, so the code of a hidden test is sent when it is
its turn and never lies on a disk. Of what comes back it reads replies only, and none longer than ``REPLY_BYTES``.
Resident memory, processes and foreign files beside the sockets are looked at five times a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import zmq
from jupyter_client.session import Session

from ..workspace import ROOT, workspace
from .sandbox import (
    FIRST_UID,
    HOW_TO_INSTALL,
    Limits,
    as_user,
    environment_inside,
    launcher,
    sandbox_command,
    working_mode,
)

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
REPLY_BYTES = 4_000_000  # a longer reply is dropped: an error message of gigabytes fills no memory here
START_SECONDS = 90  # until a new kernel answers, with a slow disk
PATIENCE = 4  # a cell that waits instead of computing may take this many times its limit, by the clock


@dataclass(frozen=True)
class Reply:
    """How a cell ended: ``status`` is "ok", "error", "timeout" (it was interrupted) or "dead" (no kernel left).

    ``name`` and ``message`` are the error's, ``values`` what the expressions asked for came to (as repr),
    ``seconds`` the time that it computed.
    """

    status: str
    name: str = ""
    message: str = ""
    values: dict[str, str] | None = None
    seconds: float = 0.0


class SandboxedKernel:
    """One kernel. ``start``, then ``run`` cells, then ``stop``, which ends every process that is left in it.

    ``chapter`` is a chapter's folder name, ``slot`` (0, 1, ...) tells kernels apart that run at the same time.
    ``killed`` says why the watcher ended the kernel, if it did.
    """

    def __init__(self, chapter: str | None, limits: Limits, *, slot: int = 0, unsafe: bool = False) -> None:
        self.chapter, self.limits, self.unsafe = chapter, limits, unsafe
        self.uid = FIRST_UID + os.getpid() % 10_000 * 100 + slot
        self.killed = ""
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the kernel and wait until it answers. ``RuntimeError`` if it does not."""
        self.folder = Path(tempfile.mkdtemp(prefix="course-", dir="/tmp" if os.path.isdir("/tmp") else None))
        self.session = Session(key=secrets.token_hex(16).encode(), signature_scheme="hmac-sha256")
        inside = str(self.folder) if self.unsafe else "/sockets"
        self.sockets = self.folder / "sockets" if not self.unsafe else self.folder
        self.sockets.mkdir(exist_ok=True)
        self._connection_file(inside)
        nothing = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self.process = subprocess.Popen(**self._command(inside), **nothing)
        self._connect()
        threading.Thread(target=self._watch, daemon=True).start()
        if self._ask(self.shell, "kernel_info_request", {}, START_SECONDS) is None:
            reason = self.killed or "It may need more memory or processes than the limits allow."
            self.stop()
            raise RuntimeError(f"A kernel in the sandbox did not answer within {START_SECONDS} s. {reason}")

    def _connection_file(self, inside: str) -> None:
        ports = {f"{name}_port": number for number, name in enumerate(CHANNELS, 1)}
        if os.name == "nt":
            ports = {name: _free_port() for name in ports}
        self.ports = ports
        connection = {**ports, "ip": "127.0.0.1" if os.name == "nt" else f"{inside}/s", "kernel_name": "python3",
                      "transport": "tcp" if os.name == "nt" else "ipc", "key": self.session.key.decode(),
                      "signature_scheme": "hmac-sha256"}
        path = self.sockets / "connection.json"
        path.write_text(json.dumps(connection), encoding="utf-8")
        if os.name == "posix" and os.geteuid() == 0 and not self.unsafe:
            for owned in (self.sockets, path):
                os.chown(owned, self.uid, self.uid)
            self.folder.chmod(0o711)

    def _command(self, inside: str) -> dict:
        arguments = ["-m", "ipykernel_launcher", "-f", f"{inside}/connection.json",
                     "--HistoryManager.enabled=False"]
        if self.unsafe:
            program = launcher("unsafe", None, self.limits, arguments)
            work = self.folder / "work"
            work.mkdir()
            places = str(workspace()), str(work)
            environment = environment_inside(self.limits, str(ROOT), self.chapter, *places)
            if os.name == "nt":
                program = [sys.executable, *arguments]
                environment |= {name: os.environ[name] for name in ("SYSTEMROOT", "PATH") if name in os.environ}
            return {"args": program, "cwd": work, "env": environment, "start_new_session": True}
        mode, reason = working_mode()
        if not mode:
            raise RuntimeError(HOW_TO_INSTALL.format(reason=reason))
        command = sandbox_command(mode, self.limits, self.chapter, self.sockets)
        command += launcher(mode, self.uid, self.limits, arguments)
        return {"args": command, "env": {"PATH": os.environ.get("PATH", os.defpath)}, "cwd": "/",
                **as_user(mode, self.uid)}

    def _connect(self) -> None:
        self.context = zmq.Context()
        self.shell, self.control = self._dealer("shell"), self._dealer("control")

    def _dealer(self, channel: str) -> zmq.Socket:
        dealer = self.context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.MAXMSGSIZE, REPLY_BYTES)
        dealer.setsockopt(zmq.RCVHWM, 10)
        port = self.ports[f"{channel}_port"]
        dealer.connect(f"tcp://127.0.0.1:{port}" if os.name == "nt" else f"ipc://{self.sockets}/s-{port}")
        return dealer

    def run(self, code: str, seconds: float, expressions: dict[str, str] | None = None) -> Reply:
        """Run a cell for ``seconds`` at most; then interrupt it, and kill the kernel if that does not help.

        Seconds are processor time (of one thread), so that a busy machine takes nobody's points; by the clock it
        may be ``PATIENCE`` times as long. Nothing that the cell prints is fetched from the kernel.
        """
        began = self.busy()
        content = {"code": code, "silent": False, "store_history": False, "user_expressions": expressions or {},
                   "allow_stdin": False, "stop_on_error": False}
        number = self._send(self.shell, "execute_request", content)
        reply, late = self._wait(self.shell, number, seconds), False
        if reply is None and self.alive():
            late = True
            self._send(self.control, "interrupt_request", {})
            reply = self._wait(self.shell, number, 2)
            if reply is None:
                self._kill("a cell ran past its time limit and could not be interrupted")
        used = max(0.0, self.busy() - began)
        if reply is None or late:
            return Reply("timeout" if late else "dead", message=self.killed, seconds=used)
        return replace(_as_reply(reply), seconds=used)

    def busy(self) -> float:
        """Seconds that the kernel's processes have computed so far, on average of the threads it may have."""
        total = 0.0
        for pid in _processes(self.process.pid) if self.alive() else []:
            with contextlib.suppress(psutil.Error):
                total += sum(psutil.Process(pid).cpu_times()[:4])
        return total / self.limits.threads

    def _ask(self, channel: zmq.Socket, kind: str, content: dict, seconds: float) -> dict | None:
        return self._wait(channel, self._send(channel, kind, content), seconds)

    def _send(self, channel: zmq.Socket, kind: str, content: dict) -> str:
        message = self.session.msg(kind, content)
        with contextlib.suppress(zmq.ZMQError):
            self.session.send(channel, message, track=False)
        return message["header"]["msg_id"]

    def _wait(self, channel: zmq.Socket, number: str, seconds: float) -> dict | None:
        """The reply to one request; None when there is none in time or the kernel has ended."""
        end, most = time.monotonic() + PATIENCE * seconds + 5, self.busy() + seconds
        while time.monotonic() < end and self.busy() < most:
            if not channel.poll(200):
                if not self.alive():
                    return None
                continue
            try:
                message = self.session.deserialize(self.session.feed_identities(channel.recv_multipart())[1])
                if message["parent_header"].get("msg_id") == number:
                    return message["content"]
            except Exception:  # noqa: BLE001, S112  whatever a hostile kernel sends, it is no reply
                continue
        return None

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def _kill(self, why: str) -> None:
        """End every process of the kernel. In the sandbox its first one takes all others with it."""
        self.killed = self.killed or why
        if self.process is None:
            return
        tree = _processes(self.process.pid) if self.unsafe else []
        with contextlib.suppress(OSError):
            if self.unsafe and os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        for pid in tree[1:]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)

    def stop(self) -> None:
        """End the kernel and whatever it started, and remove its sockets."""
        self._kill(self.killed or "stopped")
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        self.context.destroy(linger=0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _watch(self) -> None:
        """End the kernel when its processes hold too much memory, are too many, or write beside the sockets."""
        allowed = {"connection.json", "work", *(f"s-{port}" for port in self.ports.values())}
        while self.alive() and not self.killed and self.sockets.is_dir():
            pids = _processes(self.process.pid)
            if _resident(pids) > self.limits.memory_gb * 2**30:
                self._kill(f"it needed more than {self.limits.memory_gb:g} GB of memory")
            elif len(pids) > self.limits.processes:
                self._kill(f"it started more than {self.limits.processes} processes")
            elif not set(os.listdir(self.sockets)) <= allowed:
                self._kill("it wrote into the folder of the kernel's sockets")
            time.sleep(0.2)


def _as_reply(content: dict) -> Reply:
    """A kernel's reply, taken apart with care: whatever a hostile kernel puts there, these are strings."""
    values = {}
    expressions = content.get("user_expressions")
    for name, found in (expressions.items() if isinstance(expressions, dict) else []):
        data = found.get("data") if isinstance(found, dict) else None
        values[str(name)] = str(data.get("text/plain", "")) if isinstance(data, dict) else ""
    status = "ok" if content.get("status") == "ok" else "error"
    return Reply(status, str(content.get("ename", ""))[:200], str(content.get("evalue", ""))[:100_000], values)


def _processes(pid: int) -> list[int]:
    """A process and all below it."""
    found, waiting = [], [pid]
    while waiting and len(found) < 5000:
        pid = waiting.pop()
        found.append(pid)
        waiting += _children(pid)
    return found


def _children(pid: int) -> list[int]:
    children = []
    try:
        for task in os.scandir(f"/proc/{pid}/task"):
            with open(f"{task.path}/children", encoding="ascii") as file:
                children += [int(child) for child in file.read().split()]
        return children
    except (FileNotFoundError, ProcessLookupError):
        if os.path.exists("/proc/self/task"):
            return children
    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(pid).children()]
    return []


def _resident(pids: list[int]) -> int:
    """Bytes of memory that processes hold together (pages that several of them share count for each)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss
    return total


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
