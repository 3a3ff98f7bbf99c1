"""What a quantised teacher gives away: KL of its signal, and the score of the demo recovered from it."""

from __future__ import annotations

from pathlib import Path

from scripts.lab.results import JSON, TEACHER
from scripts.scale.converge import fight
from src.data.arithmetic import problems
from src.data.documents import Columns
from src.data.judging import batches, judged
from src.errors import ConfigError
from src.evaluate.text import held_out
from src.models.loading import Quantization, load_model, load_tokenizer

FORMS: tuple[Quantization, ...] = ("int8", "nf4")


def signals(work: Path) -> JSON:
    """KL from the float32 teacher to each form of it; of a form that is refused, why."""
    tokenizer, rows = load_tokenizer(TEACHER), list(problems("test", 256, 9))
    encoded, found = judged(tokenizer, rows, Columns(), "all").rows, JSON()
    for form in FORMS:
        try:
            models = load_model(TEACHER, quantize=form), load_model(TEACHER)
            found[form] = held_out(*models, batches(encoded, 64, tokenizer.pad_token_id))
        except ConfigError as refusal:
            found[form] = {"refused": str(refusal)}
    return {"forms": found}


def measure(work: Path) -> JSON:
    """Scores of the demo, recovered from the float32 teacher and from its quantised forms."""
    found = fight("configs/arena/teachers.yaml", "teachers", work)
    runs = [{"seed": run["seed"], "teacher": row["variant"], "exact_match": run["recovered"]["exact_match"]}
            for row in found["rows"] for run in row["runs"]]  # fmt: skip
    means = {row["variant"]: row["recovered"]["exact_match"]["value"] for row in found["rows"]}
    teacher = found["teacher"]
    return {
        "problems": teacher["problems"], "runs": runs, "means": means,
        "teacher": teacher["exact_match"], "int8_minus_float32": means["int8"] - means["float32"],
    }  # fmt: skip
