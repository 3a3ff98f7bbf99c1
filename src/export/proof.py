"""The proof of an export: hard-gated parent = cut model = what a fresh process loads from the directory.

This module runs the models in memory and records what they compute. :mod:`src.export.fresh` is the fresh
process, which has nothing but the directory and that record.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.export.fresh import PROOF_TEXT, Reference, unique_weights
from src.export.observe import Finding, Observation, compare, observe, proof_tokens
from src.mask import Mask
from src.models.claims import is_tied
from src.models.cut import cut, kept_weights
from src.models.cut_config import attention_implementation
from src.models.layers import decoder_layers
from src.training.progress import waiting
from src.units.kinds import KINDS
from src.units.width import Width, find_width


@waiting("the export is proven")
def prove(
    directory: Path,
    parent: PreTrainedModel,
    student: PreTrainedModel,
    mask: Mask,
    weights: int,
    recovered: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: int | None = None,
    upcast: bool = True,
) -> list[Finding]:
    """Prove two equalities: hard-gated parent = cut model, and exported model = what a fresh process loads.

    If the weights did not change after the cut, one comparison proves both: that of the fresh process with
    the hard-gated parent. Under a mask of KV groups or channels, the cut and the gated parent agree only to
    rounding, because their sums have different lengths. So these two are compared first, and then the fresh
    process with the cut, to the last bit.

    Args:
        directory: the complete export.
        parent: the parent, uncut.
        student: the model that was exported.
        mask: the mask of the cut.
        weights: how many numbers the export must hold; see :func:`predicted_weights`.
        recovered: whether the student's weights differ from the parent's.
        tokenizer: the parent's.
        tokens: length of the test sequences; None exceeds every attention window of up to 1024 tokens.
        upcast: compute in float32; changes ``parent`` and ``student`` in place.

    Returns:
        One finding for each check. A check that fails is a finding, not an error.
    """
    if upcast:
        parent, student = parent.float(), student.float()
    dtype, device = str(student.dtype).removeprefix("torch."), student.device.type
    ids_BT = proof_tokens(parent.config, tokens)
    expected, findings = observe_gated(parent, mask, ids_BT), []
    if recovered or mask.wide:
        same = compare(
            expected, observe(cut(parent, mask), ids_BT), dtype, exact=device == "cpu" and not mask.wide
        )
        original = "gated parent" if mask.wide else "parent's weights"
        findings = [Finding(f"{f.check}, {original}", f.passed, f.detail) for f in same]
        expected = observe(student, ids_BT)
    reference = Reference(
        expected=expected,
        ids_BT=ids_BT,
        weights=weights,
        layers=mask.depth,
        tied=is_tied(student),
        text_ids=tokenizer(PROOF_TEXT).input_ids if tokenizer else None,
        chat_template=tokenizer.chat_template if tokenizer else None,
        dtype=dtype,
        attention=attention_implementation(student.config),
        device=device,
        threads=torch.get_num_threads(),
    )
    if tokenizer is None:
        findings.append(Finding("tokenizer", True, "not checked: none can be read from the parent", True))
    return findings + in_fresh_process(directory, reference)


@torch.no_grad()
def stored_as_parent(
    trained: PreTrainedModel, parent: PreTrainedModel, mask: Mask, tokens: int | None = None
) -> tuple[PreTrainedModel, list[Finding]]:
    """Return the recovered model in the parent's types, and a finding if that rounds its weights.

    The finding says by how much the logits move.

    Args:
        trained: the recovered model in the types it was trained in; holds rounded weights afterwards.
        parent: the parent, in the types to store.
        mask: names the kept units.
        tokens: length of the sequences, as in :func:`prove`.
    """
    if trained.dtype == parent.dtype:
        return trained, []
    stored = cut(parent, mask)
    types = {name: t.dtype for name, t in stored.state_dict().items()}
    rounded = {(t.dtype, types[n]) for n, t in trained.state_dict().items() if t.dtype != types[n]}
    ids_BT = proof_tokens(parent.config, tokens).to(trained.device)
    before_BTV = trained(input_ids=ids_BT).logits
    stored.load_state_dict(trained.state_dict())
    trained.load_state_dict(stored.state_dict())
    moved = float((trained(input_ids=ids_BT).logits - before_BTV).abs().max())
    names = ", ".join(sorted(f"{a} -> {b}".replace("torch.", "") for a, b in rounded))
    detail = f"weights rounded {names}; logits moved by {moved:.1e} of {float(before_BTV.abs().max()):.1f}"
    return stored, [
        Finding("stored as trained", True, f"no: {detail}; --dtype float32 stores them as trained", True)
    ]


def removed_weights(width: Width, parent: PreTrainedModel, path: str, mask: Mask) -> int:
    """Count the single numbers that a mask of KV groups or channels removes from a parent's weights.

    Args:
        width: where the parent's tensors hold these units.
        parent: the parent.
        path: name of its list of layers, such as ``model.layers``.
        mask: the mask.
    """
    state, gone = parent.state_dict(), mask.units // mask.num_layers - len(mask.by_layer[0])
    held = [
        state[f"{path}.{index}.{name}"].numel()
        for index, blocks in enumerate(width.blocks)
        for name in blocks
        if f"{path}.{index}.{name}" in state
    ]
    return sum(numel // width.count * gone for numel in held)


def observe_gated(parent: PreTrainedModel, mask: Mask, ids_BT: Tensor) -> Observation:
    """Observe the parent under hard gates: those of the kept units open, the others closed.

    Args:
        parent: the parent; its gates are taken off again.
        mask: names the kept units.
        ids_BT: tokens to run on.
    """
    gates = KINDS[mask.unit].gate(parent)
    gates_U = torch.zeros(len(gates), device=parent.device)
    gates_U[list(mask.keep)] = 1.0
    try:
        with gates.use(gates_U):
            return observe(parent, ids_BT)
    finally:
        gates.remove()


def in_fresh_process(directory: Path, reference: Reference) -> list[Finding]:
    """Check a directory by :mod:`src.export.fresh` in a process of its own, offline; return its findings.

    A crash is a failed check.

    Args:
        directory: the export.
        reference: what it must reproduce.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path, report = Path(scratch) / "reference.safetensors", Path(scratch) / "findings.jsonl"
        reference.save(path)
        process = subprocess.run(
            [
                *(sys.executable, "-m", "src.export.fresh", str(directory.resolve())),
                *("--reference", str(path), "--findings", str(report)),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        lines = report.read_text().splitlines() if report.is_file() else []
    findings = [Finding(**json.loads(line)) for line in lines]
    if process.returncode or not findings:
        last = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        findings.append(Finding("loads in a fresh process", False, last[0]))
    return findings


def predicted_weights(parent: PreTrainedModel, student: PreTrainedModel, mask: Mask) -> int:
    """Count the numbers that the export must hold: the parent's without the removed units, shared ones once.

    Tensors outside the layers whose size follows the depth (per-layer embeddings) shrink with it.

    Args:
        parent: the parent.
        student: the cut model.
        mask: names the kept units.
    """
    path, _ = decoder_layers(parent)
    if mask.wide:
        removed = removed_weights(find_width(parent.config, mask.unit, type(parent)), parent, path, mask)
        return unique_weights(parent.state_dict()) - removed
    kept = kept_weights(parent.state_dict(), parent, mask)
    cut_shapes = {name: t.shape for name, t in student.state_dict().items() if not name.startswith(path)}
    shrunk = sum(t.numel() - cut_shapes[n].numel() for n, t in kept.items() if n in cut_shapes)
    return unique_weights(kept) - int(shrunk)
