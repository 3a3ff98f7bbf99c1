"""The output head of a causal language model, separate from its decoder.

Losses map hidden states to the vocabulary a chunk at a time, so they need the head alone. Families differ in
what follows its linear map; all known cases are ``cap * tanh(scale * (W h + b) / cap)``, and
:meth:`OutputHead.check` compares with the model's own logits, so an unknown case is refused.

Shapes: B batch, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from src.errors import ConfigError
from src.models.layers import decoder, text_config
from src.models.sharding import within
from src.models.summing import summing

TARGETS = ("labels", "row_id", "teacher_", "repeated")
"""Keys of a batch (or their beginnings) that are no input of a model."""

TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest difference, as a share of the largest logit, between two ways of computing the same logits."""


class OutputHead:
    """Computes the hidden states of ``model`` and their logits, as two separate steps.

    The model is borrowed, not owned: this is no ``nn.Module``, and it holds no weight of its own.

    Args:
        model: any Hugging Face causal language model, gated or not.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = text_config(model.config)
        self.model = model
        self.decoder: nn.Module = decoder(model)
        self.linear: nn.Module = model.get_output_embeddings()
        self._weights = [name for name, _ in self.linear.named_parameters()]
        self.vocabulary: int = config.vocab_size
        multiply = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
        self.scale: float = (multiply or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)

    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the decoder's hidden states ``[B, T, H]`` after the final norm.

        Args:
            batch: ``input_ids`` and whatever else the decoder takes; keys of :data:`TARGETS` are left out.
        """
        inputs = {key: value for key, value in batch.items() if not key.startswith(TARGETS)}
        return within(
            self.model, lambda: cast(Tensor, self.decoder(**inputs, use_cache=False).last_hidden_state)
        )

    def at(self, batch: Mapping[str, Any], index_N: Tensor) -> Tensor:
        """Return the final hidden states ``[N, H]`` of a batch at flat positions ``index_N`` of ``B * T``."""
        return self.hidden(batch).flatten(0, 1)[index_N]

    def logits(self, hidden: Tensor, into: tuple[Tensor, ...] = ()) -> Tensor:
        """Return the logits ``[..., V]`` of hidden states ``[..., H]``, scaled and capped as the family does.

        Args:
            hidden: hidden states.
            into: float32 buffers, one for each of ``parameters``, to which the backward pass adds its
                gradient; needs :attr:`sums`. Without buffers autograd accumulates the gradients.
        """
        logits = summing(self.linear, hidden, into) if into else self.linear(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Weights of the linear map that train (none while the model is frozen).

        They are looked up by name, because during a forward pass FSDP puts plain tensors in their place.
        """
        weights = [attrgetter(name)(self.linear) for name in self._weights]
        return tuple(weight for weight in weights if weight.requires_grad)

    @property
    def sums(self) -> bool:
        """Whether :meth:`logits` takes buffers ``into``, to which the backward pass adds the gradients.

        It does if the linear map is exactly an ``nn.Linear`` and all its weights train.
        """
        return type(self.linear) is nn.Linear and len(self.parameters) == len(self._weights)

    @property
    def few(self) -> dict[str, Tensor]:
        """A batch of eight tokens, to try the model on."""
        ids = torch.arange(3, 11, device=self.model.device)[None] % text_config(self.model.config).vocab_size
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @torch.no_grad()
    def check(self) -> None:
        """Compare the logits of this class with the model's own on a few tokens, without dropout.

        Raises:
            ConfigError: they differ, so the head computes something that this class does not know; or they
                are not finite.
        """
        batch, training = self.few, [part for part in self.model.modules() if part.training]
        self.model.eval()
        try:
            theirs = self.model(**batch, use_cache=False).logits.float()
            ours = self.logits(self.hidden(batch)).float()
        finally:
            for part in training:
                part.training = True
        if not theirs.isfinite().all():
            kind = str(self.model.dtype).removeprefix("torch.")
            raise ConfigError(
                f"model: '{self.model.name_or_path}': its logits are not finite. Its weights are broken, or "
                f"too large for {kind} (model.dtype)."
            )
        error = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 2e-2
        if not error <= tolerance:
            raise ConfigError(
                f"model: the output head of a '{self.model.config.model_type}' is not understood: logits "
                f"rebuilt from its hidden states differ from its own by {error:.1e} of their size "
                f"(accepted: {tolerance:.0e}). Teach src/models/head.py its post-processing."
            )


@runtime_checkable
class Headed(Protocol):
    """Any module, such as a teacher or a student, that gives its model's output head once it is loaded."""

    head: OutputHead
