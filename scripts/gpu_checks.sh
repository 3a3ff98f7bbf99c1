#!/usr/bin/env bash
# What only a GPU can show, in parts of less than 8 minutes each: results/gpu.json.
#
#   bash scripts/gpu_checks.sh                     every part
#   bash scripts/gpu_checks.sh laws stages/8b      these, and all whose names begin so
#   bash scripts/gpu_checks.sh --list              the names
#
# Each stage trains for a minute, and there are forty-two: --seconds 15 shortens them. Sections are merged into the
# results, so parts may run on different days.
#
# Python is that of .venv if there is one, else python3; PYTHON=... names another. It needs torch with CUDA and the
# packages of pyproject.toml; what is missing is named.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
exec "$python" -m scripts.gpu "$@"
