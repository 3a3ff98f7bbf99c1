"""Recognise models and tokenizers by their content, not by where they lie or what they are called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from src.models.loading import load_config, weightless

SCHEME = "w1-"
"""How fingerprints begin; only those that begin alike can be compared."""
_PLACES, _BYTES = 4, 256
_FORMS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where weights lie, in the order of preference of transformers; an index names several files."""


def weights_fingerprint(name: str, revision: str | None = None) -> str | None:
    """Return the fingerprint of a model's stored weights; None if no file of a known format can be read.

    It covers the name, type and shape of every tensor and 4 x 256 bytes of its values, evenly spaced, so it
    is quick at any size. A copy, and the same weights in other shards, have the same fingerprint, however the
    model is loaded (type, quantisation). If a tensor is trained, converted or renamed, the fingerprint
    changes. A change between the bytes that it reads, such as of one entry of an embedding, escapes it.

    Args:
        name: Hub id, downloaded before, or directory.
        revision: Hub revision.
    """
    if weightless.get():
        return None
    files = _weight_files(name, revision)
    try:
        tensors = sorted(tensor for file in files for tensor in _READERS[file.suffix](file))
    except (OSError, ValueError, KeyError, RuntimeError):
        return None
    return f"{SCHEME}{hashlib.sha256(b''.join(tensors)).hexdigest()[:24]}" if tensors else None


def identity(name: str) -> str | None:
    """Return what tells a model apart from others under its name, the same before and after a download.

    It is the fingerprint of the weights in a directory, and the commit of a model of the Hub.

    Raises:
        ConfigError: there is no such model.
    """
    config = load_config(name)
    return weights_fingerprint(name) if Path(name).is_dir() else getattr(config, "_commit_hash", None)


def differ(one: str | None, other: str | None) -> bool | None:
    """Return whether two fingerprints are of different weights.

    Returns:
        None if they cannot be compared: one is None, or was made by another version of the scheme.
    """
    if one is None or other is None or not (one.startswith(SCHEME) and other.startswith(SCHEME)):
        return None
    return one != other


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the fingerprint of the mapping from text pieces to ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def _weight_files(name: str, revision: str | None) -> list[Path]:
    for form in _FORMS:
        if (path := _find(name, form, revision)) is None:
            continue
        if not form.endswith(".json"):
            return [path]
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return [file for shard in shards if (file := _find(name, shard, revision)) is not None]
    return []


def _find(name: str, file: str, revision: str | None) -> Path | None:
    if Path(name).is_dir():
        return path if (path := Path(name, file)).is_file() else None
    cached = try_to_load_from_cache(name, file, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def _places(size: int) -> list[int]:
    """Return the offsets at which to sample a tensor of ``size`` bytes; of a small one all is read."""
    if size <= _PLACES * _BYTES:
        return [*range(0, size, _BYTES)]
    return [(size - _BYTES) * i // (_PLACES - 1) for i in range(_PLACES)]


def _safetensors(file: Path) -> Iterator[bytes]:
    """Yield name, type, shape and sampled bytes of each tensor in a safetensors file.

    The format is 8 bytes of length, a header in JSON, values.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"'{file}' is no safetensors file")
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, about in sorted(header.items()):
            start, end = about["data_offsets"]
            values = b""
            for place in _places(end - start):
                stream.seek(8 + length + start + place)
                values += stream.read(min(_BYTES, end - start - place))
            yield f"{name} {about['dtype']} {about['shape']} ".encode() + values


def _pickled(file: Path) -> Iterator[bytes]:
    state: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    for name, tensor in sorted(state.items()):
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        values = b"".join(flat[place : place + _BYTES].numpy().tobytes() for place in _places(len(flat)))
        yield f"{name} {tensor.dtype} {list(tensor.shape)} ".encode() + values


_READERS = {".safetensors": _safetensors, ".bin": _pickled}
