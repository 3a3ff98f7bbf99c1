"""What a quantised teacher gives away: KL of its signal, and the score of the demo recovered from it."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from scripts.headline import TEACHER, branch, make
from src.data.arithmetic import problems
from src.data.columns import Columns
from src.data.judging import batches, encode
from src.evaluate.verb import exact_match, held_out
from src.models.loading import Quantization, load_model, load_tokenizer

FORMS: tuple[Quantization | None, ...] = (None, "int8", "nf4")
RECOVERED = FORMS[:2]
SEEDS = (0,)
PROBLEMS = 2000
"""Test problems; the standard error of a score of 99 % is then 0.2 points."""


def measure(work: Path) -> dict[str, Any]:
    """KL from the float32 teacher to each form of it, and recovered scores."""
    tokenizer, rows = load_tokenizer(str(TEACHER)), list(problems("test", PROBLEMS, 9))
    signals = {}
    for form in FORMS:
        text = batches(encode(tokenizer, rows[:256], Columns(), "all"), 64, tokenizer.pad_token_id)
        model = load_model(str(TEACHER), quantize=form)
        judged = held_out(model, load_model(str(TEACHER)), text)
        signals[form or "float32"] = {key: judged[key] for key in ("kl", "agreement", "tokens")}
    runs = []
    for seed in SEEDS:
        searched = work / f"demo-{seed}"
        searched.mkdir(parents=True, exist_ok=True)
        make(f"{searched}/search/mask.json", searched, seed, 1)
        for form in RECOVERED:
            own = work / f"demo-{seed}-{form or 'float32'}"
            branch(searched, own)
            asked = f"--model.init_args.teacher.init_args.quantize {form}" if form else ""
            make(f"{own}/recovered/config.json", own, seed, 1, asked)
            score = exact_match(load_model(str(own / "recovered")), tokenizer, rows)["exact_match"]
            runs.append({"seed": seed, "teacher": form or "float32", "exact_match": score})
            print(runs[-1], flush=True)
    means = {
        name: statistics.mean(run["exact_match"] for run in runs if run["teacher"] == name)
        for name in dict.fromkeys(run["teacher"] for run in runs)
    }
    parent = exact_match(load_model(str(TEACHER)), tokenizer, rows)["exact_match"]
    return {
        "problems": PROBLEMS, "signals": signals, "runs": runs, "means": means, "teacher": parent,
        "int8_minus_float32": means["int8"] - means["float32"],
    }  # fmt: skip
