"""Say what stages and schedules ask of a data module, and find the data module of a trainer."""

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
        """Tokenizer of the rows."""

    def val_dataloader(self) -> Iterable[Batch]:
        """Return batches of held-out rows; empty if there are none."""


@runtime_checkable
class Metered(Protocol):
    """What a schedule asks of a data module to follow its tokens; with any other it follows the steps."""

    max_tokens: int | None
    """Tokens after which the run ends."""

    @property
    def tokens_seen(self) -> int:
        """Tokens that all ranks were trained on so far."""


def data_of(trainer: Trainer) -> object:
    """Return the data module of a trainer, or None; Lightning does not declare the attribute it is in."""
    return getattr(trainer, "datamodule", None)
