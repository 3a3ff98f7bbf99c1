"""Collect the residual stream of a plain model behind some of its layers while the model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from src.models.layers import decoder_layers, first


@contextmanager
def streams(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the stream that leaves each of ``layers`` when the model runs in the block.

    What leaves the last layer is what the final norm reads. The tensors are those of the pass itself, so a
    loss on them has gradients, even where activations are recomputed in the backward pass; the block must end
    before that pass.

    Yields:
        ``[B, T, H]`` by layer, of the last pass so far; empty before the first.
    """
    collected: dict[int, Tensor] = {}
    modules = decoder_layers(model)[1]
    with ExitStack() as hooks:
        for index in set(layers):

            def keep(_module: nn.Module, _args: Any, out: Any, index: int = index) -> None:
                collected[index] = first(out)

            hooks.callback(modules[index].register_forward_hook(keep).remove)
        yield collected
