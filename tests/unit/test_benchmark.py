"""The benchmark: fair turns, exact arithmetic on a fake clock, the ideal from counted operations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from src import benchmark
from src.errors import ConfigError
from tests.tiny import tiny_ids, tiny_model

TINY = {"attn_implementation": "sdpa"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_operations_are_those_of_the_layers_and_the_head(attention: str) -> None:
    model, prompt, new, batch = tiny_model("llama", attn_implementation=attention), 10, 4, 3
    hidden, inner, heads, groups, width, vocabulary, layers = 32, 48, 4, 2, 8, 97, 7
    weights = hidden * width * (2 * heads + 2 * groups) + 3 * hidden * inner
    head = 2 * hidden * vocabulary

    def layer(tokens: int, context: int) -> int:
        return 2 * weights * tokens + 4 * heads * width * tokens * context

    prefill = batch * (layers * layer(prompt, prompt) + head)
    decode = batch * sum(layers * layer(1, prompt + 1 + i) + head for i in range(new))
    rotary = 2 * (width // 2) * prompt  # the angles, once for all layers
    with torch.inference_mode():
        counted = benchmark.flops(model, tiny_ids(batch, prompt), new)
    assert counted == pytest.approx((prefill, decode), abs=batch * rotary)


def test_the_ideal_is_the_ratio_of_layers_and_head() -> None:
    models = [tiny_model("llama", num_hidden_layers=n, **TINY) for n in (6, 3)]
    baseline, half = benchmark.compare(models, batch_size=1, prompt_tokens=8, new_tokens=2, repeats=2)
    assert baseline["decode"]["speedup"] == baseline["decode"]["ideal"] == 1.0
    assert baseline["decode"]["speedup_iqr"] == [1.0, 1.0]
    layer, head = 2 * 7680 + 4 * 32 * 9.5, 2 * 32 * 97
    assert half["decode"]["ideal"] == pytest.approx((6 * layer + head) / (3 * layer + head), rel=1e-3)
    assert half["prefill"]["ideal"] > half["decode"]["ideal"]  # the head works for one token only


def test_speeds_and_ratios_on_a_fake_clock(monkeypatch) -> None:
    costs, clock, turns = {6: 4.0, 3: 2.5}, [0.0], []
    real = benchmark.step

    def step(model, ids, cache=None):
        layers = model.config.num_hidden_layers
        clock[0] += costs[layers] * (10 if cache is None else 1)
        turns.append(layers)
        return real(model, ids, cache=cache)

    models = [tiny_model("llama", num_hidden_layers=n, **TINY) for n in (6, 3)]
    monkeypatch.setattr(benchmark, "step", step)
    monkeypatch.setattr(benchmark, "_now", lambda _: clock[0])
    baseline, half = benchmark.compare(models, batch_size=2, prompt_tokens=8, new_tokens=3, repeats=5)
    assert baseline["prefill"]["tokens_per_s"] == 2 * 8 / 40.0
    assert baseline["decode"]["tokens_per_s"] == pytest.approx(2 / 4.0)
    assert half["decode"]["tokens_per_s"] == pytest.approx(2 / 2.5)
    assert half["decode"]["iqr"] == pytest.approx([2 / 2.5] * 2)
    assert half["decode"]["speedups"] == pytest.approx([1.6] * 5)
    assert turns[-8:] == [6, 3, 3, 6, 6, 3, 3, 6], "every call one turn each, in the order ABBA"


def test_a_missing_or_poor_win_is_said() -> None:
    good = {"speedup": 1.3, "speedup_iqr": [1.25, 1.35], "ideal": 1.33}
    assert benchmark.verdict("m", "decode", 1, good) is None
    poor = {"speedup": 1.1, "speedup_iqr": [1.05, 1.2], "ideal": 1.33}
    assert "83% of the ideal 1.33x" in benchmark.verdict("m", "decode", 1, poor)
    none = {"speedup": 1.02, "speedup_iqr": [0.97, 1.1], "ideal": 1.33}
    assert "No speed-up was measured" in benchmark.verdict("m", "decode", 1, none)


def test_the_command_writes_every_phase_and_batch_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, layers in (("long", 6), ("short", 3)):
        tiny_model("llama", num_hidden_layers=layers, **TINY).save_pretrained(tmp_path / name)
    common = f"--model {tmp_path}/short --baseline {tmp_path}/long --repeats 2 --new-tokens 2".split()
    benchmark.main([*common, *f"--batch-size 1 3 --prompt-tokens 8 --out {tmp_path}/b.json".split()])
    record = json.loads((tmp_path / "b.json").read_text())
    assert (record["baseline"]["layers"], record["models"][0]["layers"]) == (6, 3)
    got = [(Path(m["path"]).name, m["batch_size"]) for m in record["measured"]]
    assert got == [("long", 1), ("short", 1), ("long", 3), ("short", 3)]
    for figures in (m[phase] for m in record["measured"] for phase in benchmark.PHASES):
        assert figures["iqr"][0] <= figures["tokens_per_s"] <= figures["iqr"][1]
    assert {"threads", "device", "dtype", "commit", "command", "repeats"} <= set(record)
    with pytest.raises(ConfigError, match="64 positions"):
        benchmark.main([*common, "--prompt-tokens", "63"])
    assert "speed-up" in capsys.readouterr().out
    benchmark.main([*common, *f"--prompt-tokens 8 --out {tmp_path}/b.json --no-table".split()])
    assert "speed-up" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--no-table.*add --out"):
        benchmark.main([*common, "--no-table"])


def test_speeds_on_different_devices_are_not_compared(tmp_path: Path, monkeypatch) -> None:
    tiny_model("llama", **TINY).save_pretrained(tmp_path / "one")
    names = iter(["NVIDIA H100", "cpu"])
    monkeypatch.setattr(benchmark, "device_name", lambda _: next(names))
    with pytest.raises(ConfigError, match="different devices are not compared: NVIDIA H100, cpu"):
        benchmark.main(f"--model {tmp_path}/one --baseline {tmp_path}/one --device cpu,cpu".split())
