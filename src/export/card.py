"""Write the README.md of an exported model: what it is, where it comes from, what was proven, what it scores.

Scores come after the export, from ``evaluate``: ``python -m src.export.card DIRECTORY --scores FILE.json``
puts them into the card of an export, each beside the parent's in the same run.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from src.errors import ConfigError
from src.export.cuts import public_name
from src.export.observe import Finding
from src.files import read_json, write_text
from src.mask import Mask

SCORES = re.compile(r"(?<=<!-- scores -->\n).*?(?=<!-- /scores -->)", re.DOTALL)
FIGURES = {"exact_match": "{:.1%}", "perplexity": "{:.3f}", "kl": "{:.4f}", "agreement": "{:.1%}"}
NO_SCORES = "Not evaluated yet.\n"


def front_matter(card: Path) -> dict[str, Any]:
    """Return the YAML block at the head of a model card; empty if there is none that can be read."""
    try:
        text = card.read_bytes().decode("utf-8", "replace")
        match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        block = yaml.safe_load(match.group(1)) if match else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}  # a card is no reason to lose an export
    return block if isinstance(block, dict) else {}


def model_card(
    mask: Mask,
    weights: tuple[int, int],
    findings: Sequence[Finding],
    parent_card: dict[str, Any],
    recovery: dict[str, Any] | None = None,
    license_name: str | None = None,
    data: str | None = None,
    lost_heads: int = 0,
    repair: str | None = None,
    made_for: str | None = None,
    before: Sequence[str] = (),
    grown: str | None = None,
) -> str:
    """Return the text of the card.

    Args:
        mask: the kept units and their origin.
        weights: number of weights of the parent, and of this model.
        findings: outcome of each check of the proof.
        parent_card: front matter of the parent's card, whose licence and languages carry over, and, of a
            directory here whose ``base_model_relation`` is ``quantized``, the model that it holds.
        recovery: tokens and scope of the recovery; None if the weights are the parent's.
        license_name: licence to state instead of the parent's.
        data: what the search and the recovery were trained on.
        lost_heads: multi-token-prediction layers of the parent that are not part of this model.
        repair: the repair before any recovery, in words; None without one, or if the recovery has it.
        made_for: the model that the mask was made for, if not this parent.
        before: earlier cuts, by which the parent itself was made, in words.
        grown: the smaller model that this one was grown from, and how, in words; None if it was not.
    """
    head = _head(mask, parent_card, bool(recovery or grown), license_name)
    facts = {
        "Parent": f"`{public_name(mask.model)}`"
        + (f" at revision `{mask.revision}`" if mask.revision else ""),
        "Earlier cuts": "; then ".join(before),
        **_units(mask),
        "Weights": f"{weights[1]:,} of {weights[0]:,} ({weights[1] / weights[0]:.1%})",
        "Chosen by": f"{mask.method}" + (f", seed {mask.seed}" if mask.seed is not None else ""),
        "Mask made for": f"`{public_name(made_for)}`" if made_for and made_for != mask.model else "",
        "Search": f"{mask.tokens_seen:,} tokens" + "".join(f", {k} {v:.4g}" for k, v in mask.metrics.items()),
        **({"Grown": grown} if grown else _training(recovery, repair)),
        "Data": data or "not stated",
        "Left out": f"{lost_heads} multi-token-prediction layers (speculative decoding)"
        if lost_heads
        else "",
        "Licence": str(head.get("license", "that of the parent, whose card states none that can be read")),
        "Code": f"e3pruner, commit `{mask.git_sha}`" if mask.git_sha else "e3pruner",
    }
    return CARD.format(
        head=yaml.safe_dump(head, sort_keys=False).strip(),
        name=Path(mask.model).name,
        size=mask.listed if mask.wide else f"{mask.depth} layers",
        what=WHAT[mask.unit],
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items() if value),
        scores=NO_SCORES,
        checks="\n".join(f"| {f.check} | {f.detail} |" for f in findings),
    )


WHAT = {
    "layer": "whole decoder layers",
    "half": "attentions and feed-forwards, as many of both,",
    "kv_group": "KV heads with their query heads, as many from each layer,",
    "channel": "channels of the feed-forwards, as many from each layer,",
}
CARRIED = ("license", "license_name", "license_link", "language")
CARD = """---
{head}
---
# {name}, {size}

A smaller `{name}`: {what} removed, everything else as in the parent. It is a plain
Transformers checkpoint and needs no code of its own:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```

| | |
|---|---|
{facts}

## Scores

<!-- scores -->
{scores}<!-- /scores -->

## Proof

A fresh process loaded this directory with stock `AutoModelForCausalLM` and found:

| check | finding |
|---|---|
{checks}
"""


def _head(
    mask: Mask, parent_card: dict[str, Any], distilled: bool, license_name: str | None
) -> dict[str, Any]:
    """Return the card's front matter."""
    tags = ["width-pruning"] if mask.wide else ["depth-pruning", "layer-pruning"]
    encoded = parent_card.get("base_model_relation") == "quantized"  # the same model in other bits
    origin = (parent_card.get("base_model") if encoded else None) if Path(mask.model).exists() else mask.model
    return {
        **{key: parent_card[key] for key in CARRIED if key in parent_card},
        **({"license": license_name} if license_name else {}),
        **({"base_model": origin} if isinstance(origin, str) and not Path(origin).exists() else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*tags, *(["distillation"] if distilled else [])],
    }


def _units(mask: Mask) -> dict[str, str]:
    """Return the card's facts about what is kept."""
    if mask.wide:
        return {"Layers": f"{mask.depth}, all of the parent", "Kept": mask.listed, "Removed": mask.missing}
    return {
        "Layers": f"{mask.depth} of {mask.num_layers}; removed {mask.missing}",
        "Kept layers": mask.listed,
    }


def _training(recovery: dict[str, Any] | None, repair: str | None) -> dict[str, str | None]:
    """Return the card's facts about changes of the weights after the cut."""
    if recovery is None:
        kept = "none: the kept layers hold the parent's weights" + (", but for the repair" if repair else "")
        return {"Repair": repair, "Recovery": kept}
    frozen = recovery.get("frozen")
    return {
        "Repair": repair or recovery.get("patch"),
        "Recovery": f"distilled from the parent on {recovery['tokens']:,} tokens ({recovery['scope']})"
        + (f"; not reached by the adapters: {frozen}" if frozen else ""),
    }


def scores_table(evaluation: dict[str, Any], directory: Path) -> str:
    """Return a Markdown table of this model's figures beside its parent's.

    Args:
        evaluation: the JSON that ``evaluate --out`` writes.
        directory: the exported model.

    Raises:
        ConfigError: the evaluation has no teacher, or did not judge this directory.
    """
    parent, judged = evaluation.get("teacher"), evaluation.get("models", [])
    own = next((m for m in judged if Path(m["path"]).resolve() == directory.resolve()), None)
    if parent is None or own is None:
        paths = [m["path"] for m in judged]
        raise ConfigError(f"--scores: needs an evaluation of '{directory}' with --teacher; found {paths}.")
    lines = ["| | parent | this model |", "|---|---|---|"]
    for key, form in FIGURES.items():
        if key in own:
            lines.append(
                f"| {key.replace('_', ' ')} | {form.format(parent[key])} | {form.format(own[key])} |"
            )
    return "\n".join([*lines, "", f"On {evaluation['rows']} rows: `{evaluation['command']}`", ""])


def main(argv: list[str] | None = None) -> None:
    """Put the scores of an evaluation into the card of an export."""
    parser = argparse.ArgumentParser(prog="python -m src.export.card", description=main.__doc__)
    parser.add_argument("directory", type=Path, help="an exported model")
    parser.add_argument("--scores", type=Path, required=True, help="JSON written by evaluate --out")
    args = parser.parse_args(argv)
    card = args.directory / "README.md"
    try:
        evaluation, text = read_json(args.scores), card.read_text()
        table = scores_table(evaluation, args.directory)
    except ConfigError:
        raise
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot read '{args.scores}' or '{card}': {e}.") from e
    except (AttributeError, KeyError, TypeError) as e:
        raise ConfigError(f"--scores: '{args.scores}' is not what evaluate --out writes.") from e
    write_text(card, SCORES.sub(lambda _: table, text))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
