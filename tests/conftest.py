"""What the tests share: where the course lies, and a scratch copy of it to break."""

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SKIP = shutil.ignore_patterns(".git", ".venv", "workspace", "__pycache__", ".pytest_cache", ".hypothesis",
                              ".ipynb_checkpoints", ".ruff_cache")


def pytest_collection_modifyitems(items):
    """A kernel on a busy machine may take more than nbval's five seconds to say that a cell is done.

    And pictures are not compared: another processor may draw a line a hair's breadth beside.
    """
    from utils.plots import VECTOR

    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = 60
            item.parent.skip_compare = {*item.parent.skip_compare, VECTOR}


def starting_again(start, tries: int = 3):
    """``start``, tried again when the kernel dies at once: another worker's kernel may have taken one of its ports."""
    def start_patiently(*arguments, **named):
        for _ in range(tries - 1):
            try:
                return start(*arguments, **named)
            except RuntimeError as error:
                if "died" not in str(error):
                    raise
        return start(*arguments, **named)
    return start_patiently


def pytest_configure():
    import nbval.kernel

    nbval.kernel.start_new_kernel = starting_again(nbval.kernel.start_new_kernel)


@pytest.fixture
def scratch(tmp_path):
    """A copy of the course without its history and workspace."""
    return Path(shutil.copytree(ROOT, tmp_path / "course", ignore=SKIP))


@pytest.fixture
def clean_environment(tmp_path):
    """Environment variables of a fresh machine: an empty workspace, no pip settings, no active environment."""
    kept = {k: v for k, v in os.environ.items()
            if not k.startswith(("PIP_", "COURSE_", "VIRTUAL_ENV", "CONDA", "PYTHON"))}
    return {**kept, "COURSE_WORKSPACE": str(tmp_path / "workspace"), "PIP_CONFIG_FILE": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture(scope="session")
def base_python():
    """The Python that virtual environments are made from."""
    return getattr(sys, "_base_executable", sys.executable)
