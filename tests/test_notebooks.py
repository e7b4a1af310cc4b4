"""The notebooks as readers get them, and the way from notebook to module to next chapter."""

import ast
import collections
import json
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT, starting_again

import course
from utils.export import ExportError, chapter_notebooks, export_all, module_source
from utils.notebooks import Job, NotebookError, normalised, run_notebooks

NOTEBOOKS = chapter_notebooks()
CHAPTERS = ["ch01_data", "ch02_tokenizer", "ch03_attention", "ch04_gpt", "ch05_pretrain", "ch06_finetune"]
MAIN = [ROOT / folder / f"{folder.split('_')[1]}.ipynb" for folder in CHAPTERS]
ASSIGNMENTS = [path for path in NOTEBOOKS if path.name == "assignment.ipynb"]
SOLUTIONS = [path for path in NOTEBOOKS if path.name == "solutions.ipynb"]
DEEP_DIVES = [path for path in NOTEBOOKS if path not in MAIN + ASSIGNMENTS + SOLUTIONS]


def name_of(path):
    return f"{path.parent.name}/{path.name}"


by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)


def code_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def prose(path):
    return "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")


def outputs(path):
    return [output for cell in code_cells(path) for output in cell.outputs]


# ---------------------------------------------------------------- the committed notebooks


def test_every_chapter_is_there():
    for path in MAIN:
        files = {p.name for p in path.parent.iterdir()}
        assert files >= {path.name, path.with_suffix(".py").name, "previous_chapters.py"}


def test_course_py_knows_every_notebook_and_the_readme_names_it():
    known = [ROOT / path for path, _, _ in course.NOTEBOOKS.values()]
    assert sorted(known) == NOTEBOOKS and len(course.CHAPTERS) == len(MAIN)
    assert all(path.endswith(f"/{name}.ipynb") for name, (path, _, _) in course.DEEP_DIVES.items())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name_of(path) for path in NOTEBOOKS if f"({name_of(path)})" not in readme] == []


def test_a_chapter_names_its_deep_dives_and_links_lead_somewhere():
    for path in NOTEBOOKS:
        text = prose(path)
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            assert "://" in target or (path.parent / target).exists(), f"{name_of(path)} links to {target}"
    for path in DEEP_DIVES:
        main = next(main for main in MAIN if main.parent == path.parent)
        assert f"]({path.name})" in prose(main), f"{name_of(main)} does not name {path.name}"


@by_name
def test_is_valid_and_small(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size <= 1_500_000


@by_name
def test_is_executed_without_errors_or_warnings(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it: course.py run --save"
    for output in outputs(path):
        assert output.output_type != "error", output
        assert output.get("name") != "stderr", output.get("text")


@by_name
def test_outputs_name_no_machine(path):
    text = json.dumps(outputs(path))
    text = re.sub(r'"(?:image/png|application/[^"]+)": "[^"]*"', "", text)
    for pattern in (r"/home/", r"/root/", r"/tmp/", r"/work/", r"site-packages", r"[A-Z]:\\\\\\\\Users", str(ROOT)):
        assert not re.search(pattern, text), pattern


@by_name
def test_committed_form_is_the_runners(path):
    notebook = nbformat.read(path, as_version=4)
    before = nbformat.writes(notebook)
    assert nbformat.writes(normalised(notebook)) == before, "write it with: course.py run --save"


@by_name
def test_figures_have_alternative_text(path):
    images = [o for o in outputs(path) if "image/png" in o.get("data", {})]
    assert images, "a chapter without a picture"
    for image in images:
        assert len(image.metadata["image/png"]["alt"].split()) >= 6
        assert image.data["text/plain"].startswith("Figure: ")


@by_name
def test_headings_do_not_skip_levels(path):
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    levels = [len(m.group(1)) for m in re.finditer(r"^(#+) ", re.sub(r"```.*?```", "", text, flags=re.S), re.M)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))


@pytest.mark.parametrize("path", MAIN + DEEP_DIVES, ids=name_of)
def test_sections_are_numbered_without_gaps(path):
    numbers = [int(n) for n in re.findall(r"^## (?:\d+\.)?(\d+)\b", prose(path), re.M)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 3


@pytest.mark.parametrize("path", MAIN, ids=name_of)
def test_has_the_parts_of_a_chapter(path):
    text = prose(path)
    for part in ("## What can go wrong", "## Exercises", "## Where this stands today", "## Summary"):
        assert part in text
    assert text.count("Before you run the next cell") >= 3
    assert len(re.findall(r"\*\*Exercise \d\.\d+", text)) >= 4


@pytest.mark.parametrize("path", DEEP_DIVES, ids=name_of)
def test_has_the_parts_of_a_deep_dive(path):
    text = prose(path)
    assert text.startswith("# Deep dive: ")
    for part in ("## Exercises", "## Where this stands today", "## Summary"):
        assert part in text
    assert text.count("Before you run the next cell") >= 2
    assert len(re.findall(r"\*\*Exercise [A-Z]", text)) >= 2


@pytest.mark.parametrize("path", SOLUTIONS, ids=name_of)
def test_every_exercise_has_its_solution(path):
    """In the order of the notebooks, under the title of each."""
    wanted = []
    for notebook in sorted(p for p in NOTEBOOKS if p.parent == path.parent and p in MAIN + DEEP_DIVES):
        wanted += [(notebook.stem, number) for number in re.findall(r"^\*\*(Exercise [\w.]*\w)", prose(notebook), re.M)]
    solved = re.findall(r"^### (Exercise [\w.]*\w)", prose(path), re.M)
    assert sorted(solved) == sorted(number for _, number in wanted)
    assert prose(path).startswith(f"# Solutions: chapter {int(path.parent.name[2:4])}")


@by_name
def test_cells_are_short_and_some_are_compared_exactly(path):
    cells = code_cells(path)
    lengths = {cell.id: sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in cells}
    story = sorted(lengths[cell.id] for cell in cells if not cell.source.startswith("#| export"))
    assert max(lengths.values()) <= 50
    assert story[len(story) // 2] <= 15 or path in ASSIGNMENTS  # tests are longer than a story's cells
    assert any("nbval-check-output" in cell.metadata.get("tags", []) for cell in cells)


@by_name
def test_cells_compared_exactly_do_not_say_what_was_downloaded_or_built(path):
    """Such lines are there in the first run and gone in the second."""
    for cell in code_cells(path):
        if "nbval-check-output" in cell.metadata.get("tags", []):
            text = "".join(output.get("text", "") for output in cell.outputs)
            assert not re.search(r"^(Downloaded|Built|Using) ", text, re.M), cell.source[:200]


# ---------------------------------------------------------------- notebook to module


def notebook(tmp_path, *sources):
    cells = [nbformat.v4.new_markdown_cell("# Chapter 9: A test"), *map(nbformat.v4.new_code_cell, sources)]
    path = tmp_path / "ch09_test" / "test.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_modules_are_what_the_notebooks_export():
    assert export_all(check=True) == []


def test_export_keeps_order_and_lists_public_names(tmp_path):
    path = notebook(
        tmp_path, "#| export\nimport math\nfrom previous_chapters import GPT", "shown = 'not exported'",
        "#| export\ndef f(x):\n    return [math.sqrt(y) for y in x]\n_hidden = 1\nLIMIT = 3",
        "#| export\nclass G(GPT):\n    a = f([LIMIT])\n    def b(self: 'G') -> int:\n        return _hidden")
    source = module_source(path)
    assert "from .previous_chapters import GPT" in source and "shown" not in source
    assert source.index("def f") < source.index("class G")
    assert '__all__ = [\n    "f",\n    "LIMIT",\n    "G",\n]' in source
    assert "ch09_test/test.ipynb" in source.split('"""')[1]


@pytest.mark.parametrize(("sources", "words"), [
    (["#| export\ndef f(:\n    pass"], ["cell 2", "line 2", "invalid syntax"]),
    (["#| export\n%matplotlib inline"], ["magics"]),
    (["#| export\ndef f(): pass", "x = 1", "#| export\ndef f(): pass"], ["cell 4", "'f' is defined already in cell 2"]),
    (["#| export\nimport math", "#| export\nmath = 2"], ["'math' is defined already"]),
    (["#| export\ndef f(): pass\ndef f(): pass"], ["defined twice"]),
    (["import numpy as np", "#| export\ndef f(): return np.ones(2)"], ["cell 3", "'np'", "import it"]),
    (["#| export\nclass A(Missing): pass"], ["'Missing'"]),
    (["#| export\ndef f(x: Unknown) -> int: return 1"], ["'Unknown'"]),
    (["#| export\nfrom math import *"], ["import *"]),
    (["#| export\nimport previous_chapters"], ["from previous_chapters import NAME"]),
    (["#| export\nfrom __future__ import annotations"], ["cell 2", "leave it out"]),
    (["#| export\nx = 1\nreturn x"], ["cell 2", "line 3", "'return' outside function"]),
    (["#| export\ndef f(): pass", "#| export\nfrom math import sqrt as f"], ["'f' is defined already in cell 2"]),
    (["#| export\n_f = 1", "#| export\nfrom math import sqrt as _f"], ["'_f' is defined already in cell 2"]),
])
def test_export_refuses_and_names_the_cell(tmp_path, sources, words):
    with pytest.raises(ExportError) as error:
        module_source(notebook(tmp_path, *sources))
    for word in ["ch09_test/test.ipynb", *words]:
        assert word in str(error.value)


def test_refused_export_leaves_the_module_as_it_was(tmp_path):
    path = notebook(tmp_path, "#| export\ndef f():\n    return 1")
    assert export_all(tmp_path) == []
    before = path.with_suffix(".py").read_text()
    notebook(tmp_path, "#| export\ndef f(:")
    assert len(export_all(tmp_path)) == 1
    assert path.with_suffix(".py").read_text() == before
    notebook(tmp_path, "#| export\ndef f():\n    return 2")
    assert "differs from" in export_all(tmp_path, check=True)[0]
    path.unlink()
    assert "its notebook is gone" in export_all(tmp_path, check=True)[0]


def test_everything_is_defined_once():
    defined = collections.defaultdict(list)
    for path in [*ROOT.glob("ch0*/*.py"), *ROOT.glob("utils/**/*.py"), ROOT / "course.py"]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                defined[node.name].append(path.relative_to(ROOT).as_posix())
    commands = {"run", "test", "lab", "chat", "serve", "bench", "export", "links", "main"}
    assert {name: places for name, places in defined.items() if len(places) > 1 and name not in commands} == {}


def test_the_code_is_clean():
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "--output-format=concise", "."], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_no_chapter_knows_a_later_one_and_utils_knows_none():
    for path in [*ROOT.glob("ch0*/*.py"), *ROOT.glob("utils/**/*.py")]:
        known = re.findall(r"^(?:from|import) (ch0\d)", path.read_text(encoding="utf-8"), re.M)
        own = path.parent.name[:4]
        assert all(own.startswith("ch") and name <= own for name in known), path


def test_an_edit_in_chapter_3_changes_what_chapter_5_trains(scratch):
    """The same four training steps, before and after one line of the attention notebook is changed."""
    steps = (
        "import torch; from ch04_gpt.gpt import GPT, GPTConfig; from ch05_pretrain.pretrain import TrainConfig, train;"
        "torch.manual_seed(0); tokens = torch.randint(50, (500,));"
        "model = GPT(GPTConfig(50, 16, 32, 2, 2, norm='rmsnorm', mlp='swiglu', position='rope', bias=False));"
        "h = train(model, tokens, tokens, TrainConfig(steps=4, batch_size=2, context_length=16, warmup_steps=1));"
        "print(h.train_loss)")

    def losses():
        subprocess.run([sys.executable, "course.py", "export"], cwd=scratch, check=True, capture_output=True)
        result = subprocess.run([sys.executable, "-c", steps], cwd=scratch, check=True, capture_output=True, text=True)
        return json.loads(result.stdout)

    before = losses()
    assert losses() == before
    path = scratch / "ch03_attention" / "attention.ipynb"
    document = nbformat.read(path, as_version=4)
    exported = [c for c in document.cells if c.source.startswith("#| export")]
    cell = next(c for c in exported if "class MultiHeadAttention" in c.source)
    assert "return self.out_proj(" in cell.source
    cell.source = cell.source.replace("return self.out_proj(", "return 2 * self.out_proj(")
    nbformat.write(document, path)
    assert losses() != before


def test_a_stale_module_is_announced_to_the_next_chapter(scratch):
    path = scratch / "ch03_attention" / "attention.ipynb"
    document = nbformat.read(path, as_version=4)
    cell = next(c for c in document.cells if "class MultiHeadAttention" in c.source)
    cell.source += "\n# edited"
    nbformat.write(document, path)
    result = subprocess.run([sys.executable, "-c", "import previous_chapters"], cwd=scratch / "ch04_gpt",
                            capture_output=True, text=True)
    assert result.returncode == 0
    assert "ch03_attention/attention.py differs from" in result.stderr and "course.py export" in result.stderr


# ---------------------------------------------------------------- the runner


def test_a_kernel_that_dies_at_its_start_is_started_again():
    tries = []

    def start(name, last):
        tries.append(name)
        if len(tries) < last:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return "a kernel"

    assert starting_again(start)("python", last=3) == "a kernel" and len(tries) == 3
    with pytest.raises(RuntimeError, match="died"):
        starting_again(start)("python", last=9)
    assert len(tries) == 6


def test_runner_executes_and_saves_tidy_outputs(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path / "workspace"))
    bar = "from tqdm import tqdm\nimport sys\nfor _ in tqdm(range(3), file=sys.stdout, leave=False):\n    pass\n"
    bars = ("for _ in tqdm(range(2), 'out', file=sys.stdout, leave=False):\n    print('in')\n"
            "    for _ in tqdm(range(2), 'in', file=sys.stdout, leave=False, mininterval=0):\n        pass\n")
    path = notebook(tmp_path, bar + "print('done')", "1 + 1", bar + bars + "print('end')")
    before = path.read_text()
    run_notebooks([Job(path, "a test", 5)])
    assert path.read_text() == before, "without save the notebook itself stays"
    executed = nbformat.read(tmp_path / "workspace" / "notebooks" / "ch09_test" / "test.ipynb", as_version=4)
    assert executed.cells[1].outputs[0].text == "done\n"
    assert executed.cells[2].outputs[0].data["text/plain"] == "2"
    assert executed.cells[3].outputs[0].text == "in\nin\nend\n"
    assert "execution" not in executed.cells[1].metadata and "version" not in executed.metadata.language_info
    shown = capfd.readouterr().err
    assert "ch09_test" in shown and "GB" in shown and "left" in shown
    run_notebooks([Job(path, "a test", 5)], save=True)
    assert nbformat.read(path, as_version=4).cells[1].outputs[0].text == "done\n"


def test_runner_names_the_cell_that_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path / "workspace"))
    path = notebook(tmp_path, "a = 1", "raise ValueError('seven is not even')", "a = 2")
    with pytest.raises(NotebookError) as error:
        run_notebooks([Job(path, "a test", 5)], save=True)
    for words in ("code cell 2 of 3", "ValueError: seven is not even", "course.py lab", "ch09_test/test.ipynb",
                  "got: workspace/notebooks/ch09_test/test.ipynb"):  # every chapter has its assignment.ipynb
        assert words in str(error.value)
    assert not code_cells(path)[0].outputs, "a failed run does not replace the notebook"


def test_what_the_kernels_process_prints_stays_out_of_the_terminal(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path / "workspace"))
    late = "import atexit, os\natexit.register(lambda: (os.write(1, b'noise\\n'), os.write(2, b'noise\\n')))"
    run_notebooks([Job(notebook(tmp_path, late), "a test", 5)])
    shown = capfd.readouterr()
    assert "GB" in shown.err and "noise" not in shown.out + shown.err


def test_runner_tells_the_last_words_of_a_kernel_that_died(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path / "workspace"))
    path = notebook(tmp_path, "import ctypes\nctypes.string_at(0)")
    with pytest.raises(NotebookError, match="The kernel died") as error:
        run_notebooks([Job(path, "a test", 5)])
    assert "code cell 1 of 1" in str(error.value)
    if sys.platform != "win32":  # there it dies without a word
        assert "Fatal Python error" in str(error.value).split("Before that it said:")[1]
