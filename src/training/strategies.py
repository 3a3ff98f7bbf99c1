"""Lightning's sharding strategies, told by the model which layers to shard; for ``configs/strategy/``.

No class of a layer is named anywhere: the layers are the one list that :mod:`src.models.layers` finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
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
    """What a strategy does to a model: ``single``, ``ddp``, ``fsdp``, ``fsdp2`` or ``deepspeed``."""
    kinds = {
        ModelParallelStrategy: "fsdp2",
        FSDPStrategy: "fsdp",
        DeepSpeedStrategy: "deepspeed",
        DDPStrategy: "ddp",
    }
    return next((name for family, name in kinds.items() if isinstance(strategy, family)), "single")


def check_installed(strategy: Any) -> None:
    """Ask a strategy, as a config names it, whether what it needs is installed, before it is built.

    Raises:
        ConfigError: it is not.
    """
    if "class_path" in strategy:
        module, _, name = strategy.class_path.rpartition(".")
        getattr(getattr(import_module(module), name), "check_installed", lambda: None)()


SHARDED = ("fsdp", "fsdp2", "deepspeed")
NO_PARTS = "the bytes of 8- and 4-bit weights cannot be sharded"


def check_quantised(trainer: Trainer, quantize: str | None, name: str = "FSDP") -> None:
    """Refuse a quantised model that a strategy would shard.

    Raises:
        ConfigError: names the alternatives.
    """
    if quantize and kind(trainer.strategy) in SHARDED:
        raise ConfigError(
            f"model.quantize: '{quantize}' with {name}: {NO_PARTS}. Keep one copy on each rank with "
            f"configs/strategy/ddp.yaml, or set it to null."
        )


def check_device(trainer: Trainer) -> None:
    """Refuse an engine that needs GPUs where none is.

    Raises:
        ConfigError: names the alternatives.
    """
    if kind(trainer.strategy) in ("fsdp", "deepspeed") and not isinstance(
        trainer.accelerator, CUDAAccelerator
    ):
        raise ConfigError(
            "trainer.strategy: the first FSDP and DeepSpeed need GPUs. Without any use "
            "configs/strategy/fsdp2.yaml or configs/strategy/ddp.yaml."
        )


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


class FSDP2(ModelParallelStrategy):
    """FSDP2: every process holds a part of every layer; the modules shard themselves in ``configure_model``.

    Args:
        save_distributed_checkpoint: each process writes its part into a directory; or one whole file.
    """

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)

    def setup_environment(self) -> None:
        """One mesh of all processes; Lightning's own choice is one of the nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def _saver(self) -> type[Strategy]:
        """Whose checkpoints are written: plain files where nothing that is trained is in parts (a search)."""
        parts = any(isinstance(p, DTensor) for p in cast(nn.Module, self.lightning_module).parameters())
        return ModelParallelStrategy if parts else ParallelStrategy

    @property
    def lightning_restore_optimizer(self) -> bool:
        return self._saver is ParallelStrategy

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._saver.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self._saver.optimizer_state(self, optimizer)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._saver.save_checkpoint(self, *args, **kwargs)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        with checkpoints.reading(checkpoint_path):
            return self._saver.load_checkpoint(self, checkpoint_path, weights_only=True)

    def load_model_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._saver.load_model_state_dict(self, *args, **kwargs)

    def load_optimizer_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._saver.load_optimizer_state_dict(self, *args, **kwargs)


class FSDP(FSDPStrategy):
    """The first FSDP, a unit for each decoder layer.

    Args:
        sharded_checkpoint: each process writes its part into a directory; or one whole file.
        kwargs: of :class:`lightning.pytorch.strategies.FSDPStrategy`.
    """

    def __init__(self, sharded_checkpoint: bool = True, **kwargs: Any) -> None:
        super().__init__(state_dict_type="sharded" if sharded_checkpoint else "full", **kwargs)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        with checkpoints.reading(checkpoint_path):
            return super().load_checkpoint(checkpoint_path, weights_only=True)

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:
        """As Lightning's, but rotary frequencies and sums over ranks stay in float32."""
        config = super().mixed_precision_config
        return config and replace(config, buffer_dtype=torch.float32, reduce_dtype=torch.float32)

    def setup(self, trainer: Trainer) -> None:
        """Set up, and let gradients be clipped by their norm over all ranks, which the root unit knows."""
        super().setup(trainer)
        root = cast("FullyShardedDataParallel", self.model)

        def clip(_: Optimizer, value: float) -> None:
            root.clip_grad_norm_(value)

        self.precision_plugin.clip_grad_by_norm = clip  # type: ignore[method-assign]  # of this object

    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp.wrap import CustomPolicy

        networks = (part for part in model.modules() if isinstance(part, PreTrainedModel))
        units = {id(layer) for layer in decoder_layers(next(networks))[1]}
        self.kwargs["auto_wrap_policy"] = CustomPolicy(lambda part: id(part) in units)
        return super()._setup_model(model)


class ZeRO(DeepSpeedStrategy):
    """DeepSpeed's ZeRO. Models are loaded whole, then sharded by the engine.

    Args:
        stage: 2 shards gradients and optimiser states, 3 the weights too.
        kwargs: of :class:`lightning.pytorch.strategies.DeepSpeedStrategy`.
    """

    @checked
    def __init__(self, stage: Annotated[int, Range(int, 1, 3)] = 2, **kwargs: Any) -> None:
        super().__init__(stage=stage, **kwargs)
        # With its state in the host's memory DeepSpeed would insist on an optimiser of its own.
        cast(dict[str, Any], self.config).setdefault("zero_force_ds_cpu_optimizer", False)

    @staticmethod
    def check_installed() -> None:
        """Called by the command line, which could not tell a constructor's reason from other faults.

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
        """Nothing: weights that are partitioned as they are made cannot be loaded from files."""
        self._init_config_if_needed()
        yield

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        with checkpoints.reading(checkpoint_path):
            return super().load_checkpoint(checkpoint_path, weights_only=True)

    def setup(self, trainer: Trainer) -> None:
        """Set up; rotary frequencies and a cache's log-probabilities keep their precision."""
        self.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]  # of this object
        buffers = {name: x.clone() for name, x in cast(nn.Module, self.model).named_buffers()}
        super().setup(trainer)
        module = cast(nn.Module, self.lightning_module)
        for name, x in module.named_buffers():
            x.data = buffers[name].to(x.device)
        if self.zero_stage_3:
            self._keep_whole(cast(Headed, module).head.linear)

    def _keep_whole(self, linear: nn.Module) -> None:
        """Keep the output head in one piece on each rank, and its calls out of the engine's sight.

        The loss calls it for a chunk of tokens at a time, and ranks have different numbers of chunks:
        gathering the head for each would leave ranks waiting for one another for ever.
        """
        weights: list[Any] = [*linear.parameters()]
        for hooks in (linear._forward_pre_hooks, linear._forward_hooks):
            hooks.clear()
        for weight in weights:
            weight.ds_persist = True
        weights[0].all_gather(weights)
        engine = cast(Any, self.model)  # DeepSpeed is not typed, and may not be installed
        engine.optimizer.persistent_parameters.extend(weights)
