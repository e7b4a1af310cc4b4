"""The sandbox that students' code runs in: what is inside, and the limits that hold there.

Inside there is the system and the Python environment, read only; the course's modules and the downloaded texts,
read only; and file systems in memory that can be written to, of limited size. There is no network, no process of
the host, no assignment, no test, no notebook, no file of another student, no environment variable of the caller.

What it needs: Linux with ``bwrap`` (package bubblewrap, 0.8 or newer) and user namespaces; where they are
missing, ``sandbox_problem`` says what to do. The system's own limits (RLIMIT_DATA, RLIMIT_NPROC, RLIMIT_FSIZE)
hold beside those that ``kernel`` watches. Memory that no process has mapped (memfd) is bounded only by the size
and number of open files.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from ..workspace import ROOT, workspace

NO_NAMESPACES = ("--unshare-user", "--disable-userns")
FIRST_UID = 1_900_000_000  # of the users without rights that kernels run as when the grader is root

# Runs first inside the sandbox: gives away what rights are left, sets limits, becomes the kernel.
LAUNCHER = """
import json, os, resource, sys
wanted = json.loads(sys.argv[1])
if wanted["uid"] is not None and os.getuid() == 0:
    os.setgroups([]); os.setgid(wanted["uid"]); os.setuid(wanted["uid"])
for name, value in wanted["limits"].items():
    hard = resource.getrlimit(getattr(resource, name))[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(getattr(resource, name), (value, value))
    except (OSError, ValueError):
        pass  # systems that know a limit but do not let it be set
os.execvp(wanted["program"][0], wanted["program"])
"""

HOW_TO_INSTALL = """Grading runs the students' code, so it runs in a sandbox, and there is none here: {reason}
  Debian, Ubuntu:  sudo apt install bubblewrap      Fedora:  sudo dnf install bubblewrap
  Ubuntu 23.10 and newer also keep programs from making user namespaces. On 24.04 load the profile that allows
  it for bwrap: sudo apt install apparmor-profiles, copy /usr/share/apparmor/extra-profiles/bwrap-userns-restrict
  to /etc/apparmor.d/, then sudo apparmor_parser -r /etc/apparmor.d/bwrap-userns-restrict. (From 25.04 on it is
  loaded already.)
  In a container: user namespaces must be allowed, with Docker for example by --security-opt seccomp=unconfined
  --security-opt apparmor=unconfined --security-opt systempaths=unconfined.
  macOS, Windows: use a Linux machine, a virtual machine or WSL 2.
With --without-sandbox the students' code can read and change whatever you can: only for code that you trust."""


@dataclass(frozen=True)
class Limits:
    """What one kernel may use. ``memory_gb`` counts resident memory of all its processes together."""

    memory_gb: float = 2.5
    processes: int = 200  # threads count
    disk_mb: int = 300
    threads: int = 1

    def resources(self) -> dict[str, int]:
        """For setrlimit. Reserved memory may be half a gigabyte above what may be resident."""
        return {
            "RLIMIT_DATA": int((self.memory_gb + 0.5) * 2**30), "RLIMIT_NPROC": self.processes,
            "RLIMIT_FSIZE": self.disk_mb * 2**20, "RLIMIT_NOFILE": 512, "RLIMIT_CORE": 0, "RLIMIT_CPU": 3600,
        }


def sandbox_problem() -> str | None:
    """None where the sandbox works, else what is missing and how to get it."""
    if not sys.platform.startswith("linux"):
        return HOW_TO_INSTALL.format(reason=f"bubblewrap is for Linux, this is {sys.platform}.")
    if not shutil.which("bwrap"):
        return HOW_TO_INSTALL.format(reason="the program bwrap is not installed.")
    mode, reason = working_mode()
    return None if mode else HOW_TO_INSTALL.format(reason=f"bwrap does not work.\n  {reason}")


@functools.cache
def working_mode() -> tuple[str, str]:
    """The first way to start bwrap that works on this machine, or ("", what the last one said).

    "user": in a user namespace without rights; a grader that is root starts it as a user without rights.
    "plain": the same where namespaces inside it cannot be forbidden.
    "root": root makes the sandbox and gives its rights away inside it, for a Python that only root can read.
    "bare": the same where namespaces inside it cannot be forbidden.
    """
    reason = ""
    for mode in ["user", "plain", "root", "bare"][:4 if os.geteuid() == 0 else 2]:
        command = sandbox_command(mode, Limits(), None, None)
        command += launcher(mode, FIRST_UID, Limits(), ["-c", "import ipykernel"])
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={}, check=False,
                                  **as_user(mode, FIRST_UID))
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
            continue
        if done.returncode == 0:
            return mode, ""
        reason = (done.stderr.strip().splitlines() or [f"It ended with code {done.returncode}."])[-1]
    return "", reason


def as_user(mode: str, uid: int) -> dict:
    drop = mode in ("user", "plain") and os.geteuid() == 0
    return {"user": uid, "group": uid, "extra_groups": []} if drop else {}


def sandbox_command(mode: str, limits: Limits, chapter: str | None, sockets: Path | None) -> list[str]:
    """The command that makes the sandbox, up to the program to run in it."""
    size = str(limits.disk_mb * 2**20)
    command = ["bwrap", "--die-with-parent", "--new-session", "--clearenv", "--unshare-ipc", "--unshare-pid",
               "--unshare-net", "--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox"]
    command += {
        "user": [*NO_NAMESPACES, "--uid", "1000", "--gid", "1000"],
        "plain": ["--unshare-user", "--uid", "1000", "--gid", "1000"],
    }.get(mode, ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"])
    command += ["--proc", "/proc", "--dev", "/dev", *_memory_disk("/dev/shm", size), *_memory_disk("/tmp", size)]
    command += _system() + _course(chapter, size)
    if sockets:
        command += ["--bind", str(sockets), "/sockets"]
    for name, value in environment_inside(limits, "/course", chapter, "/workspace", "/tmp").items():
        command += ["--setenv", name, value]
    return command + ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", f"/course/{chapter or ''}"]


def launcher(mode: str, uid: int | None, limits: Limits, arguments: list[str]) -> list[str]:
    """The command that gives away rights, sets limits and becomes Python with ``arguments``."""
    again = ["bwrap", "--die-with-parent", *NO_NAMESPACES, "--dev-bind", "/", "/"] if mode == "root" else []
    resources = limits.resources()
    if mode == "unsafe":
        resources.pop("RLIMIT_NPROC")  # it would count everything that the user runs
    wanted = {"program": [*again, sys.executable, *arguments], "limits": resources, "uid": uid}
    return [sys.executable, "-c", LAUNCHER, json.dumps(wanted)]


def _system() -> list[str]:
    """Programs, libraries and the Python environment, read only; nothing else of /etc, /home, /root, /var."""
    arguments = []
    for name in ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store"):
        path = Path(name)
        if path.is_symlink():
            arguments += ["--symlink", os.readlink(path), name]
        elif path.is_dir():
            arguments += ["--ro-bind", name, name]
    for name in ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime", "fonts"):
        arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    paths = {sys.prefix, sys.base_prefix, sys.exec_prefix, *map(sysconfig.get_path, ("purelib", "platlib"))}
    for path in _outermost(paths):
        for parent in reversed(Path(path).parents[:-1]):  # bwrap would make them for its own user alone
            arguments += ["--perms", "0755", "--dir", str(parent)] if not str(parent).startswith("/usr") else []
        arguments += ["--ro-bind", path, path]
    return arguments


def _outermost(paths: set[str]) -> list[str]:
    """The folders among ``paths`` that lie neither in another one nor in /usr."""
    folders = [Path(path) for path in sorted(paths)]
    return [str(folder) for folder in folders
            if not folder.is_relative_to("/usr") and not any(other in folder.parents for other in folders)]


def _course(chapter: str | None, size: str) -> list[str]:
    """The modules of the course and the records they read: no notebook, no assignment, no test, no history.

    A chapter's folder is where its kernel starts. It can be written to, but what is written is gone at the end.
    """
    arguments = ["--dir", "/course"]
    for folder in [*sorted(ROOT.glob("ch[0-9][0-9]_*")), ROOT / "utils"]:
        place = f"/course/{folder.name}"
        arguments += _memory_disk(place, size) if folder.name == chapter else ["--dir", place]
        for path in sorted(folder.iterdir()):
            records = path.is_dir() and path.name[0] not in "._" and folder.name != "utils"
            if path.suffix == ".py" or records:
                arguments += ["--ro-bind", str(path), f"{place}/{path.name}"]
    arguments += [*_memory_disk("/workspace", size), "--perms", "0777", "--dir", "/workspace/data"]
    packages = workspace("data", "packages")
    return arguments + ["--ro-bind-try", str(packages), "/workspace/data/packages"]


def _memory_disk(place: str, size: str) -> list[str]:
    """A file system in memory that everybody inside may write to, up to ``size`` bytes."""
    return ["--size", size, "--perms", "1777", "--tmpfs", place]


def environment_inside(limits: Limits, course: str, chapter: str | None, files: str,
                       temporary: str) -> dict[str, str]:
    """All the environment variables that the kernel sees."""
    threads = {name: str(limits.threads) for name in
               ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")}
    paths = [f"{course}/{chapter}"] * bool(chapter) + [course]
    return {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"]),
        "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0",
        "PYTHONNOUSERSITE": "1", "COURSE_WORKSPACE": files, "HOME": temporary, "TMPDIR": temporary,
        "MPLCONFIGDIR": temporary, "MPLBACKEND": "module://matplotlib_inline.backend_inline", "USER": "student",
        "LANG": "C.UTF-8", "TZ": "UTC", "PIP_NO_INDEX": "1", "TOKENIZERS_PARALLELISM": "false", **threads,
    }
