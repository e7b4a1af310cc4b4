"""Submissions that try to break the grader, with the points they must get and what the teacher must be told.

Each is the small assignment's right solution (90 points without the open question) with some cells replaced. An
attack that spies raises an error whose message says what it could reach; it must say "reached []".
"""

from __future__ import annotations

from dataclasses import dataclass

WRONG_TOTAL = "def total(values):\n    return 123.0\n"
WRONG_DOUBLE = "def double(values):\n    return values\n"
SPY = """def double(values):
    reached = []
    for place in {places!r}:
        try:
            {attempt}
            reached.append(place)
        except Exception:
            pass
    raise ValueError(f"reached {{reached}}")
"""

KEY = """import hashlib, hmac, json, linecache, re, sys
text = "".join("".join(entry[2]) for entry in list(linecache.cache.values()) if len(entry) == 4)
key = re.search(r"get_ipython\\(\\), '(\\w+)'", text)[1]
guard = next(name for name in vars(sys)["modules"] if name.startswith("course_"))

class Fake:
    def plain(self, value, depth=0):
        return True
    def reached(self, token):
        self.token = token
    def given(self, names):
        pass
    def report(self, challenge, names):
        body = json.dumps([challenge, [], getattr(self, "token", "")])
        return json.dumps([body, hmac.new(key.encode(), body.encode(), hashlib.sha256).hexdigest()])

vars(sys)["modules"][guard] = Fake()
"""


@dataclass(frozen=True)
class Attack:
    """``cells`` replace the student's; ``points`` must come out, ``remark`` must be part of the remarks."""

    cells: dict[str, str]
    points: float
    remark: str = ""
    own: tuple[str, ...] = ()  # cells of the student's own at the beginning, after the imports
    says: str = ""  # part of the feedback page


def answer(code: str, points: float = 70, remark: str = "", **more) -> Attack:
    return Attack({"answer_cell": code}, points, remark, **more)


def cheat(own: str, remark: str, points: float = 50, **more) -> Attack:
    """A wrong total (40 points lost) and a cell that tries to have it pass."""
    return Attack({"total": WRONG_TOTAL}, points, remark, own=(own,), **more)


ATTACKS = {
    "right": Attack({}, 90),
    "endless": Attack({"double": "def double(values):\n    while True:\n        pass"}, 60, "time limit"),
    "stubborn": answer("while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n"
                       "        pass", 70, "could not be interrupted"),
    "leaves-hard": Attack({"double": "import os\ndef double(values):\n    os._exit(0)"}, 60, "ended the kernel"),
    "leaves": Attack({"double": "import sys\ndef double(values):\n    sys.exit(0)"}, 60),
    "quits": answer("exit()", 70),
    "kills-itself": answer("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", 70, "ended the kernel"),
    "kills-its-parent": answer("import os\nfor process in (os.getppid(), -1, 1):\n    try:\n"
                               "        os.kill(process, 9)\n    except OSError:\n        pass", 70,
                               "sends signals"),
    "forks": answer("import os, time\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n"
                    "        time.sleep(0.2)", 70, "starts processes"),
    "fills-the-disk": answer("for place in range(1000):\n    with open(f'/tmp/{place}', 'wb') as file:\n"
                             "        file.write(bytes(20_000_000))", 70),
    "fills-its-folder": answer("with open('here', 'wb') as file:\n    while True:\n"
                               "        file.write(bytes(20_000_000))", 70),
    "fills-the-sockets": answer("import time\nopen('/sockets/x', 'w').write('x')\ntime.sleep(2)\nanswer = 6", 70,
                                "sockets"),
    "allocates": answer("kept = []\nwhile True:\n    kept.append(bytearray(b'x') * 50_000_000)", 70),
    "shares-memory": answer("import mmap\nshared = mmap.mmap(-1, 6 << 30)\nfor place in range(0, 6 << 30, 4096):\n"
                            "    shared[place] = 1", 70, "GB of memory"),
    "prints": answer("while True:\n    print('x' * 1_000_000)", 70, "answer_cell: "),
    "long-error": answer("raise ValueError('x' * 50_000_000)", 70),
    "patches-allclose": cheat("np.allclose = lambda *a, **k: True", "numpy.allclose"),
    "patches-module": cheat("class Fake:\n    allclose = staticmethod(lambda *a: True)\nnp = Fake()",
                            "total_close: np"),
    "patches-all": cheat("import builtins\nbuiltins.all = lambda each: True", "all replaced", 0),
    "shadows-all": cheat("def all(each):\n    return True", "all replaced"),
    "patches-error": cheat("import builtins\nbuiltins.AssertionError = KeyboardInterrupt", "AssertionError", 0),
    "handles-errors": cheat("get_ipython().set_custom_exc((Exception,), lambda *a, **k: None)",
                            "handler of exceptions", 0),
    "patches-run-cell": cheat("import IPython\nshell = get_ipython()\nold = shell.run_cell\n"
                              "def run(raw_cell, *a, **k):\n"
                              "    return old(raw_cell.replace('assert', 'None and'), *a, **k)\n"
                              "shell.run_cell = run", "IPython's shell", 0),
    "transforms-input": cheat("get_ipython().input_transformers_post.append("
                              "lambda lines: ['pass\\n' if 'assert' in line else line for line in lines])",
                              "input transformers", 0),
    "transforms-ast": cheat("import ast\nclass No(ast.NodeTransformer):\n    def visit_Assert(self, node):\n"
                            "        return ast.Pass()\nget_ipython().ast_transformers.append(No())",
                            "AST transformers", 0),
    "traces": cheat("import sys\nsys.settrace(lambda *a: None)", "trace function", 0),
    "equals-everything": Attack({"answer_cell": "class Any:\n    def __eq__(self, other):\n        return True\n"
                                 "    def __sub__(self, other):\n        return self\n    def __abs__(self):\n"
                                 "        return self\n    def __lt__(self, other):\n        return True\n"
                                 "answer = Any()", "double": "def double(values):\n    class Same:\n"
                                 "        def __eq__(self, other):\n            return True\n"
                                 "    return [Same() for each in values]",
                                 "total": "class Sum(float):\n    __eq__ = lambda self, other: True\n"
                                 "def total(values):\n    return Sum(7.75)"}, 0, "defines __eq__"),
    "forges-reply": Attack({"double": "def double(values):\n    print('{\"status\": \"ok\", \"points\": 30}')\n"
                            "    kernel = get_ipython().kernel\n"
                            "    content = {'status': 'ok', 'execution_count': 1, 'user_expressions': {}}\n"
                            "    for name in ('shell_socket', 'shell_stream'):\n        try:\n"
                            "            kernel.session.send(getattr(kernel, name), 'execute_reply', content,\n"
                            "                parent=kernel.get_parent(), ident=kernel._parent_ident['shell'])\n"
                            "        except Exception:\n            pass\n    raise SystemExit"}, 60,
                            "get_ipython"),
    "forges-token": Attack({"double": "import sys\ndef double(values):\n"
                            "    for name, module in list(sys.modules.items()):\n"
                            "        if name.startswith('course_'):\n"
                            "            module.reached('0123456789abcdef')\n"
                            "            print('0123456789abcdef')\n"
                            "    raise SystemExit"}, 60, "sys.modules"),
    "removes-the-guard": cheat("import sys\nfor name in [one for one in sys.modules if 'course_' in one]:\n"
                               "    del sys.modules[name]", "guard", 0),
    "reads-the-key": cheat(KEY, "reads the text of cells"),
    "quotes-the-check": Attack({"double": "import inspect\ndef double(values):\n"
                                "    frame = inspect.currentframe().f_back\n"
                                "    raise ValueError(inspect.getsource(frame))"}, 60, "withheld",
                               says="withheld"),
    "html": Attack({"double": "def double(values):\n    raise ValueError('<script>alert(1)</script>')",
                    "why": "<script src=//example.org/x.js></script><img src=x onerror=alert(1)>"}, 60,
                   says="&lt;script&gt;alert(1)&lt;/script&gt;"),
    "forbidden": answer("import numpy\nanswer = int(numpy.cumsum([2, 4])[-1])", 90,
                        "numpy.cumsum, which the assignment forbids"),
    "magics": answer("%reset -f\n!echo hello\nanswer = 6", 90),
    "broken-cell": answer("answer = (", 70),
    "odd-letters": Attack({}, 90, own=("text = '\ud800 \x00 é'",)),
}
