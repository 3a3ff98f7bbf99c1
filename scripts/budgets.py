"""One search for several budgets against a search for each: ``make budgets``.

The demo's search runs with each seed once for all budgets, once more with nested masks, and once for each
budget alone. The masks are judged by their exact KL on held-out problems that no search has seen. Resumable.

Writes ``results/budgets.json``: each search with its masks and its tokens, distinct and processed; and for
each seed the KL of one search over that of the searches alone, and its share of their tokens.
"""

from __future__ import annotations

from pathlib import Path

from scripts.lab.results import JSON, options, write
from scripts.mask_quality import HeldOut, halves, search
from src.mask import Mask

BUDGETS = (0.125, 0.25, 0.375)
"""Those of the overlay."""
ALONE = {f"{share:g}": f"--model.init_args.ratio {share:g}" for share in BUDGETS}
OVERLAY = "--config configs/search/budgets.yaml"
ONE = {"one": OVERLAY, "nested": f"{OVERLAY} --model.init_args.nested true"}


def searched(run: Path, seed: int, way: str, held_out: HeldOut) -> list[JSON]:
    """The masks of a search, the smallest removal first, with what it cost."""
    search(run, seed, (ALONE | ONE)[way])
    files = sorted(run.glob("search/mask-*.json")) or [run / "search/mask.json"]
    masks = {halves(mask): mask for mask in map(Mask.load, files)}
    return [{**mask.metrics, "tokens": mask.tokens_seen, "removed": mask.removed,
             "kl": held_out.table([keep], str(run))[keep]} for keep, mask in masks.items()]  # fmt: skip


def main() -> None:
    args = options(__doc__, seeds=([0, 1, 2], "of searches"), out=(Path("results/budgets.json"), "results"))
    work, rows = Path("logs/budgets"), list[JSON]()
    held_out = HeldOut(384, 78, work / "measured.json")
    for seed in args.seeds:
        found = {way: searched(work / f"{way}-s{seed}", seed, way, held_out) for way in (*ALONE, *ONE)}
        alone = [found[way][0] for way in ALONE]
        spent = {key: sum(mask[key] for mask in alone) for key in ("tokens", "forward_tokens")}
        for way in ONE:
            kl = [own["kl"] / other["kl"] for own, other in zip(found[way], alone, strict=True)]
            share = {key: found[way][0][key] / total for key, total in spent.items()}
            rows.append({"seed": seed, "way": way, "kl": kl, **share, "searches": found})
        write(args.out, {"budgets": BUDGETS, "rows": rows})


if __name__ == "__main__":
    main()
