"""What the teacher's cache costs and saves: ``python -m scripts.bench_teacher_cache [bytes|write|recover]``.

* ``bytes``: bytes for each supervised position, by column, and the divergence that rounding adds; on the
  demo's teacher, and on a language model that reads English text (``--text`` and ``--model``).
* ``write``: ``predict``, to the complete cache on disk, against the bare forward pass of the same teacher.
* ``recover``: one step of a recovery, 16 layers cut to 12, with the signal from a cache, from a live teacher
  and from a live 8-bit teacher; chunked projection and whole.

Times are CPU seconds of one thread, variants taking turns; on a shared machine they are steadier than wall
time. Writes the sections into ``results/teacher_cache.json``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor

from scripts.cache_sizes import sizes
from scripts.lab.benches import BARE, Clock, against, forget_peak, in_turns, memory, qwen
from scripts.lab.jobs import isolated
from scripts.lab.results import JSON, TEACHER, add, options, origin, read
from src.cache import Cache, CacheTeacher
from src.cache.loader import collate
from src.cache.shards import Rows, decode, encode, rows_of
from src.data import Corpus
from src.data.arithmetic import write_splits
from src.data.batches import supervised
from src.losses.distill import Distillation
from src.losses.signals import Signal, TopK, live_signal
from src.mask import Mask
from src.models.cut import cut
from src.models.gated import freeze
from src.models.head import OutputHead
from src.models.loading import load_model

# ---------------------------------------------------------------------- bytes

TEXTS = 40


def section_bytes(args: argparse.Namespace) -> JSON:
    """Of the demo's teacher on its problems, and of a language model on text."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        corpora = {"demo": (TEACHER, _demo(Path(folder), 1000))}
        if args.text:
            few = Path(folder, "few.jsonl")
            with gzip.open(args.text, "rt") as texts:
                few.write_text("".join(islice(texts, TEXTS)))
            corpora["wide"] = args.model, Corpus(args.model, train=str(few), max_length=800, batch_size=4)
        for name, (model, corpus) in corpora.items():
            teacher = CacheTeacher(model, f"{folder}/{name}", precision="float32", count_seconds=0)
            Trainer(**BARE).predict(teacher, datamodule=corpus)
            cache = Cache(f"{folder}/{name}")
            rows = Rows.concatenate([cache.read(i) for i in range(len(cache.shards))])
            found[name] = {**origin(), "vocabulary": teacher.head.vocabulary, **sizes(rows)}
    return {"wide": read(args.out).get("bytes", {}).get("wide"), **found}  # a row says where it comes from


def _demo(folder: Path, count: int, batch_size: int = 32) -> Corpus:
    write_splits(folder, {"train": count})
    return Corpus(TEACHER, train=str(folder / "train.jsonl"), batch_size=batch_size)


# ---------------------------------------------------------------------- write


class Span(Clock):
    """CPU seconds of a prediction, from its first batch to the last byte on disk.

    What is done once before it, whatever the length of the corpus (a trial of four batches for the projected
    time, a check of the head), does not count.
    """

    def teardown(self, *_: Any, **__: Any) -> None:
        self._end()


def section_write(args: argparse.Namespace) -> JSON:
    """CPU seconds of the bare forward pass (all logits) and of ``predict`` on the same corpus.

    Both read the corpus; the bare pass keeps nothing, ``predict`` ends with the complete cache on disk.
    """
    found = {}
    models = {"demo": lambda: load_model(TEACHER), "0.6B": lambda: qwen(151_936, 1024, 28, 16)}
    for name, make in models.items():
        model, pairs = make(), []
        with tempfile.TemporaryDirectory() as folder:
            corpus = _demo(Path(folder), 640 if name == "demo" else 24, 32 if name == "demo" else 8)
            for repeat in range(args.repeats + 1):
                teacher = CacheTeacher(TEACHER, f"{folder}/{repeat}", count_seconds=0)
                teacher.model, teacher.head, teacher.weights = model, OutputHead(model), None
                span = Span()
                Trainer(**BARE, callbacks=[span]).predict(teacher, datamodule=corpus)
                began = time.process_time()
                with torch.no_grad():
                    for batch in corpus.predict_dataloader():
                        model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
                pairs.append((time.process_time() - began, span.seconds))
            tokens = sum(shard.tokens for _, shard in Cache(f"{folder}/0").shards)
        ratios = [cached / bare - 1 for bare, cached in pairs[1:]]
        found[name] = {
            "overhead": statistics.median(ratios), "range": [min(ratios), max(ratios)], "tokens": tokens,
            "bare_cpu_seconds": statistics.median(bare for bare, _ in pairs[1:]),
            "cache_cpu_seconds": statistics.median(cached for _, cached in pairs[1:]),
        }  # fmt: skip
    return found


# ---------------------------------------------------------------------- recover


def stepper(vocabulary: int, source: str, form: str, args: argparse.Namespace) -> Callable[[], Tensor]:
    """One optimiser step of a recovery, as a function."""
    tokens = args.rows * args.length
    chunk = 256 if form == "chunked" else tokens
    torch.manual_seed(0)
    ids = torch.randint(vocabulary, (args.rows, args.length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    index = supervised(ids)
    parent = qwen(vocabulary, args.hidden, 16)
    student = cut(parent, Mask.by_hand("", 16, range(12)))
    student.train()
    if source == "live int8":
        with tempfile.TemporaryDirectory() as folder:
            parent.save_pretrained(folder)
            parent = load_model(folder, quantize="int8")
    freeze(parent)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    teacher, head, loss = OutputHead(parent), OutputHead(student), Distillation(chunk_tokens=chunk)

    def say() -> Signal:
        with torch.no_grad():
            return live_signal(teacher, teacher.at(batch, index), 10, chunk)

    stored = encode(rows_of(batch, cast(TopK, say())), "float16")
    if source == "cached":
        del teacher, parent

    def read() -> Signal:
        """A shard of one batch: checked, decoded and collated as the loader does, whose shards are larger."""
        hashlib.sha256(stored).digest()
        found = collate(decode(stored, 10), np.arange(args.rows), 0)
        return TopK(*(found[f"teacher_{key}"] for key in ("ids", "log_probs", "entropy", "log_rest")))

    def step() -> Tensor:
        signal = read() if source == "cached" else say()
        hidden = head.at(batch, index)
        value = loss(head, hidden, ids.flatten()[index + 1], signal)["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def section_recover(args: argparse.Namespace) -> JSON:
    found = []
    forms = [(source, form) for source in ("cached", "live", "live int8") for form in ("chunked", "whole")]
    for vocabulary in args.vocabularies:
        peaks = {each: isolated(peak, vocabulary, *each, args) for each in forms}
        steps = {each: stepper(vocabulary, *each, args) for each in forms}
        times = in_turns(steps, args.repeats)
        for (source, form), seconds in times.items():
            median, spread = against(seconds, times["cached", form])
            found.append({
                "vocabulary": vocabulary, "teacher": source, "projection": form,
                "tokens_per_cpu_second": args.rows * args.length / statistics.median(seconds),
                "peak_bytes": peaks[source, form],
                "times_the_cached_step": median, "range": spread,
            })  # fmt: skip
            print(json.dumps(found[-1]), flush=True)
    return {"rows": args.rows, "length": args.length, "hidden": args.hidden, "cases": found}


def peak(vocabulary: int, source: str, form: str, args: argparse.Namespace) -> int:
    """Peak memory of two steps, models and optimiser included, above that of the imports."""
    torch.set_num_threads(1)
    before = memory("VmRSS")
    step = stepper(vocabulary, source, form, args)
    forget_peak()
    step()
    step()
    return memory("VmHWM") - before


SECTIONS = {"bytes": section_bytes, "write": section_write, "recover": section_recover}


def main() -> None:
    args = options(
        __doc__, parts=SECTIONS, text=("", "gzipped JSONL with a 'text' column"),
        model=("logs/public-model/parent", "the language model that reads it"),
        vocabularies=([1_000, 32_000, 151_936], "classes"), repeats=(5, "of each timing"),
        rows=(8, "of a batch"), length=(128, "tokens of a row"), hidden=(256, "size of the hidden states"),
        out=(Path("results/teacher_cache.json"), "results"),
    )  # fmt: skip
    torch.set_num_threads(1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in args.parts:
        add(args.out, name, {"cpu_threads": 1, **SECTIONS[name](args)})


if __name__ == "__main__":
    main()
