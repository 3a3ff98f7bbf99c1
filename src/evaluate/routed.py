"""Judge a routed export (``export --clusters``): each row by the checkpoint that its prompt goes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.errors import ConfigError
from src.evaluate.intervals import matched
from src.evaluate.text import figures
from src.files import read_json
from src.routing.router import CARD, FILE, Router


@dataclass(frozen=True)
class Turn:
    """A checkpoint that is to be judged.

    Attributes:
        path: its directory or Hub id.
        owner: what the user named: the same, or the routed export that it is a part of.
        numbers: the rows that it is judged on.
        last: whether no other part of its owner follows.
    """

    path: str
    owner: str
    numbers: list[int]
    last: bool = True


def home(name: str) -> str:
    """Return where config and tokenizer of a model lie: of a routed export those of its first checkpoint."""
    card = Path(name) / CARD
    return str(card.with_name(_directories(card)[0])) if card.is_file() else name


def turns(names: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[Turn]:
    """Return the checkpoints to judge: of a routed export those to which some prompt is routed.

    Args:
        names: what the user asks to be judged.
        prompts: token ids of each row's prompt.

    Raises:
        ConfigError: a routed export is damaged, or its router knows fewer tokens than the prompts have.
    """
    out: list[Turn] = []
    for name in names:
        card = Path(name) / CARD
        if not card.is_file():
            out.append(Turn(name, name, list(range(len(prompts)))))
            continue
        router = Router.load(card.with_name(FILE))
        if (most := max((max(ids, default=0) for ids in prompts), default=0)) >= len(router.table_VD):
            raise ConfigError(
                f"--model: the router of '{name}' knows {len(router.table_VD):,} tokens, and a prompt has "
                f"token {most:,}. It needs the tokenizer of its parent."
            )
        named, chosen = _directories(card), router.route(prompts)
        if len(named) != len(router.bias_U):
            raise ConfigError(
                f"--model: '{card}' names {len(named)} checkpoints, and its router {len(router.bias_U)}."
            )
        used = sorted(set(chosen))
        out += [
            Turn(str(card.with_name(named[number])), name, _places(chosen, number), number == used[-1])
            for number in used
        ]
    return out


def _places(chosen: Sequence[int], number: int) -> list[int]:
    return [row for row, each in enumerate(chosen) if each == number]


def _directories(card: Path) -> list[str]:
    try:
        named = [str(each["directory"]) for each in read_json(card)["models"]]
        return [named[0], *named[1:]]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        raise ConfigError(f"--model: '{card}' cannot be read ({type(e).__name__}: {e}).") from e


def joined(parts: Sequence[tuple[Turn, dict[str, Any], Tensor]], teacher: bool) -> dict[str, Any]:
    """Return the figures of a routed export, over all rows, from those of its checkpoints.

    Args:
        parts: each checkpoint, its result, and its sums for each row (:func:`src.evaluate.text.row_sums`).
        teacher: whether the sums compare with a teacher.
    """
    first, result, _ = parts[0]
    places = [number for turn, _, _ in parts for number in turn.numbers]
    sums_RC = torch.cat([sums for _, _, sums in parts])[torch.tensor(places).argsort()]
    out = {"path": first.owner, "parameters": result["parameters"], "layers": result["layers"]}
    out |= figures(sums_RC, first.owner, teacher)
    if first.path != first.owner:
        out["routed"] = {Path(turn.path).name: len(turn.numbers) for turn, _, _ in parts}
    if "correct" in result:
        for key in ("correct", "texts"):
            said = [each for _, own, _ in parts for each in own[key]]
            out[key] = [value for _, value in sorted(zip(places, said, strict=True))]
        out |= matched(out["correct"])
        out |= {key: sum(own[key] for _, own, _ in parts) for key in ("new_tokens", "seconds")}
    return out
