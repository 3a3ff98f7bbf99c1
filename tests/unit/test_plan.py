"""The planner: counts worked out by hand, laws of growth, and what it recommends at its thresholds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from src.models.loading import load_config
from src.plan.advice import advise
from src.plan.experiment import Experiment
from src.plan.ledger import Ledger
from src.plan.memory import OVERHEAD, Setting, memory
from src.plan.planner import Planner
from src.plan.trace import Trace
from src.plan.verb import summary
from src.plan.weights import Weights
from src.plan.work import cache_size
from tests.planning import (
    CACHE,
    HEADS,
    KV,
    LAYER,
    LENGTH,
    MLP,
    ONE_ROW,
    PLENTY,
    RECOVER,
    ROWS,
    SEARCH,
    D,
    H,
    L,
    V,
    forward_flops,
    planner_of,
    write_config,
)

KNOWN = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "deepseek-r1": 671_026_404_352,
}


Make = Callable[..., Planner]


@pytest.fixture
def plan(tmp_path: Path) -> Make:
    return partial(planner_of, tmp_path)


@pytest.mark.parametrize("name", KNOWN)
def test_shipped_configs_have_the_known_number_of_weights(name: str) -> None:
    config = load_config(f"configs/models/{name}.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == KNOWN[name]
    assert config._source.startswith("https://huggingface.co/")


# ---------------------------------------------------------------- counts by hand


def test_an_average_is_a_third_copy_beside_the_moments(plan: Make) -> None:
    averaged = "{class_path: src.callbacks.AveragedWeights}"
    with_it, without = plan(RECOVER, **{"trainer.callbacks+": averaged}), plan(RECOVER)
    more = with_it.configured.parts["optimiser"] - without.configured.parts["optimiser"]
    assert more == 4 * without.trace().trainable


def test_recovery_holds_parent_student_gradients_and_two_moments(plan: Make) -> None:
    planner = plan(RECOVER)
    traced, experiment = planner.trace(), planner.experiment
    parent, student = V * H + L * LAYER + H, V * H + (L - 1) * LAYER + H
    rotary = 2 * 4 * D // 2  # the frequencies, and their copy
    assert (traced.parent, experiment.student_parameters(), traced.trainable) == (parent, student, student)
    tensors = 2 + 11 * (L - 1)  # each has a step counter of its own in AdamW
    assert traced.peak["teacher"] == 4 * parent + rotary
    assert traced.peak["student"] == 4 * student + rotary
    assert traced.peak["gradients"] == 4 * student
    assert traced.peak["optimiser"] == 2 * 4 * student + 4 * tensors


def test_a_layer_of_a_search_keeps_what_its_architecture_says(plan: Make) -> None:
    """One more kept layer: the residual stream three times, norms, attention and MLP; exactly so."""
    four, five = (plan(SEARCH, layers=n, **ONE_ROW, **{"model.init_args.remove": 1}) for n in (L, L + 1))
    tokens = LENGTH
    residual = 3 * H  # entering, after attention, before the gate
    norms = 2 + HEADS + KV  # the inverse roots
    attention = (HEADS + KV) * D + (2 * HEADS + 2 * KV) * D + HEADS  # before norms; q, k, v, out; logsumexp
    gate = 4 + 4  # and its gradient
    before = 4 * 11  # what the first draw leaves: gates with their graph to the logits, and their gradient
    kept = 4 * tokens * (residual + norms + attention + 3 * MLP) + gate + before
    more = {key: five.trace().peak.get(key, 0) - four.trace().peak.get(key, 0) for key in five.trace().peak}
    assert {key: size for key, size in more.items() if size} == {"student": 4 * LAYER, "activations": kept}


def test_a_closed_layer_keeps_the_residual_stream_only(plan: Make) -> None:
    two, one = (plan(SEARCH, **ONE_ROW, **{"model.init_args.remove": n}) for n in (2, 1))
    less = one.trace().peak["activations"] - two.trace().peak["activations"]
    mlp, heads = 3 * MLP, 2 + HEADS + KV + (HEADS + KV) * D + (2 * HEADS + 2 * KV) * D + HEADS
    assert less == 4 * LENGTH * (H + mlp + heads), "what stays is the stream before and after the gate"


def test_cache_bytes() -> None:
    size = cache_size(tokens=1000, positions=900, k=10, precision="float16")
    assert size.raw == 1000 * 5 + 900 * (10 * (4 + 2) + 2 + 2)
    assert cache_size(1000, 900, 10, "float32").raw == 1000 * 5 + 900 * (10 * 8 + 8)
    assert cache_size(1000, 900, 10, "compact").raw == 1000 * 5 + 900 * (10 * 5 + 4)
    measured = json.loads(Path("results/teacher_cache.json").read_text())["bytes"]["wide"]
    for precision in ("float32", "float16", "compact"):
        expected = cache_size(10**6, 10**6, 10, precision).expected / 10**6
        assert expected == pytest.approx(measured[precision]["bytes_per_position"], rel=0.01)


def test_quantised_weights_leave_head_embeddings_and_norms(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path / "tiny.json"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = Weights.of(model)
    linear = LAYER - 2 * D - 2 * H
    rows = HEADS * D + 2 * KV * D + H + 2 * MLP + H  # outputs, one scale each
    plain = weights.whole - 4 * L * linear
    assert weights.int8 == plain + L * (linear + 4 * rows)
    blocks = 1 + 1 + 1 + 1 + 3 * 2  # of up to 64 weights: queries, keys, values, output, the MLP's three
    assert weights.nf4 == plain + L * (linear // 2 + 4 * blocks)
    assert weights.whole == weights.root + L * weights.layer


def test_operations_are_those_of_the_real_model(plan: Make) -> None:
    assert plan(CACHE).trace().flops == forward_flops(L)


@pytest.mark.slow
def test_a_repair_changes_no_size_and_a_plan_says_that_it_is_not_counted(tmp_path: Path) -> None:
    """Its rows and its tokenizer are not read: neither is there."""
    plans = []
    for patch in ("null", "{class_path: src.repair.mask_tuning.MaskTuning, init_args: {data: no-such-rows}}"):
        planner = planner_of(tmp_path, RECOVER, **{"model.init_args.patch": patch})
        plans.append(summary(planner, planner.configured, advise(planner)))
    assert [plan.pop("repair") for plan in plans] == [False, True]
    assert plans[0] == plans[1]


def test_a_step_of_halves_costs_what_one_of_layers_does(plan: Make) -> None:
    layers, halves = plan(SEARCH), plan(SEARCH, **{"model.init_args.unit": "half"})
    assert halves.trace().peak == layers.trace().peak
    assert halves.trace().flops == layers.trace().flops
    assert halves.calibration > layers.calibration


def test_the_ledger_sees_tensors_come_and_go() -> None:
    ledger = Ledger(vocabulary=7)
    with ledger:
        x = torch.ones(10)
        y = x + 1
        del x
        z = torch.zeros(3, 7)
        view = y[:5]
        del y
    assert dict(ledger.live) == {"activations": 40, "loss chunk": 84}, "a view keeps its storage"
    assert ledger.peak.total() == 124
    del view, z
    assert ledger.live.total() == 0


# ---------------------------------------------------------------- laws


@pytest.mark.slow
def test_more_costs_more(plan: Make) -> None:
    base = plan(SEARCH).configured
    for keys in ({"data.init_args.batch_size": 2 * ROWS}, {"data.init_args.max_length": 2 * LENGTH}):
        larger = plan(SEARCH, **keys).configured
        assert larger.total > base.total
        assert larger.hours > base.hours
    more_draws = plan(SEARCH, **{"model.init_args.draws": 8}).configured
    assert more_draws.total == base.total, "the graph of a draw dies before the next"
    assert more_draws.flops > base.flops


@pytest.mark.slow
def test_recomputing_saves_memory_and_costs_work(plan: Make) -> None:
    planner = plan(RECOVER)
    plain, recomputed = planner.trace(False), planner.trace(True)
    assert recomputed.peak["activations"] < plain.peak["activations"]
    assert recomputed.flops > plain.flops


def test_shards_shrink_with_the_ranks() -> None:
    weights = Weights(whole=1000, layer=90, root=100, int8=300, nf4=200, widest=30)
    peak = {"teacher": 1000, "student": 1000, "gradients": 1000, "optimiser": 2000, "activations": 50}
    traced = Trace(peak, 1, 1, 250, 250, weights, weights)

    def parts(strategy: str, ranks: int, **keys: Any) -> dict[str, int]:
        at = Setting("recover", keys.pop("mode", "copy"), strategy, ranks, beside=True, **keys)
        return memory(traced, at, PLENTY)

    assert sum(parts("single", 1).values()) == 5050
    assert parts("ddp", 4)["gradients"] == 2000, "and its buckets"
    gathered = 100 + 2 * 90
    for ranks in (2, 4, 8):
        held = parts("fsdp2", ranks)
        assert held["optimiser"] == 2000 // ranks
        assert held["student"] == held["teacher"] == 1000 // ranks + gathered - gathered // ranks
    assert parts("fsdp", 4)["teacher"] == 1000, "only FSDP2 shards a teacher"
    assert parts("fsdp2", 4, mode="int8")["teacher"] == 300, "quantised bytes are not sharded"
    assert parts("fsdp2", 4, mode="int8")["activations"] == 50 + 30, "one layer unpacked at a time"
    assert parts("deepspeed_z3", 4, offload=True)["optimiser"] == 0
    used = memory(
        traced,
        Setting("recover", "copy", "single", 1, beside=True),
        replace(PLENTY, overhead=7, fragmentation=0.1),
    )
    assert used[OVERHEAD] == 7 + 505


def test_what_an_optimiser_makes_for_itself_is_in_parts_too(plan: Make) -> None:
    """On a GPU its step makes a copy of all weights; of a rank's part under a sharding strategy."""
    planner = plan(RECOVER)
    traced = planner.trace()
    own = traced.step["optimiser"] - traced.peak["optimiser"]
    assert own >= traced.step["student"] - 100
    assert not planner.trace(True).step.keys() & {"activations", "loss chunk"}
    wide = replace(traced, peak={}, step=traced.step)
    for ranks in (1, 2, 4):
        held = memory(wide, Setting("recover", "cached", "fsdp2", ranks, beside=False), PLENTY)
        assert held["optimiser"] == traced.step["optimiser"] // ranks
        assert held["student"] == traced.step["student"] // ranks, "no layer is gathered then"
    offloaded = Setting("recover", "cached", "deepspeed_z3", 4, beside=False, offload=True)
    assert memory(wide, offloaded, PLENTY)["optimiser"] == 0


def test_fused_attention_holds_no_scores(tmp_path: Path) -> None:
    """Keys and values of different widths: the CPU writes the scores out, a GPU's kernels do not."""
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=V, hidden_size=H, intermediate_size=MLP, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, moe_intermediate_size=8,
    )  # fmt: skip
    path = tmp_path / "deepseek.json"
    path.write_text(config.to_json_string())
    keys = {"model": path, "ratio": "null", "remove": 1}
    argv = ["--config", SEARCH, *(f"--model.init_args.{key}={value}" for key, value in keys.items())]
    argv += ["--data.init_args.batch_size=1", "--data.init_args.max_length=256"]
    cpu, gpu = (Planner(Experiment(argv), replace(PLENTY, name=name)).trace() for name in ("cpu", "h100"))
    assert gpu.peak["activations"] < cpu.peak["activations"] / 2
    assert gpu.teacher_flops == cpu.teacher_flops
    assert gpu.flops > cpu.flops, "the backward pass makes the scores again"
