"""Run a model in four ways that reveal a wrong cut, and compare two such runs.

The ways are: a plain batch, the same batch with one row padded on the left, and greedy generation with and
without the cache. Logits are compared, not only tokens, because a wrong attention pattern often leaves the
first tokens as they were.

Shapes: B batch, T tokens, S generated tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from src.models.head import TOLERANCE
from src.models.layers import text_config
from src.models.positions import positions_of

GENERATED, PADDING = 6, 3

Observation = dict[str, Tensor]
LOGITS = "logits = original"
"""Name of the check that compares the logits of a plain batch."""


@dataclass(frozen=True)
class Finding:
    """One check of a proof, whether it passed, what was found, and whether to say so although it passed."""

    check: str
    passed: bool
    detail: str
    noted: bool = False


def proof_tokens(config: PretrainedConfig, tokens: int | None = None) -> Tensor:
    """Return two sequences of ordinary tokens ``[2, T]``, of random ids, to run a model on.

    Args:
        config: of the model; its special tokens are left out.
        tokens: the length T; None takes one that exceeds every attention window of up to 1024 tokens.
    """
    special: set[int] = set()
    windows = [8]

    def read(section: dict[str, Any]) -> None:
        for name, value in section.items():
            if isinstance(value, dict):
                read(value)
            elif "token_i" in str(name):  # *_token_id, *_token_index
                special.update(value if isinstance(value, list) else [value])
            elif str(name).endswith(("window", "window_size", "chunk_size")) and isinstance(value, int):
                windows.append(value)

    read(config.to_dict())
    positions = positions_of(config) or 1 << 20
    length = tokens or min(max(w for w in windows if w <= 1024) + 8, positions - GENERATED)
    vocabulary = min(text_config(config).vocab_size, 50_000)
    ordinary = torch.tensor([i for i in range(vocabulary) if i not in special])
    draw = torch.randint(len(ordinary), (2, length), generator=torch.Generator().manual_seed(0))
    return ordinary[draw]


@torch.no_grad()
def observe(model: PreTrainedModel, ids_BT: Tensor) -> Observation:
    """Run a model on ``ids_BT`` in the four ways of this module; return what it computes, moved to the CPU.

    Nothing but the weights decides it, neither hooks nor how the model was loaded (:func:`plain`).

    Returns:
        By name, logits ``[B, T or S, V]`` and generated tokens ``[B, S]``.
    """
    with plain(model):
        return _observe(model, ids_BT)


def _observe(model: PreTrainedModel, ids_BT: Tensor) -> Observation:
    ids_BT = ids_BT.to(model.device)
    ones_BT, padded_BT = torch.ones_like(ids_BT), torch.ones_like(ids_BT)
    padded_BT[-1, :PADDING] = 0
    single_1T, single_ones_1T = ids_BT[-1:, PADDING:], ones_BT[-1:, PADDING:]
    positions = {"position_ids": (padded_BT.cumsum(-1) - 1).clamp(min=0)}
    accepted = inspect.signature(model.forward).parameters
    outputs = {
        "plain": model(input_ids=ids_BT, attention_mask=ones_BT).logits,
        "single": model(input_ids=single_1T, attention_mask=single_ones_1T).logits,
        "padded": model(
            input_ids=ids_BT,
            attention_mask=padded_BT,
            **{name: value for name, value in positions.items() if name in accepted},
        ).logits[-1:, PADDING:],
    }
    generate: Any = model.generate  # what it returns depends on its arguments
    with _plain_generation(model):
        for name, cached in (("cached", True), ("uncached", False)):
            out = generate(
                ids_BT,
                attention_mask=ones_BT,
                max_new_tokens=GENERATED,
                use_cache=cached,
                return_dict_in_generate=True,
                output_logits=True,
            )
            outputs[name] = torch.stack(out.logits, dim=1)
            outputs[f"{name}_tokens"] = out.sequences[:, ids_BT.shape[1] :]
    return {name: tensor.cpu().contiguous().clone() for name, tensor in outputs.items()}


ALIGNMENT = 64
"""Bytes at whose multiples PyTorch's allocator begins a tensor on a CPU."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@contextmanager
def plain(model: PreTrainedModel) -> Iterator[None]:
    """Make what a model computes in the block depend on the values of its weights alone.

    A kernel is chosen by more than the values: by ``requires_grad``, even without autograd, by strides and by
    alignment (mapped weights start anywhere in memory). Training mode and hooks change what runs. So they are
    switched off with ``requires_grad``, and restored after the block. Weights move to fresh memory, and stay
    there.
    """
    model._apply(_laid_out)
    with ExitStack() as stack:
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            module.training = False
            for name in HOOKS:
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, OrderedDict())
        yield


def _laid_out(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Generate greedily and without a stop token in the block; sampling settings would hide the logits."""
    own = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = own


def compare(expected: Observation, actual: Observation, dtype: str, exact: bool) -> list[Finding]:
    """Judge an observation against the expected one; return a finding for each check.

    Args:
        expected: observation of the original.
        actual: observation of the model under test.
        dtype: type of the computation, which sets the tolerance.
        exact: whether the same computation must give the same bits (it does on a CPU).
    """
    scale = float(expected["plain"].abs().max())
    tolerance = TOLERANCE[dtype] * scale
    findings = []
    for name, what in (("plain", LOGITS), ("padded", f"padded {LOGITS}"), ("cached", f"cached {LOGITS}")):
        ours, theirs = actual[name], expected[name]
        if name == "cached" and not exact:  # beyond a token that rounding decides, the contexts differ
            steps = _alike(actual["cached_tokens"], expected["cached_tokens"])
            ours, theirs = ours[:, :steps], theirs[:, :steps]
        difference = _difference(theirs, ours)
        same = torch.equal(theirs, ours) if exact else difference <= tolerance
        detail = "equal to the last bit" if same and exact else f"differ by {difference:.1e} of {scale:.1f}"
        findings.append(Finding(what, same, detail))
    for what, ways in (("left padding = single", _padding), ("cache = no cache", _cache)):
        difference, own = _difference(*ways(actual)), _difference(*ways(expected))
        same = difference <= own + tolerance
        detail = f"differ by {difference:.1e} of {scale:.1f}"
        detail += "; so does the original" if same and difference > tolerance else ""
        findings.append(Finding(what, same, detail))
    return findings


def _padding(run: Observation) -> tuple[Tensor, Tensor]:
    return run["padded"], run["single"]


def _cache(run: Observation) -> tuple[Tensor, Tensor]:
    """Return logits with and without the cache, up to where their tokens part: beyond, contexts differ."""
    steps = _alike(run["cached_tokens"], run["uncached_tokens"])
    return run["cached"][:, :steps], run["uncached"][:, :steps]


def _alike(tokens_BS: Tensor, others_BS: Tensor) -> int:
    """Return the number of steps up to the first in which the tokens differ, that one included."""
    parted = (tokens_BS != others_BS).any(0).tolist()
    return parted.index(True) + 1 if True in parted else len(parted)


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference; infinite for different shapes and for NaN."""
    if a.shape != b.shape:
        return float("inf")
    gap = float((a.float() - b.float()).abs().max())
    return gap if gap == gap else float("inf")
