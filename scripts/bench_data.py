"""Whether the data ever starves the step: ``make data-pipeline SHARED=DIR``.

Two questions. How many tokens a second does the loader alone make, on real corpora and on the demo's, and
with what waste; and how large a share of the demo's recovery step is spent waiting for its batches. Rates
are per second of one core's own time, so that what else runs on the machine does not count. Writes
``results/data_pipeline.json``.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning import Trainer, seed_everything

from scripts.lab.benches import BARE, Clock
from scripts.lab.results import JSON, TEACHER, options, write
from src.data import Corpus
from src.data.arithmetic import write_splits
from src.data.loader import Loader
from src.mask import Mask
from src.recover import Recovery


def corpora(shared: Path, arithmetic: Path, teacher: str) -> Iterator[tuple[str, Corpus]]:
    """The corpora to measure, each with the options a user would choose for it."""
    real = str(shared / "models" / "stories260k")
    answer: JSON = {"supervise": "answer", "max_length": 512}
    packed: JSON = {"packing": "documents", "max_length": 1024, "batch_size": 8}
    yield "arithmetic, padded", Corpus(teacher, str(arithmetic))
    yield "arithmetic, packed", Corpus(teacher, str(arithmetic), **packed)
    if not shared.is_dir():
        print(f"no real corpora: '{shared}' is no directory (--shared, or E3_SHARED)", flush=True)
        return
    gsm8k, stories = (str(shared / "data" / f"{name}_train.jsonl") for name in ("gsm8k", "tinystories"))
    yield "GSM8K, answers, padded", Corpus(real, gsm8k, **answer)
    yield "GSM8K, answers, packed", Corpus(real, gsm8k, **{**answer, **packed})
    yield "TinyStories, padded", Corpus(real, stories, max_length=1024)
    yield "TinyStories, packed", Corpus(real, stories, **packed)
    books = str(shared / "data" / "ebooks.jsonl.gz")
    yield "Standard Ebooks (gz), split, packed", Corpus(real, books, too_long="split", **packed)
    yield "Standard Ebooks (gz), cut, padded", Corpus(real, books, max_length=1024)


def loader_alone(corpus: Corpus, tokens: int) -> JSON:
    """The statistics of an epoch, or of its first ``tokens``, and the rate on one core."""
    loader: Loader = corpus.loader("train", shuffle=True, max_tokens=tokens)
    began = time.process_time()
    for _ in loader:
        loader.handed()
    seconds = time.process_time() - began
    numbers = loader.statistics.numbers()
    whole = not loader.position["finished"]
    return {"tokens_per_core_second": round(numbers["tokens"] / seconds), "whole_epoch": whole, **numbers}


def recovery(teacher: str, train: str, workers: int, steps: int, folder: Path) -> JSON:
    """Steps of the demo's recovery: tokens a second of one core, and the share spent waiting."""
    seed_everything(0, verbose=False)
    Mask.by_hand(teacher, 16, sorted(set(range(16)) - {5, 7, 9, 11})).save(folder / "mask.json")
    corpus = Corpus(teacher, train, num_workers=workers)
    module, clock = Recovery(mask=str(folder / "mask.json")), Clock()
    Trainer(max_steps=steps, callbacks=[clock], **BARE).fit(module, datamodule=corpus)
    loader = corpus._loader
    assert loader is not None
    return {
        "workers": workers, "steps": steps, "waiting": round(loader.wait(), 5),
        "tokens_per_core_second": round(module.tokens / clock.seconds),
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    args = options(
        __doc__, shared=(os.environ.get("E3_SHARED", "/nonexistent"), "folder of real corpora"),
        tokens=(20_000_000, "of each corpus at most"), steps=(20, "of the recovery"),
        out=(Path("results/data_pipeline.json"), "results"),
    )  # fmt: skip
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_splits(folder, {"train": 20_000})
        train = folder / "train.jsonl"
        alone = {}
        for corpus_name, corpus in corpora(Path(args.shared), train, TEACHER):
            alone[corpus_name] = loader_alone(corpus, args.tokens)
            print(f"{corpus_name:38} {alone[corpus_name]}", flush=True)
        steps = [recovery(TEACHER, str(train), workers, args.steps, folder) for workers in (0, 1)]
    consumed = max(step["tokens_per_core_second"] for step in steps)
    ratio = alone["arithmetic, padded"]["tokens_per_core_second"] / consumed
    print(*steps, f"the loader alone is {ratio:.1f} times as fast as the recovery", sep="\n")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    found = {"loader": alone, "recovery": steps, "loader_over_recovery": ratio}
    write(args.out, {"machine": machine, "threads": 1, **found})


if __name__ == "__main__":
    main()
