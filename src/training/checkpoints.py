"""Read a Lightning checkpoint in any form: one file, or a directory of parts that ranks wrote.

``FSDP2`` and ``FSDP`` write PyTorch's distributed format beside a ``meta.pt``; DeepSpeed writes its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from src.errors import ConfigError

_WEIGHTS = ("state_dict", "model")
"""Under which name FSDP2 and FSDP save the module's weights."""


def record(path: str) -> dict[str, Any]:
    """Everything in a checkpoint but the weights (of a file these too, not read into memory).

    Raises:
        OSError: there is no such checkpoint.
    """
    file = Path(path)
    if file.is_dir():
        parts = sorted([*file.glob("meta.pt"), *file.glob("checkpoint/*mp_rank_00_model_states.pt")])
        if not parts:
            raise FileNotFoundError(f"'{path}' holds no checkpoint")
        file = parts[0]
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def weights(path: str) -> dict[str, Tensor]:
    """The weights of the LightningModule, whole.

    Raises:
        ConfigError: DeepSpeed wrote it, and is not installed.
        OSError: there is no such checkpoint, or parts are missing.
    """
    if Path(path).is_file():
        return torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
    if (Path(path) / "checkpoint").is_dir():
        return _deepspeed(path)
    reader = FileSystemReader(path)
    state = {
        key: torch.empty(about.size, dtype=about.properties.dtype)
        for key, about in reader.read_metadata().state_dict_metadata.items()
        if key.partition(".")[0] in _WEIGHTS and isinstance(about, TensorStorageMetadata)
    }
    try:
        load(state, storage_reader=reader, no_dist=True)
    except CheckpointException as e:  # not an Exception
        raise OSError(f"parts of '{path}' are missing or damaged") from e
    return {key.partition(".")[2]: tensor for key, tensor in state.items()}


def _deepspeed(path: str) -> dict[str, Tensor]:
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as e:
        raise ConfigError(
            f"checkpoint: '{path}' was written by DeepSpeed, which is not installed: pip install -e "
            f"'.[deepspeed]'."
        ) from e
    return get_fp32_state_dict_from_zero_checkpoint(path, tag="checkpoint")
