"""Read a checkpoint, one file or a directory of parts that ranks wrote, without running code in it.

``FSDP2`` and ``FSDP`` write PyTorch's distributed format beside a ``meta.pt``; DeepSpeed writes its own. A
checkpoint is a pickle, which may name any function to call; here only tensors, numbers, text and containers
of these are accepted, and the few classes in which PyTorch describes its parts.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.serialization import safe_globals

from src.errors import ConfigError
from src.training import watchdog

_WEIGHTS = ("state_dict", "model")
UNAVERAGED = "unaveraged"
"""Key under which the weights that train lie, where a checkpoint's own are their average
(:class:`src.callbacks.AveragedWeights`)."""
"""Names under which FSDP2 and FSDP save the module's weights."""
_ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Environment variable for every ``torch.load``, also those of Lightning, PyTorch and DeepSpeed."""
_DESCRIPTIONS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip
"""Classes, by module, that may occur in the description of a directory of parts."""


def record(path: str) -> dict[str, Any]:
    """Return the content of a checkpoint without reading its weights into memory.

    The weights that a directory keeps in files of their own are left out. Other tensors are memory-mapped.

    Raises:
        ConfigError: there is no such checkpoint, it is not whole, or it holds more than tensors and numbers.
    """
    with reading(path):
        file = Path(path)
        if file.is_dir():
            parts = sorted([*file.glob("meta.pt"), *file.glob("checkpoint/*mp_rank_00_model_states.pt")])
            if not parts:
                raise FileNotFoundError("it holds no checkpoint")
            file = parts[0]
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content


def weights(path: str) -> dict[str, Tensor]:
    """Return the state dict of the LightningModule in a checkpoint, parts put together.

    Raises:
        ConfigError: the checkpoint is missing, torn or foreign, or DeepSpeed wrote it and is not installed.
    """
    with reading(path):
        if not Path(path).is_dir():
            state = torch.load(path, map_location="cpu", weights_only=True)
            return {key: value for key, value in state["state_dict"].items() if isinstance(value, Tensor)}
        if (Path(path) / "checkpoint").is_dir():
            return _deepspeed(path)
        reader = _Reader(path)
        empty = {
            key: torch.empty(about.size, dtype=about.properties.dtype)
            for key, about in reader.read_metadata().state_dict_metadata.items()
            if key.partition(".")[0] in _WEIGHTS and isinstance(about, TensorStorageMetadata)
        }
        load(empty, storage_reader=reader, no_dist=True)
        return {key.partition(".")[2]: tensor for key, tensor in empty.items()}


def _deepspeed(path: str) -> dict[str, Tensor]:
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as e:
        raise ConfigError(
            f"checkpoint: '{path}' was written by DeepSpeed, which is not installed: pip install -e "
            f"'.[deepspeed]'."
        ) from e
    state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(path, tag="checkpoint")
    return state


@contextmanager
def reading(path: _PATH) -> Iterator[None]:
    """Guard the reading of a checkpoint in the block: no code of the file runs, any failure is one message.

    Raises:
        ConfigError: the checkpoint is missing, not whole, or holds more than tensors and numbers; the message
            names the newest whole checkpoint beside it.
    """
    before = os.environ.get(_ONLY_WEIGHTS)
    os.environ[_ONLY_WEIGHTS] = "1"
    try:
        if Path(path).is_dir():
            _Reader(path).check()
        with safe_globals(_states_of_deepspeed() if (Path(path) / "checkpoint").is_dir() else []):
            yield
    except ConfigError:
        raise
    except (
        Exception,
        CheckpointException,
    ) as e:  # a damaged pickle raises anything; the second is no Exception
        if watchdog.explain(e):
            raise
        raise ConfigError(f"checkpoint: {_reason(path, _first(e))}{_advice(Path(path))}") from e
    finally:
        if before is None:
            del os.environ[_ONLY_WEIGHTS]
        else:
            os.environ[_ONLY_WEIGHTS] = before


def _states_of_deepspeed() -> list[Any]:
    """Return the classes that DeepSpeed saves beside tensors and numbers: records without code to run."""
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError:
        return []
    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _first(error: BaseException) -> BaseException:
    """Return what went wrong on the first rank that failed."""
    failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
    return failures[0][0] if failures else error


def _reason(path: _PATH, error: BaseException) -> str:
    if not os.path.lexists(path):
        return f"there is no '{path}'."
    if foreign := re.search(
        r"GLOBAL (\S+)|'([\w.]+)' is no part of a checkpoint|function (\S+) ", str(error)
    ):
        name = next(filter(None, foreign.groups()))
        return f"'{path}' holds more than tensors and numbers ({name}); no such checkpoint is read."
    line = str(error).strip().partition("\n")[0].partition(". ")[0][:160]
    return f"'{path}' is damaged or not a checkpoint ({line or type(error).__name__})."


def _advice(path: Path) -> str:
    whole = newest(path)
    return f" The newest whole one beside it is '{whole}'." if whole else ""


def newest(path: Path) -> Path | None:
    """Return the newest whole checkpoint beside ``path``; None if there is none.

    One that a killed run was about to replace counts too.
    """
    folders = [path.parent, path, path / "checkpoints"]
    files = [file for folder in folders for file in [*folder.glob("*.ckpt"), *folder.glob(".*.ckpt.*.old")]]
    for file in sorted(set(files) - {path}, key=lambda file: file.stat().st_mtime, reverse=True):
        if is_whole(file):
            return file
    return None


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint can be read."""
    try:
        with reading(path):
            if path.is_dir():
                path = next(
                    iter([*path.glob("meta.pt"), *path.glob("checkpoint/*mp_rank_00_model_states.pt")])
                )
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (ConfigError, StopIteration, RuntimeError):
        return False
    return True


class _Describer(pickle.Unpickler):
    """Reads descriptions of parts and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _DESCRIPTIONS.get(module, ()):
            raise pickle.UnpicklingError(f"'{module}.{name}' is no part of a checkpoint")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """PyTorch's reader of a directory of parts, made safe: its own runs whatever their description names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _Describer(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def check(self) -> None:
        """Refuse a directory that is no checkpoint, or of which parts are missing or too short.

        Raises:
            OSError: a part is missing or too short.
            pickle.UnpicklingError: ``.metadata``, which describes the parts, names another class or function
                than those that describe parts.
        """
        folder = Path(self.path)
        if not (folder / "meta.pt").exists():  # of DeepSpeed, which has no description
            return
        for part in (self.read_metadata().storage_data or {}).values():
            file = folder / part.relative_path
            if not file.is_file() or file.stat().st_size < part.offset + part.length:
                raise OSError(f"its part {part.relative_path} is missing or damaged")


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes and reads checkpoints of one file: straight to their place, and without running code in them."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint straight to its file; Lightning's own goes through memory and ``TMPDIR``."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with open(path, "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint without running code in it, whatever ``weights_only`` says.

        Raises:
            ConfigError: the file is missing, damaged, or holds more than tensors and numbers.
        """
        with reading(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
