"""How good is the learned mask? Compare it with every mask there is: ``make mask-quality``.

All C(L, n) masks are measured on held-out problems that no search has seen: each on a few, and the best
sixty, with the learned ones, again on many others, because divergence is heavy-tailed and a few problems
cannot rank good masks. The demo's search runs with three seeds, and each learned mask is looked up.
Resumable: measurements are kept as they come.

Writes ``results/mask_quality.json``: best, median and worst mask, the best contiguous one, and for each seed
the learned mask, its KL, its rank and its ratio to the best.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
from pathlib import Path

import torch
from rich.progress import track

from scripts.lab.results import TEACHER, options, write
from src.data.arithmetic import problems
from src.data.batches import supervised
from src.data.columns import Columns
from src.data.judging import batches, encode
from src.files import write_json
from src.losses.distill import Distillation
from src.losses.signals import live_signal
from src.mask import Mask
from src.models.gated import GatedLayers, freeze
from src.models.head import OutputHead
from src.models.loading import load_model, load_tokenizer

Table = dict[str, float]
"""Removed layers, such as ``"7 10 11 12"``, to exact KL in nats per token."""


class HeldOut:
    """Exact KL, over the whole vocabulary, of masks on held-out problems.

    Args:
        teacher: directory of the model.
        rows: problems.
        seed: their seed.
        kept: file that holds what is already measured.
    """

    def __init__(self, teacher: str, rows: int, seed: int, kept: Path) -> None:
        model, tokenizer = freeze(load_model(teacher)), load_tokenizer(teacher)
        self.gates, self.head = GatedLayers(model), OutputHead(model)
        self.dense, self.kept = Distillation(k=None, weight="none"), kept
        documents = encode(tokenizer, list(problems("test", rows, seed)), Columns(), supervise="all")
        self.parts = []
        for batch in batches(documents, 64, tokenizer.pad_token_id):
            index = supervised(batch["labels"])
            with torch.inference_mode():
                signal = live_signal(self.head, self.head.hidden(batch).flatten(0, 1)[index], None)
            self.parts.append((batch, index, batch["labels"].flatten()[index + 1], signal))

    @torch.inference_mode()
    def measure(self, removed: str) -> float:
        """KL of one mask."""
        values, total, count = torch.ones(len(self.gates)), 0.0, 0
        values[list(map(int, removed.split()))] = 0.0
        for batch, index, labels, signal in self.parts:
            with self.gates.use(values):
                hidden = self.head.hidden(batch).flatten(0, 1)[index]
            total += float(self.dense(self.head, hidden, labels, signal)["kd"]) * len(index)
            count += len(index)
        return total / count

    def table(self, masks: list[str], title: str) -> Table:
        """KL of many masks."""
        known: Table = json.loads(self.kept.read_text()) if self.kept.exists() else {}
        for number, removed in enumerate(track(masks, description=title)):
            if removed not in known:
                known[removed] = self.measure(removed)
                if number % 50 == 0:
                    write_json(self.kept, known)
        write_json(self.kept, known)
        return {removed: known[removed] for removed in masks}


def text(layers: tuple[int, ...]) -> str:
    """Layers as a key of a table."""
    return " ".join(map(str, layers))


def main() -> None:
    """Scan, search, look up."""
    args = options(
        __doc__, remove=(4, "layers"), rows=(32, "problems every mask is measured on"),
        final_rows=(384, "other problems for the best masks"), finalists=(60, "masks measured on those"),
        seeds=([0, 1, 2], "of the searches"), work=(Path("logs/mask_quality"), "searches and measurements"),
        out=(Path("results/mask_quality.json"), "results"),
    )  # fmt: skip
    learned: dict[int, Mask] = {}
    for seed in args.seeds:
        run = args.work / f"seed{seed}"
        subprocess.run(["make", "-s", f"{run}/search/mask.json", f"RUN={run}", f"SEED={seed}"], check=True)
        learned[seed] = Mask.load(run / "search/mask.json")
    coarse = HeldOut(TEACHER, args.rows, 77, args.work / "all.json")
    masks = [text(removed) for removed in itertools.combinations(range(len(coarse.gates)), args.remove)]
    every = coarse.table(masks, "all masks")
    order = sorted(every, key=every.__getitem__)
    runs = [m for m in order if int(m.split()[-1]) - int(m.split()[0]) == args.remove - 1]
    again = {*order[: args.finalists], runs[0], *(text(mask.removed) for mask in learned.values())}
    fine = HeldOut(TEACHER, args.final_rows, 78, args.work / "finalists.json")
    final = fine.table(sorted(again), "finalists")
    ranked = sorted(final, key=final.__getitem__)
    best = final[ranked[0]]
    rows = []
    for seed, mask in learned.items():
        kl = final[text(mask.removed)]
        rows.append({
            "seed": seed, "removed": list(mask.removed), "kl": kl,
            "rank": ranked.index(text(mask.removed)) + 1,
            "ratio_to_best": kl / best, "tokens": mask.tokens_seen, "metrics": mask.metrics,
        })  # fmt: skip
        print(f"seed {seed}: {mask}; KL {kl:.4f}, {kl / best:.3f} x the best, rank {rows[-1]['rank']}")
    write(args.out, {
        "teacher": TEACHER, "masks": len(every), "rows": args.rows, "final_rows": args.final_rows,
        "finalists": len(final), "best": {"removed": ranked[0], "kl": best},
        "top": {m: final[m] for m in ranked[:5]},
        "median_kl": statistics.median(every.values()), "worst_kl": every[order[-1]],
        "best_contiguous": {"removed": runs[0], "kl": final[runs[0]]}, "learned": rows,
    })  # fmt: skip


if __name__ == "__main__":
    main()
