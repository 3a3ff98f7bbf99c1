"""A search does not end behind its start, however little its steps have told it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src.cli import run
from src.policies import GumbelTopK


def misled(policy: GumbelTopK, *_: Any) -> Tensor:
    """A step that turns the order of the units round."""
    with torch.no_grad():
        policy.logits.neg_()
    return policy.nothing()


def searched(teacher: str, corpus: str, out: Path, *more: str) -> dict[str, Any]:
    """The mask file of one misled step."""
    keys = {
        "model.init_args.model": teacher, "model.init_args.remove": 2, "model.init_args.ratio": "null",
        "model.init_args.draws": 1, "model.init_args.calibration_batches": 2,
        "model.init_args.policy.init_args.polish": "false", "data.init_args.tokenizer": teacher,
        "data.init_args.train": corpus, "data.init_args.validation": corpus, "data.init_args.batch_size": 4,
        "trainer.max_steps": 1, "trainer.accelerator": "cpu", "trainer.logger.init_args.save_dir": out,
        "trainer.logger.init_args.version": "",
    }  # fmt: skip
    given = [f"--{key}={value}" for key, value in keys.items()]
    run(["fit", "--config", "configs/search/gumbel_topk.yaml", *given, *more])
    found: dict[str, Any] = json.loads((out / "search/mask.json").read_text())
    return found


@pytest.mark.parametrize("candidates", [1, 4])
def test_the_first_mask_competes_where_several_do(
    candidates: int, teacher_dir: str, corpus_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain answer of a method, of one candidate, stays what the method says."""
    before = list[Tensor]()
    start = GumbelTopK.start
    monkeypatch.setattr(
        GumbelTopK, "start", lambda self, score: (start(self, score), before.append(score))[0]
    )
    monkeypatch.setattr(GumbelTopK, "surrogate", misled)
    more = f"--model.init_args.policy.init_args.candidates={candidates}"
    mask = searched(teacher_dir, corpus_file, tmp_path, more)
    order = before[0].argsort().tolist()
    first, last = sorted(order[2:]), sorted(order[:-2])
    assert first != last
    assert mask["keep"] == (first if candidates > 1 else last)
    kl, learned = mask["metrics"]["kl"], mask["metrics"]["kl_learned"]
    assert kl < learned if candidates > 1 else kl == learned
