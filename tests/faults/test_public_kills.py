"""make public-model, killed again and again at random moments, ends with what a run in peace ends with."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.data_tools import byte_tokenizer
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow
KILLS = 5
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["a", "small", "cat", "sat", "on", "the", "warm", "mat", "and", "looked", "at", "rain", "."]


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A random Llama of seven layers that reads bytes and has a chat template."""
    tokenizer = byte_tokenizer(CHAT)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "attn_implementation": "sdpa"}
    end = tokenizer.eos_token_id
    ends = {"eos_token_id": end, "pad_token_id": end, "bos_token_id": end}
    tiny_model("llama", 30, num_hidden_layers=7, **sizes, **ends, initializer_range=0.05).save_pretrained(
        tmp_path / "parent"
    )
    tokenizer.save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Corpora and tasks of a few rows, in the form of the real ones."""
    chance = random.Random(0)

    def said() -> str:
        return " ".join(chance.choices(WORDS, k=12))

    eval_ = tmp_path / "shared/data/eval"
    eval_.mkdir(parents=True)
    rows: dict[str, list[dict[str, Any]]] = {
        "gsm8k_train.jsonl": [{"question": said(), "answer": said()} for _ in range(60)],
        "tinystories_train.jsonl": [{"text": said()} for _ in range(60)],
        "ebooks.jsonl": [{"text": said(), "book": "b"} for _ in range(60)],
        "eval/piqa.jsonl": [{"query": said(), "choices": [said(), said()], "gold": 0} for _ in range(3)],
        "eval/arc_easy.jsonl": [{"query": said(), "choices": [said(), said()], "gold": 1} for _ in range(3)],
        "eval/lambada_openai.jsonl": [{"context": said(), "continuation": " mat"} for _ in range(3)],
    }
    for name, listed in rows.items():
        (eval_.parent / name).write_text("".join(json.dumps(row) + "\n" for row in listed))
    books = eval_.parent / "ebooks.jsonl"
    (eval_.parent / "ebooks.jsonl.gz").write_bytes(gzip.compress(books.read_bytes()))
    (eval_ / "wikitext2_test.txt").write_text("\n".join(said() for _ in range(20)))
    return tmp_path / "shared"


def command(out: Path, parent: Path, shared: Path) -> list[str]:
    """Two layers of seven go; the checkpoints are those of the shipped configs, of each 25 and 100 steps."""
    (venv := out / "venv").mkdir(parents=True)
    for there in (venv, out):
        (there / ".installed").touch()
    search = "--trainer.max_steps 60 --model.init_args.draws 1 --trainer.accelerator cpu"
    recover = "--trainer.max_steps 210 --trainer.val_check_interval 105 --trainer.accelerator cpu"
    return [
        "make", "--no-print-directory", "public-model", "KEEP=5", f"PUBLIC={out}", f"PARENT={parent}",
        f"SHARED={shared}", f"SEARCH={search}", f"RECOVER={recover}", f"VENV={venv}",
        f"PY={sys.executable}",
    ]  # fmt: skip


ALONE = os.environ | {"OMP_NUM_THREADS": "1"}
"""The last bits depend on the number of threads."""


def finish(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, env=ALONE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def results(out: Path) -> dict[str, Any]:
    """All that does not tell the time."""
    cut = out / "5"
    kept = ["cut/model.safetensors", "recovered/model.safetensors"]
    found: dict[str, Any] = {name: (cut / name).read_bytes() for name in kept}
    found |= {path.name: path.read_text() for path in (out / "text").glob("*.jsonl")}
    found |= {path.name: path.read_text() for path in (cut / "answers").glob("*.jsonl")}
    mask = json.loads((cut / "search/mask.json").read_text())
    found["mask"] = (mask["keep"], mask["metrics"])
    judged = {
        "evaluate.json": ("kl", "agreement"),
        "held_out.json": ("kl", "agreement"),
        "tasks.json": ("tasks",),
    }
    for name, keys in judged.items():
        told = json.loads((cut / name).read_text())
        found[name] = [[row[key] for key in keys] for row in told["models"]]
    return found


def test_killed_at_random_it_ends_with_the_same(parent: Path, shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    finish(command(whole, parent, shared))
    share = (time.monotonic() - began) / KILLS  # so that all kills fall before the end
    argv, chance = command(killed, parent, shared), random.Random(1)
    for _ in range(KILLS):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        running = subprocess.Popen(argv, start_new_session=True, env=ALONE, **quiet)  # type: ignore[call-overload]
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(chance.uniform(0.1, 0.95) * share)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    finish(argv)
    assert results(killed) == results(whole)
    assert (killed / "5/report.html").exists()
    shutil.rmtree(killed)
