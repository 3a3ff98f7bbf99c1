"""Train a small decoder from random weights, such as the teacher of the demo (``make teacher``)."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from transformers import AutoConfig, AutoModelForCausalLM

from src.data.batches import real_tokens
from src.files import whole, write_json
from src.models.loading import load_tokenizer
from src.ranges import Share, checked
from src.training.finite import FiniteOnly
from src.training.schedules import with_warmup


class Pretrain(LightningModule):
    """Trains a model, built from a config, to predict the next token.

    Args:
        tokenizer: directory of the tokenizer; its size is that of the vocabulary.
        architecture: keys of the Hugging Face config, ``model_type`` among them.
        optimizer: optimiser of all weights.
        warmup: share of the steps over which the learning rate rises; it then falls linearly to zero.
        save_to: directory for the trained model as a Hugging Face checkpoint.
    """

    @checked
    def __init__(
        self,
        tokenizer: str,
        architecture: dict[str, Any],
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: Share = 0.02,
        save_to: str | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.architecture = load_tokenizer(tokenizer), architecture
        self.optimizer, self.warmup, self.save_to = optimizer, warmup, save_to
        self.tokens = 0

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        keys = dict(self.architecture)
        special = {
            "vocab_size": len(self.tokenizer),
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "bos_token_id": None,
        }
        config = AutoConfig.for_model(keys.pop("model_type"), **{**special, **keys})
        self.model = AutoModelForCausalLM.from_config(config)

    def configure_callbacks(self) -> list[Callback]:
        return [FiniteOnly()]

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch, use_cache=False).loss
        self.tokens += real_tokens(batch)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/tokens", float(self.tokens))
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        self.log("val/loss", self.model(**batch, use_cache=False).loss, prog_bar=True)

    def configure_optimizers(self) -> Any:
        return with_warmup(self.optimizer(self.parameters()), self.trainer, self.warmup, 0.0, "linear")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens"] = self.tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens = checkpoint["tokens"]

    def on_fit_start(self) -> None:
        self._since = time.monotonic()

    def on_fit_end(self) -> None:
        """Write the model, its tokenizer and ``training.json``, what its training cost, for reports."""
        if self.save_to and self.trainer.is_global_zero:
            seconds = round(time.monotonic() - self._since)
            record = {"tokens": self.tokens, "seconds": seconds, "steps": self.trainer.global_step}
            with whole(self.save_to) as stage:
                self.model.save_pretrained(stage)
                self.tokenizer.save_pretrained(stage)
                write_json(stage / "training.json", record)
