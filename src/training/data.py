"""What is asked of a data module, each part by who asks it, and where a trainer keeps it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from lightning import Trainer
from transformers import PreTrainedTokenizerBase

from src.data.batches import Batch


class Data(Protocol):
    """What a stage asks of its data module."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the rows."""

    def val_dataloader(self) -> Iterable[Batch]:
        """Batches of held-out rows; empty where none are."""


@runtime_checkable
class Metered(Protocol):
    """What a schedule needs of a data module to follow its tokens; with any other it follows the steps."""

    max_tokens: int | None
    """Tokens after which the run ends."""

    @property
    def tokens_seen(self) -> int:
        """Tokens that all ranks were trained on so far."""


def data_of(trainer: Trainer) -> object:
    """Return the data module of a trainer, None if it has none; Lightning sets the attribute undeclared."""
    return getattr(trainer, "datamodule", None)
