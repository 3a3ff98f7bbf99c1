"""Targets of a search: the least removal that reaches them, counted on the cut models themselves."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from src.benchmark import compare
from src.cli import main
from src.errors import ConfigError
from src.models.constraints import Constraints, constraints
from src.models.costs import NEW, PROMPT, decode_flops, parameters, parameters_of
from src.models.cut import cut
from src.models.cut_config import kept_config
from src.policies import GumbelTopK
from src.search import MaskSearch
from src.units.amount import Amount
from src.units.kinds import width_of
from src.units.targets import GIB, Target, spread
from src.units.width import Width
from tests.marks import slow
from tests.planning import L, planner_of, write_config
from tests.tiny import LAYERS, mask_of, tiny_config, tiny_model

FAMILIES = ["gemma2", slow("mixtral"), slow("deepseek_v3"), slow("lfm2")]
"""Tied embeddings; experts; layers that differ in size."""
LIMITS: dict[str, Any] = {"max_position_embeddings": 256}


def kept(limits: Constraints, remove: int) -> list[int]:
    return [i for i in range(LAYERS) if i not in spread(limits, LAYERS, remove)]


def least(config: PretrainedConfig, **target: float) -> int:
    return Amount(target=Target(**target)).of(config)[0].remove


@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_is_the_smallest_whose_cut_model_reaches_the_target(family: str) -> None:
    """Every threshold between two counts, and the counts' own figures, against models that are really cut."""
    model, config = tiny_model(family, **LIMITS), tiny_config(family, **LIMITS)
    limits = constraints(config)
    most = LAYERS - max(1, len(limits.pinned(LAYERS, LAYERS - 1)))
    sizes = [parameters(cut(model, mask_of(kept(limits, n)))) for n in range(most + 1)]
    for asked in sorted({*sizes[1:], *((a + b) / 2 for a, b in pairwise(sizes))}):
        smallest = next(n for n, size in enumerate(sizes) if size <= asked)
        assert Target(parameters=asked).resolve(config, limits, torch.float32)[0] == smallest
    assert Target(memory_gib=sizes[2] * 2 / GIB).resolve(config, limits, torch.bfloat16)[0] == 2
    reach = f"{sizes[1]:,} parameters to {sizes[most]:,} parameters, without 1 to {most}"
    with pytest.raises(ConfigError, match=reach):
        least(config, parameters=sizes[most] - 1)


@pytest.mark.parametrize("family", [slow("llama"), "gemma2"])
def test_a_speedup_is_the_ideal_of_a_benchmark(family: str) -> None:
    model, config = tiny_model(family, **LIMITS), tiny_config(family, **LIMITS)
    limits = constraints(config)
    cuts = [cut(model, mask_of(kept(limits, n))) for n in range(1, 4)]
    ideal = [figures["decode"]["ideal"] for figures in compare([model, *cuts], 1, PROMPT, NEW, 1)]
    whole = decode_flops(config)
    counted = [whole / decode_flops(kept_config(config, kept(limits, n))) for n in range(4)]
    assert counted == pytest.approx(ideal, rel=1e-9)
    for asked, smallest in ((ideal[1] - 1e-6, 1), (ideal[2] - 1e-6, 2), ((ideal[2] + ideal[3]) / 2, 3)):
        assert Target(speedup=asked).resolve(config, limits, torch.float32)[0] == smallest


def test_more_is_asked_more_goes() -> None:
    config = tiny_config("llama", **LIMITS)
    counts = [least(config, speedup=asked) for asked in (1.01, 1.5, 3.0)]
    assert counts == sorted(counts)
    assert counts[0] == 1


@pytest.mark.parametrize("key", ["parameters", pytest.param("speedup", marks=pytest.mark.slow)])
def test_the_count_is_the_smallest_where_more_may_save_less(key: str) -> None:
    """Only the middle layer is large; an odd number of layers, spread evenly, takes it, an even one not."""
    sizes = {"mlp_only_layers": [3], "intermediate_size": 960, "moe_intermediate_size": 8}
    config = tiny_config("qwen3_moe", **LIMITS, decoder_sparse_step=1, **sizes)
    limits, cost = constraints(config), parameters_of if key == "parameters" else decode_flops
    costs = [cost(config), *(cost(kept_config(config, kept(limits, n))) for n in range(1, LAYERS))]
    assert [a > b for a, b in pairwise(costs)] == [True, False] * 3
    for asked in costs[1:]:
        smallest = next(n for n, each in enumerate(costs) if each <= asked)
        wanted = asked if key == "parameters" else costs[0] / asked
        assert Target(**{key: wanted}).resolve(config, limits, torch.float32)[0] == smallest
    beyond = 0.9 * min(costs)
    ends = [f"{max(costs[1:]):,}", f"{min(costs):,}"] if key == "parameters" else ["ideal", "ideal"]
    with pytest.raises(ConfigError, match=rf"in reach: .*{ends[0]}.* to .*{ends[1]}.*without 1 to 6 of 7"):
        least(config, **{key: beyond if key == "parameters" else costs[0] / beyond})


def test_only_layers_that_the_family_can_lose_count() -> None:
    """The middle of those, far from each other; of the last layers alone the very last."""
    assert spread(Constraints(frozenset({0, 6})), 7, 2) == {2, 4}
    assert spread(Constraints(tail_only=True), 7, 3) == {4, 5, 6}
    target, config = Target(parameters=1), tiny_config("llama")
    with pytest.raises(ConfigError, match=r"without 1 to 5 of 7 layers\. It says why"):
        target.resolve(config, Constraints(frozenset({0, 1}), reason="It says why."), torch.float32)
    with pytest.raises(ConfigError, match="in reach: nothing"):
        target.resolve(config, Constraints(frozenset(range(7))), torch.float32)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({}, "exactly one of speedup, parameters, memory_gib"),
        ({"speedup": 1.3, "parameters": 5}, "exactly one"),
        ({"speedup": 1.0}, r"speedup 1 asked of a model of ideal 1x; in reach: ideal 1\.\d+x to ideal \d"),
        ({"speedup": 90.0}, "in reach"),
        ({"parameters": 1e9}, r"parameters 1e\+09 asked of a model of \d+,\d+ parameters"),
        ({"memory_gib": 1e-9}, "GiB of weights, without 1 to 6 of 7 layers"),
    ],
)
def test_what_is_out_of_reach_is_one_message_with_the_reach(target: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Amount(target=Target(**target)).of(tiny_config("llama"))


def test_memory_counts_the_type_of_the_parents_weights(tmp_path: Path) -> None:
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    whole = parameters(AutoModelForCausalLM.from_pretrained(tmp_path)) * 2 / GIB
    with pytest.raises(ConfigError, match="memory_gib"):
        MaskSearch(str(tmp_path), GumbelTopK(), target=Target(memory_gib=1.01 * whole))
    search = MaskSearch(str(tmp_path), GumbelTopK(), target=Target(memory_gib=0.99 * whole))
    assert [budget.remove for budget in search.budgets] == [1]


@pytest.mark.parametrize("unit", [slow("layer"), "half"])
def test_a_target_is_told_and_planned(unit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {
        "model.init_args.ratio": "null",
        "model.init_args.target.speedup": 1.6,
        "model.init_args.unit": unit,
    }
    planner = planner_of(tmp_path, "configs/search/gumbel_topk.yaml", **keys)
    (budget,) = planner.experiment.budgets
    config = str(tmp_path / f"{L}.json")
    search = MaskSearch(config, GumbelTopK(), target=Target(speedup=1.6), unit=unit)
    assert search.budgets == (budget,)
    assert search.policy.closed == budget.remove * search.policy.units // L
    assert planner.experiment.mask.depth == L - budget.remove
    assert planner.calibration > 0
    main(["plan", "--config", "configs/search/gumbel_topk.yaml", f"--model.init_args.model={config}",
          *(f"--{key}={value}" for key, value in keys.items())])  # fmt: skip
    told = f"target speedup 1.6: removes {budget.remove} of {L} layers (ideal "
    assert told in budget.told
    assert told in capsys.readouterr().out


def test_a_target_in_a_file_goes_the_way_of_all_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, overlay = write_config(tmp_path / "model.json"), tmp_path / "target.yaml"
    argv = ["plan", "--config", "configs/search/gumbel_topk.yaml", "--config", str(overlay),
            f"--model.init_args.model={model}"]  # fmt: skip
    for text, said in (
        ("{ratio: null, target: {parameters: 1.5e3}}", "target parameters 1500: removes"),
        ("{ratio: null, target: {speedup: 50}}", "model.target: speedup 50 asked"),
        ("{target: {speedup: 1.2}}", "exactly one of model.remove"),
        ("{ratio: null, target: {sped: 1.2}}", "sped"),
    ):
        overlay.write_text(f"model: {{init_args: {text}}}\n")
        if said.endswith("removes"):
            main(argv)
        else:
            with pytest.raises(SystemExit, match="2"):
                main(argv)
        printed = capsys.readouterr()
        assert said in printed.out + printed.err


def test_a_target_of_width_is_the_fewest_channels_that_reach_it() -> None:
    """Each channel of a tiny Llama's 7 layers has 3 x 32 weights: 19 of 48 are the fewest below 27,000."""
    config = tiny_config("llama")
    width = width_of(config, "channel")
    assert width is not None
    whole = parameters_of(config)
    asked = whole - 18 * 7 * 3 * 32 - 1
    (budget,) = Amount(target=Target(parameters=asked)).of(config, width=width)
    assert budget.remove == 19
    assert "19 of 48 channels of each layer" in budget.told


def odd_heads() -> tuple[PretrainedConfig, Width]:
    """Eight heads in four KV groups at a hidden size of 32, which Llama wants its heads to divide."""
    config = tiny_config("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    width = width_of(config, "kv_group")
    assert width is not None
    return config, width


def test_a_count_that_the_config_cannot_hold_is_refused_before_a_search() -> None:
    """Six heads do not divide 32: one group of four cannot go, two or three can."""
    config, width = odd_heads()
    assert [not width.counted.refusal(config, n) for n in (1, 2, 3, 4)] == [True, True, False, True]
    with pytest.raises(ConfigError, match=r"model.remove: 1 of 4 KV groups .*multiple.*nearby: 2\."):
        Amount(ratio=0.25).of(config, width=width)
    assert [b.remove for b in Amount(budgets=[0.5, 0.75]).of(config, width=width)] == [2, 3]
    with pytest.raises(ConfigError, match=r"model.remove: 1 of 4"):
        Amount(budgets=[0.25, 0.5]).of(config, width=width)


def test_a_target_of_width_passes_over_counts_that_the_config_cannot_hold() -> None:
    config, width = odd_heads()
    whole = parameters_of(config)
    (budget,) = Amount(target=Target(parameters=whole - 1)).of(config, width=width)
    assert budget.remove == 2, "one would do, were it a model"
