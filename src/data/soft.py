"""Soft prompts: rows of embeddings in the place of rows of tokens, as a file, as batches, as held-out rows.

A model reads them as ``inputs_embeds``. They have no text, so their labels are the tokens that the parent
finds likeliest there. They mean something to the model that they were made with, and to no other.

Shapes: M prompts, T positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from src.data.batches import Batch
from src.data.corpus import Corpus
from src.data.encode import IGNORE
from src.errors import ConfigError
from src.files import whole
from src.models.fingerprint import differ

SUFFIX = ".prompts.safetensors"
"""How the name of such a file ends."""


@dataclass(frozen=True)
class SoftPrompts:
    """Holds M prompts, padded on the right.

    Attributes:
        embeds_MTH: float32, what the layers read in the place of embedded tokens.
        mask_MT: 1 at the positions of a prompt, 0 at padding, int64.
        labels_MT: the token that each position stands for, -100 at the first one and at padding.
        weights: fingerprint of the weights of the model that they were made with; None if it has none.
    """

    embeds_MTH: Tensor
    mask_MT: Tensor
    labels_MT: Tensor
    weights: str | None = None

    @classmethod
    def labelled(
        cls, embeds_MTH: Tensor, mask_MT: Tensor, likeliest_MT: Tensor, weights: str | None
    ) -> SoftPrompts:
        """Return prompts whose labels are the tokens that a model predicts at the position before.

        Args:
            embeds_MTH: the prompts.
            mask_MT: which positions are not padding.
            likeliest_MT: the model's likeliest next token at each position.
            weights: fingerprint of the model's weights.
        """
        labels_MT = torch.full_like(mask_MT, IGNORE)
        labels_MT[:, 1:] = likeliest_MT[:, :-1].where(mask_MT[:, 1:].bool(), IGNORE)
        return cls(embeds_MTH.detach().float(), mask_MT, labels_MT, weights)

    def save(self, path: str | Path) -> None:
        """Write the prompts as safetensors; the file appears whole or not at all."""
        tensors = {"embeds": self.embeds_MTH, "mask": self.mask_MT, "labels": self.labels_MT}
        with whole(path) as partial:
            about = {"weights": self.weights} if self.weights else {}
            save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, partial, about)

    @classmethod
    def load(cls, path: str | Path, key: str) -> SoftPrompts:
        """Read prompts.

        Args:
            path: the file.
            key: of the config, for messages.

        Raises:
            ConfigError: there is no such file, or it holds something else.
        """
        try:
            with safe_open(path, "pt") as file:
                embeds, mask, labels = (file.get_tensor(name) for name in ("embeds", "mask", "labels"))
                return cls(embeds, mask, labels, (file.metadata() or {}).get("weights"))
        except (OSError, SafetensorError) as e:
            raise ConfigError(
                f"{key}: '{path}' holds no soft prompts ({e}). Make them with "
                f"configs/prompts/distilled_calibration.yaml."
            ) from e

    def check(self, weights: str | None, key: str) -> None:
        """Refuse a model with other weights than those that the prompts were made with.

        Raises:
            ConfigError: its weights are others; names the key.
        """
        if differ(self.weights, weights):
            raise ConfigError(
                f"{key}: the soft prompts were made with weights {self.weights}, and this model has "
                f"{weights}, to which they mean nothing. Make them anew."
            )

    def batches(self, size: int, dtype: torch.dtype = torch.float32) -> list[Batch]:
        """Return the prompts as batches of ``size``, at most, embeddings in ``dtype``."""
        parts = zip(*(x.split(size) for x in (self.embeds_MTH.to(dtype), self.mask_MT, self.labels_MT)),
                    strict=True)  # fmt: skip
        names = ("inputs_embeds", "attention_mask", "labels")
        return [dict(zip(names, part, strict=True)) for part in parts]

    def share(self, rank: int, world: int) -> SoftPrompts:
        """Return the prompts of one of several ranks.

        Raises:
            ConfigError: there are fewer prompts than ranks.
        """
        if len(self.embeds_MTH) < world:
            raise ConfigError(
                f"data.prompts: {len(self.embeds_MTH)} soft prompts for {world} ranks. Use fewer devices."
            )
        own = slice(rank, None, world)
        return SoftPrompts(self.embeds_MTH[own], self.mask_MT[own], self.labels_MT[own], self.weights)


class PromptedCorpus(Corpus):
    """Is a corpus whose held-out rows are soft prompts: a search scores and chooses by them.

    Args:
        prompts: file of soft prompts.
        kwargs: of :class:`src.data.Corpus`; ``validation`` and ``held_out`` are not read.
    """

    def __init__(self, prompts: str, **kwargs: Any) -> None:
        self.prompts = SoftPrompts.load(prompts, "data.prompts")
        super().__init__(**kwargs)

    def val_dataloader(self) -> Sequence[Batch]:  # type: ignore[override]  # no loader: they are few
        """Return this rank's share of the prompts.

        Raises:
            ConfigError: they were made with another model, or there are fewer than ranks.
        """
        ranks, model = self._ranks(), self.model()
        stage = self.trainer and self.trainer.lightning_module
        self.prompts.check(getattr(stage, "weights", None), "data.prompts")
        own = self.prompts.share(ranks["rank"], ranks["world"])
        return own.batches(self.shape["batch_size"], torch.float32 if model is None else model.dtype)
