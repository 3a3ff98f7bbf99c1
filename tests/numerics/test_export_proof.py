"""The laws of the export, on every family of the table; and wrong cuts, which it must not let through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from src.errors import ConfigError
from src.export.fresh import Reference, verify
from src.export.observe import Finding, compare, observe, proof_tokens
from src.export.proof import in_fresh_process, observe_gated, predicted_weights
from src.mask import Mask
from src.models import cut_config as cutting
from src.models.claims import is_tied
from src.models.cut import cut, cut_config
from src.models.cut_rules import slice_section
from tests.tiny import FAMILIES, KV_SHARED, mask_of, tiny_model

MASK = mask_of((0, 2, 3, 5, 6))


def reference(parent: PreTrainedModel, student: PreTrainedModel, mask: Mask) -> Reference:
    ids_BT = proof_tokens(parent.config)
    return Reference(
        expected=observe_gated(parent, mask, ids_BT),
        ids_BT=ids_BT,
        weights=predicted_weights(parent, student, mask),
        layers=len(mask.keep),
        tied=is_tied(student),
        attention=cutting.attention_implementation(parent.config),
        threads=torch.get_num_threads(),
    )


def failures(findings: list[Finding]) -> dict[str, str]:
    return {f.check: f.detail for f in findings if not f.passed}


@pytest.mark.parametrize("family", FAMILIES)
def test_hard_gated_parent_is_the_saved_and_reloaded_cut_model(family: str, tmp_path: Path) -> None:
    parent = tiny_model(family)
    student = cut(parent, MASK)
    student.save_pretrained(tmp_path)
    facts = reference(parent, student, MASK)
    assert not torch.equal(facts.expected["plain"], observe(parent, facts.ids_BT)["plain"])  # not vacuous
    assert not failures(verify(tmp_path, facts))


def test_a_fresh_process_comes_to_the_same_verdict(tmp_path: Path) -> None:
    parent = tiny_model("gemma3n_text", **KV_SHARED)  # tensors outside the layers, shared keys and values
    mask = mask_of((0, 3, 4, 5))
    student = cut(parent, mask)
    student.save_pretrained(tmp_path)
    expected = reference(parent, student, mask)
    findings = in_fresh_process(tmp_path, expected)
    assert not failures(findings)
    assert [f.check for f in findings] == [f.check for f in verify(tmp_path, expected)]


@pytest.mark.slow
def test_what_a_library_prints_does_not_disturb_the_fresh_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tiny_model("llama")
    student = cut(parent, MASK)
    student.save_pretrained(tmp_path / "model")
    (tmp_path / "sitecustomize.py").write_text("print('a greeting', flush=True)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    findings = in_fresh_process(tmp_path / "model", reference(parent, student, MASK))
    assert not failures(findings)
    assert len(findings) > 5


# ---------------------------------------------------------------------- wrong cuts


def rederived(
    section: dict[str, Any], length: int, keep: Sequence[int], feed_forward: Sequence[int]
) -> dict[str, Any]:
    """The pattern is left to the config class, which repeats its own period."""
    lists, stale = ("layer_types", "no_rope_layers"), ("max_window_layers",)
    right = slice_section(section, length, keep, feed_forward)
    return {k: section[k] if k in stale else v for k, v in right.items() if k not in lists}


def first_entries(
    section: dict[str, Any], length: int, keep: Sequence[int], feed_forward: Sequence[int]
) -> dict[str, Any]:
    """Every list keeps its first entries, in place of the survivors'."""
    right = slice_section(section, length, keep, feed_forward)
    return {
        k: section[k][: len(keep)] if isinstance(section.get(k), list) and len(section[k]) == length else v
        for k, v in right.items()
    }


def count_alone(
    section: dict[str, Any], length: int, keep: Sequence[int], feed_forward: Sequence[int]
) -> dict[str, Any]:
    """Only the number of layers is rewritten; where the dense layers are is not."""
    right = slice_section(section, length, keep, feed_forward)
    stale = {
        k: section[k] for k in ("mlp_only_layers", "first_k_dense_replace", "moe_layers") if k in section
    }
    return {**right, **stale}


WRONG = [
    *[(rederived, family) for family in ("qwen2", "gemma2", "gemma3_text", "smollm3", "cohere2", "olmo3")],
    *[(first_entries, family) for family in ("qwen3", "gemma2", "gemma3_text", "smollm3", "cohere2", "lfm2")],
    *[(count_alone, family) for family in ("qwen3_moe", "deepseek_v3", "llama4_text")],
]


@pytest.mark.parametrize(("rule", "family"), WRONG)
def test_a_wrong_rule_is_refused_before_anything_is_saved(
    rule: Callable[..., dict[str, Any]], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "slice_section", rule)
    with pytest.raises(ConfigError, match="would become layer"):
        cut(tiny_model(family), MASK)


@pytest.mark.parametrize(("rule", "family"), WRONG)
def test_a_wrong_cut_on_disk_is_caught_by_the_proof(
    rule: Callable[..., dict[str, Any]],
    family: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent = tiny_model(family)
    right = cut(parent, MASK)
    right.save_pretrained(tmp_path)
    expected = reference(parent, right, MASK)
    monkeypatch.setattr(cutting, "slice_section", rule)
    cut_config(parent.config, MASK).save_pretrained(tmp_path)
    assert failures(verify(tmp_path, expected))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "smollm3"])
def test_layers_deleted_without_renumbering_are_caught(family: str) -> None:
    parent, wrong = tiny_model(family), tiny_model(family)
    ids_BT = proof_tokens(parent.config)
    right = observe_gated(parent, MASK, ids_BT)
    body = wrong.transformer if family == "gpt2" else wrong.model
    name = "h" if family == "gpt2" else "layers"
    setattr(body, name, nn.ModuleList(getattr(body, name)[i] for i in MASK.keep))
    wrong.config.update(cut_config(parent.config, MASK).to_dict())
    try:
        found = observe(wrong, ids_BT)
    except IndexError:
        return  # the cache has no place for the old numbers
    assert failures(compare(right, found, "float32", exact=True))


def test_missing_stale_and_foreign_tensors_are_caught(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    parent = tiny_model("llama")
    student = cut(parent, MASK)
    student.save_pretrained(tmp_path)
    expected, path = reference(parent, student, MASK), tmp_path / "model.safetensors"
    weights = load_file(path)
    teacher = {f"teacher.{name}": tensor for name, tensor in parent.state_dict().items()}
    for planted in (
        {k: v for k, v in weights.items() if "layers.4.mlp.up_proj" not in k},
        {**weights, "model.layers.5.mlp.up_proj.weight": weights["model.layers.4.mlp.up_proj.weight"] + 1},
        {**weights, **{k: v.contiguous() for k, v in teacher.items()}},
    ):
        save_file(planted, path, {"format": "pt"})
        assert "weights as predicted, nothing else stored" in failures(verify(tmp_path, expected))
