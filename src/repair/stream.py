"""LinearPatch (arXiv 2505.24680) repairs the residual stream by a linear map wherever layers were removed.

Behind such a gap the next layer meets a stream whose channels have the wrong magnitude. The map is
``P = H diag(d) H^T`` with an orthonormal Hadamard matrix H, and d_c the mean of ``|x H|_c`` where the gap
ends over that where it begins, both in the parent; the variant ``diag`` leaves H out. P is symmetric, its
eigenvalues are d, and it is one matrix product for each token and gap.

A run of removed layers at the very start or end gets none. Before the start there is no kept layer whose
output could be repaired, only the embeddings; after the end there is none to receive it, only the final norm.
The method needs a kept layer on both sides: its scales compare the inputs of two layers.

Shapes: B batch, T tokens, H hidden, N tokens that are not padding, J junctions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from src.data.batches import Batch, real
from src.mask import Mask
from src.models.layers import decoder_layers, text_config
from src.models.streams import inputs
from src.repair.hadamard import hadamard
from src.training.progress import track

Mode = Literal["rotate", "diag"]


@dataclass(frozen=True)
class Junction:
    """Where a gap of the cut model lies: a run of removed layers between two kept ones.

    Attributes:
        before: position, in the cut model, of the kept layer before it; the next one follows it.
        start: first removed layer, in the parent.
        end: first kept layer after it, in the parent.
    """

    before: int
    start: int
    end: int


def junctions(mask: Mask) -> list[Junction]:
    """Return the junction of each gap of a mask, from the first layer to the last."""
    return [Junction(at, mask.feed_forward[at] + 1, mask.reads[at]) for at in mask.gaps]


class StreamRepair(nn.Module):
    """Maps the residual stream ``h`` to ``h P``, in float32.

    Args:
        matrix_HH: the matrix P.
    """

    def __init__(self, matrix_HH: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix_HH.float(), requires_grad=False)

    def forward(self, h_BTH: Tensor) -> Tensor:
        return (h_BTH.float() @ self.matrix).to(h_BTH.dtype)


@contextmanager
def repaired(
    student: PreTrainedModel, places: Sequence[Junction], repairs: Iterable[Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Apply repairs of the residual stream at the junctions, whenever the cut model runs in the block.

    A repair is a hook at the input of the layer after its junction: no module, weight or key changes.

    Args:
        student: the cut model.
        places: junctions of its mask.
        repairs: what the stream becomes, one for each junction, such as a :class:`StreamRepair`.
    """
    _, layers = decoder_layers(student)
    with ExitStack() as stack:
        for place, repair in zip(places, repairs, strict=True):

            def enter(
                _: nn.Module, args: Any, kwargs: Any, repair: Callable[[Tensor], Tensor] = repair
            ) -> Any:
                if args:
                    return (repair(args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": repair(kwargs["hidden_states"])}

            hook = layers[place.before + 1].register_forward_pre_hook(enter, with_kwargs=True)
            stack.callback(hook.remove)
        yield


class _Reached(Exception):
    """Ends a pass behind the last layer that is wanted."""


@torch.no_grad()
def run(model: PreTrainedModel, batch: Batch, last: int | None = None) -> Tensor:
    """Pass a batch through the decoder, without the output head, for what hooks collect.

    Args:
        model: any decoder.
        batch: the rows.
        last: the layer behind which the pass ends; None runs them all.

    Returns:
        Which tokens are real (not padding), flat ``[B * T]``.
    """
    fed = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}

    def stop(*_: Any) -> None:
        raise _Reached

    with ExitStack() as stack, suppress(_Reached):
        if last is not None:
            stack.callback(decoder_layers(model)[1][last].register_forward_hook(stop).remove)
        model.base_model(**fed, use_cache=False)
    return real(fed).flatten()


def scales(
    parent: PreTrainedModel, places: Sequence[Junction], batches: Iterable[Batch], basis_HH: Tensor | None
) -> Tensor:
    """Return how the mean magnitude of each channel changes over each gap of the parent: ``d_JH``, float64.

    LinearPatch averages this ratio over its batches. Here magnitudes are summed over all real tokens first,
    so that the split into batches changes nothing. A channel that is always zero where the gap begins keeps
    the ratio 1.

    Args:
        parent: the whole model.
        places: the junctions.
        batches: calibration rows.
        basis_HH: the Hadamard matrix H, in whose basis channels are measured; None measures them as they are.
    """
    ends = [(p.start, p.end) for p in places]
    sums_2JH = torch.zeros((), dtype=torch.float64)
    with inputs(parent, {i: "" for pair in ends for i in pair}) as streams:
        for batch in track(batches, "calibration batches"):
            real_N = run(parent, batch)

            def magnitude(index: int, real_N: Tensor = real_N) -> Tensor:
                h_NH = streams[index].flatten(0, 1)[real_N].double()
                rotated_NH = h_NH if basis_HH is None else h_NH @ basis_HH.to(h_NH)
                return rotated_NH.abs().sum(0)

            sums_2JH = sums_2JH + torch.stack(
                [torch.stack([magnitude(pair[side]) for pair in ends]) for side in (0, 1)]
            )
    begin_JH, end_JH = sums_2JH
    return torch.where(begin_JH > 0, end_JH / begin_JH, 1.0)


def matrices(
    parent: PreTrainedModel, places: Sequence[Junction], batches: Iterable[Batch], mode: Mode
) -> list[Tensor]:
    """Return the map P of each junction, ``[H, H]`` float64.

    Where the hidden size has no Hadamard matrix, a warning says that ``diag`` takes the place of ``rotate``.

    Args:
        parent: the whole model.
        places: the junctions.
        batches: calibration rows.
        mode: ``rotate`` or ``diag``.
    """
    size: int = text_config(parent.config).hidden_size
    basis_HH = hadamard(size) if mode == "rotate" else None
    if mode == "rotate" and basis_HH is None:
        rank_zero_warn(f"patch: there is no Hadamard matrix of hidden size {size} here; mode 'diag' is used.")
    out = []
    for d_H in scales(parent, places, batches, basis_HH).cpu():
        basis = torch.eye(size, dtype=torch.float64) if basis_HH is None else basis_HH
        out.append(torch.eye(size, dtype=torch.float64) + basis * (d_H - 1) @ basis.T)  # exactly I at d = 1
    return out
