"""Serve exported models with engines that share no code with transformers: ``make other-engine``.

    python -m scripts.engines --exports DIR [DIR ...] --parent DIR --prompts FILE

All engines continue the same prompts greedily and score them. Where an engine chooses another token, the
margin says how much likelier transformers finds its own; weights of 32 and 16 bits must agree within
:data:`ROUNDING`. Export and parent read and decode in turns, timed in CPU seconds of one thread. Each engine
runs in a process of its own: their libraries need not bear each other, and one that dies takes nothing along.

Writes a section for each export into ``results/other_engine.json``, and the table of ``docs/export.md``; or,
with ``--out FILE``, into another file alone.
"""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import torch

from scripts.engines.kinds import ENGINES, Said, Seconds, Tokens, Transformers, serve
from scripts.lab.jobs import Failure, isolated
from scripts.lab.pages import fill, table
from scripts.lab.results import JSON, add, options, read
from src.benchmark import PHASES, of_repeats
from src.data.columns import Columns
from src.data.judging import read_rows
from src.generate.prompts import Prompts
from src.models.costs import NEW, PROMPT, flops
from src.models.cut_config import weightless
from src.models.loading import load_config, load_tokenizer

MOST = 32
"""Prompts."""
ROUNDING = {"float32": 1e-3, "F32": 1e-3, "F16": 3e-2}
"""Largest difference of log-probabilities, in nats, by type of the weights; 8 bits have no bar."""
OUT = Path("results/other_engine.json")
"""What the page shows."""
SPEED = "{parent_tokens_per_s:,.0f} -> {tokens_per_s:,.0f}, {speedup:.2f}x of {ideal:.2f}x"


def agreement(model: Transformers, prompts: list[Tokens], own: Said, other: Said) -> JSON:
    """How many continuations are equal, where the first differs, and by how much scores differ at most."""
    firsts, margins, gaps = list[int](), [0.0], list[float]()
    for prompt, (ours, scores), (theirs, found) in zip(prompts, own, other, strict=True):
        gaps += [abs(a - b) for a, b in zip(scores, found, strict=True)]
        if ours != theirs:
            at = next(n for n in range(NEW) if ours[n] != theirs[n])
            log_probs = model.log_probs([*prompt, *ours[:at]])[-1]
            firsts, margins = [*firsts, at], [*margins, float(log_probs[ours[at]] - log_probs[theirs[at]])]
    equal, first = len(prompts) - len(firsts), min(firsts, default=None)
    return {"equal": equal, "first_difference": first, "margin": max(margins), "log_prob_gap": max(gaps)}


def speeds(seconds: Seconds, ideals: list[float]) -> JSON:
    """Tokens a second of the export, and its speed over the parent's within each repeat, beside the ideal."""
    whole = {key: torch.tensor(taken, dtype=torch.float64) for key, taken in seconds.items()}
    taken = ([whole[at, 1], whole[at, 1 + NEW] - whole[at, 1]] for at in (0, 1))
    found = {}
    for phase, tokens, ideal, parent, export in zip(PHASES, (PROMPT, NEW), ideals, *taken, strict=True):
        found[phase] = of_repeats(tokens / export, parent / export) | {"ideal": ideal}
        found[phase]["parent_tokens_per_s"] = float((tokens / parent).median())
    return found


def compare(models: list[Path], asked: str, repeats: int) -> JSON:
    """All engines on the export, the last of ``models``, beside its parent, the first."""
    model, tokenizer = Transformers(models[-1]), load_tokenizer(str(models[-1]))
    prompts = [prompt.ids for prompt in Prompts(tokenizer, Columns(), 16)(read_rows(asked, MOST))]
    ids_BT = torch.ones(1, PROMPT, dtype=torch.long, device="meta")
    work = [flops(weightless(load_config(str(each))), ids_BT, NEW) for each in models]
    ideals = [parent / export for parent, export in zip(*work, strict=True)]
    engines, own = dict[str, JSON](), Said()
    for name in ENGINES:
        try:
            said, seconds = isolated(serve, name, models, prompts, repeats)
        except Failure as e:
            engines[name] = {"refused": str(e)}
        else:
            own = said if ENGINES[name] is Transformers else own
            engines[name] = agreement(model, prompts, own, said) | speeds(seconds, ideals)
        print(f"{models[-1]}, {name}: {engines[name]}", flush=True)
    about = {"export": f"{models[-1].name}, {model.model.config.model_type}", "prompts": len(prompts)}
    return {**about, "new_tokens": NEW, "threads": 1, "engines": engines}


def lines(results: JSON) -> list[str]:
    """The table: a row for each export and engine."""
    rows, sections = [], [section for section in results.values() if isinstance(section, dict)]
    for section in sections:
        for name, row in section.get("engines", {}).items():
            if "refused" in row:
                rows.append([section["export"], name, row["refused"], *"---"])
                continue
            at = row["first_difference"]
            first = "" if at is None else f"; else from token {at + 1}, margin {row['margin']:.1e}"
            equal = f"{row['equal']} of {section['prompts']}{first}"
            fast = [SPEED.format(**row[phase]) for phase in PHASES]
            rows.append([section["export"], name, equal, f"{row['log_prob_gap']:.0e}", *fast])
    return table("export | engine, weights | equal continuations | log-probs | prefill | decode", rows)


def main() -> None:
    at = Path("logs/public-model")
    args = options(
        __doc__, exports=([at / "22/recovered"], "to serve"), parent=(at / "parent", "they were cut from it"),
        prompts=("configs/public_model/prompts.jsonl", "chats, questions, texts"), repeats=(15, "of timings"),
        out=(OUT, "results; docs/export.md shows this file"),
    )  # fmt: skip
    get_context("forkserver").set_forkserver_preload(["scripts.engines.kinds"])
    wrong = []
    for export in args.exports:
        found = compare([args.parent, export], args.prompts, args.repeats)
        add(args.out, str(export), found)
        print(*lines({"of": found}), sep="\n")
        for name, row in found["engines"].items():
            bar = ROUNDING.get(name.split()[1], float("inf"))
            wrong += [f"{export}, {name}"] * (max(row.get("margin", 0), row.get("log_prob_gap", 0)) > bar)
    if args.out == OUT:
        fill(Path("docs/export.md"), lines(read(OUT)), "engines")
    if wrong:
        raise SystemExit(f"error: beyond rounding: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
