"""Prove the export of every causal language model of the installed transformers, for each kind of unit.

A tiny model of each family is built from its config class. Masks are drawn from the space of a unit, cut,
saved, and loaded by a fresh process that compares logits, cache, padding, keys and size with the hard-gated
parent. Of KV groups and channels, the gated parent is compared with the cut to rounding, and the fresh
process with the cut to the last bit. Each family ends for each unit as *pass*, *refused* (it cannot hold such
a cut, and why) or *cannot be built* (and why). Where a family allows some masks of layers only, illegal ones
are tried too, and must be refused, not exported.

    python -m scripts.export_matrix                     all, resuming what is in the results
    python -m scripts.export_matrix --families llama qwen3 --units half --fresh

A fresh process here is one forked from a server that has imported the libraries and never held a model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from scripts.lab.jobs import Failure, isolated, short
from scripts.lab.results import JSON, options, origin, read
from src.errors import ConfigError
from src.export.fresh import Reference, verify
from src.export.observe import Observation, compare, observe, proof_tokens
from src.export.proof import observe_gated, predicted_weights
from src.files import write_json
from src.mask import Mask, Unit
from src.models.claims import is_tied
from src.models.constraints import Constraints, constraints
from src.models.cut import cut
from src.models.cut_config import attention_implementation
from src.models.layers import num_layers
from src.units.kinds import KINDS
from tests.families import tiny_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
MASKS, TIMEOUT = 3, 600


def draw_masks(model: PreTrainedModel, family: str, unit: Unit) -> tuple[list[Mask], Constraints]:
    """Masks drawn from the spaces of a unit within the limits of a family, and these limits.

    They remove 1 to ``MASKS`` layers, or as many halves as these have, or a quarter of the width.

    Raises:
        ConfigError: the family holds no such units, or none can go.
    """
    kind, length = KINDS[unit], num_layers(model.config)
    generator = torch.Generator().manual_seed(len(family))
    limits = Constraints() if kind.wide else constraints(model.config)
    gates = kind.gate(model, limits=limits)
    gates.remove()
    width, found = len(gates) // length if kind.wide else None, []
    for remove in [max(1, width // 4)] if width else range(1, MASKS + 1):
        pinned = limits.pinned(length, remove)
        if width or length - len(pinned) >= remove:
            found.append(kind.space(length, width or 1, remove, pinned).uniform(generator))
    if limits.period > 1:
        found.append(tuple(kind.of(i for i in range(length) if i // limits.period != 1)))
    if not found:
        raise ConfigError(limits.reason)
    return [Mask(family, length, keep, "by hand", unit=unit, width=width) for keep in found], limits


def prepare(family: str, units: list[Unit], folder: Path) -> dict[Unit, JSON]:
    """Build a parent, cut it by each unit, and save; leave beside each export what it must reproduce."""
    torch.set_num_threads(1)
    rows: dict[Unit, JSON] = {}
    try:
        parent = Parent.of(family, folder)
    except ConfigError as e:
        return {unit: {"result": "refused", "reason": str(e)} for unit in units}
    except Exception as e:  # whatever a family's own code raises is the finding
        found = {"result": "cannot be built", "reason": f"its own code fails: {short(e)}"}
        return dict.fromkeys(units, found)
    for unit in units:
        try:
            rows[unit] = parent.cuts(unit)
        except Exception as e:
            rows[unit] = {"result": "WRONG", "reason": short(e)}
    return rows


@dataclass(frozen=True)
class Parent:
    """A model that is cut, with what it computes, and the folder of the exports."""

    family: str
    folder: Path
    model: PreTrainedModel
    ids_BT: Tensor
    whole: Observation

    @classmethod
    def of(cls, family: str, folder: Path) -> Parent:
        """Build the model, and save it whole: what fails on the parent is not the cut's fault."""
        model = tiny_model(family)
        ids_BT = proof_tokens(model.config)
        parent = cls(family, folder, model, ids_BT, observe(model, ids_BT))
        everything = Mask.by_hand(family, length := num_layers(model.config), range(length))
        parent.save("control", model, everything, parent.whole)
        return parent

    def save(self, name: str, student: PreTrainedModel, mask: Mask, expected: Observation) -> None:
        student.save_pretrained(self.folder / name)
        Reference(
            expected=expected, ids_BT=self.ids_BT, weights=predicted_weights(self.model, student, mask),
            layers=mask.depth, tied=is_tied(student), attention=attention_implementation(self.model.config),
        ).save(self.folder / f"{name}.reference")  # fmt: skip

    def cuts(self, unit: Unit) -> JSON:
        """Cut the model by masks of a unit; leave the exports to be verified, or say why there are none."""
        try:
            masks, limits = draw_masks(self.model, self.family, unit)
        except ConfigError as e:
            return {"result": "refused", "reason": str(e)}
        row: JSON = {"class": type(self.model).__name__, "limits": limits.reason, "masks": []}
        length = masks[0].num_layers
        only = limits.always_keep or (range(1, length - 1) if limits.tail_only else ())
        beyond = [[i for i in range(length) if i != gone] for gone in sorted(only if unit == "layer" else ())]
        for mask in [*masks, *(Mask.by_hand(self.family, length, keep) for keep in beyond)]:
            try:
                student = cut(self.model, mask)  # limits stricter than a mask needs: the proof judges it
            except ConfigError as e:
                if mask.wide:
                    return {"result": "refused", "reason": str(e)}
                if mask in masks:
                    raise
                row.setdefault("refusal", str(e))
                continue
            gated = expected = observe_gated(self.model, mask, self.ids_BT)
            if mask.wide:
                expected = observe(student, self.ids_BT)
            self.save(f"{unit}-{len(row['masks'])}", student, mask, expected)
            same = compare(gated, expected, "float32", exact=not mask.wide)
            row["masks"].append({
                "removed": mask.missing, "failed": failed(map(asdict, same)),
                "moved": round(apart(gated, self.whole), 4), "rounding": apart(gated, expected),
            })  # fmt: skip
        return row


def apart(a: Observation, b: Observation) -> float:
    """Largest difference of the logits of two runs, as a share of the largest logit."""
    return float((a["plain"] - b["plain"]).abs().max() / a["plain"].abs().max())


def failed(findings: Iterable[JSON]) -> list[str]:
    """Findings that did not pass, in words."""
    return [f"{f['check']}: {f['detail']}" for f in findings if not f["passed"]]


def check(folder: Path) -> dict[str, list[JSON]]:
    """The other side: verify each export, in a process that never saw the models."""
    references = {f.stem: Reference.load(f) for f in sorted(folder.glob("*.reference"))}
    return {name: [asdict(f) for f in verify(folder / name, r)] for name, r in references.items()}


def verdict(unit: Unit, row: JSON, findings: dict[str, list[JSON]]) -> JSON:
    """Judge the findings on the exports, with those on the parent as the control."""
    if control := failed(findings["control"]):
        return {"result": "refused", "reason": f"a saved parent does not load as it was: {control[0]}"}
    for number, mask in enumerate(row["masks"]):
        found = findings[f"{unit}-{number}"]
        mask["failed"] += failed(found)
        mask["as_parent"] = [f["check"] for f in found if "the original" in f["detail"]]
    right = all(mask["moved"] and not mask["failed"] for mask in row["masks"])
    return {**row, "result": "pass" if right else "WRONG"}


def judge(family: str, units: list[Unit]) -> dict[Unit, JSON]:
    """Cells of a row of the matrix."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows = isolated(prepare, family, units, Path(folder), limit=TIMEOUT)
            if any("result" not in row for row in rows.values()):
                findings = isolated(check, Path(folder), limit=TIMEOUT)
                rows = {u: row if "result" in row else verdict(u, row, findings) for u, row in rows.items()}
        except Failure as e:
            rows = {unit: {"result": "WRONG", "reason": str(e)} for unit in units}
    return rows


def main() -> None:
    args = options(
        (__doc__ or "").splitlines()[0], families=([""], "model types; all by default"),
        units=([*KINDS], "kinds of unit"), out=(Path("results/export_matrix.json"), "results"),
        fresh=(False, "judge again what the results already hold"),
    )  # fmt: skip
    head = {**origin(), "transformers": transformers.__version__}  # before a file changes
    get_context("forkserver").set_forkserver_preload(["scripts.export_matrix"])
    families = list(filter(None, args.families)) or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    done = read(args.out)
    rows = done.get("families", {}) if done.get("transformers") == transformers.__version__ else {}
    for family in track(families, description="export matrix"):
        row = rows.setdefault(family, {})
        if units := [unit for unit in args.units if args.fresh or unit not in row]:
            row |= {unit: {**cell, "commit": head["commit"]} for unit, cell in judge(family, units).items()}
            write_json(args.out, {**head, "families": rows})
    judged = [(family, unit, row) for family, units in rows.items() for unit, row in units.items()]
    wrong = [f"WRONG {a}, {unit}: {json.dumps(r)}" for a, unit, r in judged if r["result"] == "WRONG"]
    raise SystemExit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
