"""Columns of the user's own names are read by every stage of the one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.data.arithmetic import problems
from src.data.columns import WELL_KNOWN
from src.data.options import read_columns
from src.errors import ConfigError
from src.plan.experiment import Experiment
from src.shorten import settings, verb
from src.shorten.text import hold_out, look


def test_columns_that_the_user_names_reach_every_stage(tmp_path: Path, teacher_dir: str) -> None:
    """Under their own names the rows cannot be read, and what a stage reads is what well-known names give."""
    plain, own = tmp_path / "plain.jsonl", tmp_path / "own.jsonl"
    rows = list(problems("train", 200, 0))
    plain.write_text(
        "".join(json.dumps({"prompt": r["question"], "answer": r["answer"]}) + "\n" for r in rows)
    )
    own.write_text(
        "".join(json.dumps({"asked": r["question"], "told": r["answer"], "tools": "x"}) + "\n" for r in rows)
    )
    given = ["--model", teacher_dir, "--train", str(own), "--run", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match=r"data\.columns"):
        verb._chosen(verb.parse(given))
    args = verb.parse([*given, "--prompt", "asked", "--answer", "told", "--ignore", "tools"])
    columns = read_columns(args)
    assert look(teacher_dir, str(own), columns) == look(teacher_dir, str(plain), WELL_KNOWN)
    kept = [json.loads(line)["asked"] for line in hold_out(teacher_dir, str(own), columns).splitlines()]
    assert set(kept) < {row["question"] for row in rows}
    made = verb.stages(args, tmp_path / "run", {"search": [], "recover": []}, verb._facts(args))
    stages = {stage.name: stage for stage in made}
    for name in ("search", "recover"):
        command = [part for part in stages[name].argv if part.startswith("--data.init_args.columns")]
        config = ["--config", settings.RECOVER, "--model.init_args.model", teacher_dir]
        read = Experiment([*config, *command], length=64).data.columns
        assert (read.prompt, read.answer, tuple(read.ignore)) == ("asked", "told", ("tools",))
    judge = stages["evaluate"].argv
    assert judge[judge.index("--prompt") :][:6] == (
        "--prompt",
        "asked",
        "--answer",
        "told",
        "--ignore",
        "tools",
    )
    with pytest.raises(ConfigError, match="--held-out"):
        verb.parse([*given, "--split", "test"])
