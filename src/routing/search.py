"""Learn a mask for each prompt: the search of instruction-following pruning (arXiv 2501.02086).

The predictor of :class:`src.policies.PromptMasks` reads the prompt of each row, and the row runs under a mask
of its own. All rows of a batch run together, because their gates are factors and nothing is cut yet. The rest
is :class:`src.search.MaskSearch`: one frozen copy of the weights, the teacher with open gates, adapters if
asked.

Shapes: B rows, T tokens, H hidden, U units, P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from src.data.batches import Batch, Supervised, real, real_tokens
from src.data.encode import IGNORE
from src.errors import ConfigError
from src.models.layers import text_config
from src.models.loading import load_config
from src.policies.probe import LABELS
from src.policies.prompt_masks import PromptMasks
from src.routing.clusters import mean_jaccard
from src.search import MaskSearch
from src.training.half import float32_by_default
from src.training.ranks import WholeBatch, from_all


def prompt_lengths(batch: Batch) -> Tensor:
    """Return how many tokens ``[B]`` lie before the first supervised one of each padded row."""
    return (batch["labels"] != IGNORE).int().argmax(1)


class PromptSearch(MaskSearch):
    """Learns a predictor that gives each prompt its own mask.

    Under DDP each rank's rows have their own masks, and the predictor's gradients are averaged.

    Args:
        model: Hub id or directory of the model to shorten.
        policy: the predictor.
        kwargs: as of :class:`src.search.MaskSearch`; ``draws`` is 1, since nothing is drawn.
    """

    policy: PromptMasks

    def __init__(self, model: str, policy: PromptMasks, **kwargs: Any) -> None:
        if not isinstance(policy, PromptMasks):
            raise ConfigError(
                f"model.policy: {type(policy).__name__} reads no prompt. Use src.policies.PromptMasks, or "
                f"src.search.MaskSearch for one mask."
            )
        super().__init__(model, policy, **kwargs)
        if self.draws != 1 or self.race is not None or self.teacher is not None:
            raise ConfigError(
                "model: PromptSearch draws no masks at random and is its own teacher. Set model.draws to 1, "
                "and model.race and model.teacher to null."
            )
        config = text_config(load_config(model, self.revision))
        policy.reads(getattr(config, "embedding_size", None) or config.hidden_size)

    def refuse(self, trainer: Trainer, data: object) -> None:
        super().refuse(trainer, data)
        self.check_rows(data)

    def check_rows(self, data: object) -> None:
        """Refuse rows of which a mask cannot be one prompt's.

        Raises:
            ConfigError: a row holds several documents, or has no prompt.
        """
        shape = {"packing": "padded", "supervise": "answer", **getattr(data, "shape", {})}
        if (shape["packing"], shape["supervise"]) != ("padded", "answer"):
            raise ConfigError(
                f"data: packing '{shape['packing']}' and supervise '{shape['supervise']}' given; a mask "
                "belongs to a row of one prompt. Set data.packing to padded, and data.supervise to answer."
            )

    # ------------------------------------------------------------------ prompts

    @torch.no_grad()
    def prompts(self, batch: Batch) -> Tensor:
        """Return the mean of the parent's embeddings ``[B, H]`` of each row's prompt, in float32.

        Raises:
            ConfigError: a row has no prompt.
        """
        length_B = prompt_lengths(batch)
        if not bool((length_B > 0).all()):
            raise ConfigError(
                "data: a row begins with what is supervised, so it has no prompt to choose a mask by. Give "
                "rows of a prompt and an answer, and set data.supervise to answer."
            )
        embedded_BTH = self.head.model.get_input_embeddings()(batch["input_ids"]).float()
        inside_BT = torch.arange(embedded_BTH.shape[1], device=length_B.device) < length_B[:, None]
        mean_BH: Tensor = (embedded_BTH * inside_BT[..., None]).sum(1) / length_B[:, None]
        return mean_BH

    def on_fit_start(self) -> None:
        """Prepare as every search does, and hand the calibration prompts of all ranks to the predictor."""
        super().on_fit_start()
        self.policy.meet(self._calibration(self.prompts))

    def on_train_start(self) -> None:
        """Start the predictor at how much the units matter to each calibration row, if its policy asks."""
        if self.trainer.global_step == 0 and self.policy.init == "salience":
            self.policy.regress(self._calibration(self.importance))

    def _calibration(self, of: Callable[[Batch], Tensor]) -> Tensor:
        """Return what ``of`` says of the rows of the calibration batches, those of all ranks ``[P, ...]``.

        Raises:
            ConfigError: there are none.
        """
        batches: Iterator[Batch] = islice(iter(self.data.val_dataloader()), self.calibration_batches)
        own = [of(self.transfer_batch_to_device(batch, self.device, 0)).cpu() for batch in batches]
        gathered = [x for rank in from_all(own) for x in rank]
        if not gathered:
            raise ConfigError("data.validation: the predictor is scaled by held-out prompts; name a file.")
        return torch.cat(gathered).to(self.device)

    def importance(self, batch: Batch) -> Tensor:
        """Return how much each unit matters to each row ``[B, U]``, by one backward pass at open gates.

        It is ``|gate dLoss/dgate|`` of the row's cross-entropy; of KV groups and channels times the mean
        absolute activation, since the gradient of one row alone is noisy.
        """
        rows, real_BT = Supervised.of(batch), real(batch)
        open_BU = torch.ones(len(real_BT), len(self.gates), device=self.device, requires_grad=True)
        mean_BU = torch.ones_like(open_BU).detach()

        def see(layer: int, x_BTF: Tensor) -> None:
            sums_BF = (x_BTF.detach().abs().float() * real_BT[..., None]).sum(1)
            groups_BW = sums_BF.unflatten(1, (self.width or 1, -1)).sum(-1)
            mean_BU.unflatten(1, (self.num_layers, -1))[:, layer] = groups_BW / real_BT.sum(1, keepdim=True)

        signal = self.teacher_signal(rows)
        watched: AbstractContextManager[None] = nullcontext()
        if self.width is not None:
            watched = self.gates.watched(see)
        with torch.enable_grad(), self.parents_weights(), watched:
            (grad_BU,) = torch.autograd.grad(self.divergence(rows, signal, open_BU, LABELS), open_BU)
        self.spent(batch, self.num_layers)
        # A row that overflowed counts all units alike, and so moves none.
        return (grad_BU.abs() * mean_BU).nan_to_num(0.0, 0.0, 0.0)

    # ------------------------------------------------------------------ learning

    @float32_by_default()
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        rows = Supervised.of(batch)
        whole = WholeBatch(len(rows), real_tokens(batch), self.device)
        signal = self.teacher_signal(rows)
        gates_BU = self.policy.masks(self.prompts(batch))
        leaf_BU = gates_BU.detach().requires_grad_()
        loss = self.divergence(rows, signal, leaf_BU, whole=whole)
        moving = [] if self.adapters is None else self.adapters.moving()
        grad_BU, *grads = torch.autograd.grad(loss, [leaf_BU, *moving], allow_unused=bool(moving))
        self.spent(batch, self.num_layers)
        self.tokens += whole.tokens
        self.log("train/kl", loss.detach(), prog_bar=True, sync_dist=True)
        self.log("mask/jaccard", mean_jaccard(gates_BU.detach() > 0), sync_dist=True)
        surrogate = (gates_BU * grad_BU).sum()
        if self.adapters is None:
            return surrogate
        self.adapters.take(grads)
        return surrogate + self.adapters.surrogate(1)

    def validation_step(self, batch: Batch, _: int) -> None:
        """Measure the divergence under each prompt's own mask, and under the one mask for all."""
        rows = Supervised.of(batch)
        whole = WholeBatch(len(rows), real_tokens(batch), self.device)
        with self.parents_weights():
            signal = self.teacher_signal(rows)
            own_BU = self.policy.hard(self.policy.scores(self.prompts(batch)))
            one_U = self.policy.gates(self.policy.harden())
            for name, gates in (("val/kl", own_BU), ("val/kl_one_mask", one_U)):
                loss = self.divergence(rows, signal, gates, whole=whole)
                self.log(name, loss, prog_bar=True, batch_size=whole.positions, sync_dist=True)

    test_step = validation_step
