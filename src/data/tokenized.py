"""The part of a data module that turns text into rows of tokens and rows into batches, with its settings."""

from __future__ import annotations

from copy import copy
from typing import Annotated, Any, Literal

from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel

from src.data.batches import Batching, Packed, Padded
from src.data.encode import Encoder, TooLong
from src.errors import ConfigError
from src.models.head import Headed
from src.models.loading import load_tokenizer
from src.models.positions import position_limit, too_long
from src.ranges import MOST, Count, Range, checked


class Tokenized(LightningDataModule):
    """Is the base of :class:`src.data.Corpus`: it holds what turns documents into rows and batches.

    Args:
        tokenizer: Hub id or directory of the tokenizer; on the command line it is by default the model's.
        supervise: ``all`` tokens, or only those of the ``answer`` (what the assistant says, in a
            chat).
        packing: ``padded`` rows of one document each, or rows of whole ``documents`` that do not
            see each other.
        batch_size: rows of a batch, at most.
        max_length: tokens of a padded row at most, of a packed row exactly.
        too_long: what becomes of a longer document: ``truncate`` it, ``split`` it, or stop with an
            ``error``.
        bos: whether a text begins with the tokenizer's BOS; by default as the tokenizer itself does. A chat
            has what its template sets.
        eos: whether a text ends with the tokenizer's EOS. A chat has what its template sets.
    """

    @checked
    def __init__(
        self,
        tokenizer: str | None = None,
        supervise: Literal["all", "answer"] = "all",
        packing: Literal["padded", "documents"] = "padded",
        batch_size: Count = 32,
        max_length: Annotated[int, Range(int, 2, MOST)] = 256,
        too_long: TooLong = "truncate",
        bos: bool | None = None,
        eos: bool = True,
    ) -> None:
        super().__init__()
        if tokenizer is None:
            raise ConfigError("data.tokenizer: give the Hub id or directory of the model's tokenizer.")
        self.tokenizer = load_tokenizer(tokenizer)
        self.encoder = Encoder(self.tokenizer, max_length, supervise, too_long, bos, eos)
        kind = Packed if packing == "documents" else Padded
        pad = self.tokenizer.pad_token_id
        self.batching: Batching = kind(batch_size, max_length, 0 if pad is None else pad)  # never looked at
        self.shape: dict[str, Any] = {
            "supervise": supervise, "packing": packing, "batch_size": batch_size,
            "max_length": max_length, "too_long": too_long, "bos": bos, "eos": eos,
        }  # fmt: skip
        """The settings that decide the rows, by key."""
        self._warnings: set[str] = set()

    def warn_once(self, what: str) -> None:
        """Warn of something, unless this run has warned of it already."""
        if what not in self._warnings:
            rank_zero_warn(f"data: {what}.")
            self._warnings.add(what)

    def fitted(self) -> Encoder:
        """Return the encoder, with rows no longer than the model's table of positions.

        Raises:
            ConfigError: the table is shorter than ``max_length``, and ``too_long`` is ``error``.
        """
        model, asked = self.model(), self.encoder.max_length
        limit = position_limit(model) if model is not None else None
        if model is None or limit is None or limit >= asked:
            return self.encoder
        if self.encoder.too_long == "error":
            raise too_long(f"data.max_length is {asked}", model.config.model_type, limit)
        self.warn_once(
            f"the position table of this '{model.config.model_type}' ends at {limit}: longer documents are "
            f"truncated there, not at data.max_length={asked} (too_long={self.encoder.too_long})"
        )
        shorter = copy(self.encoder)
        shorter.max_length = limit
        return shorter

    def model(self) -> PreTrainedModel | None:
        """Return the model that the batches go to; None before there is one."""
        if self.trainer is None or self.trainer.lightning_module is None:
            return None
        module = self.trainer.lightning_module
        # A search keeps its frozen model out of the module tree; its output head knows it.
        parts = [*([module.head.model] if isinstance(module, Headed) else []), *module.modules()]
        return next((part for part in parts if isinstance(part, PreTrainedModel)), None)
