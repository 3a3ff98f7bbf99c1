"""A mask for each prompt from the search to the judgement: trained, clustered, exported, proven, routed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from src.cli import run
from src.data.judging import judged, prompt, read_rows
from src.errors import ConfigError
from src.evaluate.verb import QUESTIONS
from src.mask import Mask, Unit
from src.models.loading import load_model, load_tokenizer
from src.policies.prompt_masks import PromptMasks
from src.routing.router import Router
from tests.integration.test_overlays import SEARCH, arguments
from tests.integration.test_resume import broken_and_resumed

OVERLAY = "configs/search/prompts.yaml"
FIT = ["fit", "--config", SEARCH, "--config", OVERLAY]


def searched(out: Path, teacher: str, corpus: str, *more: str, **keys: Any) -> Path:
    """Two steps of a search of prompts, whose predictor tells prompts apart from the start; its mask file."""
    given = {
        "trainer.max_steps": 2,
        "model.init_args.model": teacher,
        "model.init_args.calibration_batches": 3,
    }
    run([*FIT, *more, *arguments(out, corpus, **{**given, **keys})])
    return out / "search" / "run" / "mask.json"


@pytest.fixture
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second map of the predictor is not zero at first, so that two steps suffice for different masks."""
    reads = PromptMasks.reads

    def apart(self: PromptMasks, size: int) -> None:
        reads(self, size)
        torch.nn.init.normal_(self.up.weight, std=float(self.hidden), generator=self.generator(-1, 1))

    monkeypatch.setattr(PromptMasks, "reads", apart)


@pytest.mark.slow
@pytest.mark.usefixtures("_apart")
@pytest.mark.parametrize("unit", ["layer", "half", "channel"])
def test_prompts_are_routed_to_proven_cuts(
    unit: Unit, tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    more = ["--config", "configs/public_model/routed.yaml"] if unit == "channel" else []
    mask_file = searched(tmp_path, teacher_dir, corpus_file, *more, **{"model.init_args.unit": unit})
    one, told = Mask.load(mask_file), json.loads((mask_file.parent / "record.json").read_text())["prompts"]
    assert (one.method, one.unit) == ("PromptMasks", unit)
    assert told["prompts"] == 12
    assert told["masks"] >= 2
    assert told["jaccard"] < 1
    out = tmp_path / "routed"
    run(["export", "--mask", str(mask_file), "--clusters=2", "--out", str(out)])
    card = json.loads((out / "router.json").read_text())
    assert [each["directory"] for each in card["models"]] == ["0", "1"]
    assert sum(each["share"] for each in card["models"]) == pytest.approx(1)
    masks = [Mask.load(out / name / "mask.json") for name in "01"]
    assert len({mask.keep for mask in masks}) == 2
    assert {len(mask.keep) for mask in masks} == {len(one.keep)}
    assert all(
        "| logits = original | equal to the last bit |" in (out / n / "README.md").read_text() for n in "01"
    )
    config = AutoConfig.from_pretrained(out / "1")
    assert config.num_hidden_layers == (6 if unit == "channel" else 4)

    judge = ["evaluate", "--teacher", teacher_dir, "--data", corpus_file, "--no-exact-match"]
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    run([*judge, "--model", str(out), "--out", str(whole)])
    rows = judged(load_tokenizer(teacher_dir), read_rows(corpus_file), QUESTIONS).rows
    chosen = Router.load(out / "router.safetensors").route([prompt(row) for row in rows])
    (routed,) = json.loads(whole.read_text())["models"]
    assert routed["routed"] == {name: chosen.count(int(name)) for name in "01" if int(name) in chosen}
    total = 0.0
    for number in set(chosen):
        own = tmp_path / f"{number}.jsonl"
        lines = Path(corpus_file).read_text().splitlines(keepends=True)
        own.write_text("".join(line for line, at in zip(lines, chosen, strict=True) if at == number))
        argv = ["evaluate", "--teacher", teacher_dir, "--data", str(own), "--no-exact-match"]
        run([*argv, "--model", str(out / str(number)), "--out", str(parts)])
        (part,) = json.loads(parts.read_text())["models"]
        total += part["kl"] * part["tokens"]
        parts.unlink()
    assert routed["kl"] * routed["tokens"] == pytest.approx(total, rel=1e-5)


def test_a_routed_export_of_equal_checkpoints_is_judged_as_one_of_them(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    """Answers, verdicts and sums come back in the order of the rows; damage is one message."""
    out = tmp_path / "routed"
    run(["export", "--mask", mask_file, "--out", str(out / "0")])
    shutil.copytree(out / "0", out / "1")
    tokenizer = load_tokenizer(teacher_dir)
    table = torch.randn(len(tokenizer), 1, generator=torch.Generator().manual_seed(0))
    router = Router(table, torch.tensor([[1.0], [-1.0]]), torch.zeros(2), table[:3])
    rows = judged(tokenizer, read_rows(corpus_file, 12), QUESTIONS).rows
    middle = router.read([prompt(row) for row in rows]).quantile(0.5)
    replace(router, bias_U=torch.stack([-middle, middle])).save(out / "router.safetensors")
    card = out / "router.json"
    card.write_text(json.dumps({"models": [{"directory": "0"}, {"directory": "1"}]}))
    argv = ["evaluate", "--teacher", teacher_dir, "--data", corpus_file, "--limit=12", "--max-new-tokens=3"]
    run([*argv, "--model", str(out), str(out / "0"), str(out), "--out", str(tmp_path / "figures.json")])
    first, plain, again = json.loads((tmp_path / "figures.json").read_text())["models"]
    assert {*first["routed"].values()} == {6}
    assert "routed" not in plain
    for key in ("exact_match", "correct", "samples", "tokens", "new_tokens", "layers", "parameters"):
        assert first[key] == plain[key] == again[key], key
    assert first["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert first["row_tokens"] == plain["row_tokens"]
    assert first["kl_interval"] == pytest.approx(plain["kl_interval"], rel=1e-4)
    assert first["row_kl"] == pytest.approx(plain["row_kl"], rel=1e-4)
    assert sum(plain["row_kl"]) / sum(plain["row_tokens"]) == pytest.approx(plain["kl"])
    card.write_text(json.dumps({"models": [{"directory": "0"}]}))
    with pytest.raises(ConfigError, match="names 1 checkpoints, and its router 2"):
        run([*argv, "--model", str(out)])
    card.write_text("{}")
    with pytest.raises(ConfigError, match=r"--model: '.*router.json' cannot be read"):
        run([*argv, "--model", str(out)])


@pytest.mark.slow
def test_prompts_of_one_mask_are_a_collapse_and_no_clusters(
    tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    """With a rate of nearly zero all keep one mask: there is a warning, and an export is refused."""
    rate = {"model.init_args.optimizer.init_args.lr": 1e-12, "trainer.max_steps": 1}
    with pytest.warns(UserWarning, match="the masks have collapsed to one: 1 different masks for 12 prompts"):
        mask_file = searched(tmp_path, teacher_dir, corpus_file, **rate)
    out, argv = tmp_path / "routed", ["export", "--mask", str(mask_file)]
    with pytest.raises(ConfigError, match="--clusters: 2 given"):
        run([*argv, "--clusters=2", "--out", str(out)])
    with pytest.raises(ConfigError, match="--checkpoint: belongs to one checkpoint"):
        run([*argv, "--clusters=1", "--out", str(out), "--checkpoint=last.ckpt"])
    assert not out.exists()


def test_a_plan_says_that_it_does_not_know_a_search_of_prompts(teacher_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"'PromptSearch' cannot be planned; accepted: MaskSearch"):
        run(["plan", "--config", SEARCH, "--config", OVERLAY, "--model.init_args.model", teacher_dir])


@pytest.mark.slow
@pytest.mark.usefixtures("_apart")
def test_adapters_train_beside_the_predictor_and_are_merged_into_each_cut(
    tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    pytest.importorskip("peft")
    adapters = "{class_path: src.training.adapters.LoRA, init_args: {lr: 0.01}}"
    mask_file = searched(tmp_path, teacher_dir, corpus_file, **{"model.init_args.adapters": adapters})
    out = tmp_path / "routed"
    run(["export", "--mask", str(mask_file), "--clusters=2", "--out", str(out)])
    for name in "01":
        mask, own = Mask.load(out / name / "mask.json"), load_model(str(out / name)).state_dict()
        parent = load_model(teacher_dir).state_dict()
        for place, layer in enumerate(mask.keep):
            key = "model.layers.{}.mlp.down_proj.weight"
            assert not torch.equal(own[key.format(place)], parent[key.format(layer)]), (
                "an adapter is merged in"
            )
        assert torch.equal(own["model.embed_tokens.weight"], parent["model.embed_tokens.weight"])


@pytest.mark.slow
@pytest.mark.usefixtures("_apart")
def test_a_killed_and_resumed_search_of_prompts_ends_with_the_same_router(
    tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    extra = [f"--config={OVERLAY}", "--model.init_args.calibration_batches=2"]
    broken_and_resumed(SEARCH, tmp_path, *extra, teacher=teacher_dir, corpus=corpus_file)
    one, other = (load_file(next((tmp_path / n).rglob("router.safetensors"))) for n in ("whole", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
