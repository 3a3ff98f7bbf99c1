"""Options of a judgement by tasks: what is refused before a model is loaded, and ratios of nothing."""

from __future__ import annotations

import sys

import pytest

from src.errors import ConfigError
from src.evaluate.tasks import compare
from src.evaluate.verb import main


def test_a_teacher_that_scores_nothing_gives_no_ratio() -> None:
    student = {"t": {"acc": {"score": 0.5, "correct": [True, False]}, "perplexity": {"score": 6.0}}}
    compare(student, {"t": {"acc": {"score": 0.0, "correct": [False] * 2}, "perplexity": {"score": 4.0}}})
    assert student["t"]["acc"] == {
        "score": 0.5, "correct": [True, False], "flips": {"lost": 0, "gained": 1, "p": 1.0},
    }  # fmt: skip
    assert student["t"]["perplexity"] == {"score": 6.0, "ratio": 1.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "neither given"),
        ("--data x.jsonl --tasks piqa", "both given"),
        (
            "--data x.jsonl --num-fewshot 2 --data-dir y",
            "--data-dir, --num-fewshot: means nothing with --data",
        ),
        ("--data x.jsonl --chat", "--chat: means nothing with --data"),
        ("--tasks piqa --prompt question", "--prompt: means nothing with --tasks"),
        ("--tasks piqa --num-fewshot -1", "whole number from 0"),
    ],
)
def test_one_kind_of_judgement_at_a_time(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--model", "nothing", *arguments.split()])


def test_without_the_extra_the_command_to_install_it_is_named(monkeypatch) -> None:
    for module in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tasks\]'"):
        main(["--model", "nothing", "--tasks", "piqa"])
