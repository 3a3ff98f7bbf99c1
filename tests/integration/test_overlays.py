"""Every policy overlay runs by the same command; CLP's two halves do what they say."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from src import policies
from src.cli import run
from src.data import Corpus
from src.mask import Mask
from src.plan.experiment import Experiment
from src.recover import Recovery
from tests.integration.test_resume import broken_and_resumed
from tests.marks import slow

OVERLAYS = sorted(Path("configs/policy").glob("*.yaml"))
SEARCH = "configs/search/gumbel_topk.yaml"


def arguments(out: Path, corpus: str, **keys: Any) -> list[str]:
    keys |= {
        "data.init_args.train": corpus, "data.init_args.validation": corpus, "data.init_args.batch_size": 4,
        "trainer.limit_val_batches": 0, "trainer.accelerator": "cpu",
        "trainer.logger.init_args.save_dir": out, "trainer.logger.init_args.version": "run",
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in keys.items()]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_makes_the_search_another_method(
    overlay: Path, tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    given = arguments(
        tmp_path, corpus_file,
        **{
            "trainer.max_steps": 2, "model.init_args.model": teacher_dir,
            "model.init_args.calibration_batches": 2,
        },
    )  # fmt: skip
    named = yaml.safe_load(overlay.read_text())["model"]["init_args"]["policy"]["class_path"].split(".")[-1]
    wide = ["--config", "configs/unit/channel.yaml"] if "layer" not in vars(policies)[named].works_on else []
    done = run(["fit", "--config", SEARCH, *wide, "--config", str(overlay), *given])
    mask = Mask.load(tmp_path / "search" / "run" / "mask.json")
    assert mask.method == named
    assert len(mask.removed) == (36 if wide else 2)  # of six layers, or of 24 channels of each
    if mask.method in ("Streamline", "AngularDistance"):
        assert mask.removed[1] - mask.removed[0] == 1, "a window"
    if mask.method == "BlockInfluence":
        assert list(mask.removed) == lowest_turns(teacher_dir, corpus_file)
        assert mask.metrics["kl"] == mask.metrics["kl_learned"] == mask.metrics["kl_soft"] > 0
    used = yaml.safe_load((tmp_path / "search" / "run" / "config.yaml").read_text())
    policy = used["model"]["init_args"]["policy"]["init_args"]
    assert (policy.get("candidates", 1), policy.get("polish", False)) == (1, False), "the plain answer"
    if overlay.stem == "concave":
        assert done.model.policy.temperature == pytest.approx(0.05), (
            "the overlay's schedule has the last word"
        )
    callbacks = [c["class_path"].split(".")[-1] for c in used["trainer"]["callbacks"]]
    assert "HardenMask" in callbacks
    assert "StageRecord" in callbacks


def lowest_turns(teacher_dir: str, corpus_file: str) -> list[int]:
    """The two layers of least block influence, by plain transformers on the same rows."""
    data = Corpus(train=corpus_file, validation=corpus_file, tokenizer=teacher_dir, batch_size=4)
    data.setup("fit")
    model = AutoModelForCausalLM.from_pretrained(teacher_dir).eval()
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    total, count = torch.zeros(len(model.model.layers), dtype=torch.float64), 0
    for batch in itertools.islice(data.val_dataloader(), 2):
        seen.clear()
        with torch.no_grad():
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
        real_BT = batch["attention_mask"].bool()
        u, v = (torch.stack(h)[:, real_BT].double() for h in zip(*seen, strict=True))
        total += (1 - (u * v).sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1))).sum(-1)
        count += u.shape[1]
    return sorted((total / count).topk(2, largest=False).indices.tolist())


@pytest.mark.parametrize("name", ["bypass", slow("concave"), slow("grain")])
def test_a_killed_and_resumed_rival_equals_the_uninterrupted(
    name: str, tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    extra = [f"--config=configs/policy/{name}.yaml", "--model.init_args.calibration_batches=2"]
    broken_and_resumed(SEARCH, tmp_path, *extra, teacher=teacher_dir, corpus=corpus_file)


class Watch(Callback):
    """Keeps the student's weights from the start of a recovery, and which of them had a gradient."""

    before: dict[str, torch.Tensor] = {}  # noqa: RUF012
    moved: set[str] = set()  # noqa: RUF012

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        Watch.before = {name: p.detach().clone() for name, p in module.named_parameters()}
        Watch.moved = set()

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        Watch.moved |= {name for name, p in module.named_parameters() if p.grad is not None}


def test_clp_tunes_the_blocks_next_to_the_cut_and_nothing_else(
    tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    Mask(model=teacher_dir, num_layers=6, keep=(0, 1, 4, 5), method="x").save(tmp_path / "mask.json")
    given = arguments(
        tmp_path, corpus_file,
        **{
            "trainer.max_steps": 4, "model.init_args.mask": tmp_path / "mask.json",
            "trainer.callbacks+": "tests.integration.test_overlays.Watch",
            "model.init_args.optimizer.init_args.weight_decay": 0.1,  # must not reach what does not train
        },
    )  # fmt: skip
    configs = ["--config", "configs/recover/entropy_kd.yaml", "--config", "configs/recover/clp.yaml"]
    module: Recovery = run(["fit", *configs, *given]).model
    tuned = {name for name in Watch.before if ".layers.1." in name or ".layers.2." in name}
    assert tuned
    assert Watch.moved == tuned
    changed = {n for n, p in module.named_parameters() if not torch.equal(p, Watch.before[n])}
    assert changed == tuned


TERMS = [path for path in sorted(Path("configs/recover").glob("*.yaml")) if "terms:" in path.read_text()]


@pytest.mark.parametrize("overlay", TERMS, ids=lambda path: path.stem)
def test_terms_owe_nothing_to_an_earlier_config(overlay: Path, teacher_dir: str) -> None:
    """The entries of two lists are merged key by key: what the later does not say, the earlier decides."""

    def terms(*files: str) -> list[tuple[float, float]]:
        configs = [
            part for file in ("configs/recover/entropy_kd.yaml", *files) for part in ("--config", file)
        ]
        found = Experiment([*configs, f"--model.init_args.model={teacher_dir}"]).model.terms
        return [(each.weight, each.until) for each in found]

    assert terms("configs/public_model/recover.yaml") == [(1.0, 0.5)]
    assert terms("configs/public_model/recover.yaml", str(overlay)) == terms(str(overlay)) != [(1.0, 0.5)]
