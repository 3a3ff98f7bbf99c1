"""What a plan counts of validations: two forward passes for each batch, in operations, hours and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from src.plan.devices import Tried
from src.plan.planner import Planner
from tests.planning import RECOVER, L, forward_flops, planner_of

Make = Callable[..., Planner]


@pytest.fixture
def plan(tmp_path: Path) -> Make:
    return partial(planner_of, tmp_path)


def test_each_batch_that_is_validated_is_a_forward_pass_of_both_models(plan: Make) -> None:
    """500 steps, and 16 batches after each 100: as the config says, of held-out rows alone."""
    held = {"data.init_args.validation": "held_out.jsonl"}
    none, held_out = plan(RECOVER).configured.flops, plan(RECOVER, **held)
    both = forward_flops(L) + forward_flops(L - 1)
    assert held_out.configured.flops - none == 5 * 16 * both
    share = plan(RECOVER, **{"data.init_args.held_out": 0.1, "trainer.accumulate_grad_batches": 2})
    assert share.experiment.validated(500) == 10 * 16, "the interval is one of batches"
    for key, value in (("limit_val_batches", 0), ("limit_val_batches", 0.5), ("val_check_interval", 0.5)):
        assert plan(RECOVER, **held, **{f"trainer.{key}": value}).configured.flops == none, "not counted"
    cached = "{class_path: src.teachers.CachedTeacher}"
    read = {"model.init_args.teacher": cached}
    more = plan(RECOVER, **read, **held).configured.flops - plan(RECOVER, **read).configured.flops
    assert more == 5 * 16 * forward_flops(L - 1), "a cache has the teacher's part of them"
    whole = plan(RECOVER, **{"model.init_args.closing": 0.5})
    assert whole.trace().validation_flops == both, "the cut is judged, also where training begins whole"
    assert whole.trace().flops > plan(RECOVER).trace().flops


def test_after_a_trial_a_validation_takes_as_long_as_its_share_of_a_step(plan: Make) -> None:
    held = plan(RECOVER, **{"data.init_args.validation": "held_out.jsonl"})
    held.tried(Tried(2.0, 0))
    share = held.trace().validation_flops / held.trace().flops
    assert held.configured.hours == pytest.approx((500 + 5 * 16 * share) * 2.0 / 3600)


@pytest.mark.parametrize("every", ["100", "100.0"])
def test_steps_that_fit_do_not_depend_on_how_many_were_configured(every: str, plan: Make) -> None:
    """With 99 steps nothing is validated, with 100 a first time."""
    held = {"data.init_args.validation": "held_out.jsonl", "trainer.val_check_interval": every}
    few, more = (plan(RECOVER, **held, **{"trainer.max_steps": steps}) for steps in (99, 100))
    assert few.within(1e-3) == more.within(1e-3) < plan(RECOVER).within(1e-3)
    assert [each.experiment.validated(each.steps) for each in (few, more)] == [0, 16]


def test_a_validation_of_logits_can_be_the_peak_of_a_run_that_learns_streams_alone(plan: Make) -> None:
    """It is with a large vocabulary, which stands for the model's here."""
    streams = "{class_path: src.losses.HiddenStates, init_args: {layers: all, local: true}}"
    local = {
        "model.init_args.distillation": "null", "model.init_args.terms": f"[{{term: {streams}}}]",
        "model.init_args.scope": "cut_adjacent",
    }  # fmt: skip
    held = plan(RECOVER, **local, **{"data.init_args.validation": "held_out.jsonl"})
    none = plan(RECOVER, **local)
    traced = held.trace()
    assert traced.validation_peak["activations"] > 0
    wide = replace(traced, validation_peak={**traced.validation_peak, "loss chunk": 1 << 30})
    for planner, bytes_ in ((none, 0), (held, 1 << 30)):
        planner._traces = {(False, None): wide}
        assert planner.configured.parts["loss chunk"] == bytes_
