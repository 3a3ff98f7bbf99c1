"""Hooks on a plain model: collect what it computes inside while it runs, or let a module add nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from src.models.layers import decoder_layers, first, with_first


@contextmanager
def streams(
    model: PreTrainedModel, layers: Iterable[int], apart: bool = False
) -> Iterator[dict[int, Tensor]]:
    """Collect the stream that leaves each of ``layers`` when the model runs in the block.

    What leaves the last layer is what the final norm reads. The tensors are those of the pass itself, so a
    loss on them has gradients, even where activations are recomputed in the backward pass; the block must end
    before that pass.

    Args:
        model: a decoder, with or without adapters.
        layers: numbers of the layers.
        apart: whether the layer behind each of them reads its stream without a gradient. The stream is cut
            where it leaves a layer, so that a layer that is recomputed is given the same input again.

    Yields:
        ``[B, T, H]`` by layer, of the last pass so far; empty before the first.
    """
    collected: dict[int, Tensor] = {}
    modules = decoder_layers(model)[1]
    with ExitStack() as hooks:
        for index in set(layers):

            def keep(_module: nn.Module, _args: Any, out: Any, index: int = index) -> Any:
                collected[index] = first(out)
                return with_first(out, first(out).detach()) if apart else None

            hooks.callback(modules[index].register_forward_hook(keep).remove)
        yield collected


@contextmanager
def inputs(model: PreTrainedModel, paths: Mapping[int, str]) -> Iterator[dict[int, Tensor]]:
    """Collect the input of one module in each of some layers when the model runs in the block.

    The tensors are those of the pass itself, as in :func:`streams`.

    Args:
        model: a decoder, with or without adapters.
        paths: of the modules inside their layers, by the layer's number; "" is the layer itself.

    Yields:
        ``[B, T, features]`` by layer, of the last pass so far; empty before the first.
    """
    collected: dict[int, Tensor] = {}
    modules = decoder_layers(model)[1]
    with ExitStack() as hooks:
        for index, path in paths.items():

            def keep(_module: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                collected[index] = args[0] if args else kwargs["hidden_states"]

            module = modules[index].get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield collected


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Let a module return zeros in place of its hidden states, whenever it runs in the block."""
    hook = module.register_forward_hook(lambda _m, _i, out: with_first(out, torch.zeros_like(first(out))))
    try:
        yield
    finally:
        hook.remove()
