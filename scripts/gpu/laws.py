"""The laws of exactness in the types that models are served in, on the kernels of a GPU.

Open gates must be the teacher and hard gates the cut model, to the last bit. A model is first compared with
itself, run twice: where its own kernels do not repeat, no comparison can. Beside the laws stand the figures
that set the proof's tolerance in bf16 (left padding, cache) and the error of the gates' gradient.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from scripts.gpu.shapes import directory, label, middle_mask, random_model
from scripts.lab.jobs import short as told
from src.data.batches import supervised
from src.errors import ConfigError
from src.export import verb as export
from src.export.observe import Observation, _cache, observe, proof_tokens
from src.export.proof import observe_gated
from src.losses.distill import Distillation
from src.losses.signals import live_signal
from src.mask import Mask
from src.models.cut import cut
from src.models.gated import GatedLayers, freeze
from src.models.head import TOLERANCE, OutputHead
from tests.families import tiny_config

FAMILIES = ("gemma2", "gpt2", "mixtral", "phi3")
"""Tiny models beside the real shapes: soft-capped, learned positions, experts, fused projections."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every model's laws and gradients, and what the proof of an export finds in bf16."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.set_float32_matmul_precision("highest")
    rows = []
    for name, model in models(args):
        try:
            rows.append({"model": name, **laws(model), **gradients(model)})
        except (RuntimeError, ConfigError) as e:  # of a kernel that this device does not have, say
            rows.append({"model": name, "error": told(e)})
        print(json.dumps(rows[-1]), flush=True)
        del model
    return {"rows": rows, "export_proof": export_proof(args), "tolerance": TOLERANCE["bfloat16"]}


def models(args: argparse.Namespace) -> Any:
    """Real shapes and tiny families, in bf16."""
    bf16 = torch.bfloat16
    yield label("0.6b", args.tiny), random_model("0.6b", args.device, bf16, args.tiny)
    name = f"{label('llama', args.tiny)}, 8 layers of it"
    yield name, random_model("llama", args.device, bf16, args.tiny, num_hidden_layers=8)
    for family in FAMILIES[: 1 if args.tiny else None]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=bf16).eval()
        yield f"tiny {family}", model.to(args.device)


def laws(model: PreTrainedModel) -> dict[str, Any]:
    """Run model, open gates, hard gates and cut in the proof's four ways each, and compare bits."""
    freeze(model)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    everything = Mask.by_hand("", layers, range(layers))
    mask = Mask.by_hand("", layers, (i for i in range(layers) if i % 4 != 2))
    ids = proof_tokens(model.config, 48)
    once, again = observe(model, ids), observe(model, ids)
    opened, hard = observe_gated(model, everything, ids), observe_gated(model, mask, ids)
    short = observe(cut(model, mask), ids)
    scale = float(once["plain"].abs().max())
    return {
        "repeats": same(once, again), "open_is_teacher": same(once, opened), "hard_is_cut": same(hard, short),
        "largest_difference": max(gap(once, opened), gap(hard, short)) / scale,
        "padding": distance(once["padded"], once["single"]) / scale,
        "cache": distance(*_cache(once)) / scale,
    }  # fmt: skip


def same(a: Observation, b: Observation) -> bool:
    """Whether two runs agree to the last bit: logits of every kind and generated tokens."""
    return all(torch.equal(a[key], b[key]) for key in a)


def gap(a: Observation, b: Observation) -> float:
    return max(distance(a[key], b[key]) for key in a if not key.endswith("tokens"))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def gradients(model: PreTrainedModel) -> dict[str, Any]:
    """Gradient of the gates: skipping autograd in closed layers changes no bit, and bf16 this much.

    Attention's backward pass on a GPU adds up in no fixed order unless it is asked to.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    ids = proof_tokens(model.config, 48).to(model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        lean, again, full = (gate_gradient(model, batch, layers, skip) for skip in (True, True, False))
        exact = gate_gradient(model.float(), batch, layers, True)
    finally:
        torch.use_deterministic_algorithms(False)
    exactly = {"gradient_repeats": again, "gradient_of_closed_layers_exact": full}
    error = float((lean - exact).norm() / exact.norm())
    return {**{name: torch.equal(lean, other) for name, other in exactly.items()}, "gradient_error": error}


def gate_gradient(model: PreTrainedModel, batch: dict[str, Tensor], layers: int, skip: bool) -> Tensor:
    """Gradient ``[L]`` of the search's loss at a mask that removes every fourth layer."""
    gates, head = GatedLayers(model, lean=skip), OutputHead(model)
    leaf = torch.tensor([float(i % 4 != 2) for i in range(layers)], device=model.device, requires_grad=True)
    index = supervised(batch["labels"])
    try:
        with torch.no_grad():
            signal = live_signal(head, head.hidden(batch).flatten(0, 1)[index], 10)
        with gates.use(leaf):
            hidden_NH = head.hidden(batch).flatten(0, 1)[index]
        labels, loss = batch["labels"].flatten()[index + 1], Distillation(weight="none")
        return torch.autograd.grad(loss(head, hidden_NH, labels, signal)["loss"], leaf)[0]
    finally:
        gates.remove()


def export_proof(args: argparse.Namespace) -> dict[str, Any]:
    """The export of a bf16 model, its proof computing in bf16 on the device: what it found."""
    model = directory("0.6b", args.work, args.device, args.tiny)
    mask = middle_mask(model, args.work)
    asked = ["--mask", str(mask), "--out", str(args.work / "export"), "--force", "--device", args.device]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            parsed = export._parse([*asked, "--dtype", "bfloat16", "--proof-dtype", "stored"])
            findings = export.export(Mask.load(mask), parsed)
    except ConfigError as e:
        return {"error": told(e)}
    return {"findings": {finding.check: finding.detail for finding in findings}}
