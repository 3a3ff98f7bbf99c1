"""Instruction-following pruning: a predictor reads the prompt and gives one mask for the whole response.

*The paper's* (arXiv 2501.02086, ICML 2025): a predictor of two linear maps without a non-linearity between
them, hidden width 128, behind a small language model that reads the prompt; SoftTopK; masks of feed-forward
channels ``soft * [among the top k]``; joint training with the weights. The code of its training is not
public. *Ours*: the predictor reads the mean of the parent's own token embeddings, centred and scaled by those
of the calibration prompts. Then all that it does is linear, and folds into one small vector for each token
(:mod:`src.routing.router`). Layers, halves and KV groups as units; a bias that starts from scores of the
units, and maps that start from those of each row; the distillation as the loss; hard gates with the gradient
of SoftTopK (``gates_are: hard``), because that is what a plain checkpoint computes.

Shapes: B prompts, H hidden size of the parent, D hidden width of the predictor, U units, G groups of F free
units.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from src.errors import ConfigError
from src.policies.gumbel_topk import GumbelTopK
from src.policies.measuring import Probe
from src.policies.principal import regression
from src.policies.relaxations import straight_through
from src.policies.soft_topk import soft_topk
from src.ranges import Count, NonNegative, Positive, Seed, checked
from src.routing.router import Router

TINY = 1e-8
"""Least importance, as a share of the mean one of its group."""


class PromptMasks(GumbelTopK):
    """Predicts the logits of a mask from a prompt: ``logits + W2 W1 (e - mean) / (scale H D)``.

    ``e`` is the mean embedding of the prompt. ``logits`` start as those of Gumbel-TopK. With ``init:
    salience``, ``W2`` starts where :meth:`regress` puts it, so that prompts begin with masks of their own.
    Else it is zero at first, and all begin with one. As the embeddings are centred, ``logits`` stay the mean
    of those of the calibration prompts. The division by H and D makes a step of Adam, through either map,
    move a logit by as much in a wide model as in a narrow one. Nothing is drawn at random.

    Args:
        hidden: hidden width D.
        gates_are: ``soft`` runs the model under the soft shares of the kept units, as in the paper; ``hard``
            under ones and zeros, with the gradient of the shares.
        init: start of ``logits``, as for :class:`src.policies.GumbelTopK`.
        init_scale: their standard deviation at the start.
        temperature: softness of SoftTopK; :class:`src.callbacks.TemperatureAnnealing` moves it.
        always_keep: layers that no mask removes, such as ``[0, -1]``.
        seed: seed of the predictor's first values.
    """

    any_count = False

    @checked
    def __init__(
        self,
        hidden: Count = 128,
        gates_are: Literal["soft", "hard"] = "hard",
        init: Literal["kl", "block_influence", "salience", "zeros", "random"] = "kl",
        init_scale: NonNegative = 1.0,
        temperature: Positive = 1.0,
        always_keep: Iterable[int] = (),
        seed: Seed = 0,
    ) -> None:
        super().__init__(
            "softmax", "prune", init, init_scale, temperature, always_keep, seed, 1, polish=False
        )
        self.hidden, self.gates_are = hidden, gates_are
        self.down: nn.Linear | None = None
        self.prompts: Tensor | None = None
        """Mean embeddings ``[P, H]`` of the calibration prompts."""

    def reads(self, size: int) -> None:
        """Create the predictor for embeddings of a size; the search calls this after :meth:`setup`."""
        self.down = nn.Linear(size, self.hidden, bias=False)
        self.up = nn.Linear(self.hidden, self.units, bias=False)
        start_DH = torch.randn(self.hidden, size, generator=self.generator(-1, 0)) * size**0.5
        with torch.no_grad():
            self.down.weight.copy_(start_DH)
            self.up.weight.zero_()

    def refuse(self, quantize: str | None, adapted: bool, in_parts: bool) -> None:
        """Refuse what the base class refuses, and a search that hands no prompts to its policy.

        Raises:
            ConfigError: see the base class; or the search is a plain one, or the weights lie in parts, where
                nothing averages the predictor's gradients.
        """
        super().refuse(quantize, adapted, in_parts)
        if self.down is None:
            raise ConfigError(
                "model.policy: PromptMasks reads prompts, which src.search.MaskSearch does not hand to it. "
                "Set model.class_path to src.routing.search.PromptSearch (configs/search/prompts.yaml)."
            )
        if in_parts:
            raise ConfigError(
                "trainer.strategy: under FSDP2 nothing averages the gradients of a predictor over the "
                "ranks. Use configs/strategy/ddp.yaml."
            )

    def meet(self, prompts_PH: Tensor) -> None:
        """Take the calibration prompts' mean embeddings: they centre and scale what the predictor reads.

        All ranks must be given the same.
        """
        self.prompts = prompts_PH
        self.centre = prompts_PH.mean(0)
        self.scale = (prompts_PH - self.centre).square().mean().sqrt().clamp_min(1e-8)

    def initialise(self, probe: Probe) -> None:
        """Start as the base class does; at ``init: salience`` the search calls :meth:`regress` instead."""
        if self.init != "salience":
            super().initialise(probe)

    @torch.no_grad()
    def regress(self, importance_PU: Tensor) -> None:
        """Start at how much the units matter to each calibration row, by regression on its prompt.

        A unit's importance counts as a share s of its group's; m is the mean of s over the rows. ``logits``
        start at ``log m``, ``W2`` at the regression of ``s / m``, which differs between prompts as ``log s``
        does, to first order. The deviation of their sum, over rows and units of a group, is ``init_scale``.

        Args:
            importance_PU: not negative, one row for each prompt of :meth:`meet`.
        """
        assert self.prompts is not None, "meet() came first"
        free_PGF = importance_PU[:, self.free].unflatten(1, (self.space.groups, -1))
        share_PGF = free_PGF / free_PGF.mean(-1, keepdim=True).clamp_min(TINY)
        mean_GF = share_PGF.mean(0).clamp_min(TINY)
        score_U = torch.zeros_like(importance_PU[0])
        score_U[self.free] = mean_GF.log().flatten()
        own_PGF = share_PGF / mean_GF
        spread_G1 = (mean_GF.log() + own_PGF).std((0, -1), correction=0)[:, None].clamp_min(TINY)
        self.start(score_U, spread_G1)
        own_PU = (self.init_scale / spread_G1 * own_PGF).flatten(1)
        self.up.weight[self.free] = regression(self.read(self.prompts), own_PU).T.to(self.up.weight)

    # ------------------------------------------------------------------ masks

    def read(self, prompts_BH: Tensor) -> Tensor:
        """Return what the second map reads ``[B, D]`` of prompts, given by their mean embeddings."""
        assert self.down is not None, "reads() came first"
        out: Tensor = self.down((prompts_BH - self.centre) / self.scale) / self.down.weight.numel()
        return out

    def scores(self, prompts_BH: Tensor) -> Tensor:
        """Return the logits ``[B, U]`` of prompts by their mean embeddings."""
        out: Tensor = self.logits + self.up(self.read(prompts_BH))
        return out

    def shares(self, scores_BU: Tensor) -> Tensor:
        """Return shares ``[B, U]`` that sum, in each group of units, to as many as a mask keeps of it."""
        space = self.spare(self.remove)
        free_BGF = scores_BU[:, self.free].unflatten(1, (space.groups, -1))
        keep = (space.keep - len(space.pinned)) // space.groups
        shares_BU = torch.ones_like(scores_BU)
        shares_BU[:, self.free] = soft_topk(free_BGF, keep, self.temperature).flatten(1)
        return shares_BU

    def hard(self, scores_BU: Tensor) -> Tensor:
        """Return the best legal mask ``[B, U]`` of each row of scores, as ones and zeros."""
        return self.spare(self.remove).argmax(scores_BU.detach())

    def masks(self, prompts_BH: Tensor) -> Tensor:
        """Return the gates ``[B, U]`` of prompts, with their graph; exactly ``closed`` of a row are zero."""
        scores_BU = self.scores(prompts_BH)
        soft_BU, hard_BU = self.shares(scores_BU), self.hard(scores_BU)
        return soft_BU * hard_BU if self.gates_are == "soft" else straight_through(hard_BU, soft_BU)

    def sample(self, step: int, draw: int) -> Tensor:
        """Return the mask of the mean prompt, by :meth:`harden`; a search of prompts asks :meth:`masks`."""
        return self.gates(self.harden())

    # ------------------------------------------------------------------ use

    @torch.no_grad()
    def router(self, embeddings_VH: Tensor, fingerprint: str | None) -> Router:
        """Return the predictor folded into one vector for each token.

        Args:
            embeddings_VH: the parent's.
            fingerprint: of its weights.
        """
        assert self.down is not None, "reads() came first"
        assert self.prompts is not None, "meet() came first"
        down_DH = self.down.weight / (self.scale * self.down.weight.numel())
        return Router(
            table_VD=embeddings_VH.to(down_DH) @ down_DH.T,
            weight_UD=self.up.weight,
            bias_U=self.logits - self.up.weight @ (down_DH @ self.centre),
            prompts_PD=self.prompts @ down_DH.T,
            pinned=tuple(sorted(self.pinned)),
            fingerprint=fingerprint,
        )
