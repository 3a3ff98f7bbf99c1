"""The command line with FSDP and DeepSpeed made to run on CPUs, to compare their steps; run as a module.

The product refuses them there, because Lightning does; PyTorch and DeepSpeed themselves can.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch

os.environ["DS_ACCELERATOR"] = "cpu"

if __name__ == "__main__":
    from lightning.pytorch.strategies import DDPStrategy, deepspeed
    from torch.distributed.fsdp import FullyShardedDataParallel

    from src import cli
    from src.training import strategies

    strategies.CUDAAccelerator = object  # type: ignore[assignment, misc]
    wrap: Any = FullyShardedDataParallel.__init__

    def on_cpu(self: Any, *args: Any, **kwargs: Any) -> None:
        wrap(self, *args, **{**kwargs, "device_id": torch.device("cpu")})

    FullyShardedDataParallel.__init__ = on_cpu
    if find_spec("deepspeed"):
        made: Any = strategies.ZeRO.__init__

        def in_parts(self: Any, *args: Any, **kwargs: Any) -> None:
            """DeepSpeed leaves small weights whole, and all weights of a test are small."""
            made(self, *args, **kwargs)
            self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

        engine: Any = strategies.ZeRO
        engine.__init__ = in_parts
        engine.root_device = property(lambda self: torch.device("cpu", 0))
        engine.setup_environment = DDPStrategy.setup_environment
        deepspeed._validate_device_index_selection = lambda devices: None
    cli.main()
