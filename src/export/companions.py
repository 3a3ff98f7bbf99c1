"""Copy the files of a parent that belong to an export: tokenizer, templates, generation settings, licence.

They are copied byte for byte, with one exception: an ``auto_map``, which points to code, is left out. Code
and pickles of the parent's author are not copied.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from src.errors import ConfigError
from src.export.fresh import PROOF_TEXT
from src.models.loading import load_tokenizer

TOKENIZER = (
    "*token*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "*.spm",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "normalizer.json",
    "word_*.json",
)
COMPANIONS = (
    *TOKENIZER,
    "*.jinja",
    "chat_template.json",
    "additional_chat_templates/*",
    "*processor_config.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
RUNS = (".py", ".so", ".pkl", ".pickle", ".bin", ".pt", ".pth")
"""Endings of files that may run code when they are read."""


def parent_files(name: str, revision: str | None) -> Path:
    """Return a directory with the parent's tokenizer, templates, card and licence, downloaded if needed."""
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, revision=revision, allow_patterns=[*COMPANIONS, "README.md"]))


def parent_tokenizer(name: str, revision: str | None, files: Path) -> PreTrainedTokenizerBase | None:
    """Return the parent's tokenizer; None if it has no tokenizer files, or they encode a text to nothing.

    Args:
        name: Hub id or directory of the parent.
        revision: its Hub revision.
        files: the directory that :func:`parent_files` returned.

    Raises:
        ConfigError: its files cannot be read, so that nobody could read them in the export either.
    """
    if not _matching(files, TOKENIZER):
        return None
    try:
        tokenizer = load_tokenizer(name, revision)
    except ConfigError as e:
        raise ConfigError(
            f"{e} An export would pass these files on. Mend them, install what is missing, or take them out "
            f"of the parent's directory to export without a tokenizer."
        ) from e
    return tokenizer if tokenizer(PROOF_TEXT).input_ids else None


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files of the patterns :data:`COMPANIONS`, except those that may run code.

    Args:
        source: directory of the parent.
        target: directory of the export.
    """
    for file in _matching(source, COMPANIONS):
        destination = target / file.relative_to(source)
        destination.parent.mkdir(exist_ok=True)
        settings = _settings(file)
        if "auto_map" in settings:
            del settings["auto_map"]
            destination.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
        else:
            shutil.copyfile(file, destination)


def _matching(source: Path, patterns: tuple[str, ...]) -> set[Path]:
    files = {file for pattern in patterns for file in source.glob(pattern) if file.is_file()}
    return {file for file in files if file.suffix not in RUNS}


def _settings(file: Path) -> dict[str, Any]:
    """Return the content of a ``*_config.json``; empty for every other file."""
    if not file.name.endswith("config.json"):
        return {}
    try:
        settings = json.loads(file.read_text("utf-8"))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def stored_heads(parent: Path, length: int) -> int:
    """Count the multi-token-prediction layers among the parent's weights; its config need not mention them.

    Args:
        parent: directory of the parent.
        length: its number of decoder layers.
    """
    heads = set()
    for path in parent.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                extra = re.search(r"(?:^|\.)mtp\w*\.(?:layers\.)?(\d+)?", name)
                layer = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
                if extra or (layer and int(layer.group(1)) >= length):
                    heads.add((extra or cast(re.Match[str], layer)).group(1) or "0")
    return len(heads)
