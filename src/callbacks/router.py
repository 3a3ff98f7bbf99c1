"""End a search of prompts with its router, and say whether prompts have masks of their own at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from src.callbacks.record import check_path
from src.mask import Mask
from src.ranges import Share, checked
from src.routing.clusters import mean_jaccard
from src.routing.router import ADAPTERS, FILE

if TYPE_CHECKING:
    from src.routing.search import PromptSearch


class KeepRouter(Callback):
    """Writes ``router.safetensors`` after the last step, and warns if all prompts have the same mask.

    The record of the run gets ``prompts``: how many calibration prompts there are, how many different masks
    they have, and the mean Jaccard index of two of them. Adapters, if any trained, are written beside the
    router, for all layers.

    Args:
        path: where to write; None is ``router.safetensors`` in the run's log directory, beside ``mask.json``.
        alarm: mean Jaccard index above which the masks count as one: a collapse, of which there is a warning.
    """

    @checked
    def __init__(self, path: str | None = None, alarm: Share = 0.99) -> None:
        self.path, self.alarm = path, alarm

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        check_path(self, self.path)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.interrupted:
            return
        search = cast("PromptSearch", module)
        path = Path(self.path or Path(trainer.log_dir or ".") / FILE)  # log_dir asks all ranks
        embeddings = cast(nn.Embedding, search.head.model.get_input_embeddings())
        router = search.policy.router(embeddings.weight, search.weights)
        masks_PU = search.policy.hard(router.scores(router.prompts_PD)).cpu()
        jaccard, different = mean_jaccard(masks_PU), len(masks_PU.unique(dim=0))
        search.figures["prompts"] = {"prompts": len(masks_PU), "masks": different, "jaccard": jaccard}
        for logger in trainer.loggers:
            logger.log_metrics({"mask/jaccard_held_out": jaccard}, trainer.global_step)
        if trainer.is_global_zero:
            router.save(path)
            if search.adapters is not None:
                whole = Mask.by_hand(search.name, search.num_layers, range(search.num_layers))
                search.adapters.save(path.with_name(ADAPTERS), whole)
        told = f"{different} different masks for {len(masks_PU)} prompts, mean Jaccard index {jaccard:.3f}"
        rank_zero_info(f"{told}; router written to {path}")
        if jaccard > self.alarm:
            rank_zero_warn(
                f"the masks have collapsed to one: {told}. One mask for all, by "
                "configs/search/gumbel_topk.yaml, will do as well. Train longer, with a higher rate, or on "
                "text of more kinds."
            )
