"""16 distilled prompts against 16 rows, for a repair and for a search: ``make distilled-calibration``.

For each seed prompts are distilled twice: for the best mask of all, to repair its cut, and for drawn masks,
to search by. They start from the best of eight sets of rows (*selected*), each cut off at their length
(*cut-off*); the first set is *random*. Writes ``results/distilled_calibration.json``: the divergence on
unseen problems that each source ends at. The same command again goes on where it was stopped.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from scripts.arena.stages import command, mask
from scripts.lab.results import JSON, TEACHER, options, read, write
from src.data.arithmetic import write_splits
from src.data.columns import Columns
from src.data.judging import batches, judged, read_rows
from src.evaluate.text import held_out
from src.mask import Mask, git_sha
from src.models.cut import cut
from src.models.loading import load_model, load_tokenizer
from src.repair.linear_patch import LinearPatch
from src.repair.mask_tuning import MaskTuning

SIZES, LENGTH, GONE = {"train": 640, "validation": 32, "test": 128}, 16, [7, 10, 11, 12]
REPAIRS = {"mask_tuning": MaskTuning, "linear_patch": LinearPatch}
SOURCES = {"distilled": 256, "cut-off": LENGTH, "selected": 256, "random": 256, "more": 256}
"""Most tokens of a row of each source."""


def distilled(work: Path, use: str, seed: int) -> dict[str, str]:
    """Distil prompts unless that is done; the file of each source."""
    at, train = work / use, work / "data/train.jsonl"
    cuts = {"mask": f"{work}/mask.json"} if use == "repair" else {"model": TEACHER, "remove": len(GONE)}
    keys = {
        "model.init_args": {"starts": 8, "max_length": LENGTH, "seed": seed, **cuts},
        "data.init_args": {"train": str(train), "validation": f"{work}/data/validation.jsonl", "seed": seed},
        "trainer.accelerator": "cpu", "seed_everything": seed,
    }  # fmt: skip
    if not (at / "fit/record.json").exists():
        command(str(at), "fit", ["configs/prompts/distilled_calibration.yaml"], keys)
    scores, rows = read(at / "fit/record.json")["kl_starts"], train.read_text().splitlines(True)
    best = 16 * scores.index(min(scores))
    for name, first, count in (("selected", best, 16), ("random", 0, 16), ("more", 0, 64)):
        (at / f"{name}.jsonl").write_text("".join(rows[first : first + count]))
    files = {name: f"{at}/{name}.jsonl" for name in SOURCES}
    return files | {"distilled": f"{at}/fit/distilled.prompts.safetensors", "cut-off": files["selected"]}


def searched(work: Path, path: str, length: int) -> Mask:
    """The mask that a search finds by a source alone."""
    soft = path.endswith(".safetensors")
    data = {"train": f"{work}/data/train.jsonl", "batch_size": 1, "max_length": length}
    keys = {
        "data.class_path": "src.data.PromptedCorpus" if soft else "src.data.Corpus",
        "data.init_args": {**data, "prompts" if soft else "validation": path}, "trainer.accelerator": "cpu",
        "model.init_args": {"policy": {"init_args": {"rearranged": True}}, "calibration_batches": 64},
    }  # fmt: skip
    command(f"{work}/found", "fit", ["configs/search/gumbel_topk.yaml", "configs/policy/fisher.yaml"], keys)
    return Mask.load(work / "found/fit/mask.json")


def measured(work: Path, seed: int, by: str, source: str) -> JSON:
    """Repair the best mask, or search a mask, by a source; its divergence on unseen problems."""
    parent, tokenizer, found = load_model(TEACHER), load_tokenizer(TEACHER), mask(TEACHER, GONE)
    found.save(work / "mask.json")
    path = distilled(work, "search" if by == "fisher" else "repair", seed)[source] if by != "none" else ""
    if by == "fisher":
        found = searched(work, path, SOURCES[source])
    student = cut(parent, found)
    if by in REPAIRS:
        REPAIRS[by](path, rows=64, max_length=SOURCES[source])(student, parent, found, tokenizer)
    tests = judged(tokenizer, read_rows(f"{work}/data/test.jsonl"), Columns(), "all").rows
    kl = held_out(student, parent, batches(tests, 64, 0))["kl"]
    return {"seed": seed, "by": by, "source": source, "kl": kl, "removed": found.removed, "commit": git_sha()}


def main() -> None:
    out = Path("results/distilled_calibration.json"), "results"
    args = options(__doc__, seeds=([0, 1, 2], "of rows and draws"), out=out)
    uses = [("none", "nothing"), *((by, source) for by in (*REPAIRS, "fisher") for source in SOURCES)]
    for seed, (by, source) in product(args.seeds, uses):
        work, rows = Path(f"logs/distilled_calibration/{seed}"), read(args.out).get("rows", [])
        write_splits(work / "data", SIZES, 100 + seed)
        if (seed, by, source) not in {(row["seed"], row["by"], row["source"]) for row in rows}:
            write(args.out, {"rows": [*rows, measured(work, seed, by, source)]})


if __name__ == "__main__":
    main()
