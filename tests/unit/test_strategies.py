"""Overlays parse on every stage, build what they can on a CPU, and what cannot work is refused at once."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import yaml

from src.cli import main, run
from src.errors import ConfigError
from src.training.arguments import PruneCLI
from src.training.strategies import FSDP, FSDP2, ZeRO, kind
from tests.cached import workspace

OVERLAYS = sorted(Path("configs/strategy").glob("*.yaml"))
STAGES = {
    "search": ["fit", "--config", "configs/search/gumbel_topk.yaml"],
    "cache": ["predict", "--config", "configs/cache/topk.yaml"],
    "recover": ["fit", "--config", "configs/recover/entropy_kd.yaml"],
}
DEEPSPEED = "deepspeed"
REFUSED = {("search", "fsdp"), ("search", DEEPSPEED), ("cache", DEEPSPEED)}


def arguments(stage: str, overlay: Path, teacher: str, corpus: str, mask: str, out: Path) -> list[str]:
    given = [*STAGES[stage], "--config", str(overlay), "--trainer.accelerator=cpu", "--trainer.devices=1"]
    given += ["--trainer.precision=32-true", f"--data.init_args.train={corpus}"]
    given += [f"--trainer.logger.init_args.save_dir={out}", f"--model.init_args.model={teacher}"]
    given += [f"--model.init_args.mask={mask}"] * (stage == "recover")
    given += [f"--model.init_args.out={out}/cache"] * (stage == "cache")
    return given


class Parsed(Exception):
    """Carries what was parsed, before anything is built."""


def parse(given: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def stop(self: PruneCLI) -> None:
        raise Parsed(self.config)

    monkeypatch.setattr(PruneCLI, "before_instantiate_classes", stop)
    with pytest.raises(Parsed) as caught:
        run(given)
    return caught.value.args[0][given[0]]


def test_there_is_an_overlay_for_each_strategy() -> None:
    names = {path.stem for path in OVERLAYS}
    assert names == {"single", "ddp", "fsdp", "fsdp2", "deepspeed_z2", "deepspeed_z3"}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_overlays_change_the_trainer_alone_and_name_no_family(overlay: Path) -> None:
    loaded = yaml.safe_load(overlay.read_text())
    assert loaded.keys() == {"trainer"}
    assert loaded["trainer"].keys() <= {"strategy", "devices", "precision", "callbacks+"}
    assert "transformers" not in overlay.read_text()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_every_overlay_parses_on_every_stage(
    overlay: Path, stage: str, teacher_dir: str, corpus_file: str, mask_file: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = arguments(stage, overlay, teacher_dir, corpus_file, mask_file, tmp_path)
    base = len(yaml.safe_load(Path(STAGES[stage][-1]).read_text())["trainer"].get("callbacks", []))
    trainer = parse(given, monkeypatch).trainer
    wanted = yaml.safe_load(overlay.read_text())["trainer"]
    strategy = wanted["strategy"]
    if isinstance(strategy, dict):
        assert trainer.strategy.class_path.endswith(strategy["class_path"].rpartition(".")[2])
        for key, value in strategy["init_args"].items():
            assert trainer.strategy.init_args[key] == value
    assert len(trainer.callbacks) == base + len(wanted.get("callbacks+", [])), "callbacks are added"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_on_a_cpu_an_overlay_is_built_or_refused_in_one_message(
    overlay: Path, stage: str, teacher_dir: str, corpus_file: str, mask_file: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Nothing is loaded either way: a refusal comes before it."""
    monkeypatch.setattr(PruneCLI, "_run_subcommand", lambda *_: None)
    monkeypatch.setattr("src.models.loading.load_model", None)
    given = arguments(stage, overlay, teacher_dir, corpus_file, mask_file, tmp_path)
    if overlay.stem in ("single", "ddp", "fsdp2"):
        made = run(given)
        assert kind(made.trainer.strategy) == overlay.stem
        return
    with pytest.raises(SystemExit) as ended:
        main(given)
    text = capsys.readouterr().err
    assert ended.value.code == 2
    assert text.count("error:") == 1
    assert "trainer.strategy" in text
    assert "configs/strategy/fsdp2.yaml" in text, "the alternative is named"


@pytest.mark.parametrize(("name", "told"), [("fsdp22", "fsdp22"), ("fsdp", "requires a GPU")])
def test_a_strategy_by_name_that_cannot_be_made_is_told_in_one_message(
    name: str, told: str, teacher_dir: str, corpus_file: str, mask_file: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = arguments("recover", OVERLAYS[-1], teacher_dir, corpus_file, mask_file, tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*given, f"--trainer.strategy={name}"])
    text = capsys.readouterr().err
    assert ended.value.code == 2
    assert text.count("error:") == 1
    assert told in text


def test_an_optimiser_of_torch_goes_with_state_in_the_hosts_memory() -> None:
    pytest.importorskip("deepspeed")
    config: Any = ZeRO(stage=3, offload_optimizer=True).config
    assert config["zero_force_ds_cpu_optimizer"] is False


def trainer_of(strategy: str) -> Any:
    """Enough of a trainer on a GPU to be asked whether a pair can work."""
    from lightning.pytorch.accelerators import CUDAAccelerator
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

    kinds: dict[str, Any] = {
        "single": SingleDeviceStrategy, "ddp": DDPStrategy, "fsdp": FSDP, "fsdp2": FSDP2, DEEPSPEED: ZeRO,
    }  # fmt: skip
    made = object.__new__(kinds[strategy])
    return SimpleNamespace(
        strategy=made, accelerator=object.__new__(CUDAAccelerator), ckpt_path=None, precision="32-true"
    )


def refusal(module: Any, strategy: str, data: object = None) -> str:
    """What a module says to a strategy on a GPU; empty if it agrees."""
    try:
        module.refuse(trainer_of(strategy), data)
    except ConfigError as e:
        return str(e)
    return ""


@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "fsdp2", DEEPSPEED])
def test_which_pairs_are_refused(strategy: str, quantize: Any, teacher_dir: str, mask_file: str) -> None:
    from src.cache import CacheTeacher
    from src.policies import GumbelTopK
    from src.recover import Recovery
    from src.search import MaskSearch
    from src.teachers import LiveTeacher

    sharded = strategy not in ("single", "ddp")
    search = refusal(MaskSearch(teacher_dir, GumbelTopK(), remove=2, quantize=quantize), strategy)
    assert bool(search) == (strategy in ("fsdp", DEEPSPEED) or bool(quantize and sharded))
    cache = refusal(CacheTeacher(teacher_dir, "out", quantize=quantize), strategy)
    assert bool(cache) == (strategy == DEEPSPEED or bool(quantize and sharded))
    copies = Recovery(mask_file, teacher=LiveTeacher(quantize=quantize))
    assert not refusal(copies, strategy), "a teacher of its own on each rank goes with every strategy"
    parts = refusal(Recovery(mask_file, teacher=LiveTeacher(quantize=quantize, shard=True)), strategy)
    assert bool(parts) == (strategy != "fsdp2" or quantize is not None)
    for text in filter(None, (search, cache, parts)):
        assert "configs/strategy/" in text or "Set it to" in text, "an alternative is named"


@pytest.mark.parametrize(("strategy", "quantize"), [("fsdp2", None), ("single", "int8"), ("ddp", None)])
def test_a_policy_that_differentiates_weights_wants_them_whole(
    strategy: str, quantize: Any, teacher_dir: str
) -> None:
    from src.policies import Taylor
    from src.search import MaskSearch

    said = refusal(MaskSearch(teacher_dir, Taylor(), remove=2, quantize=quantize), strategy)
    assert ("choose another policy" in said) == (strategy != "ddp")


def test_a_cached_teacher_wants_a_cache_before_anything_is_loaded(mask_file: str, tmp_path: Path) -> None:
    from src.cache import CachedCorpus
    from src.recover import Recovery
    from src.teachers import CachedTeacher

    made = Recovery(mask_file, teacher=CachedTeacher())
    assert "CachedCorpus" in refusal(made, "ddp", object())
    ws = workspace(tmp_path)
    assert not refusal(made, "ddp", CachedCorpus(tokenizer=ws.model, train=ws.write("cache")))


@pytest.mark.parametrize(
    ("strategy", "directory", "refused"),
    [("ddp", True, True), ("fsdp2", True, False), ("fsdp2", False, False), (DEEPSPEED, False, True)],
)
def test_a_checkpoint_of_another_kind_is_refused(
    strategy: str, directory: bool, refused: bool, tmp_path: Path
) -> None:
    from src.training.strategies import check_checkpoint

    path = tmp_path / "last.ckpt"
    file = path / "meta.pt" if directory else path
    file.parent.mkdir(exist_ok=True)
    torch.save({"recovery": {}}, file)
    if directory:
        torch.distributed.checkpoint.save(
            {"state_dict": {"a": torch.ones(1)}}, checkpoint_id=path, no_dist=True
        )
    with pytest.raises(ConfigError, match="overlay") if refused else nullcontext():
        check_checkpoint(trainer_of(strategy), path)


# ---------------------------------------------------------------- micro-batches


def test_micro_batches_weigh_by_their_tokens(
    teacher_dir: str, corpus_file: str, mask_file: str, tmp_path: Path
) -> None:
    """Two micro-batches of unequal counts make the step that one batch of all their rows makes."""

    def fit(rows: int, micro: int) -> dict[str, torch.Tensor]:
        given = {
            "data": "tests.distributed.rows.GlobalRows", "data.init_args.train": corpus_file,
            "data.init_args.tokenizer": teacher_dir, "data.init_args.batch_size": rows,
            "model.init_args.mask": mask_file, "model.init_args.distillation.init_args.weight": "none",
            "trainer.accumulate_grad_batches": micro, "trainer.max_steps": 3, "trainer.accelerator": "cpu",
            "trainer.limit_val_batches": 0, "trainer.logger.init_args.save_dir": tmp_path,
        }  # fmt: skip
        made = run(
            ["fit", "--config", "configs/recover/entropy_kd.yaml", *[f"--{k}={v}" for k, v in given.items()]]
        )
        return made.model.model.state_dict()

    whole, parts = fit(8, 1), fit(4, 2)
    for name, tensor in whole.items():
        torch.testing.assert_close(
            parts[name], tensor, rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
