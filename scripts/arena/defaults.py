"""Which row justifies each default: the default of every group beside the best of the others."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.arena.cells import JSON, difference, nats, percent
from scripts.lab.pages import table

HEAD = "choice | reference | its figure | best other | its figure | other - reference | the same, final KL"


def defaults(rows: Sequence[JSON]) -> list[str]:
    """A table, one line for each group and ratio; the reference of a group is the default.

    The figure of a search is the divergence of its plain answer, that of a recovery exact match; where these
    are equal, the divergence of the final model decides which of the others is best. It is the figure of a
    recovery on texts, which have no answers.
    """
    out = []
    for group, ratio in dict.fromkeys((row["group"], row["ratio"]) for row in rows):
        own = [row for row in rows if (row["group"], row["ratio"]) == (group, ratio)]
        default = next((row for row in own if row["variant"] == row["reference"]), None)
        recovered = "recovered" in (default or {})
        others = [row for row in own if row is not default and ("recovered" in row) == recovered]
        if default is None or not others:
            continue
        show, gap = nats("learned"), difference("learned", 1, 4)
        if recovered:
            exact = "exact_match" in default["recovered"]
            show = (percent if exact else nats)("recovered")
            gap = difference("exact_match", 100, 1) if exact else difference("kl", 1, 4)
        best = min(others, key=rank)
        cells = [group.replace("_", " "), default["title"], show(default), best["title"], show(best)]
        out.append([*cells, gap(best), difference("kl", 1, 4)(best)])
    return table(HEAD, out)


def rank(row: JSON) -> tuple[float, float]:
    """Best first: exact match where models are recovered, else the plain answer, then the final one."""
    if "recovered" in row:
        return -row["recovered"].get("exact_match", {"value": 0})["value"], row["recovered"]["kl"]["value"]
    return row["learned"]["kl"]["value"], row["cut"]["kl"]["value"]
