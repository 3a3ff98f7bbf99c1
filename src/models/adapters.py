"""Put LoRA adapters on every linear layer of a model, and say which weights they do not reach."""

from __future__ import annotations

import re
from typing import Protocol, cast

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from src.errors import ConfigError


class Wrapped(Protocol):
    """A model that peft has wrapped; this declares the one method of it that is used here."""

    def merge_and_unload(self) -> PreTrainedModel: ...


def adapted(student: PreTrainedModel, rank: int) -> PreTrainedModel:
    """Put LoRA adapters on all linear layers, so that nothing else trains; warn of what they do not reach.

    Args:
        student: a plain model.
        rank: rank r of each adapter; its update is scaled by alpha / r = 2.

    Returns:
        The student, wrapped by peft.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as e:
        raise ConfigError("model.scope: 'lora' needs peft: pip install -e '.[lora]'.") from e
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = cast(PreTrainedModel, get_peft_model(student, config))
    if left := out_of_reach(model):
        rank_zero_warn(
            f"model.scope: the adapters of 'lora' do not reach {left}; these stay the parent's. "
            f"'cut_adjacent' and 'full' train them."
        )
    return model


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Merge the adapters into the weights of a model from :func:`adapted`; return the plain model in it."""
    return cast(Wrapped, model).merge_and_unload()


def out_of_reach(model: PreTrainedModel) -> str:
    """Return which weight matrices of an adapted model's layers have no adapter, in words for a message.

    They are mostly routed experts: one tensor holds the weights of all experts, and is no linear layer. peft
    adapts these tensors in some families (Mixtral), and not in others (GPT-OSS).

    Returns:
        The names inside a layer, and the share of the layers' weights that these matrices hold; empty if all
        have an adapter.
    """
    sizes = {"reached": 0, "left": 0}
    names = set()
    for name, parameter in model.named_parameters():
        inside = re.search(r"\.\d+\.(.+)", name)
        if inside is None or parameter.ndim < 2 or "lora_" in name:
            continue
        kind = "reached" if ".base_layer." in name else "left"
        sizes[kind] += parameter.numel()
        if kind == "left":
            names.add(inside[1].removesuffix(".weight"))
    if not names:
        return ""
    share = sizes["left"] / (sizes["left"] + sizes["reached"])
    return f"{', '.join(sorted(names))} ({share:.0%} of the weights of the layers)"
