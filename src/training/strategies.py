"""Lightning's sharding strategies, for the overlays in ``configs/strategy/``.

A strategy shards the decoder layers that :mod:`src.models.layers` finds, so no config names a class of layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from lightning import Trainer
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
)
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from src.errors import ConfigError
from src.models.head import Headed
from src.models.layers import decoder_layers
from src.ranges import Range, checked
from src.training import checkpoints

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision


def kind(strategy: Strategy) -> str:
    """Return the kind of a strategy: ``single``, ``ddp``, ``fsdp``, ``fsdp2`` or ``deepspeed``."""
    kinds = {
        ModelParallelStrategy: "fsdp2",
        FSDPStrategy: "fsdp",
        DeepSpeedStrategy: "deepspeed",
        DDPStrategy: "ddp",
    }
    return next((name for base, name in kinds.items() if isinstance(strategy, base)), "single")


def check_installed(strategy: Any) -> None:
    """Refuse a strategy whose engine (DeepSpeed) is not installed, before the strategy is built.

    Args:
        strategy: the value of ``trainer.strategy`` in a config.

    Raises:
        ConfigError: the engine is not installed; the message names its extra.
    """
    if "class_path" in strategy:
        getattr(resolve_name(strategy.class_path), "check_installed", lambda: None)()


SHARDED = ("fsdp", "fsdp2", "deepspeed")
"""Kinds of strategy that shard the weights over the ranks."""
UNSHARDABLE = "the bytes of 8- and 4-bit weights cannot be sharded"
"""Why quantised weights are refused under such a strategy."""


def check_quantised(trainer: Trainer, quantize: str | None, name: str = "FSDP") -> None:
    """Refuse a quantised model under a strategy that would shard it.

    Args:
        trainer: has the strategy.
        quantize: type to which the weights are quantised; None if they are not.
        name: the strategy's, for the message.

    Raises:
        ConfigError: the weights are quantised, and the strategy shards them; names the alternatives.
    """
    if quantize and kind(trainer.strategy) in SHARDED:
        raise ConfigError(
            f"model.quantize: '{quantize}' with {name}: {UNSHARDABLE}. Keep one copy on each rank with "
            f"configs/strategy/ddp.yaml, or set it to null."
        )


def check_device(trainer: Trainer) -> None:
    """Refuse FSDP1 and DeepSpeed on a machine without GPUs.

    Raises:
        ConfigError: the strategy is one of these, and there is no GPU; names the alternatives.
    """
    if kind(trainer.strategy) in ("fsdp", "deepspeed") and not isinstance(
        trainer.accelerator, CUDAAccelerator
    ):
        raise ConfigError(
            "trainer.strategy: the first FSDP and DeepSpeed need GPUs. Without any use "
            "configs/strategy/fsdp2.yaml or configs/strategy/ddp.yaml."
        )


def check_checkpoint(trainer: Trainer, path: Any) -> None:
    """Refuse a checkpoint that the trainer's strategy cannot read: a file, or a directory of parts.

    Args:
        trainer: has the strategy.
        path: the value of ``ckpt_path``.

    Raises:
        ConfigError: it does not exist, is damaged, or is a file where a directory is needed, or the reverse.
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


class FSDP2(ModelParallelStrategy):
    """Runs FSDP2, under which every rank holds a part of every layer.

    Modules shard themselves, in ``configure_model`` (:mod:`src.models.sharding`).

    Args:
        save_distributed_checkpoint: if true, each rank writes its part into a directory; else one rank writes
            a file.
    """

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)

    def setup_environment(self) -> None:
        """Set up the ranks, and shard over all of them; by default Lightning shards over the nodes alone."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def _checkpoints(self) -> type[Strategy]:
        """The strategy whose form of checkpoints is read and written.

        They are plain files if no trained parameter is sharded, as in a search.
        """
        sharded = any(isinstance(p, DTensor) for p in cast(nn.Module, self.lightning_module).parameters())
        return ModelParallelStrategy if sharded else ParallelStrategy

    @property
    def lightning_restore_optimizer(self) -> bool:
        return self._checkpoints is ParallelStrategy

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._checkpoints.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self._checkpoints.optimizer_state(self, optimizer)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._checkpoints.save_checkpoint(self, *args, **kwargs)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        with checkpoints.reading(checkpoint_path):
            return self._checkpoints.load_checkpoint(self, checkpoint_path, weights_only=True)

    def load_model_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._checkpoints.load_model_state_dict(self, *args, **kwargs)

    def load_optimizer_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._checkpoints.load_optimizer_state_dict(self, *args, **kwargs)


class FSDP(FSDPStrategy):
    """Runs FSDP1 (``FullyShardedDataParallel``), with each decoder layer wrapped on its own.

    Args:
        sharded_checkpoint: if true, each rank writes its part into a directory; else one rank writes a file.
        kwargs: of :class:`lightning.pytorch.strategies.FSDPStrategy`.
    """

    def __init__(self, sharded_checkpoint: bool = True, **kwargs: Any) -> None:
        super().__init__(state_dict_type="sharded" if sharded_checkpoint else "full", **kwargs)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        with checkpoints.reading(checkpoint_path):
            return super().load_checkpoint(checkpoint_path, weights_only=True)

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:
        """Lightning's choice of types, but float32 for buffers (rotary frequencies) and sums over ranks."""
        config = super().mixed_precision_config
        return config and replace(config, buffer_dtype=torch.float32, reduce_dtype=torch.float32)

    def setup(self, trainer: Trainer) -> None:
        """Set up as Lightning does, but let the root FSDP module clip gradients, by their norm over ranks."""
        super().setup(trainer)
        root = cast("FullyShardedDataParallel", self.model)

        def clip(_: Optimizer, value: float) -> None:
            root.clip_grad_norm_(value)

        self.precision_plugin.clip_grad_by_norm = clip  # type: ignore[method-assign]  # of this object

    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp.wrap import CustomPolicy

        networks = (module for module in model.modules() if isinstance(module, PreTrainedModel))
        layers = {id(layer) for layer in decoder_layers(next(networks))[1]}
        self.kwargs["auto_wrap_policy"] = CustomPolicy(lambda module: id(module) in layers)
        return super()._setup_model(model)


class ZeRO(DeepSpeedStrategy):
    """Runs DeepSpeed's ZeRO. A model is loaded whole on every rank, then sharded by the engine.

    Args:
        stage: 2 shards gradients and optimiser states, 3 the weights too.
        kwargs: of :class:`lightning.pytorch.strategies.DeepSpeedStrategy`.
    """

    @checked
    def __init__(self, stage: Annotated[int, Range(int, 1, 3)] = 2, **kwargs: Any) -> None:
        super().__init__(stage=stage, **kwargs)
        # With the optimiser's state in the host's memory, DeepSpeed refuses all optimisers but its own.
        cast(dict[str, Any], self.config).setdefault("zero_force_ds_cpu_optimizer", False)

    @staticmethod
    def check_installed() -> None:
        """Refuse to run without DeepSpeed.

        The constructor does not check it, because the parser would hide its message.

        Raises:
            ConfigError: DeepSpeed is not installed.
        """
        if find_spec("deepspeed") is None:
            raise ConfigError(
                "trainer.strategy: DeepSpeed is not installed: pip install -e '.[deepspeed]', or use "
                "configs/strategy/fsdp2.yaml."
            )

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Shard nothing yet: weights that are sharded as they are created cannot be loaded from files."""
        self._init_config_if_needed()
        yield

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        with checkpoints.reading(checkpoint_path):
            return super().load_checkpoint(checkpoint_path, weights_only=True)

    def setup(self, trainer: Trainer) -> None:
        """Set up as Lightning does, but leave buffers and batches, such as cached signals, in their types."""
        self.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]  # of this object
        buffers = {name: x.clone() for name, x in cast(nn.Module, self.model).named_buffers()}
        super().setup(trainer)
        module = cast(nn.Module, self.lightning_module)
        for name, x in module.named_buffers():
            x.data = buffers[name].to(x.device)
        if self.zero_stage_3:
            self._keep_whole(cast(Headed, module).head.linear)

    def _keep_whole(self, linear: nn.Module) -> None:
        """Keep the output head whole on each rank, without the engine's hooks.

        The loss calls the head for a chunk of tokens at a time, and ranks have different numbers of chunks.
        If each call gathered the head from all ranks, some ranks would wait for ever.
        """
        weights: list[Any] = [*linear.parameters()]
        for hooks in (linear._forward_pre_hooks, linear._forward_hooks):
            hooks.clear()
        for weight in weights:
            weight.ds_persist = True
        weights[0].all_gather(weights)
        engine = cast(Any, self.model)  # DeepSpeed is not typed, and may not be installed
        engine.optimizer.persistent_parameters.extend(weights)
