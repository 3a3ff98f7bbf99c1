"""What evolutions and gated scores find is exported, and reloads as the model that was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from src.cli import main, run
from src.mask import Mask, Unit
from src.models.loading import load_model
from src.units.kinds import KINDS
from tests.integration.test_overlays import SEARCH, arguments
from tests.integration.test_width import llama_dir  # noqa: F401  (a fixture)

OFFERED = {
    "level_switch": ("layer", "half", "kv_group"),
    "segment_evolution": ("layer",),
    "prune_merge": ("layer", "half"),
}
RUNS = [(overlay, unit) for overlay, units in OFFERED.items() for unit in units]


@pytest.mark.parametrize(
    ("overlay", "unit"),
    [pytest.param(*each, marks=[] if each[1] == "layer" else pytest.mark.slow) for each in RUNS],
)
def test_a_mask_is_exported_and_reloads_as_the_gated_parent(
    overlay: str, unit: Unit, tmp_path: Path, corpus_file: str, request: pytest.FixtureRequest
) -> None:
    teacher = request.getfixturevalue("llama_dir" if unit == "kv_group" else "teacher_dir")
    keys = {
        "trainer.max_steps": 1,
        "model.init_args.model": teacher,
        "model.init_args.calibration_batches": 2,
    }
    configs = [SEARCH, f"configs/unit/{unit}.yaml", f"configs/policy/{overlay}.yaml"]
    given = [word for path in configs if Path(path).exists() for word in ("--config", path)]
    done = run(["fit", *given, *arguments(tmp_path, corpus_file, **keys)]).model
    file, out = tmp_path / "search" / "run" / "mask.json", tmp_path / "out"
    mask, ids = Mask.load(file), torch.arange(3, 33)[None]
    main(["export", "--mask", str(file), "--out", str(out)])
    parent = load_model(teacher)
    gates = KINDS[unit].gate(parent)
    with torch.no_grad(), gates.use(done.policy.gates(mask.keep)):
        expected = parent(ids).logits
    with torch.no_grad():
        found = load_model(str(out))(ids).logits
    if unit == "kv_group":  # sums run in another order
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)
    assert mask.metrics["forward_tokens"] == done.forward_tokens > mask.tokens_seen
