"""What repairing the cuts is worth, on the demo's teacher: ``python -m scripts.linear_patch``.

For each mask the cut model is judged on held-out problems as it is, with LinearPatch's modules (rotated or
not, training-free or distilled), with these folded into the layer before each cut, and with that layer fitted
to the parent's stream. Then two recoveries run for a few steps, from the cut model and from the fitted one.

Writes ``results/linear_patch.json``, and its tables into ``docs/linear_patch.md``.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from torch.optim import AdamW
from transformers import PreTrainedModel

from scripts import origin
from scripts.readme_results import BEGIN, END
from src.data import Corpus
from src.data.arithmetic import problems
from src.data.columns import Columns
from src.data.judging import batches, encode
from src.evaluate.verb import held_out
from src.files import write_json, write_text
from src.mask import Mask
from src.models.cut import cut
from src.models.layers import num_layers
from src.models.loading import load_model, load_tokenizer
from src.recover import Recovery
from src.repair.linear_patch import LinearPatch
from src.repair.stream import junctions, patched

Row = dict[str, Any]
PAGE = Path("docs/linear_patch.md")
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
    "enable_model_summary": False, "enable_checkpointing": False,
}  # fmt: skip


class Curve(Callback):
    """Judges the student at a few steps.

    Args:
        judge: what a model scores.
        steps: after how many steps.
    """

    def __init__(self, judge: Callable[[PreTrainedModel], Row], steps: set[int]) -> None:
        self.judge, self.steps, self.points = judge, steps, list[Row]()

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.point(module, 0)

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step in self.steps:
            self.point(module, trainer.global_step)

    def point(self, module: Any, step: int) -> None:
        """Judge now."""
        self.points.append({"step": step, **self.judge(module.model)})
        module.model.train()


class Bench:
    """One teacher, held-out problems, and calibration and training rows as files.

    Args:
        args: the options.
        work: folder for the files.
    """

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.parent = args, load_model(args.teacher)
        self.tokenizer = load_tokenizer(args.teacher)
        for name, rows, seed in (("calibration", args.rows, 21), ("train", 32 * args.steps, 22)):
            lines = [json.dumps(row) + "\n" for row in problems("train", rows, seed)]
            (work / f"{name}.jsonl").write_text("".join(lines))
        self.work, self.rows = work, list(problems("test", args.tests, 23))
        self.patch = partial(LinearPatch, str(work / "calibration.jsonl"), rows=args.rows, batch_size=32)

    def judge(self, model: PreTrainedModel) -> Row:
        """Exact KL and agreement with the teacher on the test problems."""
        text = batches(encode(self.tokenizer, self.rows, Columns(), "all"), 32, 0)
        found = held_out(model.eval(), self.parent, text)
        return {key: found[key] for key in ("kl", "agreement")}

    def variants(self, mask: Mask) -> Iterator[Row]:
        """Each way to treat the cuts, without and with a training of P."""
        yield {"goal": "none", "form": "plain cut", "seconds": 0.0, **self.judge(cut(self.parent, mask))}
        trained = {"distill_steps": self.args.distill_steps, "lr": self.args.lr}
        for options in (
            {"goal": "rotate"},
            {"goal": "diag"},
            {"goal": "rotate", **trained},
            {"goal": "parent"},
        ):
            patch, student, began = self.patch(**options), cut(self.parent, mask), time.monotonic()
            places, rows = junctions(mask), patch.calibration(self.tokenizer)
            patches = []
            if patch.goal != "parent":
                patches = patch.patches(student, self.parent, places, rows)
                spent = time.monotonic() - began
                with patched(student, places, patches):
                    found = self.judge(student)
                yield {**options, "form": "module", "seconds": spent, **found}
                began = time.monotonic() - spent
            repairs = patch.fold(student, self.parent, places, rows, patches)
            spent = time.monotonic() - began
            fits = [{"module": r.module, "before": r.before, "after": r.after} for r in repairs]
            yield {**options, "form": "folded", "seconds": spent, **self.judge(student), "fits": fits}

    def recoveries(self, mask: Mask) -> Iterator[Row]:
        """The demo's recovery for a few steps, from the cut model and from the folded one."""
        path = self.work / "mask.json"
        mask.save(path)
        for start, patch in (("plain cut", None), ("folded, parent", self.patch())):
            seed_everything(0, verbose=False)
            module = Recovery(
                mask=str(path),
                patch=patch,
                optimizer=lambda parameters: AdamW(parameters, lr=7e-4, betas=(0.9, 0.95), weight_decay=0.0),
                final_lr=0.02,
            )
            data = Corpus(self.args.teacher, train=str(self.work / "train.jsonl"), batch_size=32, seed=0)
            steps = self.args.steps
            curve = Curve(self.judge, {steps // 4, steps // 2, steps})
            trainer = Trainer(max_steps=steps, gradient_clip_val=1.0, callbacks=[curve], **QUIET)
            trainer.fit(module, datamodule=data)
            yield {"start": start, "tokens": module.tokens, "curve": curve.points}


def tables(result: Row) -> list[str]:
    """The page's tables."""
    lines = [
        "| removed | P, or what is fitted | as | KL | agreement | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for one in result["masks"]:
        removed = ", ".join(map(str, one["removed"]))
        for row in one["variants"]:
            goal = {"none": "-", "parent": "parent's stream"}.get(row["goal"], row["goal"])
            goal += f", distilled {row['distill_steps']} steps" if "distill_steps" in row else ""
            figures = f"{row['kl']:.4f} | {row['agreement']:.1%} | {row['seconds']:.1f}"
            lines.append(f"| {removed} | {goal} | {row['form']} | {figures} |")
    lines += ["", "KL (agreement) in a recovery, by steps:", ""]
    steps = [point["step"] for point in result["masks"][0]["recoveries"][0]["curve"]]
    lines += [
        "| removed | starts from | " + " | ".join(map(str, steps)) + " |",
        "|---|---|" + "---|" * len(steps),
    ]
    for one in result["masks"]:
        for run in one["recoveries"]:
            points = [f"{point['kl']:.4f} ({point['agreement']:.1%})" for point in run["curve"]]
            removed = ", ".join(map(str, one["removed"]))
            lines.append(f"| {removed} | {run['start']} | {' | '.join(points)} |")
    return lines


def fill(result: Row) -> None:
    """Put the tables between the page's markers."""
    made = f"`{result['command']}` at commit `{result['commit']}`: {result['tests']} test problems"
    made += f" ({result['teacher']}), {result['rows']} calibration problems, one CPU thread."
    text = "\n".join([BEGIN, made, "", *tables(result), END])
    write_text(PAGE, re.sub(f"{BEGIN}.*{END}", lambda _: text, PAGE.read_text(), flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="assets/arithmetic-teacher")
    parser.add_argument("--removed", nargs="+", default=["7,10,11,12", "4,5,6,7"], help="masks")
    parser.add_argument("--rows", type=int, default=256, help="calibration problems")
    parser.add_argument("--tests", type=int, default=256, help="test problems")
    parser.add_argument("--distill-steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=80, help="of each recovery, 32 problems a step")
    parser.add_argument("--out", type=Path, default=Path("results/linear_patch.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: Row = {
        **origin("linear_patch"), "teacher": args.teacher, "rows": args.rows, "tests": args.tests,
        "distill_lr": args.lr, "masks": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(args, Path(work))
        depth = num_layers(bench.parent.config)
        for removed in args.removed:
            gone = {int(i) for i in removed.split(",")}
            keep = tuple(i for i in range(depth) if i not in gone)
            mask = Mask(model=args.teacher, num_layers=depth, keep=keep, method="given")
            one: Row = {"removed": sorted(gone), "variants": [], "recoveries": []}
            for kind, rows in (("variants", bench.variants(mask)), ("recoveries", bench.recoveries(mask))):
                for row in rows:
                    print(json.dumps({**row, "removed": removed}), flush=True)
                    one[kind].append(row)
            result["masks"].append(one)
    write_json(args.out, result)
    fill(result)


if __name__ == "__main__":
    main()
