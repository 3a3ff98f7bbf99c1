"""The router: reads a prompt, and names the mask, or the checkpoint, that is to answer it.

All that the predictor of :class:`src.policies.PromptMasks` does to a prompt is linear. So it folds into one
small vector for each token, ``table_VD``, of which a prompt has the mean; the logits of the units are then
``weight_UD`` times that mean, plus ``bias_U``. With k masks fixed, what each is worth to a prompt is linear
too: the sum of the logits that it keeps. The router of an export has therefore one row of weights for each
checkpoint, and needs no model to run.

Shapes: P prompts, V vocabulary, D hidden width, U units, K checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from src.errors import ConfigError
from src.files import whole
from src.mask import Mask

FILE = "router.safetensors"
CARD = "router.json"
ADAPTERS = "router.adapters.safetensors"
"""Adapters that trained beside the predictor, of all layers."""


@dataclass(frozen=True)
class Router:
    """Scores prompts.

    Attributes:
        table_VD: a vector for each token.
        weight_UD: for each unit (of an export: checkpoint), what its score is by the prompt's mean vector.
        bias_U: its score for a mean vector of zeros.
        prompts_PD: mean vectors of the calibration prompts.
        pinned: layers that each mask keeps.
        fingerprint: of the parent's weights.
    """

    table_VD: Tensor
    weight_UD: Tensor
    bias_U: Tensor
    prompts_PD: Tensor
    pinned: tuple[int, ...] = ()
    fingerprint: str | None = None

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return the mean vectors ``[P, D]`` of prompts, given as token ids."""
        return torch.stack([self.table_VD[torch.tensor(ids)].mean(0) for ids in prompts])

    def scores(self, read_PD: Tensor) -> Tensor:
        """Return the score ``[P, U]`` of each unit, or checkpoint, for prompts of the given mean vectors."""
        return read_PD @ self.weight_UD.T + self.bias_U

    def route(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Return for each prompt, given as token ids, the number of the checkpoint that is to answer it."""
        if not prompts:
            return []
        best: list[int] = self.scores(self.read(prompts)).argmax(1).tolist()
        return best

    def to(self, masks_KU: Tensor) -> Router:
        """Return the router to the checkpoints of masks, each worth the sum of the units that it keeps."""
        masks_KU = masks_KU.to(self.weight_UD)
        return replace(self, weight_UD=masks_KU @ self.weight_UD, bias_U=masks_KU @ self.bias_U)

    def save(self, path: Path) -> None:
        """Write the router, whole or not at all."""
        tensors = {
            "table": self.table_VD,
            "weight": self.weight_UD,
            "bias": self.bias_U,
            "prompts": self.prompts_PD,
        }
        about = {"pinned": json.dumps(list(self.pinned)), "fingerprint": json.dumps(self.fingerprint)}
        with whole(path) as partial:
            save_file({k: v.detach().cpu().float().clone() for k, v in tensors.items()}, partial, about)

    @classmethod
    def load(cls, path: Path) -> Router:
        """Read a router.

        Raises:
            ConfigError: there is none, or it cannot be read.
        """
        try:
            with safe_open(path, framework="pt") as file:
                keys, about = ("table", "weight", "bias", "prompts"), file.metadata()
                table, weight, bias, prompts = (file.get_tensor(key) for key in keys)
            pinned, fingerprint = tuple(json.loads(about["pinned"])), json.loads(about["fingerprint"])
            return cls(table, weight, bias, prompts, pinned, fingerprint)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
            raise ConfigError(
                f"router: '{path}' cannot be read ({e}). A search by configs/search/prompts.yaml writes one "
                "beside its mask.json."
            ) from e

    def check(self, mask: Mask) -> None:
        """Refuse a mask of another search.

        Raises:
            ConfigError: the mask has other units, or is of another model.
        """
        if mask.units != len(self.bias_U) or mask.fingerprint != self.fingerprint:
            raise ConfigError(
                f"router: it was trained for {len(self.bias_U)} units of a model {self.fingerprint}, and the "
                f"mask has {mask.units} of {mask.fingerprint}. Give the mask.json that lies beside it."
            )
