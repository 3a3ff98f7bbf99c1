"""The contract of a repair: a change of a cut model's weights, without training, on a few rows of text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.data.batches import Batch
from src.data.columns import Columns
from src.data.distinct import Distinct
from src.data.judging import batches, judged, read_rows
from src.data.soft import SUFFIX, SoftPrompts
from src.errors import ConfigError
from src.mask import Mask
from src.models.fingerprint import weights_fingerprint
from src.models.positions import position_limit
from src.ranges import Count, checked
from src.repair.fold import Repair

LISTED = 16
"""Most places whose errors are listed one by one."""


class CutRepair(ABC):
    """Changes weights of the cut model in place; its class, shapes and keys stay what they are.

    ``python -m src.cli patch`` exports such a model; ``src.recover.Recovery(patch=...)`` starts from one.

    Args:
        data: calibration rows: JSONL, Parquet, text or a Hub id; or a file of soft prompts
            (:mod:`src.data.soft`). None, in a recovery, is the first source of the text that it trains on, of
            which it reads no more rows than train.
        rows: largest number of calibration rows that are read; of soft prompts all are.
        columns: columns of these rows; None looks for well-known names.
        split: split of a Hub or saved dataset; None is the only one that it has.
        max_length: tokens after which a row is cut off.
        batch_size: rows at once.
        device: where to compute; None is cuda if there is one.

    Attributes:
        repairs: the outcome of each change of the last call.
        read: the documents of its calibration rows.
    """

    @checked
    def __init__(
        self,
        data: str | None,
        rows: Count = 256,
        columns: Columns | None = None,
        split: str | None = None,
        max_length: Count = 1024,
        batch_size: Count = 8,
        device: str | None = None,
    ) -> None:
        self.data, self.rows, self.columns = data, rows, columns or Columns()
        self.split, self.max_length, self.batch_size = split, max_length, batch_size
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.repairs: list[Repair] = []
        self.read = Distinct()
        self.used = f"{rows} rows"

    @property
    @abstractmethod
    def fitted(self) -> str:
        """What is fitted to what, in words."""

    @abstractmethod
    def repair(
        self, student: PreTrainedModel, parent: PreTrainedModel, mask: Mask, calibration: Sequence[Batch]
    ) -> list[Repair]:
        """Change the cut model; return the outcome of each change.

        Args:
            student: the cut model, with the parent's weights, on :attr:`device`.
            parent: the whole model, there too.
            mask: names the kept units.
            calibration: batches, as :meth:`calibration` gives.
        """

    def refuse(self, mask: Mask) -> None:  # noqa: B027
        """Refuse a mask that leaves nothing to repair, with a :class:`ConfigError`; by default none."""

    def __str__(self) -> str:
        if not self.repairs:
            return "nothing is repaired"
        errors = ", ".join(f"{r.module} {r.before:.2g} -> {r.after:.2g}" for r in self.repairs)
        if len(self.repairs) > LISTED:
            before, after = (fmean(getattr(r, key) for r in self.repairs) for key in ("before", "after"))
            errors = f"{before:.2g} -> {after:.2g} on average over {len(self.repairs)} places"
        return f"{self.fitted} on {self.used}; squared relative error: {errors}"

    def __call__(
        self,
        student: PreTrainedModel,
        parent: PreTrainedModel,
        mask: Mask,
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Repair]:
        """Repair the cut model in place; return the outcome of each change.

        Args:
            student: the cut model, with the parent's weights.
            parent: the whole model.
            mask: names the kept units.
            tokenizer: the parent's.

        Raises:
            ConfigError: the rows cannot be read, or a layer of this family has no weights to fold into.
        """
        if self.data is not None and self.data.endswith(SUFFIX):
            calibration = self.prompts(self.data, parent)
        else:
            calibration = self.calibration(tokenizer, position_limit(parent))
        self.read = Distinct()
        for batch in calibration:
            self.read.add(batch)
        models = (student, parent)
        homes = [model.device for model in models]
        try:
            for model in models:
                nn.Module.to(model, self.device)
            self.repairs = self.repair(student, parent, mask, calibration)
        finally:
            for model, home in zip(models, homes, strict=True):
                nn.Module.to(model, home)
        return self.repairs

    def prompts(self, path: str, parent: PreTrainedModel) -> list[Batch]:
        """Return soft prompts as batches: all of them, as they are.

        Args:
            path: their file.
            parent: the model that they must have been made with.

        Raises:
            ConfigError: the file holds none, or they were made with other weights.
        """
        prompts = SoftPrompts.load(path, "patch.data")
        revision = getattr(parent.config, "_commit_hash", None)
        prompts.check(weights_fingerprint(str(parent.name_or_path), revision), "patch.data")
        self.used = f"{len(prompts.mask_MT)} soft prompts ({int(prompts.mask_MT.sum()):,} positions)"
        return prompts.batches(self.batch_size, parent.dtype)

    def calibration(self, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[Batch]:
        """Return the calibration rows as padded batches, every token supervised.

        Args:
            tokenizer: of the model.
            limit: tokens that the model can read in a row, after which a row is cut off; None is no limit.

        Raises:
            ConfigError: there are no rows.
        """
        if self.data is None:
            raise ConfigError(
                "patch.data: null given, and this run reads no text that rows could be taken from, such as a "
                "cache alone. Name a file: --model.init_args.patch.init_args.data train.jsonl."
            )
        read = read_rows(self.data, self.rows, self.split)
        length = min(self.max_length, limit or self.max_length)
        rows = judged(tokenizer, read, self.columns, "all", length)
        if not rows.rows:
            raise ConfigError(f"patch.data: '{self.data}' gives no row of two tokens or more.")
        self.used = f"{rows} ({sum(len(row.ids) for row in rows.rows):,} tokens)"
        return list(batches(rows.rows, self.batch_size, tokenizer.pad_token_id or 0))
