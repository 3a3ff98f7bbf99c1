"""Export a search of prompts: k plain checkpoints, each proven, and the router that names one for a prompt.

``python -m src.cli export --mask logs/run/mask.json --clusters 3 --out DIRECTORY``

The directory holds the checkpoints ``0`` to ``k - 1``, ``router.safetensors``, ``router.json`` and a card. It
appears whole, after the last proof, or not at all.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from src.errors import ConfigError
from src.export.cuts import public_name
from src.export.observe import Finding
from src.export.parent import true_parent
from src.export.write import Parent, check_out, staged, write
from src.files import write_json, write_text
from src.mask import Mask
from src.models.cut import cut
from src.routing.clusters import clusters, mean_jaccard
from src.routing.router import ADAPTERS, CARD, FILE, Router
from src.training.adapters import merged
from src.units.kinds import KINDS
from src.units.spaces import Space

README = """# {count} cuts of `{parent}`, one for each kind of prompt

Each directory `0` to `{last}` is a plain Hugging Face checkpoint with a card and a proof of its own. All are
of one size. A prompt is answered by one of them, which the router names.

| checkpoint | calibration prompts | removed |
|---|---|---|
{rows}

Mean Jaccard index of the masks of two prompts: {jaccard:.3f}.

**Routing.** `router.safetensors` holds `table` (a vector for each token), `weight` and `bias`. Take the mean
of the table's rows of the prompt's tokens; the checkpoint is the place of the highest entry of `weight @ mean
+ bias`. The prompt is all that comes before the answer, in the parent's tokens. The choice stays for the
whole answer.

`python -m src.cli evaluate --model DIRECTORY --data FILE` judges each row by the checkpoint that it is routed
to.
"""


def space_of(mask: Mask, router: Router) -> Space:
    """Return the space of the masks of the size of ``mask`` that keep the layers which the search pinned."""
    every = mask.width or mask.num_layers
    keep = len(mask.by_layer[0]) if mask.wide else mask.depth
    return KINDS[mask.unit].space(mask.num_layers, mask.width or 1, every - keep, router.pinned)


def export_clusters(mask: Mask, args: argparse.Namespace) -> list[tuple[Mask, list[Finding]]]:
    """Export ``args.clusters`` checkpoints and their router; return each mask with the findings of its proof.

    Args:
        mask: of the search, beside which the router lies.
        args: the options of the verb.

    Raises:
        ConfigError: an option is at fault, there is no router of this mask, the prompts have fewer masks than
            are asked for, or a check fails.
    """
    out, name = Path(args.out), args.model or mask.model
    check_out(out, args.force, name)
    beside = Path(args.mask).parent
    router = Router.load(beside / FILE)
    router.check(mask)
    found = clusters(router.scores(router.prompts_PD), space_of(mask, router), args.clusters)
    shares = torch.bincount(found.of_P, minlength=len(found.masks_KU)) / len(found.of_P)
    mask, parent = true_parent(mask, name, None, args.any_parent), Parent.of(mask, name)
    proven: list[tuple[Mask, list[Finding]]] = []
    with staged(out.resolve(), args.force) as stage:
        for number, mask_U in enumerate(found.masks_KU):
            keep = tuple(mask_U.nonzero().flatten().tolist())
            one = replace(mask, keep=keep, metrics={"share": float(shares[number])})
            proven.append((one, _export(one, stage / str(number), parent, beside / ADAPTERS, args)))
        router.to(found.masks_KU).save(stage / FILE)
        _describe(stage, [one for one, _ in proven], mean_jaccard(found.masks_KU[found.of_P]))
    return proven


def _export(mask: Mask, out: Path, parent: Parent, adapters: Path, args: argparse.Namespace) -> list[Finding]:
    """Write the checkpoint of one mask, with the search's adapters merged if it trained any."""
    model = parent.load(args.dtype or "auto", args)
    adapted = adapters.is_file()
    whole = Mask.by_hand(mask.model, mask.num_layers, range(mask.num_layers))
    source = merged(parent.load(args.dtype or "auto", args), whole, adapters) if adapted else model
    return write(out, parent, model, cut(source, mask), mask, args, changed=adapted, data=args.data)


def _describe(stage: Path, masks: list[Mask], jaccard: float) -> None:
    """Write ``router.json`` and the card of a routed export."""
    models = [
        {"directory": str(number), "share": mask.metrics["share"], "keep": mask.kept}
        for number, mask in enumerate(masks)
    ]
    parent = public_name(masks[0].model)
    write_json(stage / CARD, {"parent": parent, "unit": masks[0].unit, "jaccard": jaccard, "models": models})
    rows = [f"| {n} | {mask.metrics['share']:.1%} | {mask.missing} |" for n, mask in enumerate(masks)]
    text = README.format(
        count=len(masks), parent=parent, last=len(masks) - 1, rows="\n".join(rows), jaccard=jaccard
    )
    write_text(stage / "README.md", text)


def refuse(args: argparse.Namespace) -> None:
    """Refuse options that belong to one checkpoint.

    Raises:
        ConfigError: names them.
    """
    given = [f"--{key}" for key in ("checkpoint", "push") if getattr(args, key) is not None]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: belongs to one checkpoint, and --clusters writes {args.clusters}. Leave it "
            "out; each of them has a mask.json, by which it is recovered and pushed like any other."
        )
