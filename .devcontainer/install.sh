#!/usr/bin/env bash
# The course's environment with the CPU build of PyTorch, where course.py looks for it: in .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .venv
.venv/bin/python -m pip install --quiet uv
.venv/bin/python -m uv pip install --python .venv/bin/python --torch-backend=cpu --requirements requirements.txt
