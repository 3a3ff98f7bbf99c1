"""One process, two of DDP and two of FSDP2 make the same steps from the same batches (gloo, CPU, fp32)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from src.mask import Mask
from src.models.loading import load_model
from src.models.two_four import linear_maps
from src.training.scopes import load_student
from tests.distributed.launch import STEPS, Bench, diary, drift, saver

MAX, MEAN = 1e-5, 1e-6
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", ["search", "recover"])
def test_one_process_equals_two_of_ddp_and_two_of_fsdp2(
    stage: str, bench: Bench, record_property: Any
) -> None:
    """Search logits, or recovery losses, over 50 steps; and masks equal on all ranks at every step.

    The ranks have different rows, and different numbers of supervised tokens, at every step.
    """
    alone = diary(bench.fit("single", stage, "single", 1))
    assert len(alone) == STEPS
    record_property("steps", STEPS)
    record_property("accepted", f"max {MAX:.0e} mean {MEAN:.0e}")
    for overlay in ("ddp", "fsdp2"):
        run = bench.fit(overlay, stage, overlay, 2)
        first, second = diary(run, 0), diary(run, 1)
        for a, b in zip(first, second, strict=True):
            assert a["rows"] != b["rows"]
            assert a["gates"] == b["gates"], "ranks ask for the same masks"
            assert a["logits"] == b["logits"], "ranks make the same update, to the last bit"
        assert (
            sum(a["supervised"] != b["supervised"] for a, b in zip(first, second, strict=True)) > STEPS // 2
        )
        for key in ("logits", "loss") if stage == "search" else ("loss",):
            largest, mean = drift(alone, first, key)
            record_property(f"{stage} {overlay} {key}", f"max {largest:.1e} mean {mean:.1e}")
            assert largest <= MAX
            assert mean <= MEAN
        if stage == "search":
            assert [step["gates"] for step in alone] == [step["gates"] for step in first]
    if stage == "search":
        moved = [abs(a - b) for a, b in zip(alone[0]["logits"], alone[-1]["logits"], strict=True)]
        assert max(moved) > 0.1, "a search that stands still would agree with anything"


@pytest.mark.parametrize("overlay", ["fsdp", "deepspeed_z2", "deepspeed_z3"])
def test_other_engines_make_the_same_steps(overlay: str, bench: Bench) -> None:
    """On CPUs, where the product refuses them; in chunks whose number differs over the ranks.

    What they save is exported too.
    """
    if overlay.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    keys = {"trainer__max_steps": 6, "model__init_args__distillation__init_args__chunk_tokens": 16}
    alone = diary(bench.fit("single", "recover", "single", 1, **keys))
    saved = bench.out / "saved"
    keys |= {"callbacks": [saver(saved, 6)], "program": "tests.distributed.engines"}
    pair = diary(bench.fit("pair", "recover", overlay, 2, **keys))
    assert drift(alone, pair, "loss")[0] <= MAX
    ids = torch.arange(3, 33)[None]
    parent, mask = load_model(bench.teacher), Mask.load(bench.mask)
    trained = next((bench.out / "single").rglob("last.ckpt"))
    one, other = (
        load_student(parent, mask, str(path))(ids).logits for path in (trained, saved / "step=6.ckpt")
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("weight", ["linear", "topq", "eakd"])
def test_entropy_weights_are_those_of_the_whole_batch(weight: str, bench: Bench) -> None:
    """Each weight is normalised, and the top share chosen, over the tokens of all ranks."""
    keys = {
        "model__init_args__distillation__init_args__weight": weight, "trainer__max_steps": 4,
        "model__init_args__distillation__init_args__alpha": 0.7,
    }  # fmt: skip
    alone = diary(bench.fit("single", "recover", "single", 1, **keys))
    pair = diary(bench.fit("ddp", "recover", "ddp", 2, **keys))
    assert drift(alone, pair, "loss")[0] <= MAX


def test_a_policy_that_is_not_learned_by_gradient_stays_equal(bench: Bench) -> None:
    """Random search remembers losses: all ranks are told the same ones, and choose the same mask."""
    keys = {"model__init_args__policy": "src.policies.RandomSearch", "trainer__max_steps": 8}
    run = bench.fit("ddp", "search", "ddp", 2, **keys)
    assert [step["gates"] for step in diary(run, 0)] == [step["gates"] for step in diary(run, 1)]
    assert [step["loss"] for step in diary(run, 0)] == [step["loss"] for step in diary(run, 1)]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("LevelSwitch", {"generations": 3, "offspring": 6, "initial": 4}),
        ("SegmentEvolution", {"segments": 3, "population": 6, "generations": 3}),
        ("SegmentEvolution", {"segments": 3, "population": 6, "generations": 3, "fitness": "frechet"}),
        ("PruneMerge", {"prune": 0.2, "keep": 0.2}),
    ],
)
def test_a_search_by_measurements_on_two_ranks_ends_as_one(
    name: str, keys: dict[str, Any], bench: Bench
) -> None:
    """Each rank measures its own rows; what decides is the mean over all."""
    policy = {"class_path": f"src.policies.{name}", "init_args": keys}
    given = {"model__init_args__policy": policy, "trainer__max_steps": 1}
    runs = [bench.fit(each, "search", each, ranks, **given) for each, ranks in (("single", 1), ("ddp", 2))]
    one, other = (Mask.load(next(run.rglob("mask.json"))) for run in runs)
    assert one.keep == other.keep
    assert other.metrics["kl"] == pytest.approx(one.metrics["kl"], abs=MAX)
    assert diary(runs[1], 0)[0]["logits"] == diary(runs[1], 1)[0]["logits"]


@pytest.mark.parametrize("overlay", ["ddp", "fsdp2"])
def test_fisher_scores_of_two_ranks_are_those_of_one_process(overlay: str, bench: Bench) -> None:
    """A calibration batch is that of all ranks, whose numbers of supervised tokens differ."""
    policy = {"class_path": "src.policies.Fisher", "init_args": {"rearranged": True}}
    keys = {"model__init_args__policy": policy, "trainer__max_steps": 1}
    runs = [bench.fit(name, "search", name, ranks, **keys) for name, ranks in (("single", 1), (overlay, 2))]
    alone, pair = (diary(run) for run in runs)
    assert diary(runs[1], 1)[0]["logits"] == pair[0]["logits"]
    assert alone[0]["gates"] == pair[0]["gates"]
    assert drift(alone, pair, "logits")[0] <= MAX
    assert max(alone[0]["logits"]) > 2, "kept units have two more than their share"


def test_what_grain_removes_on_two_ranks_is_what_it_removes_on_one(bench: Bench) -> None:
    """The size is taken of the gradient of the whole batch, not of each rank's."""
    curriculum = "src.callbacks.PruningCurriculum={until: 1.0, shape: cubic}"
    keys = {"model__init_args__policy": "src.policies.Grain", "trainer__max_steps": 6}
    keys["model__init_args__draws"] = 1
    runs = [
        bench.fit(name, "search", name, ranks, callbacks=[curriculum], **keys)
        for name, ranks in (("single", 1), ("ddp", 2))
    ]
    alone, pair = (diary(run) for run in runs)
    assert [step["gates"] for step in alone] == [step["gates"] for step in pair]
    assert drift(alone, pair, "logits")[0] <= MAX
    assert diary(runs[1], 1)[-1]["logits"] == pair[-1]["logits"]
    assert len({str(step["gates"]) for step in alone}) > 1, "more go in the course of the run"


@pytest.mark.parametrize("overlay", ["ddp", "fsdp2"])
def test_layers_that_learn_one_by_one_do_so_alike_on_all_ranks(overlay: str, bench: Bench) -> None:
    """Those around the gaps train, and every one of their weights has a gradient on every rank."""
    term = {"class_path": "src.losses.HiddenStates", "init_args": {"local": True}}
    keys = {
        "model__init_args__distillation": "null", "model__init_args__terms": [{"term": term}],
        "model__init_args__scope": "cut_adjacent", "trainer__max_steps": 8,
    }  # fmt: skip
    runs = [bench.fit(name, "recover", name, ranks, **keys) for name, ranks in (("single", 1), (overlay, 2))]
    alone, pair = (diary(run) for run in runs)
    assert drift(alone, pair, "loss")[0] <= MAX
    assert alone[-1]["loss"] < alone[0]["loss"]


def test_a_recovery_from_tuned_scales_starts_alike_on_all_ranks(bench: Bench) -> None:
    patch = {
        "class_path": "src.repair.mask_tuning.MaskTuning",
        "init_args": {"data": bench.corpus, "rows": 8},
    }
    keys = {"model__init_args__patch": patch, "trainer__max_steps": 4}
    alone = diary(bench.fit("single", "recover", "single", 1, **keys))
    pair = diary(bench.fit("ddp", "recover", "ddp", 2, **keys))
    plain = diary(bench.fit("plain", "recover", "single", 1, trainer__max_steps=4))
    assert drift(alone, pair, "loss")[0] <= MAX
    assert drift(alone, plain, "loss")[0] > 100 * MAX


@pytest.mark.parametrize(("scope", "sharded"), [("cut_adjacent", "false"), ("lora", "true")])
def test_a_sharded_student_learns_in_every_scope(scope: str, sharded: str, bench: Bench) -> None:
    """Frozen weights beside trained ones, adapters, and a teacher in parts or whole go with FSDP2."""
    keys = {
        "model__init_args__scope": scope, "trainer__max_steps": 4, "model__init_args__lora_rank": 4,
    }  # fmt: skip
    alone = diary(bench.fit("single", "recover", "single", 1, **keys))
    keys["model__init_args__teacher__init_args__shard"] = sharded
    pair = diary(bench.fit("fsdp2", "recover", "fsdp2", 2, **keys))
    assert drift(alone, pair, "loss")[0] <= MAX


@pytest.mark.parametrize("overlay", ["ddp", "fsdp2"])
def test_streams_of_inner_layers_are_compared_over_the_whole_batch(overlay: str, bench: Bench) -> None:
    """The ranks hold different rows with different numbers of supervised tokens; FSDP2 shards both models."""
    term = {"term": {"class_path": "src.losses.HiddenStates"}, "weight": 10.0}
    keys = {"model__init_args__terms": f"[{term}]", "trainer__max_steps": 8}
    alone = diary(bench.fit("single", "recover", "single", 1, **keys))
    pair = diary(bench.fit(overlay, "recover", overlay, 2, **keys))
    size = max(step["loss"] for step in alone)
    assert drift(alone, pair, "loss")[0] <= MAX * size


@pytest.mark.parametrize(("overlay", "scope"), [("ddp", "full"), ("ddp", "lora"), ("fsdp2", "full")])
def test_activations_are_counted_over_the_whole_batch(overlay: str, scope: str, bench: Bench) -> None:
    """The density of ranks with different numbers of positions is that of one process with all of them."""
    term = {"term": {"class_path": "src.losses.Density"}, "weight": 1.0}
    keys = {"model__init_args__terms": f"[{term}]", "trainer__max_steps": 8, "model__init_args__scope": scope}
    alone = diary(bench.fit("single", "recover", "single", 1, **keys))
    pair = diary(bench.fit(overlay, "recover", overlay, 2, **keys))
    assert drift(alone, pair, "loss")[0] <= MAX


def test_two_ranks_choose_the_zeros_of_one_process(bench: Bench) -> None:
    """Two of four under DDP: the same losses, the same weights at zero, and the ranks agree on the change."""
    keys = {"model__init_args__optimizer": "src.optim.AdamS", "trainer__max_steps": 8}
    keys |= {"model__init_args__optimizer__init_args__lr": 1e-3}
    runs = [
        bench.fit(name, "recover", name, ranks, **keys, callbacks=["src.callbacks.Sparsify"])
        for name, ranks in (("single", 1), ("ddp", 2))
    ]
    alone, pair = (diary(run) for run in runs)
    assert drift(alone, pair, "loss")[0] <= MAX
    parent, mask = load_model(bench.teacher), Mask.load(bench.mask)
    students = [load_student(parent, mask, str(next(run.rglob("last.ckpt")))) for run in runs]
    one, other = (linear_maps(student) for student in students)
    for name, (weight, _) in one.items():
        assert (weight == 0).sum() >= weight.numel() // 2
        assert torch.equal(weight == 0, other[name][0] == 0)
        torch.testing.assert_close(weight, other[name][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("overlay", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["LoRA", "Scales"])
def test_adapters_of_a_search_move_as_in_one_process(kind: str, overlay: str, bench: Bench) -> None:
    """Whole on every rank, beside weights that FSDP2 shards: losses, logits and the adapters themselves."""
    pytest.importorskip("peft")
    adapters = {"class_path": f"src.training.adapters.{kind}", "init_args": {"lr": 0.01}}
    keys = {"model__init_args__adapters": adapters, "trainer__max_steps": 8}
    runs = [
        bench.fit("single", "search", "single", 1, **keys),
        bench.fit(overlay, "search", overlay, 2, **keys),
    ]
    alone, pair = (diary(run) for run in runs)
    assert diary(runs[1], 0)[-1]["logits"] == diary(runs[1], 1)[-1]["logits"]
    for key in ("loss", "logits"):
        assert drift(alone, pair, key)[0] <= MAX
    one, other = (load_file(next(run.rglob("adapters.safetensors"))) for run in runs)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=2e-4)
    metrics = [Mask.load(next(run.rglob("mask.json"))).metrics for run in runs]
    assert metrics[0]["kl_adapted"] != metrics[0]["kl"]
    for key in ("kl", "kl_adapted"):
        assert metrics[1][key] == pytest.approx(metrics[0][key], abs=1e-4)


def test_removed_units_close_alike_on_all_ranks(bench: Bench) -> None:
    """Units run beside a student that DDP wraps: open, half closed and gone."""
    keys = {"model__init_args__closing": 0.6, "trainer__max_steps": 6}
    alone = diary(bench.fit("single", "recover", "single", 1, **keys))
    pair = diary(bench.fit("ddp", "recover", "ddp", 2, **keys))
    assert drift(alone, pair, "loss")[0] <= MAX


TURNS: dict[str, tuple[str, dict[str, Any]]] = {
    "half": ("interleaved.Interleaved", {"unit": "half", "amplitude": 0.1}),
    "channel": ("interleaved.Interleaved", {"unit": "channel", "amplitude": 0.1}),
    "weights": ("weighed.Weighed", {"pull": 1e-3, "within": 0.3}),
}


@pytest.mark.parametrize("case", TURNS)
def test_units_go_in_turns_alike_on_all_ranks(case: str, bench: Bench) -> None:
    """The ranks choose by the rows of both, and average the gradients of what is left."""
    path, keys = TURNS[case]
    given = {f"model__init_args__{k}": v for k, v in {"mask": "null", "ratio": 0.5, **keys}.items()}
    keys = {"model": f"src.training.{path}", **given, "trainer__max_steps": 8}
    runs = [bench.fit(name, "recover", name, ranks, **keys) for name, ranks in (("single", 1), ("ddp", 2))]
    alone, pair = (diary(run) for run in runs)
    assert drift(alone, pair, "loss")[0] <= MAX
    one, other = (Mask.load(next(run.rglob("mask.json"))) for run in runs)
    assert one.keep == other.keep
    parent = load_model(bench.teacher)
    students = [load_student(parent, one, str(next(run.rglob("last.ckpt")))).state_dict() for run in runs]
    for name, weight in students[0].items():
        torch.testing.assert_close(students[1][name], weight, rtol=0, atol=1e-4)


def test_a_race_on_two_ranks_has_the_winner_of_one(bench: Bench) -> None:
    """Students learn from the rows of all ranks, and are judged by all."""
    race = {"class_path": "src.policies.race.Race", "init_args": {"runners": 3, "steps": 2}}
    keys = {"model__init_args__race": race, "trainer__max_steps": 4}
    runs = [bench.fit(name, "search", name, ranks, **keys) for name, ranks in (("single", 1), ("ddp", 2))]
    one, other = (Mask.load(next(run.rglob("mask.json"))) for run in runs)
    assert one.keep == other.keep
    for key in ("kl", "kl_recovered"):
        assert other.metrics[key] == pytest.approx(one.metrics[key], abs=1e-4)
