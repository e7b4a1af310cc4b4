#!/usr/bin/env python3
"""Bytes to Chat: one command for the whole course.

    python3 course.py run [ch01 ...]   from raw text to a model that answers, chapter by chapter
    python3 course.py test             every test, and every notebook run again
    python3 course.py bench [NAME]     this course against the usual libraries, side by side
    python3 course.py lab              JupyterLab on this machine
    python3 course.py chat             talk to SmolLM2 on the course's own code
    python3 course.py serve            the same model for your programs, at an OpenAI-compatible address
    python3 course.py export [--check] write each chapter's module from its notebook
    python3 course.py assignments      homework: release it to students, grade it, write feedback
    python3 course.py book             a web site, a PDF and an EPUB, from the notebooks as they stand
    python3 course.py links OWNER/REPO badges and launch links of a fork

It uses the virtual environment that is active, or makes one in .venv, and installs what
requirements.txt pins. Nothing but Python is needed to start. This file keeps to a syntax that
old Pythons can read, so that they can say what is wrong.
"""

import sys

MINIMUM = (3, 11)
if sys.version_info < MINIMUM:
    sys.exit(
        "This course needs Python %d.%d or newer; this is Python %d.%d (%s).\n"
        "Install a newer one from python.org or your system's packages, then run it by name, for example:\n"
        "    python3.12 course.py run"
        % (MINIMUM + tuple(sys.version_info[:2]) + (sys.executable,))
    )

import argparse  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parent
REQUIREMENTS = ROOT / "requirements.txt"
TEST_REQUIREMENTS = ROOT / "tests" / "requirements.txt"
INSTALL_BYTES = 2.5e9  # a CPU-only PyTorch, JupyterLab and the rest, with room for pip to work

# chapter, notebook, what it turns into what, seconds on two cores without a GPU
CHAPTERS = {
    "ch01": ("ch01_data/data.ipynb", "raw text to documents", 55),
    "ch02": ("ch02_tokenizer/tokenizer.ipynb", "documents to tokens", 35),
    "ch03": ("ch03_attention/attention.ipynb", "attention", 45),
    "ch04": ("ch04_gpt/gpt.ipynb", "attention to a GPT, and real weights", 55),
    "ch05": ("ch05_pretrain/pretrain.ipynb", "tokens to a pretrained model", 235),
    "ch06": ("ch06_finetune/finetune.ipynb", "a pretrained model to one that answers", 190),
}

# further notebooks, one question each; run by name, or all of them with --all
DEEP_DIVES = {
    "near_duplicates": ("ch01_data/near_duplicates.ipynb", "100,000 documents: which are the same?", 35),
    "pipeline": ("ch01_data/pipeline.ipynb", "a corpus in one command, on one core or many", 35),
    "how_much_data": ("ch01_data/how_much_data.ipynb", "how much text does a model need?", 35),
    "vocabulary": ("ch02_tokenizer/vocabulary.ipynb", "how large a vocabulary, and what it costs", 20),
    "flash_attention": ("ch03_attention/flash_attention.ipynb", "attention that never holds the table of scores", 20),
    "attention_variants": ("ch03_attention/attention_variants.ipynb", "what if the cache is too large?", 20),
    "weights": ("ch04_gpt/weights.ipynb", "what is in a checkpoint?", 30),
    "memory_and_compute": ("ch04_gpt/memory_and_compute.ipynb", "what a model costs before anyone builds it", 30),
    "inside": ("ch04_gpt/inside.ipynb", "what happens inside, on your sentence", 25),
    "fast_generation": ("ch04_gpt/fast_generation.ipynb", "how fast can it write?", 40),
    "mixture_of_experts": ("ch04_gpt/mixture_of_experts.ipynb", "many experts, few at work", 25),
    "choosing_settings": ("ch05_pretrain/choosing_settings.ipynb", "which rate, which batch, and is it luck?", 60),
    "precision": ("ch05_pretrain/precision.ipynb", "how few bits does training need?", 40),
    "overfitting": ("ch05_pretrain/overfitting.ipynb", "when does it learn by heart?", 45),
    "speed_run": ("ch05_pretrain/speed_run.ipynb", "the same loss in a tenth of the time", 30),
    "storyteller": ("ch05_pretrain/storyteller.ipynb", "the best model of two cores and a few hours", 35),
    "scaling_laws": ("ch05_pretrain/scaling_laws.ipynb", "how good will a larger one be?", 15),
    "parallelism": ("ch05_pretrain/parallelism.ipynb", "one model on many machines", 30),
    "classification": ("ch06_finetune/classification.ipynb", "which state knows that it is spam?", 45),
    "instruction": ("ch06_finetune/instruction.ipynb", "what can examples teach, and what not?", 45),
    "lora": ("ch06_finetune/lora.ipynb", "how small can the change be?", 45),
    "quantization": ("ch06_finetune/quantization.ipynb", "how few bits does a weight need?", 45),
    "preferences": ("ch06_finetune/preferences.ipynb", "rather this than that", 50),
    "rewards": ("ch06_finetune/rewards.ipynb", "told only how well it did", 50),
    "evaluation": ("ch06_finetune/evaluation.ipynb", "is it better?", 35),
    "distillation": ("ch06_finetune/distillation.ipynb", "what does a teacher know that the text does not say?", 45),
    "serving": ("ch06_finetune/serving.ipynb", "how does one model answer everybody at once?", 30),
}

# homework with its solutions, as teachers have it; `assignments release` makes the students' copies
ASSIGNMENTS = {
    "ch01-assignment": ("ch01_data/assignment.ipynb", "homework: near-duplicates and an honest split", 20),
    "ch02-assignment": ("ch02_tokenizer/assignment.ipynb", "homework: byte-pair encoding", 20),
    "ch03-assignment": ("ch03_attention/assignment.ipynb", "homework: attention", 20),
    "ch04-assignment": ("ch04_gpt/assignment.ipynb", "homework: a block, and sampling from it", 20),
    "ch05-assignment": ("ch05_pretrain/assignment.ipynb", "homework: loss, optimizer, resume", 20),
    "ch06-assignment": ("ch06_finetune/assignment.ipynb", "homework: fine-tuning", 20),
}
# the exercises of a chapter and its deep dives, worked out
SOLUTIONS = {
    "ch01-solutions": ("ch01_data/solutions.ipynb", "the exercises of chapter 1, worked out", 80),
    "ch02-solutions": ("ch02_tokenizer/solutions.ipynb", "the exercises of chapter 2, worked out", 60),
    "ch03-solutions": ("ch03_attention/solutions.ipynb", "the exercises of chapter 3, worked out", 80),
    "ch04-solutions": ("ch04_gpt/solutions.ipynb", "the exercises of chapter 4, worked out", 90),
    "ch05-solutions": ("ch05_pretrain/solutions.ipynb", "the exercises of chapter 5, worked out", 100),
    "ch06-solutions": ("ch06_finetune/solutions.ipynb", "the exercises of chapter 6, worked out", 130),
}
NOTEBOOKS = dict(CHAPTERS, **DEEP_DIVES, **SOLUTIONS, **ASSIGNMENTS)

MODELS = "smollm2, storyteller (once chapter 6 has run), or the folder of another"
ADAPTERS = "LoRA for that model: tasks (the course's own, for smollm2), one that chapter 6 has saved, or its folder"

BOOK_FORMS = ("html", "pdf", "epub")

# what is measured, and the module that says how
BENCHES = {name: "tests.bench_" + name
           for name in ("limits", "tokenizer", "data", "model", "train", "finetune", "generate")}


def main(argv):
    arguments = parse(argv)
    if arguments.command in ("export", "links"):  # these need nothing installed
        return {"export": export, "links": links}[arguments.command](arguments)
    more = arguments.command in ("test", "bench", "assignments", "book")
    requirements = [REQUIREMENTS] + ([TEST_REQUIREMENTS] if more else [])
    python = ready_environment(requirements)
    if not same_environment(python):
        return hand_over(python, argv)
    commands = {"run": run, "test": test, "lab": lab, "chat": chat, "serve": serve, "bench": bench,
                "assignments": assignments, "book": book}
    return commands[arguments.command](arguments)


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="course.py", description="Bytes to Chat: build a large language model from raw text.",
        epilog="Everything that runs make lies under workspace/ (COURSE_WORKSPACE moves it). "
               "COURSE_DEVICE=cpu|cuda|mps chooses the device.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("run", help="execute the chapters in order, from raw text to a model that answers")
    command.add_argument("notebooks", nargs="*", metavar="ch01",
                         help="only these chapters or deep dives (%s)" % ", ".join(DEEP_DIVES))
    command.add_argument("--all", action="store_true", help="all chapters and all deep dives")
    command.add_argument("--save", action="store_true",
                         help="write the outputs into the notebooks themselves (for maintainers)")
    command = commands.add_parser("test", help="every test and every notebook; further arguments go to pytest")
    command.add_argument("pytest", nargs="*", metavar="PATH", help="only these test files or notebooks")
    command = commands.add_parser("lab", help="JupyterLab on this machine; saving a notebook rewrites its module")
    command.add_argument("--port", type=int, default=8888)
    command.add_argument("--no-browser", action="store_true")
    command = commands.add_parser("chat", help="talk to SmolLM2-135M, or another model, on the course's own code")
    command.add_argument("--model", default="smollm2", help=MODELS)
    command.add_argument("--adapter", default=None, metavar="NAME_OR_FOLDER", help=ADAPTERS)
    command.add_argument("--system", default=None, help="a system prompt")
    command.add_argument("--temperature", type=float, default=0.2)
    command.add_argument("--top-p", type=float, default=0.9)
    command.add_argument("--seed", type=int, default=None, help="the same seed gives the same answers")
    command = commands.add_parser("serve", help="an OpenAI-compatible address for the programs on this machine")
    command.add_argument("--model", default="smollm2", help=MODELS)
    command.add_argument("--adapter", default=None, metavar="NAME_OR_FOLDER", help=ADAPTERS)
    command.add_argument("--port", type=int, default=8000, help="8000 if not given; 0 takes any that is free")
    command.add_argument("--key", default=None,
                         help="answer only those who send it; COURSE_API_KEY keeps it out of the list of processes")
    command.add_argument("--at-once", type=int, default=16, help="answers that share a step of the model (16)")
    command.add_argument("--clients", type=int, default=64, help="requests under way, waiting ones too (64)")
    command = commands.add_parser("export", help="write each chapter's module from its notebook")
    command.add_argument("--check", action="store_true", help="only say what differs; exit code 1 if anything does")
    parse_assignments(commands.add_parser("assignments", help="homework: release, grade, feedback, check"))
    command = commands.add_parser("book", help="the course as a web site, a PDF and an EPUB")
    command.add_argument("forms", nargs="*", metavar="FORM", help="one or more of html, pdf, epub; all if not given")
    command.add_argument("--out", type=Path, default=None, metavar="DIR", help="where to (workspace/book)")
    command = commands.add_parser("links", help="write the badges and launch links of a fork into every notebook")
    command.add_argument("repository", nargs="?", metavar="OWNER/REPO",
                         help="the fork on GitHub; without it, the one that pyproject.toml names")
    command.add_argument("--branch", default=None, help="the branch that the links open (main)")
    command.add_argument("--hub", default=None, metavar="URL", help="your JupyterHub, for the nbgitpuller links")
    command.add_argument("--check", action="store_true", help="only say what differs; exit code 1 if anything does")
    command = commands.add_parser("bench", help="measure this course against the usual libraries, interleaved")
    command.add_argument("names", nargs="*", metavar="NAME", help="one or more of %s; or all" % ", ".join(BENCHES))
    command.add_argument("--rounds", type=int, default=5, help="timed runs of each contender; medians are shown")
    command.add_argument("--quick", action="store_true", help="small sizes and one round: does it run at all?")
    command.add_argument("--save", action="store_true",
                         help="write the last figures of all into docs/measurements.md and README (for maintainers)")
    arguments = parser.parse_args(argv)
    if getattr(arguments, "quick", False) and arguments.save:
        parser.error("--save writes figures that people rely on; those of --quick are none")
    for given, what, table in (("notebooks", "notebook", NOTEBOOKS), ("names", "bench", dict(BENCHES, all="")),
                               ("chapters", "chapter", CHAPTERS), ("forms", "form of the book", BOOK_FORMS)):
        for name in getattr(arguments, given, []):
            if name not in table:
                parser.error("there is no %s %r; there are %s" % (what, name, ", ".join(table)))
    if getattr(arguments, "rounds", 1) < 1:
        parser.error("--rounds is %d; it must be at least 1" % arguments.rounds)
    return arguments


def parse_assignments(parser):
    """``assignments release|grade|feedback|check``, each with its own help."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    task = tasks.add_parser("release", help="write the students' copies, without solutions and hidden tests")
    task.add_argument("folder", metavar="DIR", type=Path)
    task.add_argument("--chapters", nargs="+", default=[], metavar="ch03", help="only these; all if not given")
    task.add_argument("--whole-course", action="store_true",
                      help="the whole course with the students' copies in it, to push as your class's repository")
    task = tasks.add_parser("grade", help="run and grade a folder of notebooks, each in a sandbox of its own")
    task.add_argument("submissions", metavar="SUBMISSIONS", type=Path,
                      help="NAME.ipynb, NAME/assignment.ipynb, or the folder that Moodle, Canvas or nbgrader collects")
    task.add_argument("--out", type=Path, default=None, metavar="DIR",
                      help="where grades.csv and feedback/ go (workspace/grades/ and the folder's name)")
    task.add_argument("--chapter", choices=list(CHAPTERS), default=None,
                      help="for notebooks that do not say it themselves")
    task.add_argument("--columns", choices=("plain", "canvas", "moodle"), default="plain",
                      help="write the grades also in the columns that Canvas or Moodle imports")
    task.add_argument("--jobs", type=int, default=2, help="submissions at a time (2)")
    task.add_argument("--seconds", type=float, default=120, help="time for one submission (120)")
    task.add_argument("--memory", type=float, default=2.5, metavar="GB", help="memory for one submission (2.5)")
    task.add_argument("--again", action="store_true", help="also run what has not changed since the last grading")
    task.add_argument("--without-sandbox", action="store_true",
                      help="where bubblewrap is not to be had: students' code then runs with your rights")
    task = tasks.add_parser("feedback", help="write the feedback pages again, with the points you entered by hand")
    task.add_argument("folder", metavar="DIR", type=Path, help="what grade wrote")
    task = tasks.add_parser("check", help="try many wrong and right solutions: do the tests tell them apart?")
    task.add_argument("chapters", nargs="*", default=[], metavar="ch03", help="only these; all if not given")


# ---------------------------------------------------------------- the environment


def ready_environment(requirements):
    """The Python of the active virtual environment, or of .venv, with the requirements installed."""
    folder = active_environment() or make_environment(ROOT / ".venv")
    python = environment_python(folder)
    stamp = folder / ".bytes-to-chat.json"
    try:
        installed = json.loads(stamp.read_text())
    except (OSError, ValueError):
        installed = {}
    wanted = {path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
              for path in requirements}
    if any(installed.get(name) != digest for name, digest in wanted.items()):
        install(python, folder, requirements)
        stamp.write_text(json.dumps(dict(installed, **wanted), indent=1) + "\n")
    return python


def active_environment():
    """The folder of the active virtual (or conda) environment, or None."""
    if sys.prefix != sys.base_prefix or (Path(sys.prefix) / "conda-meta").is_dir():
        return Path(sys.prefix)
    folder = os.environ.get("VIRTUAL_ENV")
    return Path(folder) if folder and environment_python(Path(folder)).exists() else None


def environment_python(folder):
    """Where a virtual environment keeps its Python."""
    if os.name == "nt":
        scripts = folder / "Scripts" / "python.exe"
        return scripts if scripts.exists() or not (folder / "python.exe").exists() else folder / "python.exe"
    return folder / "bin" / "python"


def make_environment(folder):
    """Make .venv with its pip, or say what this system lacks. Half-made ones do not stay."""
    python = environment_python(folder)
    if python.exists() and subprocess.call([str(python), "-c", "import pip"], stderr=subprocess.DEVNULL) == 0:
        return folder
    need_space(ROOT)
    if folder.exists():
        print("%s is incomplete: making it again." % folder.name, flush=True)
    else:
        print("Making a virtual environment in %s" % folder.name, flush=True)
    result = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        fail(
            "This Python (%s) could not make a virtual environment:\n%s\n"
            "On Debian and Ubuntu the module comes separately: sudo apt install python3-venv\n"
            "Or activate an environment of your own (venv, conda, uv venv --seed) and run the same command again."
            % (sys.executable, indented(result.stdout)))
    return folder


def install(python, folder, requirements):
    """pip install -r, with pip's own progress, and a way out of the usual failures."""
    need_space(folder)
    names = " and ".join(path.relative_to(ROOT).as_posix() for path in requirements)
    print("Installing %s into %s (once; some minutes)" % (names, folder.name), flush=True)
    if subprocess.call([str(python), "-c", "import pip"], stderr=subprocess.DEVNULL):
        fail("The environment %s has no pip. Run: %s -m ensurepip (with uv: uv venv --seed)" % (folder, python))
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install"]
    command += [] if sys.stdout.isatty() else ["--quiet", "--progress-bar", "off"]
    for path in requirements:
        command += ["-r", str(path)]
    if subprocess.call(command):
        fail(
            "pip could not install %s (its message is above). The usual causes:\n"
            "  no network: connect, or point pip to a mirror or a folder of wheels (PIP_INDEX_URL, PIP_FIND_LINKS)\n"
            "  no matching version of torch: this Python is %d.%d; use 3.11 to 3.14, 64-bit\n"
            "  disk full: %.1f GB are free in %s\n"
            "Run the same command again afterwards: what was installed already stays."
            % ((names,) + tuple(sys.version_info[:2]) + (shutil.disk_usage(folder).free / 1e9, folder)))


def need_space(folder):
    """Stop before an install that would not fit."""
    free = shutil.disk_usage(folder).free
    if free < INSTALL_BYTES:
        fail("The disk is too full: %.1f GB are free in %s, and installing needs %.1f GB. Free some space, "
             "or activate a virtual environment on another disk, and run the same command again."
             % (free / 1e9, folder, INSTALL_BYTES / 1e9))


def same_environment(python):
    """Whether this very process runs in the environment of that Python."""
    return Path(sys.prefix).resolve() == python.parent.parent.resolve() or Path(sys.executable) == python


def hand_over(python, argv):
    """Run the same command in the environment's Python, and pass its exit code on."""
    process = subprocess.Popen([str(python), str(ROOT / "course.py")] + list(argv))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches the child too: let it end in its own way
            continue


def fail(message):
    sys.exit("\n" + message)


def indented(text):
    return "\n".join("    " + line for line in text.strip().splitlines())


# ---------------------------------------------------------------- the commands


def run(arguments):
    from utils.notebooks import Job, NotebookError, run_notebooks

    names = arguments.notebooks or list(NOTEBOOKS if arguments.all else CHAPTERS)
    jobs = [Job(ROOT / path, title, seconds) for path, title, seconds in (NOTEBOOKS[name] for name in names)]
    check_modules()
    try:
        run_notebooks(jobs, save=arguments.save)
    except NotebookError as error:
        fail(str(error))
    report(names)
    if arguments.save and set(names) >= set(CHAPTERS):
        from utils.overview import draw_overview

        notebooks = [ROOT / path for path, _, _ in CHAPTERS.values()]
        draw_overview(notebooks, ROOT / "docs" / "overview.png")
    return 0


def check_modules():
    """Chapters import the modules of earlier ones: write those that are behind their notebooks."""
    from utils.export import export_all

    problems = export_all()
    if problems:
        fail("\n".join(problems))


def report(names):
    """What the model says, its loss against the baselines, and where everything lies."""
    from utils.workspace import short_path, workspace

    def read(*parts):
        path = workspace(*parts[:-1]) / parts[-1]
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    if "ch05" in names:
        pretrained = read("pretrain", "first_storyteller", "results.json")
        print("\nHeld-out bits per byte (lower is better)")
        for name, value in pretrained.get("bits_per_byte", {}).items():
            print("  %-28s %.3f" % (name, value))
        print("\nThe pretrained model continues a story:\n%s" % indented(pretrained.get("sample", "")))
    if "ch06" in names:
        finetuned = read("finetune", "results.json")
        for exchange in finetuned.get("exchanges", []):
            print("\n%s is asked: %s\n%s" % (exchange["model"], exchange["question"], indented(exchange["answer"])))
    print("\nWhere everything lies (delete any of it: it can be made again)")
    folders = [("data", "texts and weights as downloaded"), ("tokens", "the tokenizer and token shards"),
               ("pretrain", "the pretrained model"), ("finetune", "the fine-tuned models"),
               ("notebooks", "the notebooks as they ran here")]
    for folder, holds in folders:
        if any((workspace() / folder).glob("*")):
            print("  %-22s %s" % (short_path(workspace(folder)) + "/", holds))
    print("\nNext: python3 course.py chat   or   python3 course.py lab")


def test(arguments):
    from utils.export import chapter_notebooks
    from utils.workspace import workspace

    problems = export(argparse.Namespace(check=True))
    if problems:
        return problems
    environment = dict(os.environ, JUPYTER_PREFER_ENV_PATH="1")
    if "COURSE_WORKSPACE" not in os.environ:  # tests never touch what a reader's own runs made
        share_downloads(workspace("data", "packages"), workspace("test", "data", "packages"))
        environment["COURSE_WORKSPACE"] = str(workspace("test"))
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=900",
               "--durations=15"]
    cores = os.cpu_count() or 1
    if arguments.pytest:
        command += arguments.pytest
    else:  # two files or notebooks at a time, each on half of the cores: done in little more than half the time
        command += ["tests"] + [str(path.relative_to(ROOT)) for path in chapter_notebooks()]
        command += ["--numprocesses=%d" % min(2, cores), "--dist=loadfile"]
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // 2)))
    return subprocess.call(command, cwd=str(ROOT), env=environment)


def share_downloads(source, target):
    """Give the tests' workspace the files that were downloaded already."""
    for path in source.iterdir():
        if path.is_file() and not (target / path.name).exists():
            try:
                os.link(str(path), str(target / path.name))
            except OSError:
                shutil.copy2(str(path), str(target / path.name))


def lab(arguments):
    command = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=%d" % arguments.port,
               "--ServerApp.root_dir=%s" % ROOT, "--config=%s" % (ROOT / "utils" / "jupyter_server_config.py")]
    command += ["--ServerApp.open_browser=False"] if arguments.no_browser else []
    if getattr(os, "geteuid", lambda: 1)() == 0:  # containers: still loopback only, still with a token
        command += ["--ServerApp.allow_root=True"]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    print("JupyterLab starts; its address, with the token, follows. Ctrl-C twice ends it.\n"
          "Saving a chapter's notebook rewrites the chapter's module.", flush=True)
    return subprocess.call(command, cwd=str(ROOT), env=environment)


def open_model(arguments):
    """Model, tokenizer, name and system prompt that --model and --adapter ask for."""
    from ch06_finetune.finetune import open_chat_model

    return open_chat_model(arguments.model, arguments.adapter)


def chat(arguments):
    from ch06_finetune.finetune import Assistant
    from utils.terminal_chat import talk
    from utils.workspace import workspace

    assistant = Assistant(*open_model(arguments), temperature=arguments.temperature, top_p=arguments.top_p,
                          seed=arguments.seed)
    return talk(assistant, system=arguments.system, history=workspace("chat") / "typed.txt")


def serve(arguments):
    from utils.server import ChatServer, reserve_port

    key = os.environ.get("COURSE_API_KEY") if arguments.key is None else arguments.key
    if key is not None and not key.strip():
        fail("The key is empty: give --key one or more letters, or leave it out (and COURSE_API_KEY unset).")
    sockets = reserve_port(arguments.port)  # before a model is loaded for nothing
    from ch06_finetune.serving import Engine

    engine = Engine(*open_model(arguments), max_rows=arguments.at_once)
    server = ChatServer(engine, sockets, key=key, max_clients=arguments.clients,
                        log=lambda line: print(line, flush=True))
    print("%s answers programs on this machine%s, at %s\nCtrl-C ends it."
          % (engine.name, " that send the key" if key else "", server.address), flush=True)
    server.run()
    return 0


def bench(arguments):
    import importlib

    from utils.bench_report import compare, save_measurements

    check_modules()
    names = list(BENCHES) if not arguments.names or "all" in arguments.names else arguments.names
    if "limits" not in names and not arguments.quick:  # the machine itself is measured in the same run
        names = ["limits"] + names
    for name in names:
        rows = importlib.import_module(BENCHES[name]).rows(arguments.quick)
        compare(rows, 1 if arguments.quick else arguments.rounds, name, "quick" if arguments.quick else "full")
    if arguments.save:
        print("Written to " + " and ".join(save_measurements(list(BENCHES))))
    return 0


def assignments(arguments):
    from utils import classroom
    from utils.workspace import short_path, workspace

    if arguments.task == "check":
        from tests.attempts import chapters, table

        text, problems = table(arguments.chapters or chapters())
        print(text)
        fail("\n".join(problems)) if problems else print("\nEvery test catches what it is meant for.")
        return 0
    names = getattr(arguments, "chapters", []) or list(CHAPTERS)
    sources = [ROOT / ASSIGNMENTS[name + "-assignment"][0] for name in names]
    if arguments.task == "release":
        written = classroom.release(sources, arguments.folder, whole_course=arguments.whole_course)
        print("\n".join(short_path(path) for path in written))
    elif arguments.task == "grade":
        out = arguments.out or workspace("grades") / arguments.submissions.resolve().name
        table = classroom.grade(
            arguments.submissions, sources, out, chapter=arguments.chapter, jobs=arguments.jobs,
            seconds=arguments.seconds, memory_gb=arguments.memory, unsafe=arguments.without_sandbox,
            columns=arguments.columns, again=arguments.again)
        print("Grades: %s\nFeedback: %s" % (short_path(table), short_path(out / "feedback")))
    else:
        classroom.feedback(arguments.folder)
    return 0


def book(arguments):
    from utils.book import BookError, make_book
    from utils.workspace import short_path, workspace

    out = arguments.out or workspace("book")
    try:
        made = make_book(ROOT, out, arguments.forms or list(BOOK_FORMS), cover_picture)
    except BookError as error:
        fail(str(error))
    for form in made:
        print("%s" % short_path(form.path / "index.html" if form.form == "html" else form.path))
    return 0


def cover_picture():
    """What the book's cover shows: where the committed storyteller looks while it reads a sentence."""
    import torch

    from ch02_tokenizer.tokenizer import BPETokenizer
    from ch04_gpt.gpt import GPT
    from ch04_gpt.inside import look_inside
    from utils.book.cover import Cover

    folder = ROOT / "ch05_pretrain" / "storyteller"
    model, tokenizer = GPT.from_pretrained(folder).eval(), BPETokenizer.load(folder / "tokenizer.json")
    token_ids = tokenizer.encode("Far out in the ocean, where the water is as blue as the prettiest cornflower")
    with torch.no_grad():
        weights = look_inside(model, torch.tensor([token_ids])).weights
    return Cover(weights.numpy(), tuple(tokenizer.decode([number]) for number in token_ids))


def links(arguments):
    from utils.launch import write_links

    problems = write_links(arguments.repository, arguments.branch, hub=arguments.hub, check=arguments.check)
    for problem in problems:
        print(problem, file=sys.stderr if arguments.check else sys.stdout)
    if arguments.check and not problems:
        print("Every launch link is in place.")
    return 1 if arguments.check and problems else 0


def export(arguments):
    from utils.export import export_all

    problems = export_all(check=arguments.check)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print("Every module is what its notebook exports.")
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
    except (OSError, ValueError, ImportError) as problem:
        if os.environ.get("COURSE_TRACEBACK"):
            raise
        fail("%s\n(COURSE_TRACEBACK=1 shows where.)" % problem)
