"""Load tasks of EleutherAI's lm-evaluation-harness, an optional extra, and let it judge a model.

https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.errors import ConfigError
from src.training.quiet import silent

RESAMPLES = 1000
"""Bootstrap draws for the error of a perplexity; the error of a mean is computed, not drawn."""


def harness(module: str) -> Any:
    """Import a module of the lm-evaluation-harness by its name below ``lm_eval``.

    Raises:
        ConfigError: the harness is not installed.
    """
    try:
        return importlib.import_module(f"lm_eval.{module}".rstrip("."))
    except ImportError as e:
        raise ConfigError(
            f"--tasks: needs the lm-evaluation-harness ({e}). Run: pip install -e '.[tasks]'"
        ) from e


def load_tasks(names: Sequence[str], include: str | None = None, data_dir: str = ".") -> list[Any]:
    """Return the tasks and groups of these names as the harness's own objects, with their data read.

    Args:
        names: tasks, groups or tags of the harness, or tasks of ``include``.
        include: a folder with task YAMLs; they come before the harness's own.
        data_dir: where relative ``data_files`` of a task lie.

    Raises:
        ConfigError: a folder does not exist, a task is unknown, or its data cannot be read.
    """
    for option, folder in (("--include-path", include), ("--data-dir", data_dir)):
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"{option}: there is no directory '{folder}'.")
    manager_of, include = harness("tasks").TaskManager, include and str(Path(include).resolve())
    tasks = list[Any]()
    # The harness warns of what is meant, such as a local task in place of its own; the Hub of each retry.
    with silent("lm_eval", "huggingface_hub", "datasets"), contextlib.chdir(data_dir):
        manager = manager_of(include_path=include, include_defaults=False)
        if not set(names) <= set(manager.all_subtasks):  # reading all of the harness's own takes seconds
            manager = manager_of(include_path=include)
        _check_known(names, manager.all_tasks)
        for name in names:
            try:
                loaded = manager.load([name])
            except Exception as e:  # a task is a program: templates, functions, downloads
                raise _unreadable(name, e, data_dir) from e
            group = loaded["groups"].get(name)
            tasks += loaded["tasks"].values() if group is None else [group]
    return tasks


def _check_known(names: Sequence[str], known: Sequence[str]) -> None:
    if not names:
        raise ConfigError("--tasks: names no task. Give names, separated by commas: --tasks piqa,arc_easy.")
    if unknown := [name for name in names if name not in known]:
        near = {name: difflib.get_close_matches(name, known, n=4) for name in unknown}
        hints = [f"'{name}' (near: {', '.join(near[name]) or 'nothing'})" for name in unknown]
        raise ConfigError(
            f"--tasks: unknown {', '.join(hints)}. Give names of the lm-evaluation-harness, "
            f"or of YAMLs in the folder --include-path."
        )


def _unreadable(name: str, error: Exception, data_dir: str) -> ConfigError:
    hint = ""
    if isinstance(error, ConnectionError):
        hint = (
            " Where the Hub cannot be reached, use local task files and data: "
            "--include-path configs/tasks --data-dir DIR (docs/evaluate.md)."
        )
    elif isinstance(error, FileNotFoundError):
        hint = f" Data files of local tasks are looked for in --data-dir ('{data_dir}')."
    return ConfigError(f"--tasks: '{name}' cannot be loaded: {_first_line(error)}.{hint}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Any],
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    new_tokens: int | None = None,
) -> dict[str, Any]:
    """Let the harness judge one model; return the harness's results, with every answer under ``samples``.

    Args:
        model: the model to judge, in eval mode.
        tokenizer: its tokenizer.
        tasks: what :func:`load_tasks` returned.
        shots: solved examples before each document; None is the task's own number.
        limit: documents of each task; None is all.
        batch_size: requests at once.
        chat: whether documents are asked as chats, by the tokenizer's template.
        new_tokens: largest number of tokens of a written answer; None is the task's own number.

    Raises:
        ConfigError: the harness refuses, such as a task that would run code the model wrote; or there is no
            template to ask by.
    """
    if chat and not tokenizer.chat_template:
        raise ConfigError(
            f"--chat: the tokenizer '{tokenizer.name_or_path}' has no chat template. Leave it out."
        )
    with silent("lm_eval"):
        lm = harness("models.huggingface").HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, trust_remote_code=False
        )
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no bootstrap in forks of a process that holds a model
    manager = harness("tasks").TaskManager(include_defaults=False)  # all are loaded: nothing to look up
    options = {
        "num_fewshot": shots, "limit": limit, "bootstrap_iters": RESAMPLES, "log_samples": True,
        "apply_chat_template": chat, "gen_kwargs": {"max_gen_toks": new_tokens} if new_tokens else None,
    }  # fmt: skip
    judge = harness("evaluator").simple_evaluate
    try:
        with contextlib.redirect_stdout(sys.stderr):
            results: dict[str, Any] = judge(model=lm, tasks=tasks, task_manager=manager, **options)
            return results
    except (AssertionError, ValueError) as e:  # it asserts that a written answer has room
        raise ConfigError(f"--tasks: the lm-evaluation-harness refuses: {_first_line(e)}.") from e
