"""A search whose mask is chosen by short recoveries: its record, its cost, resumed, exported, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from src.cli import main, run
from src.mask import Mask
from src.models.loading import load_model
from src.policies.race import Race
from tests.faults.runs import ended
from tests.integration.test_overlays import SEARCH, arguments
from tests.integration.test_resume import STEPS, Killed, broken_and_resumed, fit

SHORT = {"runners": 4, "steps": 2, "lr": 0.01}
OVERLAY = ["--config", "configs/search/recovered.yaml"]
KEYS = {
    "model.init_args.calibration_batches": 2,
    "model.init_args.remove": 2,
    "model.init_args.ratio": "null",
}
GIVEN = [*OVERLAY, *(f"--model.init_args.race.init_args.{key}={value}" for key, value in SHORT.items())]


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["layer", "half"])
def test_the_winner_is_written_with_what_it_cost(
    unit: str, tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    keys = {
        "model.init_args.model": teacher_dir,
        "model.init_args.unit": unit,
        "trainer.max_steps": 2,
        **KEYS,
    }
    given = arguments(tmp_path / "raced", corpus_file, **keys)
    still = [] if unit == "layer" else ["--model.init_args.race.init_args.lr=1e-12"]
    done = run(["fit", "--config", SEARCH, *given, *GIVEN, *still]).model
    file = tmp_path / "raced" / "search" / "run" / "mask.json"
    mask, weights = Mask.load(file), load_model(teacher_dir).state_dict()
    assert mask.depth == 4
    if still:  # who does not learn is the cut, whose gates were measured
        assert mask.metrics["kl_recovered"] == pytest.approx(mask.metrics["kl"], rel=1e-4)
    else:
        assert mask.metrics["kl_recovered"] < mask.metrics["kl"]
    cost = mask.metrics["race_forward_tokens"]
    if unit == "layer":  # the same search without a race
        plain = arguments(tmp_path / "plain", corpus_file, **keys)
        assert done.forward_tokens - run(["fit", "--config", SEARCH, *plain]).model.forward_tokens == (
            pytest.approx(cost)
        )
    assert mask.metrics["forward_tokens"] == done.forward_tokens
    kept = done.head.model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights.items())  # the search's stay
    main(["export", "--mask", str(file), "--out", str(tmp_path / "out")])
    assert load_model(str(tmp_path / "out")).config.num_hidden_layers == 4


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_mask(
    tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    extra = [*(f"--{key}={value}" for key, value in KEYS.items()), *GIVEN]
    broken_and_resumed(SEARCH, tmp_path, *extra, teacher=teacher_dir, corpus=corpus_file)
    one, other = (next((tmp_path / name).rglob("mask.json")).read_bytes() for name in ("whole", "broken"))
    assert one == other


@pytest.mark.slow
def test_killed_while_masks_race_ends_with_the_same_mask(
    tmp_path: Path, teacher_dir: str, corpus_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four run, then two: it is killed in the second round, and goes on from the search's last checkpoint."""
    extra = [*(f"--{key}={value}" for key, value in KEYS.items()), *GIVEN]
    paths, broken = {"teacher": teacher_dir, "corpus": corpus_file}, tmp_path / "broken"
    fit(SEARCH, tmp_path / "whole", False, *extra, **paths)
    recovered, runs = Race.recovered, list[Any]()

    def killed(*about: Any) -> float:
        runs.append(about)
        if len(runs) == 6:
            raise Killed
        return recovered(*about)

    monkeypatch.setattr(Race, "recovered", killed)
    with pytest.raises(Killed):
        fit(SEARCH, broken, False, *extra, **paths)
    monkeypatch.setattr(Race, "recovered", recovered)
    assert not list(broken.rglob("mask*.json"))
    last = next(broken.rglob("last.ckpt"))
    assert torch.load(last, weights_only=False)["global_step"] == STEPS, "the search itself has ended"
    fit(SEARCH, broken, False, *extra, f"--ckpt_path={last}", **paths)
    one, other = (next((tmp_path / name).rglob("mask.json")).read_bytes() for name in ("whole", "broken"))
    assert one == other


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--model.init_args.quantize=int8"], "model.quantize 'int8' holds weights that cannot be cut"),
        (["--model.init_args.race.init_args.runners=1"], "runners: 1 given; accepted: a whole number"),
        (["--config=configs/strategy/fsdp2.yaml"], "FSDP2 divides the weights"),
    ],
)
def test_what_cannot_race_is_refused_in_one_message(
    more: list[str], told: str, tmp_path: Path, teacher_dir: str, corpus_file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    keys = {"model.init_args.model": teacher_dir, "trainer.max_steps": 1, **KEYS}
    given = arguments(tmp_path, corpus_file, **keys)
    assert ended(["fit", "--config", SEARCH, *given, *GIVEN, *more]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("error:") == 1
