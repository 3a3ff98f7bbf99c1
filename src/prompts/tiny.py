"""A repair so small that its training can be differentiated: a factor for each channel behind each gap.

Behind a gap of a cut model the stream h becomes ``h (1 + theta)``, theta one number for each channel, 0 at
the start. It is LinearPatch's diagonal form (:mod:`src.repair.stream`) as a parameter. It serves to learn
prompts; what is exported is fitted by a repair that weights can hold.

Shapes: J gaps, H hidden, M prompts, T positions, N positions that predict, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from src.data.batches import Supervised
from src.errors import ConfigError
from src.losses.distill import Distillation
from src.losses.signals import Signal, live_signal
from src.mask import Mask
from src.models.cut import cut
from src.models.gated import freeze
from src.models.head import OutputHead
from src.models.layers import text_config
from src.prompts.unroll import Data, descend
from src.prompts.windows import Inner
from src.repair.stream import junctions, repaired
from src.training.ranks import WholeBatch

LOSS = Distillation(weight="none")
"""The outer loss, on real rows."""


def lesson(teacher: OutputHead, embeds_MTH: Tensor, mask_MT: Tensor) -> Data:
    """Return prompts, their mask, and the log-probabilities ``[N, V]`` that the parent has on them.

    Args:
        teacher: output head of the parent.
        embeds_MTH: the prompts.
        mask_MT: which of their positions are not padding.
    """
    return embeds_MTH, mask_MT, log_probs(teacher, embeds_MTH, mask_MT)


@torch.no_grad()
def signal(teacher: OutputHead, rows: Supervised) -> Signal:
    """Return the parent's signal on real rows, for the outer loss."""
    return live_signal(teacher, teacher.at(rows.batch, rows.index_N), LOSS.k)


def log_probs(head: OutputHead, embeds_MTH: Tensor, mask_MT: Tensor) -> Tensor:
    """Return a model's log-probabilities ``[N, V]`` where a prompt has a next position, twice differentiable.

    Fused attention has no second derivative, so the plain one is used.
    """
    fed = {"inputs_embeds": embeds_MTH, "attention_mask": mask_MT}
    index_N = torch.nn.functional.pad(mask_MT[:, 1:], (0, 1)).flatten().nonzero()[:, 0]
    with sdpa_kernel(SDPBackend.MATH):
        logits: Tensor = head.logits(head.at(fed, index_N)).log_softmax(-1)
    return logits


class TinyRepair:
    """Holds a cut model whose stream has a factor for each channel behind each gap.

    Args:
        parent: the whole model.
        mask: of layers or halves.

    Raises:
        ConfigError: the mask leaves no gap between two kept layers.
    """

    def __init__(self, parent: PreTrainedModel, mask: Mask) -> None:
        self.places = [] if mask.wide else junctions(mask)
        if not self.places:
            raise ConfigError(
                f"model.mask: {mask} has no gap between two kept layers, so the stream needs no repair to "
                f"learn prompts by. Give another mask."
            )
        self.head = OutputHead(freeze(cut(parent, mask)))

    @property
    def start(self) -> Tensor:
        """The factors that change nothing: zeros ``[J, H]``."""
        size: int = text_config(self.head.model.config).hidden_size
        return torch.zeros(len(self.places), size, device=self.head.model.device)

    @contextmanager
    def applied(self, theta_JH: Tensor) -> Iterator[None]:
        """Let the stream behind each gap become ``h (1 + theta)``, in the block."""
        with repaired(self.head.model, self.places, [partial(torch.mul, 1 + each) for each in theta_JH]):
            yield

    def imitate(self, theta_JH: Tensor, data: Data) -> Tensor:
        """Return the inner loss: the mean divergence from the parent on prompts (:func:`lesson`)."""
        embeds_MTH, mask_MT, log_p_NV = data
        with self.applied(theta_JH):
            log_q_NV = log_probs(self.head, embeds_MTH, mask_MT)
        return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).mean()

    def divergence(
        self, theta_JH: Tensor, rows: Supervised, signal: Signal, whole: WholeBatch | None = None
    ) -> Tensor:
        """Return the outer loss: the mean divergence from the parent on real rows.

        Args:
            theta_JH: the factors.
            rows: a batch and its supervised positions.
            signal: the parent's, on the same batch.
            whole: the batch of all ranks that this one is a part of.
        """
        with self.applied(theta_JH):
            hidden_NH = self.head.at(rows.batch, rows.index_N)
        return LOSS(self.head, hidden_NH, rows.labels_N, signal, whole)["loss"]

    def learn(self, data: Data, inner: Inner) -> Tensor:
        """Return the factors that all T steps on prompts end at."""
        return descend(self.imitate, self.start, data, inner.rate, inner.steps)[0][-1]
