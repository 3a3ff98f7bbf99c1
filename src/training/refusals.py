"""Pairs of strategy, stage and teacher that cannot work, refused before anything is loaded.

Each refusal names what to use instead. docs/strategies.md says the same as a table. The command line asks
before it starts processes; the modules ask again in ``setup``, for who uses a Trainer directly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator

from src.errors import ConfigError
from src.policies import MaskPolicy
from src.training import checkpoints
from src.training.strategies import kind

SHARDED = ("fsdp", "fsdp2", "deepspeed")
_BYTES = "the bytes of 8- and 4-bit weights cannot be sharded"
_QUANTISED = f"{_BYTES}. Keep one copy on each rank with configs/strategy/ddp.yaml, or set it to null"


def check_search(
    trainer: Trainer, data: object, quantize: str | None, teacher: object | None, policy: MaskPolicy
) -> None:
    """Refuse what a mask search cannot do.

    Args:
        trainer: with its strategy.
        data: the data module.
        quantize: quantisation of the one copy of the weights.
        teacher: another source of the teacher's signal.
        policy: how masks are learned.

    Raises:
        ConfigError: names the key and the alternative.
    """
    strategy = kind(trainer.strategy)
    if strategy in ("fsdp", "deepspeed"):
        raise ConfigError(
            "trainer.strategy: FSDP and DeepSpeed shard what is trained, which in a search is one number for "
            "each layer; the frozen weights would stay whole on every rank. Use configs/strategy/fsdp2.yaml, "
            "which shards the frozen weights and keeps the gates whole, or configs/strategy/ddp.yaml."
        )
    if quantize and strategy in SHARDED:
        raise ConfigError(f"model.quantize: '{quantize}' with FSDP2: {_QUANTISED}.")
    name = type(policy).__name__
    if policy.differentiates_weights and quantize:
        raise ConfigError(
            f"model.quantize: {name} differentiates the weights, which '{quantize}' does not allow. Set it "
            f"to null, or choose another policy."
        )
    if policy.differentiates_weights and strategy == "fsdp2":
        raise ConfigError(
            f"trainer.strategy: {name} differentiates the weights, which FSDP2 holds in parts. Use "
            f"configs/strategy/ddp.yaml, or choose another policy."
        )
    _check_teacher(trainer, data, teacher)


def check_recovery(trainer: Trainer, data: object, teacher: object) -> None:
    """Refuse what a recovery cannot do; arguments and errors as of :func:`check_search`."""
    _check_device(trainer)
    _check_teacher(trainer, data, teacher)


def check_cache(trainer: Trainer, quantize: str | None) -> None:
    """Refuse what a pass of the teacher cannot do; arguments and errors as of :func:`check_search`."""
    strategy = kind(trainer.strategy)
    if strategy == "deepspeed":
        raise ConfigError(
            "trainer.strategy: DeepSpeed shards the state of training, and a teacher only runs forward. Use "
            "configs/strategy/fsdp2.yaml for a teacher too large for a device, or configs/strategy/ddp.yaml."
        )
    if quantize and strategy in SHARDED:
        raise ConfigError(f"model.quantize: '{quantize}' with FSDP: {_QUANTISED}.")
    _check_device(trainer)


def check_checkpoint(trainer: Trainer, path: Any) -> None:
    """Refuse a checkpoint that cannot be read, here or at all: some take files, some directories of parts.

    Raises:
        ConfigError: names the alternative.
    """
    if path is None or path == "last" or "://" in str(path):
        return
    if path == "best":
        raise ConfigError("ckpt_path: 'best' is known within a run only; give a path, or 'last'.")
    if path == "hpc":
        if not list(Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt")):
            raise ConfigError(
                f"ckpt_path: 'hpc' is what SLURM's requeue signal saved, and there is none in "
                f"'{trainer.default_root_dir}'. Give a path, or 'last'."
            )
        return
    checkpoints.record(str(path))
    directory, strategy = Path(path).is_dir(), kind(trainer.strategy)
    if directory and strategy not in SHARDED:
        raise ConfigError(
            f"ckpt_path: '{path}' is a checkpoint in parts, of a sharding strategy. Resume with the overlay "
            f"that wrote it, on any number of devices."
        )
    if not directory and strategy == "deepspeed":
        raise ConfigError(
            f"ckpt_path: '{path}' is a file, and DeepSpeed resumes from its own directories. Resume with the "
            f"overlay that wrote it, or with configs/strategy/fsdp2.yaml."
        )


def _check_device(trainer: Trainer) -> None:
    if kind(trainer.strategy) in ("fsdp", "deepspeed") and not isinstance(
        trainer.accelerator, CUDAAccelerator
    ):
        raise ConfigError(
            "trainer.strategy: the first FSDP and DeepSpeed need GPUs. Without any use "
            "configs/strategy/fsdp2.yaml or configs/strategy/ddp.yaml."
        )


def _check_teacher(trainer: Trainer, data: object, teacher: object | None) -> None:
    from src.teachers import CachedTeacher, LiveTeacher  # which import the cache, which imports this

    strategy = kind(trainer.strategy)
    if isinstance(teacher, CachedTeacher):
        teacher.corpus(data)
    if isinstance(teacher, LiveTeacher) and teacher.shard and strategy != "fsdp2":
        raise ConfigError(
            f"teacher.shard: only FSDP2 shards a teacher, and this is '{strategy}'. Use "
            f"configs/strategy/fsdp2.yaml, teacher.quantize, or a cache (src.teachers.CachedTeacher)."
        )
    if isinstance(teacher, LiveTeacher) and teacher.shard and teacher.loading["quantize"]:
        raise ConfigError(
            f"teacher.shard: {_BYTES}. Set it to false (one quantised copy on each rank), or "
            f"teacher.quantize to null."
        )
