"""Gumbel-TopK: the learned mask of E3-Pruner (arXiv 2511.17205).

One logit for each layer says how much it is worth keeping. A draw perturbs the logits with Gumbel noise and
removes exactly the n layers that are worth least then (a Plackett-Luce draw without replacement, arXiv
1903.06059). The backward pass goes through a relaxation whose temperature a callback anneals; the temperature
never changes which layers are drawn. With other units than layers, which is our extension, a draw is the best
legal set of the perturbed logits.

The relaxation is a softmax over the negated logits by default, of which the layers to remove have the
highest. A softmax over what is worth keeping spends its mass of 1 on the surest keepers, and layers at the
border between kept and removed get almost no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from src.errors import ConfigError
from src.mask import Unit
from src.policies import relaxations as R
from src.policies.base import MaskPolicy
from src.policies.measuring import Probe
from src.policies.scores import block_influence, salience, unit_kl
from src.ranges import Count, NonNegative, Positive, Seed, checked
from src.units.spaces import TABULATED

_SCORES = {"kl": unit_kl, "block_influence": block_influence, "salience": salience}
_FORMS = {
    "softmax": R.softmax_form,
    "successive": R.successive_form,
    "sigmoid": R.sigmoid_form,
    "identity": R.identity_form,
}


class GumbelTopK(MaskPolicy):
    """Learns logits by exact top-n draws with straight-through gradients.

    Args:
        form: backward pass: ``softmax`` (one softmax), ``successive`` (Xie-Ermon), ``simple`` (exact draws
            from ``P(S) ~ exp(sum of the logits of S)``, with the gradient of their exact keep probabilities;
            no temperature), ``sigmoid``, or ``identity`` (control).
        side: ``prune`` draws the layers to remove, ``keep`` those to keep.
        init: start of the logits: ``kl`` (rise of the KL when the layer is bypassed), ``block_influence``
            (ShortGPT), ``salience`` (the gates' gradients, one backward pass), ``zeros``, or ``random``
            (normal, by the seed). Scores go through a logarithm and are standardised, those of KV groups or
            channels within their layer.
        init_scale: standard deviation of the initial logits. A larger one keeps the first draws near the
            start, as a deep model needs of which most masks tell nothing (docs/public_model.md).
        temperature: softness of the relaxation; :class:`src.callbacks.TemperatureAnnealing` moves it.
        always_keep: layers that may not be removed, such as ``[0, -1]``.
        seed: seed of the noise.
        candidates: how many of the last distinct masks compete on held-out rows, with the first. The last
            mask is not always the best: E3-Pruner's own results do not improve steadily with the budget.
        polish: try single swaps of a removed and a kept layer on held-out rows.
    """

    works_on = ("layer", "half", "kv_group", "channel")
    any_count = True

    @checked
    def __init__(
        self,
        form: Literal["softmax", "successive", "simple", "sigmoid", "identity"] = "softmax",
        side: Literal["prune", "keep"] = "prune",
        init: Literal["kl", "block_influence", "salience", "zeros", "random"] = "kl",
        init_scale: NonNegative = 1.0,
        temperature: Positive = 1.0,
        always_keep: Iterable[int] = (),
        seed: Seed = 0,
        candidates: Count = 4,
        polish: bool = True,
    ) -> None:
        super().__init__(always_keep, seed, candidates, polish)
        self.form, self.side, self.init = form, side, init
        self.init_scale, self.temperature = init_scale, temperature

    def setup(
        self, num_layers: int, remove: int, pinned: Iterable[int] = (), unit: Unit = "layer", width: int = 1
    ) -> None:
        """Set up as the base class does, and refuse a start or a backward pass that the units do not allow.

        Raises:
            ConfigError: as of the base class; ``init`` compares the stream around whole layers, and other
                units are asked; or ``init`` or ``form`` takes too long for so many channels.
        """
        super().setup(num_layers, remove, pinned, unit, width)
        if self.init == "block_influence" and unit != "layer":
            raise ConfigError(
                f"policy.init: 'block_influence' compares the streams around whole layers, and model.unit is "
                f"'{unit}'. Accepted here: salience, zeros, random{', kl' if unit != 'channel' else ''}."
            )
        if self.init == "kl" and unit == "channel":
            raise ConfigError(
                f"policy.init: 'kl' takes a pass for each unit, here {self.units:,}. Accepted for channels: "
                f"salience, zeros, random."
            )
        if self.form == "simple" and width > TABULATED:
            raise ConfigError(
                f"policy.form: 'simple' tabulates each layer's {width:,} units, which is done up to "
                f"{TABULATED:,}. Accepted here: softmax, successive, sigmoid, identity."
            )

    def initialise(self, probe: Probe) -> None:
        if self.init == "random":
            # A stream of its own: draw 0 of step 0 would give the noise of the first mask.
            self.start(torch.randn(self.units, generator=self.generator(-1, 0)))
        elif self.init != "zeros":
            # Importance is heavy-tailed (one layer can be a thousand times the median): take logarithms.
            self.start(torch.log(_SCORES[self.init](probe, self.units).clamp_min(0) + 1e-8))

    @torch.no_grad()
    def start(self, score_U: Tensor, scale_G1: Tensor | None = None) -> None:
        """Set the logits to scores, centred in each group and divided by ``scale``, or by their deviation."""
        free_GF = self.by_group(score_U[self.free])
        if scale_G1 is None:
            scale_G1 = free_GF.std(-1, correction=0, keepdim=True).clamp_min(1e-8)
        spread_GF = (free_GF - free_GF.mean(-1, keepdim=True)) / scale_G1
        self.logits[self.free] = (self.init_scale * spread_GF).flatten().to(self.logits)

    def _scores(self) -> tuple[Tensor, int]:
        """Return the free units' scores ``[G, F]`` for being selected, and how many to select in a group."""
        theta = self.by_group(self.logits[self.free].cpu())
        gone = self.closed // self.space.groups
        return (-theta, gone) if self.side == "prune" else (theta, theta.shape[-1] - gone)

    def sample(self, step: int, draw: int) -> Tensor:
        space, generator = self.spare(self.remove), self.generator(step, draw)
        if self.form == "simple":
            theta = self.logits.cpu()
            kept, chance = space.draw(theta, generator), space.marginals(theta)
            return R.straight_through(kept, chance).to(self.logits.device)
        theta, q = self._scores()
        z = theta + R.gumbel(theta.numel(), generator).view_as(theta)
        worth = torch.zeros(self.units)
        worth[self.free] = (-z if self.side == "prune" else z).detach().flatten()
        kept = self.by_group(space.argmax(worth)[self.free])
        hard = 1 - kept if self.side == "prune" else kept
        selected = R.straight_through(hard, _FORMS[self.form](z, q, self.temperature))
        gates = torch.ones(self.units, device=self.logits.device)
        gates[self.free] = (1 - selected if self.side == "prune" else selected).flatten().to(gates.device)
        return gates

    def keep_probabilities(self) -> Tensor:
        """Return the probability ``[U]`` that a mask drawn with the present logits keeps each unit.

        It is computed for masks of probability ``P(S) ~ exp(sum of the logits of S)``. With ``form: simple``
        the draws follow just that; those of the other forms, by Gumbel noise, differ from it by a few
        percent.
        """
        return self.spare(self.remove).marginals(self.logits.detach().cpu()).clamp(0, 1)
