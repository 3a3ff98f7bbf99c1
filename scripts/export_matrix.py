"""Prove the export of every causal language model of the installed transformers.

A tiny model of each family is built from its config class; several random masks are cut, saved, and loaded
by a fresh process that compares logits, cache, padding, keys and size with the hard-gated parent. Each family
ends as *pass*, *refused* (the format cannot hold a cut, and why) or *cannot be built* (and why).
Where a family allows some masks only, illegal ones are tried too, and must be refused, not exported.

    python -m scripts.export_matrix                     all families, resuming what is in the results
    python -m scripts.export_matrix --families llama qwen3 --fresh

A fresh process here is one forked from a server that has imported the libraries and never held a model.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from scripts.lab.jobs import Failure, isolated, short
from scripts.lab.results import options, origin, read
from src.errors import ConfigError
from src.export.fresh import Reference, verify
from src.export.observe import Observation, proof_tokens
from src.export.proof import observe_gated, predicted_weights
from src.files import write_json
from src.mask import Mask
from src.models.claims import is_tied
from src.models.constraints import Constraints, constraints
from src.models.cut import cut
from src.models.cut_config import attention_implementation
from src.models.cut_rules import forbidden
from src.models.layers import decoder_layers, num_layers
from tests.families import tiny_config

Row = dict[str, Any]
MASKS, TIMEOUT = 3, 180


def tiny_model(family: str) -> PreTrainedModel:
    """A tiny model of any family, with weights large enough to betray a wrong cut, saved and loaded once.

    A parent is always a loaded one, and some families change weights on loading (Youtu's padding row).

    Raises:
        ConfigError: stock ``AutoModelForCausalLM`` does not load what the family saves.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        except ValueError as e:
            raise ConfigError(
                f"model: AutoModelForCausalLM builds a '{family}' and does not load what it saves, so no "
                f"export could be loaded: {str(e).splitlines()[0].partition(' for this kind')[0]}."
            ) from e
    return loaded.eval()._apply(torch.clone)


def draw_masks(length: int, limits: Constraints, seed: int) -> list[list[int]]:
    """Random masks that remove 1 to ``MASKS`` layers and respect the limits."""
    draw, found = random.Random(seed), []
    for remove in range(1, MASKS + 1):
        free = sorted(set(range(length)) - limits.pinned(length, remove))
        if len(free) >= remove:
            gone = set(draw.sample(free, remove))
            found.append([i for i in range(length) if i not in gone])
    if limits.period > 1:
        block = range(limits.period, 2 * limits.period)
        found.append([i for i in range(length) if i not in block])
    return found


def prepare(family: str, folder: Path) -> Row:
    """Build, cut and save; leave beside each export what it must reproduce."""
    torch.set_num_threads(1)
    try:
        if why := forbidden(tiny_config(family)):
            return {"result": "refused", "reason": f"This '{family}' {why}."}
        model = tiny_model(family)
        length, ids_BT = num_layers(model.config), proof_tokens(model.config)
        decoder_layers(model)
        mask_of = partial(Mask.by_hand, family, length)
        everything = observe_gated(model, mask_of(range(length)), ids_BT)
    except ConfigError as e:
        return {"result": "refused", "reason": str(e)}
    except Exception as e:  # whatever a family's own code raises is the finding
        return {"result": "cannot be built", "reason": f"its own code fails: {short(e)}"}
    try:
        limits = constraints(model.config)
    except ConfigError as e:
        return {"result": "refused", "reason": str(e)}
    row: Row = {"class": type(model).__name__, "limits": limits.reason, "masks": []}
    drawn = draw_masks(length, limits, seed=len(family))
    for gone in sorted(limits.always_keep or (range(1, length - 1) if limits.tail_only else ())):
        keep = [i for i in range(length) if i != gone]
        try:
            cut(model, mask_of(keep))
            drawn.append(keep)  # stricter limits than this one mask needs: let the proof judge it
        except ConfigError as e:
            row.setdefault("refusal", str(e))

    def save(name: str, student: PreTrainedModel, mask: Mask, expected: Observation) -> None:
        student.save_pretrained(folder / name)
        Reference(
            expected=expected, ids_BT=ids_BT, weights=predicted_weights(model, student, mask),
            layers=mask.depth, tied=is_tied(student), attention=attention_implementation(model.config),
        ).save(folder / f"{name}.reference")  # fmt: skip

    for number, mask in enumerate(map(mask_of, drawn)):
        expected = observe_gated(model, mask, ids_BT)
        moved = float((expected["plain"] - everything["plain"]).abs().max())
        row["masks"].append({"keep": list(mask.keep), "moved": round(moved, 4)})
        save(str(number), cut(model, mask), mask, expected)
    if not row["masks"]:
        return row | {"result": "refused", "reason": limits.reason}
    # What fails on the parent is not the cut's fault.
    save("control", model, mask_of(range(length)), everything)
    return row


def check(folder: Path) -> dict[str, list[Row]]:
    """The other side: verify each export, in a process that never saw the models."""
    references = {f.stem: Reference.load(f) for f in sorted(folder.glob("*.reference"))}
    return {name: [asdict(f) for f in verify(folder / name, r)] for name, r in references.items()}


def verdict(masks: list[Row], findings: dict[str, list[Row]]) -> Row:
    """Judge the findings on the exports, with those on the parent as the control."""
    wrong_of = {name: [f for f in fs if not f["passed"]] for name, fs in findings.items()}
    failed = {name: [f"{f['check']}: {f['detail']}" for f in fs] for name, fs in wrong_of.items()}
    if control := failed.pop("control"):
        return {"result": "refused", "reason": f"a saved parent does not load as it was: {control[0]}"}
    for number, mask in enumerate(masks):
        mask["failed"] = failed[str(number)]
    wrong = any(failed.values()) or not all(mask["moved"] for mask in masks)
    as_parent = sorted({f["check"] for fs in findings.values() for f in fs if "the original" in f["detail"]})
    return {"result": "WRONG" if wrong else "pass", "as_parent": as_parent}


def quietly(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of this file without the library's own words."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return function(*args)


def judge(family: str) -> Row:
    """One row of the matrix."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        row = isolated(quietly, prepare, family, Path(folder), limit=TIMEOUT)
        if "result" not in row:
            row |= verdict(row["masks"], isolated(quietly, check, Path(folder), limit=TIMEOUT))
    return row | {"seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    args = options(
        (__doc__ or "").splitlines()[0], families=([""], "model types; all by default"),
        out=(Path("results/export_matrix.json"), "results"),
        fresh=(False, "judge again what the results already hold"),
    )  # fmt: skip
    head = {**origin(), "transformers": transformers.__version__}  # before a file changes
    get_context("forkserver").set_forkserver_preload(["src.export.proof", "tests.families"])
    families = list(filter(None, args.families)) or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    done = read(args.out)
    rows = done.get("families", {}) if done.get("transformers") == transformers.__version__ else {}
    for family in track([f for f in families if args.fresh or f not in rows], description="export matrix"):
        try:
            rows[family] = judge(family)
        except Failure as e:
            rows[family] = {"result": "WRONG", "reason": str(e)}
        write_json(args.out, {**head, "families": rows})
    wrong = {family: row for family, row in rows.items() if row["result"] == "WRONG"}
    print(*(f"WRONG {family}: {json.dumps(row)}" for family, row in wrong.items()), sep="\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
