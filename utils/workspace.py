"""Where a reader's files lie, and how they are written: whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def workspace(*parts: str) -> Path:
    """The folder ``workspace/part/part/...``, made if it is missing.

    ``COURSE_WORKSPACE`` moves the whole of it to another place, another disk for instance. A relative path counts
    from the course's folder, whatever the current one is.
    """
    base = Path(os.environ.get("COURSE_WORKSPACE") or "workspace").expanduser()
    folder = (ROOT / base).resolve().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain_disk_error(error, folder) from error
    return folder


def short_path(path: Path) -> str:
    """``path`` as a reader types it: relative to the course, or to ``COURSE_WORKSPACE``."""
    path = Path(path).resolve()
    for base, name in ((workspace(), "workspace"), (ROOT, "")):
        if path.is_relative_to(base):
            return (Path(name) / path.relative_to(base)).as_posix()
    return str(path)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; move it into place when the block ends well.

    A reader, another process or a power cut sees the old file or the new one, never half of it.
    ``OSError`` says what to do when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except Exception as error:
        raise explain_disk_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 with ``\\n`` line ends, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def explain_disk_error(error: Exception, path: Path) -> Exception:
    """``error`` itself, or, where a full or write-protected disk caused it, one that says the way out."""
    number = getattr(error, "errno", None)
    if getattr(error, "winerror", None) in (5, 32, 1224) and Path(path).is_file():  # denied, shared, mapped
        return OSError(number, f"Could not replace {path}: a notebook or another program has it open. Restart that "
                               "kernel, or close the program, and run the same command again.")
    if number == errno.ENOSPC or "No space left on device" in str(error):
        problem = "the disk is full"
    elif number in (errno.EACCES, errno.EROFS, errno.EPERM):
        problem = "this place cannot be written to"
    else:
        return error
    where = next(p for p in [Path(path), *Path(path).parents] if p.exists())
    free = shutil.disk_usage(where).free / 1e6
    return OSError(
        number or errno.ENOSPC,
        f"Could not write {path}: {problem} ({free:,.0f} MB free there). Free some space, or set "
        "COURSE_WORKSPACE to a folder on another disk, and run the same command again. "
        "What was there before is unchanged.",
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
