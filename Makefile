# Every target sets up what it needs: on a fresh machine `make demo` or `make test` is the first command.
VENV   ?= .venv
PY     := $(VENV)/bin/python
CLI    := $(PY) -m src.cli
RUN    ?= logs/demo
SEED   ?= 0
TEACHER := assets/arithmetic-teacher
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-full lint types teacher tensorboard clean

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.installed  ## virtual environment and pinned installation

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# ---------------------------------------------------------------- the demo: search, recover, export, judge

demo: $(RUN)/report.json  ## remove 25 % of a small teacher's layers, recover, export, report (<= 10 minutes)
	@$(CLI) report --run $(RUN)

$(RUN)/data/test.jsonl: | $(VENV)/.installed
	$(PY) -m src.data.arithmetic --out $(RUN)/data --train 40000 --validation 256 --test 600 --seed 1000

$(RUN)/mask.json: $(RUN)/data/test.jsonl configs/demo/search.yaml
	$(CLI) fit --config configs/demo/search.yaml --run $(RUN) --seed_everything $(SEED)

$(RUN)/student.ckpt: $(RUN)/mask.json configs/demo/recover.yaml
	$(CLI) fit --config configs/demo/recover.yaml --run $(RUN) --seed_everything $(SEED)

