"""Count the bytes and the floating-point operations of code that runs on tensors without data.

Under ``FakeTensorMode`` the training step of a stage runs through every operation that a real one would run,
and each tensor has a shape, a type and a lifetime, but no data. The ledger watches the storages come and go.
So a plan follows the code: which tensors autograd keeps, when the graph of a draw dies, how long old
gradients live. No family of models needs formulas of its own. Memory inside a kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from src.models.attention import CPU, CPU_BACKWARD, attention_flops

PARTS = ("teacher", "student", "gradients", "optimiser", "activations", "loss chunk")


@dataclass
class _Record:
    part: str
    bytes: int


class Ledger(TorchDispatchMode):
    """Counts the bytes that are held, by the parts :data:`PARTS`, and the operations, while it is active.

    A new storage counts as ``loss chunk`` if it is as wide as the vocabulary, and as ``activations``
    otherwise, unless :meth:`own` names its part.

    Args:
        vocabulary: number of logits.

    Attributes:
        live: bytes now, by part.
        peak: bytes by part when their sum was highest.
        step_peak: as ``peak``, of the optimiser's step alone.
        flops: floating-point operations so far.
    """

    def __init__(self, vocabulary: int) -> None:
        TorchDispatchMode.__init__(self)
        self.vocabulary = vocabulary
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.step_peak: Counter[str] = Counter()
        self.flops = 0
        self._known = WeakIdKeyDictionary()  # storage -> its record

    def __torch_dispatch__(
        self,
        func: OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        out = _grouped_shape(*args, **kwargs) if packet is GROUPED else func(*args, **kwargs)
        formula = FLOPS.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                wide = self.vocabulary in value.shape[-2:]
                self._enter(value, "loss chunk" if wide else "activations")
        return out

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record the peak of the block, an optimiser's step, in ``step_peak`` and not in ``peak``.

        What the block allocates counts as the optimiser's.
        """
        before, self.peak = self.peak, Counter()
        yield
        self.step_peak, self.peak = self.peak, before
        for part in ("activations", "loss chunk"):
            self.step_peak["optimiser"] += self.step_peak.pop(part, 0)

    def own(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """Count the storages of some tensors to a part from now on, also those not counted before.

        Args:
            tensors: the tensors; None is passed over.
            part: one of :data:`PARTS`.
        """
        for tensor in tensors:
            if tensor is None:
                continue
            record = self._known.get(tensor.untyped_storage())
            if record is None:
                self._enter(tensor, part)
            elif record.part != part:
                self.live[record.part] -= record.bytes
                self.live[part] += record.bytes
                record.part = part

    def _enter(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known or tensor.device.type == "meta":
            return
        record = _Record(part, storage.nbytes())
        self._known[storage] = record
        self.live[part] += record.bytes
        weakref.finalize(storage, self._leave, record)
        if self.live.total() > self.peak.total():
            self.peak = Counter(self.live)

    def _leave(self, record: _Record) -> None:
        self.live[record.part] -= record.bytes


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return attention_flops(query.shape, key.shape, value.shape)


def _attention_back(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **__: Any) -> int:
    """Count five products in place of two, as the scores are computed again."""
    return _attention(query, key, value) * 5 // 2


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Count the product of experts: ``a [S, K]``, ``b [E, K, N]``; or backwards ``[K, S]``, ``[S, N]``."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[-1]


def _grouped_shape(a: Tensor, b: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return what the experts' product returns; torch knows it for bfloat16 only."""
    return a.new_empty(*([a.shape[0]] if b.ndim == 3 else [offs.shape[0], a.shape[0]]), b.shape[-1])


GROUPED = torch.ops.aten._grouped_mm
# torch counts the fused attention of GPUs and the plain products; these it does not know.
FLOPS: dict[object, Callable[..., int]] = {
    CPU: _attention,
    CPU_BACKWARD: _attention_back,
    GROUPED: _grouped,
}


@contextmanager
def fused_attention(ledger: Ledger) -> Iterator[None]:
    """Let attention hold in the block only what the fused kernels of GPUs hold, and so no matrix of scores.

    CPUs write the scores out where keys and values differ in width (multi-head latent attention). The
    function is replaced, because a torch function mode would be off while a backward pass recomputes layers.

    Args:
        ledger: counts the operations.
    """
    fused: Callable[..., Tensor] = _Fused.apply

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = q.new_empty(attn_mask.shape)  # kernels add it as numbers, a copy for each call
        return fused(ledger, attn_mask, q, k, v)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ledger: Ledger, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.ledger, ctx.mask = ledger, mask
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        ledger.flops += _attention(q, k, v)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        ctx.ledger.flops += _attention(q, k, v) * 5 // 2
        return None, None, *(torch.empty_like(x) for x in (q, k, v))
