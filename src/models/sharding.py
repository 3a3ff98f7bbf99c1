"""Shard a network's weights over the ranks, layer by layer, for any family of decoders (FSDP2).

Each decoder layer is gathered when its turn comes. What is left (embeddings, final norm, head) is gathered
from the start of the pass to the end of the backward pass. FSDP2 does this in the forward pass of the *root*
module. A training step here calls the decoder and the head separately, and never the root; :func:`within`
makes such a step count as a forward pass of the root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from src.models.layers import decoder_layers

T = TypeVar("T")


def shard(network: PreTrainedModel, mesh: DeviceMesh, whole: Iterable[nn.Parameter] = ()) -> None:
    """Shard ``network`` in place over a data-parallel mesh (FSDP2); its weights move to the mesh's device.

    Args:
        network: any decoder.
        mesh: one dimension, over all ranks.
        whole: parameters that every rank keeps unsharded.
    """
    kept = set(whole)
    for layer in decoder_layers(network)[1]:
        fully_shard(layer, mesh=mesh, ignored_params=kept)
    # Not resharded after the forward pass: the loss projects to the vocabulary after it.
    fully_shard(network, mesh=mesh, reshard_after_forward=False, ignored_params=kept)
    setattr(network, "within", MethodType(_call, network))  # noqa: B010 (mypy)
    register_fsdp_forward_method(network, "within")


def within(network: nn.Module, step: Callable[[], T]) -> T:
    """Call a function that runs parts of ``network`` so that FSDP2 takes it for a forward pass of the whole.

    Args:
        network: sharded by :func:`shard` or not; if not, the function is simply called.
        step: the function; it takes no arguments.

    Returns:
        What the function returns.
    """
    run: Callable[[Callable[[], T]], T] | None = getattr(network, "within", None)
    return run(step) if run else step()


def _call(network: nn.Module, step: Callable[[], T]) -> T:
    return step()
