"""Give each feed-forward a weight, and drop those whose weight falls (ADA-DEFT, arXiv 2402.01911).

A layer computes ``y = h + w FFN(h)`` with a learned weight w, 1 at first. To the loss a pull towards zero is
added, ``pull * sum of w``; a feed-forward that matters resists:

    slope    =  dLoss / dlog w
    log w   <-  log w - speed * clip(1 + slope / (pull w), -1, 1),    w at most 1

*The paper's*: a learned weight of each feed-forward, and that those of low weight are left out. It gives no
equation that we know of. *Ours* is the rest:

* The weight is in the model. A step gives the direction of the feed-forward's last map W, and w the norm
  (weight normalisation, arXiv 1602.07868), which cannot grow back what w takes, until no more can go. Each
  checkpoint is a plain model, and ``slope = <dLoss/dW, W>`` is exact.
* ``speed`` is such that without resistance w reaches the threshold in a given share of the run.
* A lone feed-forward leaves no layer that stock transformers loads. So with each goes an attention: of those
  that come to stand between the same two feed-forwards, the one with the most block influence stays.

Shapes: L layers of the parent, U units of the student.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from src.data.batches import Batch, real
from src.errors import ConfigError
from src.mask import Mask
from src.models.layers import decoder_layers
from src.models.loading import load_config
from src.ranges import Positive, Range, checked, inside_unit
from src.training.interleaved import Interleaved
from src.training.schedules import total_steps
from src.units.halves import find_halves
from src.units.importance import block_influence
from src.units.spaces import Kept
from src.units.width import feed_forward_writers

STAYS = 1e6
"""Score of a feed-forward that stays, above any sum of influences; minus it of one that goes."""


class Weighed(Interleaved):
    """Drops feed-forwards of low weight in the course of a recovery, each with an attention.

    ``mask``, ``remove`` or ``ratio`` says how many go at most. The record of the run has all weights.

    Args:
        model: Hub id or directory of the parent.
        threshold: weight below which a feed-forward is dropped, at the next stage.
        pull: size of the pull on each weight, in nats.
        within: share of the run in which a weight falls to the threshold if nothing resists.
        kwargs: how many go and at which stages; see :class:`src.training.interleaved.Interleaved`.
    """

    @checked
    def __init__(
        self,
        model: str,
        threshold: Annotated[float, inside_unit] = 0.5,
        pull: Positive = 2e-2,
        within: Annotated[float, Range(float, 0, 1, open="low")] = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, unit="half", amplitude=0.0, **kwargs)
        self.threshold, self.pull, self.within = threshold, pull, within
        self.weight_L = torch.ones(self.mask.num_layers, dtype=torch.float64)
        """Weight of each feed-forward of the parent; of those that are gone, the last."""
        self._noted: list[tuple[int, nn.Module, float, float]] = []

    def begin(self, mask: str) -> Mask:
        """Return the mask of all halves, whether the number is that of layers or of halves."""
        whole = self.goal.whole
        if whole.wide:
            raise ConfigError(
                f"model.mask: a mask of {whole.unit}s given, and feed-forwards go. Accepted: one of layers "
                f"or halves, of which the number is taken; or null, with model.remove or model.ratio."
            )
        whole = replace(whole, unit="half", keep=tuple(range(2 * whole.num_layers)))
        self.goal = replace(self.goal, whole=whole)
        return whole

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """For each layer of the parent, the path of the map that ends its feed-forward."""
        return feed_forward_writers(load_config(self.name, self.revision))

    @property
    def maps(self) -> dict[int, nn.Module]:
        """The maps that end the student's feed-forwards, by the parent's layer."""
        layers = zip(self.mask.feed_forward, decoder_layers(self.model)[1], strict=True)
        return {home: layer.get_submodule(self.paths[home]) for home, layer in layers}

    def check(self) -> None:
        super().check()
        self.check_maps()

    def check_maps(self) -> None:
        """Refuse a model in which a norm behind the last map undoes a weight on it."""
        for home, halves in zip(self.mask.feed_forward, find_halves(self.model), strict=True):
            if not f"{self.paths[home]}.".startswith(f"{halves.writers[1]}."):
                raise ConfigError(
                    f"Weighed: in a '{self.model.config.model_type}' {halves.writers[1]} stands behind "
                    f"{self.paths[home]} and undoes its size. Use src.training.interleaved.Interleaved."
                )

    # ------------------------------------------------------------------ weights

    @property
    def left(self) -> int:
        """Number of feed-forwards that may still go."""
        return self.goal.remove - (self.mask.num_layers - self.mask.depth)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Note of each map the norm and the slope, of the gradient of all ranks, as long as some may go."""
        super().on_before_optimizer_step(optimizer)
        maps = self.maps if self.left and len(self.history) < self.stages else {}
        norms = {home: float(m.get_parameter("weight").detach().norm()) for home, m in maps.items()}
        self._noted = [(home, m, norms[home], log_slope(m)) for home, m in maps.items()]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make a step of all parameters, then one of the feed-forwards' weights."""
        super().optimizer_step(*args, **kwargs)
        speed = -math.log(self.threshold) / (self.within * total_steps(self.trainer))
        for home, linear, norm, slope in self._noted:
            self.weight_L[home] = self.weigh(linear, float(self.weight_L[home]), norm, slope, speed)

    @torch.no_grad()
    def weigh(self, linear: nn.Module, weight: float, norm: float, slope: float, speed: float) -> float:
        """Return the next weight of a feed-forward, and give its last map the norm that this says.

        Args:
            linear: the map, behind a step of the optimiser.
            weight: its weight so far.
            norm: its norm in front of the step.
            slope: of the loss, by the logarithm of the weight.
            speed: most by which this logarithm moves.
        """
        fall = speed * max(-1.0, min(1.0, 1 + slope / (self.pull * weight)))
        new = min(1.0, weight * math.exp(-fall))
        for name, p in linear.named_parameters():
            p.mul_(new / weight * (norm / (float(p.norm()) or 1.0) if name == "weight" else 1.0))
        return new

    # ------------------------------------------------------------------ removal

    def chosen(self, batch: Batch, share: float) -> Kept:
        """Return the halves that stay: without the feed-forwards below the threshold, and as many attentions.

        If more are below than may go, the lowest go.
        """
        self.model.eval()
        try:
            with self.trainer.precision_plugin.forward_context():
                scores_U = block_influence(self.model, "half", real(batch), lambda: self.head.hidden(batch))
        finally:
            self.model.train()
        low = self.low()
        rank_zero_info(f"feed-forwards below {self.threshold:g}: {', '.join(map(str, low)) or 'none'}")
        scores_U = scored(self.kept, scores_U, low)
        return self.goal.best(self.kept, scores_U, 1 - (self.left - len(low)) / self.goal.remove)

    def low(self) -> list[int]:
        """Return the layers whose feed-forwards are to go now, the lowest first."""
        may = {*self.mask.feed_forward} - self.goal.limits.pinned(self.mask.num_layers, self.goal.remove)
        below = sorted((float(self.weight_L[home]), home) for home in may)
        return [home for weight, home in below if weight < self.threshold][: self.left]

    def on_train_end(self) -> None:
        """Write the mask, and the weights into the record."""
        super().on_train_end()
        self.figures["weights"] = [round(weight, 4) for weight in self.weight_L.tolist()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["stages"]["weights"] = self.weight_L.tolist()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.weight_L = torch.tensor(checkpoint["stages"]["weights"], dtype=torch.float64)


@torch.no_grad()
def log_slope(linear: nn.Module) -> float:
    """Return the slope of a loss by the logarithm of a factor on all that a map puts out."""
    return sum(float((p * p.grad).sum()) for p in linear.parameters() if p.grad is not None)


def scored(kept: Kept, influence_U: Tensor, low: list[int]) -> Tensor:
    """Return scores by which, of the halves ``kept``, the feed-forwards of the layers ``low`` go."""
    fate = [0.0 if unit % 2 == 0 else -STAYS if unit // 2 in low else STAYS for unit in kept]
    return influence_U + torch.tensor(fate)
