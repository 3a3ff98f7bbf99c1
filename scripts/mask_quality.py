"""How good is the learned mask? Compare it with every mask there is: ``make mask-quality``.

All C(L, n) masks are measured on held-out problems that no search has seen, then the search of the demo is
run with three seeds, and each learned mask is looked up in that table. Resumable: the scan is kept as it goes.

Writes ``results/mask_quality.json``: best, median and worst mask, the best contiguous one, and for each seed
the learned mask, its KL, its rank and its ratio to the best.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from rich.progress import track

from src.data.arithmetic import problems
from src.losses.distill import Distillation, supervised
from src.losses.signals import live_signal
from src.mask import Mask, git_sha, write_json
from src.models.gated import GatedLayers, freeze
from src.models.head import OutputHead
from src.models.loading import load_model, load_tokenizer
from src.rows import batches, encode
from src.data.documents import Columns


def scan(teacher: str, remove: int, rows: int, kept: Path) -> dict[str, float]:
    """Exact held-out KL (nats per token, dense) of every mask that removes ``remove`` layers."""
    known: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    model, tokenizer = freeze(load_model(teacher)), load_tokenizer(teacher)
    gates, head, dense = GatedLayers(model), OutputHead(model), Distillation(k=None, weight="none")
    documents = encode(tokenizer, list(problems("test", rows, seed=77)), Columns(), supervise="all")
    parts = []
    with torch.inference_mode():
        for batch in batches(documents, 64, tokenizer.pad_token_id):
            index = supervised(batch["labels"])
            hidden = head.hidden(batch).flatten(0, 1)[index]
            parts.append((batch, index, batch["labels"].flatten()[index + 1], live_signal(head, hidden, None)))
        masks = list(itertools.combinations(range(len(gates)), remove))
        for number, gone in enumerate(track(masks, description="all masks")):
            key = " ".join(map(str, gone))
            if key in known:
                continue
            values = torch.ones(len(gates))
            values[list(gone)] = 0.0
            total = count = 0.0
            for batch, index, labels, signal in parts:
                with gates.use(values):
                    hidden = head.hidden(batch).flatten(0, 1)[index]
                total += float(dense(head, hidden, labels, signal)["kd"]) * len(index)
                count += len(index)
            known[key] = total / count
            if number % 50 == 0:
                write_json(kept, known)
    write_json(kept, known)
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="assets/arithmetic-teacher")
    parser.add_argument("--remove", type=int, default=4)
    parser.add_argument("--rows", type=int, default=48, help="held-out problems a mask is measured on")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("logs/mask_quality"))
    parser.add_argument("--out", type=Path, default=Path("results/mask_quality.json"))
    args = parser.parse_args()
    table = scan(args.teacher, args.remove, args.rows, args.work / "all.json")
    order = sorted(table, key=table.__getitem__)
    best = table[order[0]]
    learned = []
    for seed in args.seeds:
        run = args.work / f"seed{seed}"
        subprocess.run(["make", "-s", f"{run}/search/mask.json", f"RUN={run}", f"SEED={seed}"], check=True)
        mask = Mask.load(run / "search/mask.json")
        key = " ".join(map(str, mask.removed))
        raw = mask.metrics["kl_learned"]
        learned.append({
            "seed": seed, "removed": list(mask.removed), "kl": table[key], "rank": order.index(key) + 1,
            "ratio_to_best": table[key] / best, "tokens": mask.tokens_seen,
            "calibration_kl_before_polish": raw, "calibration_kl": mask.metrics["kl"],
        })
    runs = [k for k in order if (r := list(map(int, k.split())))[-1] - r[0] == args.remove - 1]
    write_json(args.out, {
        "command": "python -m scripts.mask_quality " + " ".join(sys.argv[1:]), "commit": git_sha(),
        "teacher": args.teacher, "masks": len(order), "rows": args.rows,
        "best": {"removed": order[0], "kl": best}, "median_kl": statistics.median(table.values()),
        "worst_kl": table[order[-1]], "best_contiguous": {"removed": runs[0], "kl": table[runs[0]]},
        "learned": learned,
    })
    for row in learned:
        print(f"seed {row['seed']}: removed {row['removed']}, KL {row['kl']:.4f}, rank {row['rank']} of "
              f"{len(order)}, {row['ratio_to_best']:.3f} x the best")


if __name__ == "__main__":
    main()
