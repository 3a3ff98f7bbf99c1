"""How good is the learned mask? Compare it with every mask there is: ``make mask-quality``.

All C(L + K, 2 K) cuts of halves at K = L - n layers, the C(L, n) of whole layers among them, are measured on
held-out problems that no search has seen: each on a few, and the best sixty of both kinds, with the learned
ones, again on many others, because divergence is heavy-tailed and a few problems cannot rank good masks. The
demo's search runs with three seeds for each unit, and each learned mask is looked up. Resumable: measurements
are kept as they come. The masks are a walk in which neighbours share a prefix, computed once
(:mod:`src.models.prefixes`).

Writes ``results/mask_quality.json``: best, median and worst mask of whole layers, the best contiguous one,
and for each seed the learned mask, its KL, its rank and its ratio to the best; the same of halves beside it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.progress import track

from scripts.lab.results import JSON, TEACHER, options, write
from src.data.arithmetic import problems
from src.data.batches import supervised
from src.data.columns import Columns
from src.data.judging import batches, judged
from src.files import write_json
from src.losses.distill import Distillation
from src.losses.signals import live_signal
from src.mask import Mask, Unit
from src.models.gated import freeze
from src.models.head import OutputHead
from src.models.loading import load_model, load_tokenizer
from src.models.prefixes import Prefixes
from src.units.kinds import KINDS
from src.units.spaces import Kept

Table = dict[Kept, float]
"""Kept halves to exact KL in nats per token."""


class HeldOut:
    """Exact KL, over the whole vocabulary, of masks of halves on held-out problems.

    Args:
        rows: problems.
        seed: their seed.
        kept: file that holds what is already measured.
    """

    def __init__(self, rows: int, seed: int, kept: Path) -> None:
        model, tokenizer = freeze(load_model(TEACHER)), load_tokenizer(TEACHER)
        self.gates, self.head = KINDS["half"].gate(model), OutputHead(model)
        self.dense, self.kept = Distillation(k=None, weight="none"), kept
        documents = judged(tokenizer, list(problems("test", rows, seed)), Columns(), "all").rows
        self.parts = []
        for batch in batches(documents, 64, tokenizer.pad_token_id):
            index = supervised(batch["labels"])
            with torch.inference_mode():
                signal = live_signal(self.head, self.head.at(batch, index), None)
            self.parts.append((batch, index, batch["labels"].flatten()[index + 1], signal, Prefixes()))

    @torch.inference_mode()
    def measure(self, keep: Kept) -> float:
        """KL of one mask."""
        values = torch.zeros(len(self.gates)).index_fill(0, torch.tensor(keep), 1.0)
        total = 0.0
        for batch, index, labels, signal, prefixes in self.parts:
            with self.gates.remember(prefixes), self.gates.use(values):
                hidden = self.head.at(batch, index)
            total += float(self.dense(self.head, hidden, labels, signal)["kd"]) * len(index)
        return total / sum(len(index) for _, index, *_ in self.parts)

    def table(self, masks: Iterable[Kept], title: str) -> Table:
        """KL of many masks, in an order in which neighbours share much."""
        stored = json.loads(self.kept.read_text()) if self.kept.exists() else {}
        known = {tuple(map(int, key.split())): kl for key, kl in stored.items()}
        ordered = sorted(masks)
        for number, keep in enumerate(track(ordered, title)):
            if keep not in known:
                known[keep] = self.measure(keep)
            if number % 200 == 0 or number == len(ordered) - 1:
                write_json(self.kept, {" ".join(map(str, keep)): kl for keep, kl in known.items()})
        return {keep: known[keep] for keep in ordered}


def halves(mask: Mask) -> Kept:
    """The halves that a mask keeps."""
    return mask.keep if mask.unit == "half" else tuple(u for i in mask.keep for u in (2 * i, 2 * i + 1))


def whole(keep: Kept) -> bool:
    """Whether these halves are whole layers."""
    return [u + 1 for u in keep[::2]] == [*keep[1::2]]


def search(run: Path, seed: int, settings: str) -> Mask:
    """The mask that the demo's search learns with further settings."""
    make = ["make", "-s", f"{run}/search/mask.json", f"RUN={run}", f"SEED={seed}", f"SEARCH={settings}"]
    subprocess.run(make, check=True)
    return Mask.load(run / "search/mask.json")


def main() -> None:
    """Search, scan, look up."""
    args = options(
        __doc__, remove=(4, "layers"), rows=(32, "problems every mask is measured on"),
        final_rows=(384, "other problems for the best masks"), finalists=(60, "masks measured on those"),
        seeds=([0, 1, 2], "of the searches"), work=(Path("logs/mask_quality"), "searches and measurements"),
        out=(Path("results/mask_quality.json"), "results"),
    )  # fmt: skip
    units: tuple[Unit, ...] = ("layer", "half")
    each = [(unit, seed) for unit in units for seed in args.seeds]
    learned = [search(args.work / u / f"seed{s}", s, f"--model.init_args.unit {u}") for u, s in each]
    coarse = HeldOut(args.rows, 77, args.work / "all.json")
    depth = len(coarse.gates) // 2
    every = coarse.table(KINDS["half"].space(depth, 1, args.remove), "all masks")
    orders = {"half": sorted(every, key=every.__getitem__)}
    orders["layer"] = [keep for keep in orders["half"] if whole(keep)]

    def gone(keep: Kept) -> list[int]:
        return sorted({*range(2 * depth)} - {*keep})

    def named(keep: Kept) -> str:
        """What goes: layers by number, or halves by layer and kind."""
        return " ".join(dict.fromkeys(f"{u // 2}" + "af"[u % 2] * (not whole(keep)) for u in gone(keep)))

    run = next(keep for keep in orders["layer"] if gone(keep)[-1] - gone(keep)[0] == 2 * args.remove - 1)
    again = {run, *map(halves, learned), *(k for order in orders.values() for k in order[: args.finalists])}
    final = HeldOut(args.final_rows, 78, args.work / "finalists.json").table(again, "finalists")

    def story(unit: Unit) -> JSON:
        """What there is, and how far the learned masks are from the best."""
        ranked = sorted((keep for keep in final if unit == "half" or whole(keep)), key=final.__getitem__)
        best, rows = final[ranked[0]], []
        for mask in (each for each in learned if each.unit == unit):
            kl, rank = final[halves(mask)], ranked.index(halves(mask)) + 1
            rows.append({
                "seed": mask.seed, "removed": named(halves(mask)), "kl": kl, "rank": rank,
                "ratio_to_best": kl / best, "tokens": mask.tokens_seen, "metrics": mask.metrics,
            })  # fmt: skip
            print(f"seed {mask.seed}: {mask}; KL {kl:.4f}, {kl / best:.3f} x the best, rank {rank}")
        return {
            "masks": len(orders[unit]), "finalists": len(ranked),
            "best": {"removed": named(ranked[0]), "kl": best},
            "top": {named(keep): final[keep] for keep in ranked[:5]},
            "median_kl": statistics.median(every[keep] for keep in orders[unit]),
            "worst_kl": every[orders[unit][-1]], "learned": rows,
        }  # fmt: skip

    layer, half = story("layer"), story("half")
    write(args.out, {
        "teacher": TEACHER, "rows": args.rows, "final_rows": args.final_rows, **layer,
        "best_contiguous": {"removed": named(run), "kl": final[run]},
        "halves": {**half, "best_over_best_layer": half["best"]["kl"] / layer["best"]["kl"]},
    })  # fmt: skip


if __name__ == "__main__":
    main()
