"""Distil soft prompts, from which a cut model learns what many real rows would teach it (arXiv 2510.04838).

The paper distils a data set of images: over synthetic data S it minimises the loss on real data of a
classifier that T steps on S have trained. Here S are M soft prompts, and what they train is a repair of a cut
model (:mod:`src.prompts.tiny`), by the divergence from its parent. Only a window of the T steps is
differentiated (:mod:`src.prompts.windows`), and the outer gradient is clipped at twice the running average of
its norm. *Ours*: prompts, repair and divergence; the decay of that average; and that a mask is drawn for each
step where none is known yet.

Shapes: M prompts, T positions, H hidden.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from src.data.batches import Batch, Supervised, real_tokens
from src.data.soft import SUFFIX, SoftPrompts
from src.errors import ConfigError
from src.mask import Mask
from src.models.gated import freeze
from src.models.head import OutputHead
from src.models.loading import load_config, load_tokenizer
from src.prompts.cuts import DrawnCuts, OneCut, seeded
from src.prompts.judging import Judging
from src.prompts.rows import embedded, row_sets
from src.prompts.tiny import lesson, signal
from src.prompts.unroll import descend, unroll
from src.prompts.windows import Inner, Windows
from src.ranges import Count, Seed, checked
from src.training import identity
from src.training.ranks import WholeBatch
from src.training.strategies import kind

DECAY = 0.9
"""Of the running average of the outer gradient's norm."""


class DistilledCalibration(Judging):
    """Trains M soft prompts to be the calibration rows of a repair, or of a search.

    Args:
        mask: the ``mask.json`` of a search, whose cut the prompts shall help to repair. None draws a mask for
            each step, for prompts that shall serve a search.
        model: Hub id or directory of the parent; None is the one that the mask names.
        remove: number of layers that a drawn mask removes; None with ``mask``.
        prompts: how many, M.
        rows: real rows that they start from, a file or a Hub id; None is the first source of the text that is
            trained on.
        starts: sets of M rows that are judged, of which the best is the start.
        max_length: positions of a prompt, at most; a longer row loses its end.
        inner: how the repair is trained on the prompts.
        validate_every: steps after which prompts are judged on held-out rows, which moves the windows on.
        optimizer: optimiser of the prompts.
        seed: of windows and masks.
        kwargs: revision and attention of the parent; see :class:`src.training.stage.Stage`.
    """

    @checked
    def __init__(
        self,
        mask: str | None = None,
        model: str | None = None,
        remove: Count | None = None,
        prompts: Count = 16,
        rows: str | None = None,
        starts: Count = 1,
        max_length: Count = 16,
        inner: Inner = Inner(),  # noqa: B008 (frozen)
        validate_every: Count = 6,
        optimizer: OptimizerCallable = torch.optim.Adam,
        seed: Seed = 0,
        **kwargs: Any,
    ) -> None:
        loaded = Mask.load(mask) if mask else None
        name = model or (loaded.model if loaded else None)
        if (loaded is None) is (remove is None) or name is None:
            raise ConfigError(
                "model.mask, model.remove: give one. A mask, for prompts that help to repair its cut; or a "
                "number of layers beside model.model, for prompts that serve a search."
            )
        super().__init__(name, dtype="float32", quantize=None, checkpoint_activations=False, **kwargs)
        self.mask, self.parent_key = loaded, identity.MODEL if model else identity.MASK
        theirs = loaded.revision if loaded and name == loaded.model else None
        self.loading = replace(self.loading, revision=self.revision or theirs)
        if loaded is not None:
            self.cuts = OneCut(loaded)
        elif remove is not None:
            self.cuts = DrawnCuts(name, load_config(name, self.revision), remove, seed)
        self.count, self.rows, self.starts, self.max_length = prompts, rows, starts, max_length
        self.validate_every = validate_every
        self.inner, self.windows, self.optimizer, self.seed = inner, Windows(inner), optimizer, seed
        self.usual = 0.0
        """Running average of the norm of the outer gradient."""

    # ------------------------------------------------------------------ model

    def refuse(self, trainer: Trainer, data: object) -> None:
        if kind(trainer.strategy) not in ("single", "ddp"):
            raise ConfigError(
                "trainer.strategy: what trains are a few prompts, and there is nothing to shard. Use "
                "configs/strategy/single.yaml or configs/strategy/ddp.yaml."
            )
        for key, accepted in (("precision", "32-true"), ("accumulate_grad_batches", 1)):
            if (found := getattr(trainer, key)) != accepted:
                raise ConfigError(
                    f"trainer.{key}: {found} given; accepted: {accepted}, because prompts learn by a "
                    f"gradient of gradients, from one batch for each step."
                )

    def configure_model(self) -> None:
        """Load the parent, frozen, and keep it out of checkpoints; the prompts alone are the module's."""
        if hasattr(self, "head"):
            return
        self.head = OutputHead(freeze(self.load()))
        if self.mask is not None:
            identity.check_parent(self.mask, self.name, self.weights, self.parent_key)
        tokenizer = load_tokenizer(self.name, self.revision)
        self.sets = row_sets(tokenizer, self.rows, self.starts, self.count, self.max_length)
        ids_MT, mask_MT = self.sets[0]
        self.prompts = nn.Parameter(embedded(self.head, ids_MT, mask_MT))
        self.register_buffer("mask_MT", mask_MT.clone())

    def on_fit_start(self) -> None:
        """Bring the parent to the device, which Lightning does not know of, cut it, and check its head."""
        nn.Module.to(self.head.model, self.device)
        self.cuts.adopt(self.head.model)
        self.check()

    # ------------------------------------------------------------------ learning

    def training_step(self, batch: Batch, _: int) -> Tensor:
        rows, step, inner = Supervised.of(batch), self.trainer.global_step, self.inner
        if step and step % self.validate_every == 0:
            kl = self.judged(self.taught(self.prompts, self.mask_MT))
            self.windows.heed(kl)
            self.log("val/kl", kl, prog_bar=True)
        whole = WholeBatch(len(rows), real_tokens(batch), self.device)
        repair, data = self.cuts.at(step), lesson(self.head, self.prompts, self.mask_MT)
        draws = seeded(self.seed, step)
        if self.windows.reads_norms:
            path, norms_T = descend(repair.imitate, repair.start, data, inner.rate, inner.steps)
            first, size = self.windows.choose(norms_T, draws)
        else:
            first, size = self.windows.choose(self.prompts.new_zeros(0), draws)
            path = descend(repair.imitate, repair.start, data, inner.rate, first)[0]
        theta_JH = unroll(repair.imitate, path[first], data, inner.rate, size)
        loss = repair.divergence(theta_JH, rows, signal(self.head, rows), whole)
        self.tokens += whole.tokens
        self.log("train/kl", loss.detach(), prog_bar=True, sync_dist=True)
        self.log_dict({"train/stage": float(self.windows.stage), "train/window": float(size)})
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the outer gradient at twice the running average of its norm."""
        grad = self.prompts.grad
        assert grad is not None
        norm = float(grad.norm())
        if norm > 2 * self.usual > 0:
            grad.mul_(2 * self.usual / norm)
        self.usual = DECAY * self.usual + (1 - DECAY) * norm if self.usual else norm

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer([self.prompts])

    # ------------------------------------------------------------------ records

    def on_train_end(self) -> None:
        """Write the prompts into the run's log directory, and note what they teach."""
        folder = Path(self.trainer.log_dir or ".")  # asks all ranks
        if self.trainer.interrupted:
            return
        self.figures["kl_distilled"] = self.judged(self.taught(self.prompts, self.mask_MT))
        with torch.no_grad():
            fed = {"inputs_embeds": self.prompts, "attention_mask": self.mask_MT}
            likeliest_MT = self.head.logits(self.head.hidden(fed)).argmax(-1)
        made = SoftPrompts.labelled(self.prompts, self.mask_MT, likeliest_MT, self.weights)
        if self.trainer.is_global_zero:
            made.save(folder / f"distilled{SUFFIX}")
        told = "{kl_cut:.4f}, repaired by rows {kl_start:.4f}, by prompts {kl_distilled:.4f}"
        rank_zero_info(f"held-out KL of the cut {told.format(**self.figures)}; written to {folder}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        kept = {"usual": self.usual, "tokens": self.tokens, "figures": self.figures}
        checkpoint["prompts"] = {"windows": self.windows.state_dict(), **kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        found = checkpoint["prompts"]
        self.windows.load_state_dict(found["windows"])
        self.usual, self.tokens, self.figures = found["usual"], found["tokens"], found["figures"]
