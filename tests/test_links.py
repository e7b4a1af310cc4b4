"""Launch links: the badges, the cell that fetches the course on Colab, Binder, Codespaces and the workflows."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT, SKIP
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.specifiers import SpecifierSet

import course
from utils.export import chapter_notebooks
from utils.launch import (
    BADGES,
    NOT_ON_COLAB,
    Place,
    badges,
    in_range,
    launch_links,
    launch_source,
    missing_packages,
    parse_repository,
    read_place,
    write_links,
)

NOTEBOOKS = chapter_notebooks()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPTS = [ROOT / "binder" / "postBuild", ROOT / "binder" / "start", ROOT / ".devcontainer" / "install.sh"]

BINARY = {".png", ".safetensors", ".bin", ".gz"}
# projects that the course cites; whoever adds one has looked at the link
CITED = {"karpathy/llm.c", "containers/bubblewrap"}
OWNERS = re.compile(
    r"(?:(?:^|[^\w.-]|%2F)(?:www\.)?github\.com(?:[/:]|%2F)|raw\.githubusercontent\.com/|mybinder\.org/v2/gh/|/github/|"
    r"codespaces\.new/|github\.dev/)([A-Za-z0-9][A-Za-z0-9-]*)(?:/|%2F)([A-Za-z0-9._-]*[A-Za-z0-9_-])", re.I)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)


# ---------------------------------------------------------------- what is committed


def test_every_link_is_what_the_setting_says():
    assert write_links(check=True) == []


def test_links_need_nothing_installed(scratch, clean_environment, base_python):
    def links(*arguments):
        return subprocess.run([base_python, "-S", "course.py", "links", *arguments], cwd=scratch,
                              env=clean_environment, capture_output=True, text=True)

    right, other, wrong = links("--check"), links("ada/lovelace", "--check"), links("ada")
    assert right.returncode == 0, right.stderr
    assert other.returncode == 1 and "course.py links ada/lovelace" in other.stderr
    assert wrong.returncode == 1 and "OWNER/REPO" in wrong.stderr and "Traceback" not in wrong.stderr
    assert not (scratch / ".venv").exists()


@by_name
def test_a_notebook_has_its_own_badges_and_the_launch_cell(path):
    cells = nbformat.read(path, as_version=4).cells
    place = read_place()
    where, repository = name_of(path), f"{place.owner}/{place.name}"
    title = cells[0].source
    assert title.startswith("# ") and title.count("<!-- launch -->") == title.count("<!-- /launch -->") == 1
    assert f"(https://colab.research.google.com/github/{repository}/blob/{place.branch}/{where})" in title
    assert f"/v2/gh/{repository}/{place.branch}?urlpath=lab%2Ftree%2F{where.replace('/', '%2F')})" in title
    for alternative, picture in re.findall(r"!\[([^]]*)\]\(([^)]*)\)", title.split("<!-- /launch -->")[0]):
        assert alternative in BADGES.values() and (path.parent / picture).is_file()
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert code[0].id == "launch" and sum(cell.id == "launch" for cell in cells) == 1
    assert {"launch", "remove-cell"} <= set(code[0].metadata.tags) and code[0].metadata.jupyter.source_hidden
    assert code[0].outputs == [] and code[0].source.startswith("#@title ")
    assert ("nbgrader" in code[0].metadata) == (path.name == "assignment.ipynb")


def test_launch_cells_differ_only_in_the_folder():
    cells = [next(c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code").source
             for path in NOTEBOOKS]
    assert all(cell.count(path.parent.name) == 1 for cell, path in zip(cells, NOTEBOOKS, strict=True))
    same = {cell.replace(path.parent.name, "FOLDER") for cell, path in zip(cells, NOTEBOOKS, strict=True)}
    assert len(same) == 1
    lines = [line for line in same.pop().splitlines() if line.strip()]
    assert len(lines) <= 15 and max(map(len, lines)) <= 115


def test_the_readme_has_badges_and_the_citation_an_address():
    place = read_place()
    assert badges(place, "ch01_data/data.ipynb", "docs/badges") in (ROOT / "README.md").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["repository-code"] == f"https://github.com/{place.owner}/{place.name}"


def other_owners(root):
    """What names a repository that is neither this one nor cited: file and owner/name."""
    place = read_place(root)
    known = {name.lower() for name in CITED | {f"{place.owner}/{place.name}"}}
    found = []
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if SKIP(None, parts) or not path.is_file() or path.name == Path(__file__).name or path.suffix in BINARY:
            continue
        text = re.sub(r'"(?:image/png|application/[^"]+)": "[^"]*"', "", path.read_bytes().decode("utf-8", "ignore"))
        for owner, name in OWNERS.findall(text):
            named = f"{owner}/{name.removesuffix('.git')}"
            if named.lower() not in known:
                found.append(f"{'/'.join(parts)}: {named}")
    return found


def test_no_other_owner_appears_anywhere():
    assert other_owners(ROOT) == []


@pytest.mark.parametrize("text", [
    "https://github.com/mallory/course", "git clone git@github.com:mallory/course.git",
    "https://colab.research.google.com/github/mallory/course/blob/main/x.ipynb",
    "https://mybinder.org/v2/gh/mallory/course/main", "https://codespaces.new/mallory/course?quickstart=1",
    "https://hub.example.org/hub/user-redirect/git-pull?repo=https%3A%2F%2Fgithub.com%2Fmallory%2Fcourse&branch=main",
    "https://raw.githubusercontent.com/mallory/course/main/x.py"])
def test_another_owner_would_be_found(tiny, text):
    assert other_owners(tiny) == []
    (tiny / "docs").mkdir()
    (tiny / "docs" / "page.md").write_text(f"See {text}, please.")
    assert other_owners(tiny) == ["docs/page.md: mallory/course"]


@pytest.mark.parametrize("name", BADGES)
def test_a_badge_is_a_small_picture_of_its_own_that_can_be_read(name):
    file = ROOT / "docs" / "badges" / f"{name}.svg"
    tree = ElementTree.parse(file).getroot()
    text = "".join(tree.find("{*}text").itertext())
    assert text == tree.find("{*}title").text == tree.get("aria-label") == BADGES[name]
    body = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "://" not in body and "<script" not in body and "href" not in body and len(body) < 1500

    def luminance(colour):
        channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = luminance(tree.find("{*}text").get("fill")), luminance(tree.find("{*}rect").get("fill"))
    assert (light + 0.05) / (dark + 0.05) >= 4.5


# ---------------------------------------------------------------- the forms of links


def test_links_have_the_forms_that_the_places_read():
    links = launch_links(Place("ada", "engine", "autumn/2027"), "ch03_attention/attention.ipynb")
    assert links == {
        "colab": "https://colab.research.google.com/github/ada/engine/blob/autumn/2027/ch03_attention/attention.ipynb",
        "binder": "https://mybinder.org/v2/gh/ada/engine/autumn%2F2027?urlpath=lab%2Ftree%2Fch03_attention%2F"
                  "attention.ipynb",
        "codespaces": "https://codespaces.new/ada/engine/tree/autumn/2027?quickstart=1",
        "nbgitpuller": "https://nbgitpuller.readthedocs.io/en/latest/link.html?repo=https%3A%2F%2Fgithub.com%2Fada%2F"
                       "engine&branch=autumn%2F2027&urlpath=lab%2Ftree%2Fengine%2Fch03_attention%2Fattention.ipynb"}
    hub = launch_links(Place("ada", "engine", "main", "https://hub.example.org/jupyter"), "a/b.ipynb")["nbgitpuller"]
    assert hub == ("https://hub.example.org/jupyter/hub/user-redirect/git-pull?repo=https%3A%2F%2Fgithub.com%2Fada%2F"
                   "engine&branch=main&urlpath=lab%2Ftree%2Fengine%2Fa%2Fb.ipynb")


@pytest.mark.parametrize("text", [
    "ada/my-engine.2", "https://github.com/ada/my-engine.2", "http://www.github.com/ada/my-engine.2/",
    "github.com/ada/my-engine.2", "https://github.com/ada/my-engine.2.git", "git@github.com:ada/my-engine.2.git",
    "ssh://git@github.com/ada/my-engine.2.git", " ada/my-engine.2\n"])
def test_a_repository_is_read_in_its_usual_forms(text):
    assert parse_repository(text) == ("ada", "my-engine.2")


@pytest.mark.parametrize("text", [
    "foo", "", "/", "a/b/c", "https://github.com/ada", "https://gitlab.com/ada/engine", "ada/engine/tree/main",
    "a b/c", "-a/b", "ada/..", "ada/x'y", 'ada/x"y', "ada/x\ny", "{a}/{b}"])
def test_what_is_no_repository_is_refused(tiny, text):
    before = contents(tiny)
    with pytest.raises(ValueError, match="write OWNER/REPO"):
        write_links(text, root=tiny)
    assert contents(tiny) == before


@pytest.mark.parametrize(("settings", "words"), [
    ({"branch": "main; rm"}, "name of a branch"), ({"branch": ""}, "name of a branch"),
    ({"branch": "-f"}, "name of a branch"), ({"branch": "a..b"}, "name of a branch"),
    ({"hub": "hub.example.org"}, "https://hub.example.org"), ({"hub": "https://h'x"}, "https://hub.example.org")])
def test_a_branch_or_hub_that_cannot_be_one_is_refused(tiny, settings, words):
    before = contents(tiny)
    with pytest.raises(ValueError, match=re.escape(words)):
        write_links("ada/engine", root=tiny, **settings)
    assert contents(tiny) == before


# ---------------------------------------------------------------- writing


PROJECT = '''[project]
dependencies = ["torch>=2.10", "numpy>=2.0"]

[project.urls]
Repository = "https://github.com/OWNER/REPO"

[tool.bytes-to-chat]
branch = "main"
hub = ""
'''


@pytest.fixture
def tiny(tmp_path):
    """A course of one executed notebook, one that was never run, one assignment and a README."""
    root = tmp_path / "tiny"
    (root / "ch09_test").mkdir(parents=True)
    (root / "pyproject.toml").write_text(PROJECT)
    (root / "README.md").write_text("# A course\n\n<!-- launch -->\n<!-- /launch -->\n\n"
                                    "Clone https://github.com/OWNER/REPO.git, or read https://github.com/OWNER/REPO.\n")
    for name, counted in (("run", True), ("new", False), ("assignment", True)):
        cells = [nbformat.v4.new_markdown_cell("# A title\n\nA text.", id="a")]
        for number in (1, 2):
            output = nbformat.v4.new_output("execute_result", {"text/plain": "é"}, execution_count=number)
            cells.append(nbformat.v4.new_code_cell("é = 1\né", id=f"c{number}", outputs=[output] if counted else [],
                                                   execution_count=number if counted else None))
        nbformat.write(nbformat.v4.new_notebook(cells=cells), root / "ch09_test" / f"{name}.ipynb")
    return root


def contents(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_writes_a_launch_cell_first_and_counts_executions_anew(tiny):
    assert sorted(write_links(root=tiny)) == ["README.md", "ch09_test/assignment.ipynb", "ch09_test/new.ipynb",
                                              "ch09_test/run.ipynb"]
    assert write_links(check=True, root=tiny) == [] == write_links(root=tiny)
    for name, counts in (("run", [1, 2, 3]), ("new", [None] * 3), ("assignment", [1, 2, 3])):
        path = tiny / "ch09_test" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert nbformat.writes(notebook) + "\n" == path.read_text(encoding="utf-8"), "the form that nbformat writes"
        code = notebook.cells[1:]
        assert [cell.id for cell in code] == ["launch", "c1", "c2"]
        assert [cell.execution_count for cell in code] == counts
        for cell in code[1:]:
            assert all(output.execution_count == cell.execution_count for output in cell.outputs)
        assert notebook.cells[0].source.startswith("# A title\n\n<!-- launch -->\n[![")
        assert notebook.cells[0].source.endswith("\n<!-- /launch -->\n\nA text.")
    locked = {"grade": False, "grade_id": "launch", "locked": True, "schema_version": 3, "solution": False,
              "task": False}
    assert code[0].metadata.nbgrader == locked


def test_a_launch_cell_that_was_moved_or_edited_comes_back(tiny):
    write_links(root=tiny)
    path = tiny / "ch09_test" / "run.ipynb"
    before = path.read_bytes()
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(notebook.cells.pop(1))
    notebook.cells[-1].source += "\nprint('mine')"
    nbformat.write(notebook, path)
    assert len(write_links(check=True, root=tiny)) == 2  # the notebook, and the command that mends it
    write_links(root=tiny)
    assert path.read_bytes() == before


def test_a_notebook_without_a_title_is_named(tiny):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), tiny / "ch09_test" / "bare.ipynb")
    with pytest.raises(ValueError, match="ch09_test/bare.ipynb has no title"):
        write_links(root=tiny)
    for text in ("{", "{}", "[]"):
        (tiny / "ch09_test" / "bare.ipynb").write_text(text)
        with pytest.raises(ValueError, match="ch09_test/bare.ipynb is not a readable notebook"):
            write_links(root=tiny)


def test_addresses_in_the_text_follow_and_names_that_only_begin_alike_do_not(tiny):
    page = tiny / "docs" / "teach.md"
    page.parent.mkdir()
    page.write_text("https://github.com/OWNER/REPO-2 https://github.com/OWNER/REPO/blob/HEAD/x "
                    "git@github.com:OWNER/REPO.git ?repo=https%3A%2F%2Fgithub.com%2FOWNER%2FREPO&branch=main\n"
                    "<!-- launch ch09_test/run.ipynb -->\nold\n<!-- /launch -->\n")
    write_links("ada/engine", root=tiny)
    text = page.read_text()
    assert "OWNER/REPO-2 https://github.com/ada/engine/blob/HEAD/x git@github.com:ada/engine.git" in text
    assert "github.com%2Fada%2Fengine&branch=main" in text
    assert badges(Place("ada", "engine"), "ch09_test/run.ipynb", "badges") in text and "old" not in text
    assert "ada/engine.git, or read https://github.com/ada/engine.\n" in (tiny / "README.md").read_text()


def test_the_setting_keeps_what_is_not_given(tiny):
    write_links("ada/engine", "autumn", hub="https://hub.example.org/", root=tiny)
    assert read_place(tiny) == Place("ada", "engine", "autumn", "https://hub.example.org")
    write_links("grace/engine", root=tiny)
    assert read_place(tiny) == Place("grace", "engine", "autumn", "https://hub.example.org")
    write_links(None, hub="", root=tiny)
    assert read_place(tiny) == Place("grace", "engine", "autumn", "")


def test_a_fork_gets_its_links_with_one_command_and_nothing_else_changes(scratch):
    write_links(root=scratch)
    before = contents(scratch)
    said = write_links("Ada-1/my.engine", "autumn", check=True, root=scratch)
    assert contents(scratch) == before, "a check writes nothing"
    changed = write_links("https://github.com/Ada-1/my.engine", "autumn", root=scratch)
    assert len(changed) == len(said) - 1 and {name_of(path) for path in NOTEBOOKS} < set(changed)
    assert write_links("Ada-1/my.engine", check=True, root=scratch) == []
    assert other_owners(scratch) == []
    after = contents(scratch)
    assert {path.relative_to(scratch).as_posix() for path in after if after[path] != before[path]} == set(changed)
    for name in changed:
        if name.endswith(".ipynb"):
            old, new = (json.loads(files[scratch / name])["cells"] for files in (before, after))
            assert [c for c in old if c["id"] != "launch"][1:] == [c for c in new if c["id"] != "launch"][1:]
            outside = [re.sub(r"<!-- launch -->.*<!-- /launch -->", "", "".join(cells[0]["source"]), flags=re.S)
                       for cells in (old, new)]
            assert outside[0] == outside[1]
    place = read_place()
    write_links(f"{place.owner}/{place.name}", place.branch, root=scratch)
    assert contents(scratch) == before, "and back again"


# ---------------------------------------------------------------- elsewhere than on Colab


def run_cells(sources, folder, environment=None):
    """Run code in a fresh kernel that starts in ``folder``: the text that each cell showed."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = NotebookClient(notebook, timeout=300, kernel_name="python3",
                            resources={"metadata": {"path": str(folder)}})
    kernel = {k: v for k, v in os.environ.items() if not k.startswith("COURSE_REPOSITORY")}
    client.execute(env={**kernel, "JUPYTER_PREFER_ENV_PATH": "1", **(environment or {})})
    return ["".join(output.get("text", "") + str(output.get("data", "")) for output in cell.outputs)
            for cell in notebook.cells]


def test_elsewhere_the_launch_cell_shows_and_imports_nothing(tmp_path):
    launch = launch_source(read_place(), "ch03_attention/attention.ipynb")
    before = "import os, sys\nmodules, where, path = set(sys.modules), os.getcwd(), list(sys.path)"
    after = "print(sorted(set(sys.modules) - modules - allowed), os.getcwd() == where, sys.path == path)"
    # beside the course nothing is looked for; alone, Python may open an installed google-something on the way
    for folder, allowed in ((ROOT / "ch03_attention", "set()"), (tmp_path, "{'google'}")):
        assert run_cells([before, launch, f"allowed = {allowed}\n{after}"], folder)[1:] == ["", "[] True True\n"]
        assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- on Colab, as far as it can be had here


@pytest.fixture(scope="session")
def origin(tmp_path_factory):
    """The working tree as a git repository with one commit, to be cloned from."""
    if os.name == "nt" or not shutil.which("git"):
        pytest.skip("Colab's machines run Linux and have git")
    folder = shutil.copytree(ROOT, tmp_path_factory.mktemp("origin") / "course", ignore=SKIP)
    for command in (["init", "--quiet", "--initial-branch", read_place().branch], ["add", "--all"],
                    ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false",
                     "commit", "--quiet", "--message", "The course"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture
def colab(tmp_path, origin):
    """An empty folder, and the environment of a kernel with ``google.colab``, told versions and a pip that notes.

    ``COLAB_VERSIONS`` is what importlib.metadata shall say, null for a package that is not there;
    ``pip`` writes down how it was called and ends with ``COLAB_PIP``.
    """
    fake, empty = tmp_path / "fake", tmp_path / "content"
    for folder in (fake / "google" / "colab", fake / "pip", empty):
        folder.mkdir(parents=True)
    (fake / "google" / "colab" / "__init__.py").write_text("")
    (fake / "google" / "colab" / "output.py").write_text(
        "def enable_custom_widget_manager():\n    open(__file__ + '.enabled', 'a').write('x')\n")
    (fake / "pip" / "__init__.py").write_text("")
    (fake / "pip" / "__main__.py").write_text(
        "import json, os, sys\nopen(os.environ['COLAB_NOTES'], 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "print('pip is sorry')\nsys.exit(int(os.environ.get('COLAB_PIP', '0')))\n")
    (fake / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata, json, os\nreal = metadata.version\n"
        "told = json.loads(os.environ.get('COLAB_VERSIONS', '{}'))\n"
        "def version(name):\n    found = told[name] if name in told else real(name)\n"
        "    if found is None:\n        raise metadata.PackageNotFoundError(name)\n    return found\n"
        "metadata.version = version\n")
    environment = {"PYTHONPATH": str(fake), "COURSE_REPOSITORY": str(origin), "COLAB_NOTES": str(tmp_path / "pip.txt"),
                   "COURSE_WORKSPACE": os.environ.get("COURSE_WORKSPACE", str(tmp_path / "workspace"))}
    return empty, environment


def calls(environment):
    notes = Path(environment["COLAB_NOTES"])
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


@pytest.mark.parametrize("name", ["ch03_attention/attention.ipynb", "ch04_gpt/gpt.ipynb"])
def test_on_colab_a_bare_notebook_fetches_the_course_and_runs(colab, name):
    """The file alone in an empty folder: the first cell brings the rest, the second and third use it."""
    empty, environment = colab
    bare = Path(shutil.copy(ROOT / name, empty))
    cells = [cell for cell in nbformat.read(bare, as_version=4).cells if cell.cell_type == "code"]
    exported = [cell.source for cell in cells if cell.source.startswith("#| export")][:3]
    shown = run_cells([cells[0].source, cells[1].source, *exported, cells[0].source,
                       "import previous_chapters\nprint(os.getcwd())\nprint(previous_chapters.__file__)"],
                      empty, environment)
    root = empty / read_place().name
    assert (root / "course.py").exists() and (root / name).exists()
    assert "could not" not in shown[0] and f"The course is in {root}; nothing had to be installed" in shown[0]
    assert "widgets can be moved" in shown[0]
    enabled = Path(environment["PYTHONPATH"]) / "google" / "colab" / "output.py.enabled"
    assert enabled.read_text() == "x"
    assert calls(environment) == [], "nothing was missing"
    assert shown[-2] == "", "a second run does nothing"
    where, module = shown[-1].split()
    assert Path(where) == (root / name).parent and Path(module) == (root / name).parent / "previous_chapters.py"


def test_on_colab_pip_gets_what_is_missing_and_never_torch(colab):
    empty, environment = colab
    environment["COLAB_VERSIONS"] = json.dumps({
        "gguf": None, "tiktoken": None, "torch": "2.8.0+cu128", "numpy": "1.26.4", "jupyterlab": None,
        "nbclient": None, "ipykernel": "6.1.0"})
    launch = launch_source(read_place(), "ch03_attention/attention.ipynb")
    shown = run_cells([launch, launch], empty, environment)
    ranges = {re.match(r"[\w.-]+", line)[0]: line
              for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]}
    (call,) = calls(environment)
    assert call[0] == "install" and [x for x in call[1:] if not x.startswith("-")] == \
        [ranges["tiktoken"], ranges["gguf"]]
    assert "installed tiktoken, gguf" in shown[0] and shown[1] == ""
    assert f"torch 2.8.0+cu128 ({ranges['torch'][5:]})" in shown[0] and "numpy 1.26.4" in shown[0]
    assert "ipykernel" not in shown[0] and "jupyterlab" not in shown[0]


def test_on_colab_a_runtime_without_torch_is_named_and_not_mended(colab):
    empty, environment = colab
    environment["COLAB_VERSIONS"] = json.dumps({"torch": None})
    (shown,) = run_cells([launch_source(read_place(), "ch03_attention/attention.ipynb")], empty, environment)
    assert calls(environment) == [] and "nothing had to be installed" in shown
    assert "torch is not here at all (choose another runtime" in shown


def test_on_colab_a_second_kernel_uses_the_clone_that_is_there(colab):
    empty, environment = colab
    launch = launch_source(read_place(), "ch03_attention/attention.ipynb")
    run_cells([launch], empty, environment)
    (empty / read_place().name / "mark").write_text("")
    shown = run_cells([launch, "print(os.path.basename(os.getcwd()))"], empty,
                      {**environment, "COURSE_REPOSITORY": "nowhere"})
    assert shown[0].startswith("The course is in") and "nothing had to be installed" in shown[0]
    assert shown[1] == "ch03_attention\n"
    assert (empty / read_place().name / "mark").exists()


@pytest.mark.parametrize("gone", ["repository", "branch"])
def test_on_colab_a_clone_that_fails_says_so(colab, tmp_path, gone):
    empty, environment = colab
    place = read_place()
    if gone == "repository":
        environment["COURSE_REPOSITORY"] = str(tmp_path / "nowhere")
    else:
        place = Place(place.owner, place.name, "gone")
    with pytest.raises(CellExecutionError) as error:
        run_cells([launch_source(place, "ch03_attention/attention.ipynb")], empty, environment)
    said = str(error.value)
    assert f"{environment['COURSE_REPOSITORY']} could not be fetched" in said
    assert "fatal" in said and "check network and address, run again" in said
    assert list(empty.iterdir()) == [] and calls(environment) == []


def test_on_colab_a_failing_pip_says_what_pip_said(colab):
    empty, environment = colab
    environment |= {"COLAB_VERSIONS": json.dumps({"gguf": None}), "COLAB_PIP": "1"}
    with pytest.raises(CellExecutionError, match="pip could not install gguf"):
        run_cells([launch_source(read_place(), "ch03_attention/attention.ipynb")], empty, environment)


numbers = st.lists(st.integers(0, 12), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))


@given(there=numbers, low=numbers, high=numbers, local=st.sampled_from(["", "+cpu", ".post1"]))
def test_ranges_mean_what_packaging_says(there, low, high, local):
    for bounds in ("", f">={low}", f"<{high}", f">={low},<{high}", f">={low}, <{high}"):
        if local != ".post1" or "<" not in bounds:  # packaging has a rule of its own for the bound's post-releases
            assert in_range(there + local, bounds) == SpecifierSet(bounds).contains(there + local)


def test_every_range_of_the_course_can_be_read_and_holds_here():
    missing, outside = missing_packages()
    assert missing == [] and outside == []
    with pytest.raises(ValueError, match="written with >= and <"):
        in_range("1.0", "~=1.0")


def test_colab_keeps_its_own():
    assert set(NOT_ON_COLAB) == {"torch", "jupyterlab", "ipykernel", "nbclient"}


# ---------------------------------------------------------------- Binder, Codespaces, workflows


def commands():
    """Every call of course.py in the workflows and scripts: (file, arguments)."""
    found = []
    for path in [*WORKFLOWS, *SCRIPTS, ROOT / ".devcontainer" / "devcontainer.json"]:
        for line in path.read_text(encoding="utf-8").splitlines():
            line = line.replace("${{ matrix.what }}", "tests")
            line = re.sub(r'"?\$GITHUB_REPOSITORY"?', "ada/engine", line)
            for call in re.findall(r'python[\d.]* course\.py ([^;"&|]*)', line):
                found.append((path.name, shlex.split(call)))
    return found


def test_every_command_that_they_call_exists():
    calls = commands()
    assert {name for name, _ in calls} >= {"tests.yml", "links.yml", "newest.yml", "postBuild", "devcontainer.json"}
    for _, arguments in calls:
        words = arguments[:arguments.index("and")] if "and" in arguments else arguments  # in a sentence
        course.parse(words)  # leaves with exit code 2 if there is no such command or option


def test_every_path_that_they_name_exists():
    for path in [*WORKFLOWS, *SCRIPTS]:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"(?:bash |--requirements )([\w./-]+)", text)
        named += re.findall(r"'([^']*\*[^']*|[^']*\.py)'", " ".join(re.findall(r"hashFiles\(([^)]*)\)", text)))
        named += re.findall(r"(?<=\s)((?:ch0|docs/|README|tests/)[\w./*-]*\.(?:md|ipynb|txt))", text)
        for name in set(named) - {"course.txt", "ch0*/*.md"}:
            assert list(ROOT.glob(name)), f"{path.name} names {name}"


def test_python_versions_agree():
    low = ".".join(map(str, course.MINIMUM))
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"] == f">={low}"
    (high,) = set(re.findall(rf"use {re.escape(low)} to (3\.\d+)", (ROOT / "course.py").read_text(encoding="utf-8")))
    supported = [f"3.{minor}" for minor in range(course.MINIMUM[1], int(high.split(".")[1]) + 1)]
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == supported
    assert {system.split("-")[0] for system in matrix["system"]} == {"ubuntu", "macos", "windows"}
    for path in WORKFLOWS:
        for version in re.findall(r'python-version: "([\d.]+)"', path.read_text()):
            assert version in supported
    binder = (ROOT / "binder" / "runtime.txt").read_text().strip()
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert binder.removeprefix("python-") in supported and container["image"].rpartition(":")[2] in supported
    assert course.parse(["lab"]).port in container["forwardPorts"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read_and_knows_no_secrets(path):
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"} and "concurrency" in workflow
    assert "secrets." not in text and "GITHUB_TOKEN" not in text and "pull_request_target" not in text
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 180
        if "permissions" in job:  # to publish: such a job runs nothing of the repository, only hands over what was made
            assert path.name == "book.yml" and job["needs"] == "make" and "if" in job
            said = " ".join(step.get("uses", "") + step.get("run", "") for step in job["steps"])
            assert "checkout" not in said and "python" not in said
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))
            assert "${{ github.event" not in step.get("run", ""), "somebody else's words in a shell"


@pytest.mark.skipif(not shutil.which("bash") or os.name == "nt", reason="needs bash")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_scripts(script):
    assert script.read_text().startswith("#!") and os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.skipif(not shutil.which("bash") or os.name == "nt", reason="needs bash")
def test_binder_installs_what_notebooks_need_and_leaves_its_server_alone(tmp_path):
    """postBuild, run with stand-ins for python3: what would uv be asked to install?"""
    folder = tmp_path / "course"
    shutil.copytree(ROOT / "binder", folder / "binder")
    shutil.copy(ROOT / "requirements.txt", folder)
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "python3"
    stand_in.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\n[[ -f course.txt ]] && cat course.txt > '
                        f"{tmp_path}/asked\nexit 0\n")
    stand_in.chmod(0o755)
    subprocess.run(["bash", "binder/postBuild"], cwd=folder, check=True,
                   env={**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"})
    asked = set(re.findall(r"^([\w-]+)==", (tmp_path / "asked").read_text(), re.M))
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M))
    assert pinned - asked == {"jupyterlab", "ipykernel", "nbclient", "nbformat", "tornado"} and asked < pinned
    said = (tmp_path / "calls").read_text()
    assert "--torch-backend=cpu" in said and f"--python {stand_in}" in said
    assert not (folder / "course.txt").exists()
    started = subprocess.run([str(folder / "binder" / "start"), sys.executable, "-c",
                              "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['COURSE_DEVICE'])"],
                             capture_output=True, text=True)
    assert started.stdout == "2 cpu\n"
