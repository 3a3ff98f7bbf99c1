"""Laws of comparing engines: what a difference of tokens may be, and what a ratio of times is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from scripts.engines.__main__ import agreement, lines, speeds
from scripts.engines.kinds import CTranslate2, Transformers
from src.mask import Mask, Unit
from src.models.costs import NEW, PROMPT
from src.models.cut import cut
from src.models.loading import load_tokenizer

PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]]


@pytest.fixture(scope="module")
def exact(teacher_dir: str) -> Transformers:
    return Transformers(Path(teacher_dir))


@pytest.fixture(scope="module")
def own(exact: Transformers) -> list[tuple[list[int], list[float]]]:
    return said(exact)


def said(engine: Transformers | CTranslate2) -> list[tuple[list[int], list[float]]]:
    return [(engine.continued(prompt, NEW), engine.scored(prompt)) for prompt in PROMPTS]


def test_the_reference_is_what_transformers_says(exact: Transformers, own: Any) -> None:
    """Its continuation is that of ``generate``, past any stop token; its scores sum to the loss."""
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    for prompt, (new, scores) in zip(PROMPTS[:2], own, strict=False):
        ids_BT = torch.tensor([prompt])
        whole = exact.model.generate(ids_BT, generation_config=config)
        assert new == whole[0, len(prompt) :].tolist()
        loss = exact.model(ids_BT, labels=ids_BT).loss.item()
        assert sum(scores) == pytest.approx(-loss * (len(prompt) - 1), rel=1e-5)


def test_a_model_agrees_with_itself(exact: Transformers, own: Any) -> None:
    whole = {"equal": len(PROMPTS), "first_difference": None, "margin": 0.0, "log_prob_gap": 0.0}
    assert agreement(exact, PROMPTS, own, own) == whole


def test_another_token_is_chosen_only_where_scores_differ_by_half_the_margin(
    exact: Transformers, own: Any, teacher_dir: str
) -> None:
    """Up to the first difference both have read the same, so each likes its own token best there."""
    other = Transformers(Path(teacher_dir))
    other.model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in other.model.parameters():
            weight += 0.03 * torch.randn_like(weight)
    theirs = said(other)
    found = agreement(exact, PROMPTS, own, theirs)
    firsts, bounds = [], []
    for prompt, (ours, _), (others, _) in zip(PROMPTS, own, theirs, strict=True):
        if ours != others:
            firsts.append(next(n for n in range(NEW) if ours[n] != others[n]))
            text = [*prompt, *ours[: firsts[-1]]]
            bounds.append(float((exact.log_probs(text) - other.log_probs(text))[-1].abs().max()))
    assert firsts, "the noise is large enough to change a token"
    assert found["equal"] == len(PROMPTS) - len(firsts)
    assert found["first_difference"] == min(firsts)
    assert 0 < found["margin"] <= 2 * max(bounds)
    gaps = [
        abs(a - b)
        for (_, a_T), (_, b_T) in zip(own, theirs, strict=True)
        for a, b in zip(a_T, b_T, strict=True)
    ]
    assert found["log_prob_gap"] == max(gaps) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "unit"), [("qwen3", "channel"), ("qwen3", "kv_group"), ("llama", "channel")]
)
def test_narrower_layers_are_served_as_transformers_runs_them(
    family: str, unit: Unit, tmp_path: Path
) -> None:
    pytest.importorskip("ctranslate2")
    narrower(family, unit, tmp_path)
    exact, served = Transformers(tmp_path), CTranslate2(tmp_path, "float32")
    whole = {"equal": len(PROMPTS), "first_difference": None, "margin": 0.0}
    found = agreement(exact, PROMPTS, said(exact), said(served))
    assert found.pop("log_prob_gap") < 1e-4
    assert found == whole


@pytest.mark.slow
def test_heads_that_do_not_fill_the_stream_are_not_served_for_every_family(tmp_path: Path) -> None:
    """CTranslate2 divides Llama's hidden size by its heads, whatever its config says of their width."""
    pytest.importorskip("ctranslate2")
    narrower("llama", "kv_group", tmp_path)
    with pytest.raises(ValueError, match="axis 2 has dimension"):
        CTranslate2(tmp_path, "float32").continued(PROMPTS[0], 2)


def narrower(family: str, unit: Unit, at: Path) -> None:
    """A quarter of the channels, or half of the KV groups, of a model with the demo's tokenizer goes."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "vocab_size": 87,
    }
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **heads)).eval()
    width = 96 if unit == "channel" else 4
    kept = tuple(i for i in range(3 * width) if i % width >= width // (4 if unit == "channel" else 2))
    cut(model, Mask("m", 3, kept, "by hand", unit=unit, width=width)).save_pretrained(at)
    tokenizer = load_tokenizer("assets/arithmetic-teacher")
    tokenizer.bos_token = tokenizer.unk_token = tokenizer.eos_token  # the converter of Llama wants them
    tokenizer.save_pretrained(at)


def test_speeds_are_medians_of_ratios_within_repeats() -> None:
    """Decoding is what the longer call takes more; a slow repeat slows both and changes no ratio."""
    slow = [1.0, 7.0, 1.0]
    seconds = {
        (0, 1): [2.0 * s for s in slow], (0, 1 + NEW): [6.0 * s for s in slow],
        (1, 1): [1.0 * s for s in slow], (1, 1 + NEW): [4.0 * s for s in slow],
    }  # fmt: skip
    found = speeds(seconds, [1.9, 1.5])
    assert (found["prefill"]["speedup"], found["prefill"]["ideal"]) == (2.0, 1.9)
    assert found["decode"]["speedups"] == pytest.approx([4 / 3] * 3)
    assert (found["prefill"]["tokens_per_s"], found["prefill"]["parent_tokens_per_s"]) == (PROMPT, PROMPT / 2)
    assert (found["decode"]["tokens_per_s"], found["decode"]["ideal"]) == (NEW / 3, 1.5)


def test_the_table_has_a_row_for_each_engine_and_says_why_one_is_absent() -> None:
    speed = {"parent_tokens_per_s": 30.4, "tokens_per_s": 40.1, "speedup": 1.319, "ideal": 1.27}
    row: dict[str, Any] = {"equal": 19, "first_difference": 4, "margin": 0.0012, "log_prob_gap": 0.0004}
    row |= {"prefill": speed, "decode": speed}
    engines = {
        "a F32": row,
        "b F16": row | {"equal": 20, "first_difference": None},
        "c Q8_0": {"refused": "died"},
    }
    section = {"export": "recovered, llama", "prompts": 20, "engines": engines}
    _, _, first, second, third = lines({"versions": {"torch": "2"}, "commit": "x", "logs/recovered": section})
    fast = "30 -> 40, 1.32x of 1.27x"
    apart = "19 of 20; else from token 5, margin 1.2e-03"
    assert first == f"| recovered, llama | a F32 | {apart} | 4e-04 | {fast} | {fast} |"
    assert second == f"| recovered, llama | b F16 | 20 of 20 | 4e-04 | {fast} | {fast} |"
    assert third == "| recovered, llama | c Q8_0 | died | - | - | - |"
