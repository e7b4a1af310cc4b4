"""Where the course can be opened: badges and launch cells for one repository, and what Colab needs.

The owner, the repository, the branch and a JupyterHub stand once, in ``pyproject.toml``; everything
that names them is written from there. Standard library only.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import quote, urlencode

from .export import chapter_notebooks
from .workspace import ROOT, write_text

REPOSITORY = re.compile(
    r"(?:(?:https?://|ssh://git@)?(?:www\.)?github\.com/|git@github\.com:)?"
    r"(?P<owner>[A-Za-z0-9](?:[A-Za-z0-9-]{0,38}))/(?P<name>[A-Za-z0-9._-]+?)(?:\.git)?/?")
BRANCH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]*")
HUB = re.compile(r"https?://[A-Za-z0-9.-]+(?::\d+)?(?:/[A-Za-z0-9._~/-]*)?")
BLOCK = re.compile(r"<!-- launch(?P<path>(?: [\w./-]+)?) -->\n.*?<!-- /launch -->", re.S)
LINK_GENERATOR = "https://nbgitpuller.readthedocs.io/en/latest/link.html"
FIRST = "ch01_data/data.ipynb"  # what a block without a path opens
BADGES = {"colab": "Open in Colab", "binder": "Open in Binder", "codespaces": "Open in Codespaces",
          "nbgitpuller": "Open with nbgitpuller"}
NOT_ON_COLAB = ("torch", "jupyterlab", "ipykernel", "nbclient")  # Colab's own, or of no use there
CELL_ID = "launch"
CELL = '''\
#@title On Colab, this cell fetches the course. Anywhere else it does nothing. {{ display-mode: "form" }}
import os
import sys
from importlib.util import find_spec

here = os.path.exists("previous_chapters.py")
if not here and ("google.colab" in sys.modules or (find_spec("google") and find_spec("google.colab"))):
    course = "https://github.com/{owner}/{name}"
    root, course = os.path.abspath(course.split("/")[-1]), os.environ.get("COURSE_REPOSITORY", course)
    if not os.path.exists(f"{{root}}/course.py"):
        get_ipython().system(f"git clone --progress --depth 1 --branch {branch} '{{course}}' '{{root}}'")
    if not os.path.exists(f"{{root}}/course.py"):
        raise ConnectionError(f"{{course}} could not be fetched (see above): check network and address, run again.")
    sys.path.insert(0, root)
    from utils.launch import prepare_colab
    prepare_colab("{folder}")'''


@dataclass(frozen=True)
class Place:
    """Where this copy of the course is published: owner and name on GitHub, a branch, a JupyterHub or ""."""

    owner: str
    name: str
    branch: str = "main"
    hub: str = ""

    def __str__(self) -> str:
        return f"{self.owner}/{self.name} (branch {self.branch}{', hub ' + self.hub if self.hub else ''})"


# ---------------------------------------------------------------- the setting


def parse_repository(text: str) -> tuple[str, str]:
    """Owner and name from ``OWNER/REPO``, or from an address on github.com as a browser or git writes it.

    Raises ``ValueError`` for anything else.
    """
    found = REPOSITORY.fullmatch(text.strip())
    if not found or found["name"] in (".", ".."):
        raise ValueError(f"{text!r} is not a GitHub repository: write OWNER/REPO, for example ada/bytes-to-chat, "
                         "or its address on github.com.")
    return found["owner"], found["name"]


def read_place(root: Path = ROOT) -> Place:
    """The setting in ``pyproject.toml``. Raises ``ValueError`` where it is missing or not usable."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    try:
        repository = project["project"]["urls"]["Repository"]
        setting = project["tool"]["bytes-to-chat"]
    except KeyError as error:
        raise ValueError(f"pyproject.toml says nothing about {error}: it needs Repository in [project.urls] and a "
                         "table [tool.bytes-to-chat] with branch and hub.") from None
    return _place(Place(*parse_repository(repository)), None, setting.get("branch", "main"), setting.get("hub", ""))


def _place(old: Place, repository: str | None, branch: str | None, hub: str | None) -> Place:
    """``old`` with what was given instead, checked."""
    owner, name = parse_repository(repository) if repository is not None else (old.owner, old.name)
    branch = old.branch if branch is None else branch.strip()
    hub = old.hub if hub is None else hub.strip().rstrip("/")
    if not BRANCH.fullmatch(branch) or ".." in branch or branch.endswith(("/", ".lock")):
        raise ValueError(f"{branch!r} is not the name of a branch: letters, digits, . _ / and - are possible.")
    if hub and not HUB.fullmatch(hub):
        raise ValueError(f"{hub!r} is not the address of a JupyterHub: write it like https://hub.example.org")
    return Place(owner, name, branch, hub)


def _setting_text(text: str, place: Place) -> str:
    """``pyproject.toml`` with this setting."""
    for key, value in (("Repository", f"https://github.com/{place.owner}/{place.name}"),
                       ("branch", place.branch), ("hub", place.hub)):
        text = re.sub(rf'^{key} = "[^"\n]*"', f'{key} = "{value}"', text, count=1, flags=re.M)
    return text


# ---------------------------------------------------------------- links


def launch_links(place: Place, path: str) -> dict[str, str]:
    """Addresses that open ``path`` (relative to the repository) in each of the places of ``BADGES``."""
    repository, branch = f"{place.owner}/{place.name}", quote(place.branch)
    pull = urlencode({"repo": f"https://github.com/{repository}", "branch": place.branch,
                      "urlpath": f"lab/tree/{place.name}/{path}"})
    puller = f"{place.hub}/hub/user-redirect/git-pull" if place.hub else LINK_GENERATOR
    return {
        "colab": f"https://colab.research.google.com/github/{repository}/blob/{branch}/{quote(path)}",
        "binder": f"https://mybinder.org/v2/gh/{repository}/{quote(place.branch, safe='')}"
                  f"?urlpath={quote(f'lab/tree/{path}', safe='')}",
        "codespaces": f"https://codespaces.new/{repository}/tree/{branch}?quickstart=1",
        "nbgitpuller": f"{puller}?{pull}",
    }


def badges(place: Place, path: str, pictures: str) -> str:
    """One badge a line, in Markdown; ``pictures`` is the way to ``docs/badges`` from where they are shown."""
    return "\n".join(f"[![{BADGES[name]}]({pictures}/{name}.svg)]({link})"
                     for name, link in launch_links(place, path).items())


def _with_badges(text: str, place: Place, pictures: str, default: str) -> str:
    """``text`` with the badges between each pair of launch markers written anew."""
    def block(found: re.Match) -> str:
        path = found["path"].strip() or default
        return f"<!-- launch{found['path']} -->\n{badges(place, path, pictures)}\n<!-- /launch -->"

    return BLOCK.sub(block, text)


# ---------------------------------------------------------------- files


def write_links(repository: str | None = None, branch: str | None = None, *, hub: str | None = None,
                check: bool = False, root: Path = ROOT) -> list[str]:
    """Write the badges, the launch cells and the setting for ``repository``; the files that changed.

    What is None stays as ``pyproject.toml`` has it; ``hub=""`` takes a JupyterHub out again. With
    ``check`` nothing is written, and each line says what differs. Raises ``ValueError`` for a
    repository, branch or hub that cannot be one, and for a notebook without a title.
    """
    root = Path(root)
    old = read_place(root)
    new = _place(old, repository, branch, hub)
    found = []
    for path in _linked_files(root):
        before = path.read_text(encoding="utf-8")
        after = _linked_text(path.relative_to(root).as_posix(), before, old, new)
        if after != before:
            name = path.relative_to(root).as_posix()
            found.append(f"{name} differs from what it is for {new}" if check else name)
            if not check:
                write_text(path, after)
    if check and found:
        found.append(f"To write them: python3 course.py links {new.owner}/{new.name}")
    return found


def _linked_files(root: Path) -> list[Path]:
    """What may name the repository; the setting itself last, so that an interrupted run can be repeated."""
    texts = [root / "README.md", *sorted(root.glob("docs/**/*.md")), root / "CITATION.cff", root / "pyproject.toml"]
    return [*chapter_notebooks(root), *(path for path in texts if path.exists())]


def _linked_text(name: str, text: str, old: Place, new: Place) -> str:
    if name.endswith(".ipynb"):
        return _linked_notebook(name, text, new)
    if name == "pyproject.toml":
        return _setting_text(text, new)
    pictures = Path(os.path.relpath("docs/badges", Path(name).parent)).as_posix()
    return _with_badges(_moved(text, old, new), new, pictures, FIRST)


def _moved(text: str, old: Place, new: Place) -> str:
    """Addresses of the old repository, plain or quoted inside another, now of the new one."""
    return re.sub(rf"(github\.com(?:[/:]|%2F)|/gh/|/github/|codespaces\.new/){re.escape(old.owner)}(/|%2F)"
                  rf"{re.escape(old.name)}(?!(?!\.git\b)[\w.-]*[\w-])",
                  lambda found: f"{found[1]}{new.owner}{found[2]}{new.name}", text)


def _linked_notebook(name: str, text: str, place: Place) -> str:
    """A notebook's text with its badges and its launch cell; nothing else in it changes."""
    try:
        notebook = json.loads(text)
        cells = notebook["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} is not a readable notebook: {error}") from error
    title = next((cell for cell in cells if cell["cell_type"] == "markdown"), None)
    source = "".join(title["source"]) if title else ""
    if not source.startswith("# "):
        raise ValueError(f"{name} has no title to put the badges under: its first text cell must begin with '# '.")
    if not BLOCK.search(source):
        head, _, rest = source.partition("\n")
        source = f"{head}\n\n<!-- launch -->\n<!-- /launch -->\n\n{rest.lstrip()}".rstrip()
    title["source"] = _with_badges(source, place, "../docs/badges", name).splitlines(keepends=True)
    _put_launch_cell(cells, name, place, after=cells.index(title))
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False, separators=(",", ": ")) + "\n"


def _put_launch_cell(cells: list[dict], name: str, place: Place, after: int) -> None:
    """Make the launch cell the first code cell; count executions anew if it was not there."""
    first = next((cell for cell in cells if cell["cell_type"] == "code"), {})
    if first.get("id") == CELL_ID:
        cell = first
    else:
        cell = {"cell_type": "code", "execution_count": None, "id": CELL_ID, "metadata": {}, "outputs": []}
        cells[:] = [other for other in cells if other.get("id") != CELL_ID]
        cells.insert(after + 1, cell)
        _count_executions(cells, cell)
    cell["source"] = launch_source(place, name).splitlines(keepends=True)
    cell["metadata"] = {"jupyter": {"source_hidden": True}, "tags": ["launch", "remove-cell"]}
    if Path(name).stem == "assignment":
        cell["metadata"]["nbgrader"] = {"grade": False, "grade_id": CELL_ID, "locked": True, "schema_version": 3,
                                        "solution": False, "task": False}


def _count_executions(cells: list[dict], new: dict) -> None:
    """1, 2, 3 ... over the code cells of an executed notebook; one that was not run stays as it is."""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    if any(cell["execution_count"] is None for cell in code if cell is not new):
        return
    for number, cell in enumerate(code, 1):
        cell["execution_count"] = number
        for output in cell["outputs"]:
            if "execution_count" in output:
                output["execution_count"] = number


def launch_source(place: Place, path: str) -> str:
    """The launch cell of the notebook at ``path``: only the name of its folder tells it from the others."""
    return CELL.format(**dataclasses.asdict(place), folder=Path(path).parent.as_posix())


# ---------------------------------------------------------------- on Colab


def prepare_colab(folder: str, root: Path = ROOT) -> None:
    """Go into a chapter's folder, install what its notebooks need and Colab lacks, let Colab show widgets.

    One line says what was done. Never installs torch; what is there in a version outside the
    course's range is named and left alone. Raises ``RuntimeError`` if pip fails.
    """
    os.chdir(root / folder)
    sys.path.insert(0, str(root / folder))
    missing, outside = missing_packages(root)
    if missing:
        _install(missing)
    done = "installed " + ", ".join(re.split(r"\W", name, maxsplit=1)[0] for name in missing) if missing else \
        "nothing had to be installed"
    print(f"The course is in {root}; {done}; {_show_widgets()}.")
    if outside:
        print("Left as they are, though outside the range the course was tested with: " + "; ".join(outside) + ".")


def missing_packages(root: Path = ROOT) -> tuple[list[str], list[str]]:
    """Requirements in ``pyproject.toml`` that are not installed, and words on those outside their range."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    missing, outside = [], []
    for requirement in project["dependencies"]:
        name, bounds = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
        try:
            there = version(name)
        except PackageNotFoundError:
            if name == "torch":
                outside.append("torch is not here at all (choose another runtime in the menu)")
            elif name not in NOT_ON_COLAB:
                missing.append(requirement)
            continue
        if not in_range(there, bounds) and name not in NOT_ON_COLAB[1:]:
            outside.append(f"{name} {there} ({bounds})")
    return missing, outside


def in_range(there: str, bounds: str) -> bool:
    """Whether a version lies within bounds such as ``>=2.10,<3``. Raises ``ValueError`` for other signs."""
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, re.match(r"\d+(?:\.\d+)*", text)[0].split(".")))

    for bound in filter(None, bounds.replace(" ", "").split(",")):
        found = re.fullmatch(r"(>=|<)(\d+(?:\.\d+)*)", bound)
        if not found:
            raise ValueError(f"{bound!r} cannot be read here: a range is written with >= and <.")
        reached = _padded(numbers(there)) >= _padded(numbers(found[2]))
        if reached != (found[1] == ">="):
            return False
    return True


def _padded(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return numbers + (0,) * (6 - len(numbers))


def _install(requirements: list[str]) -> None:
    """pip install, with the seconds that have gone by once it takes more than three."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    names, shown, began = ", ".join(requirements), "", time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.1)
            seconds = f"Installing {names}: {time.monotonic() - began:.0f} s"
            if time.monotonic() - began > 3 and seconds != shown:
                shown = seconds
                print("\r" + shown, end="", flush=True)
        print("\r" + " " * len(shown) + "\r" if shown else "", end="")
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"pip could not install {names}. Is there a network? Run this cell again. pip said:\n"
                               + said.read().decode("utf-8", "replace").strip()[-2000:])
    importlib.invalidate_caches()


def _show_widgets() -> str:
    """Colab shows widgets that are not its own only after it is asked to; in words what came of it."""
    try:
        from google.colab import output

        output.enable_custom_widget_manager()
    except (ImportError, AttributeError):
        return "widgets stay still pictures"
    return "widgets can be moved"
