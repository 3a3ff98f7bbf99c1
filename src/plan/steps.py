"""Run one step of each stage for a plan, with allocations in their real order and a teacher without weights.

The functions of the stages are called as they are. Only Lightning's loop around them is repeated here,
because it needs a running trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from lightning import Trainer
from torch import Tensor
from transformers import PreTrainedModel

from src.cache.teacher import CacheTeacher
from src.callbacks import AveragedWeights, Sparsify
from src.data.batches import Batch, Supervised
from src.losses.distill import Distillation
from src.losses.signals import FLOOR, Signal, TopK, live_signal
from src.models.head import OutputHead
from src.models.streams import streams
from src.plan.ledger import Ledger
from src.policies.draws import draw
from src.recover import Recovery
from src.search import MaskSearch
from src.teachers import Learner, LiveTeacher, TeacherSource


class PlannedTeacher:
    """Stands in for a teacher: gives a signal of the same shape, from a model without weights or from none.

    Args:
        source: the teacher of the config; only a live one needs a model.
        parent: name and revision of the parent.
    """

    weights: str | None = None
    """Fingerprint of the weights: None, as there are none."""

    def __init__(self, source: TeacherSource, parent: tuple[str, str | None]) -> None:
        self.source, self.parent = source, parent
        self.k: int | None = None
        self.head: OutputHead | None = None
        self.ledger: Ledger | None = None
        self.vocabulary, self.flops = 0, 0

    def adopt(self, parent: PreTrainedModel) -> None:
        """Keep the parent as the teacher, or load the model that the config's teacher would load."""
        self.vocabulary = OutputHead(parent).vocabulary
        if isinstance(self.source, LiveTeacher):
            loading = self.source.loading
            name, revision = self.source.name or self.parent[0], loading.revision or self.parent[1]
            plain = replace(loading, revision=revision, quantize=None)
            model = parent if self.source.adopts else plain.load(name)
            self.head = OutputHead(model.eval().requires_grad_(False))

    def refuse(self, trainer: Trainer, data: object, distillation: Distillation) -> None:
        """Refuse nothing: a plan runs on no trainer and reads no data."""

    def setup(self, learner: Learner) -> None:
        """Move nothing: there are no weights."""

    @torch.no_grad()
    def signal(self, batch: Batch, index_N: Tensor) -> Signal:
        """Return a signal at N positions whose tensors have no data."""
        if self.head is not None and self.ledger is not None:
            before = self.ledger.flops
            signal = live_signal(self.head, self.head.at(batch, index_N), self.k)
            self.flops = self.ledger.flops - before
            return signal
        size, k = len(index_N), self.k or self.vocabulary
        log_probs, entropy = torch.full((size, k), FLOOR), torch.zeros(size)
        return TopK(torch.zeros(size, k, dtype=torch.long), log_probs, entropy, entropy.clone())

    def states(self, layers: Sequence[int]) -> AbstractContextManager[dict[int, Tensor]]:
        """Collect the streams behind some layers, in the block, in tensors without data.

        A source without a model, such as a cache, refuses as it does in a run.
        """
        if self.head is None:
            return self.source.states(layers)
        return streams(self.head.model, layers)


class Counted(NamedTuple):
    """Holds what parts of a step cost.

    Attributes:
        teacher: floating-point operations of the teacher's forward pass.
        validation: operations of a validation of the same batch; 0 for stages that do not count it.
        validation_peak: bytes by part when a validation holds most.
    """

    teacher: int
    validation: int = 0
    validation_peak: Mapping[str, int] = MappingProxyType({})


def _search(search: MaskSearch, batch: Batch, ledger: Ledger, gpu: bool) -> Counted:
    """Run two draws: the second meets what the first still holds, and all further ones cost as it does.

    They share nothing, because a plan cannot know how alike a search's masks are: it is an upper bound.
    """
    rows = Supervised.of(batch)
    moving = [] if search.adapters is None else search.adapters.moving()
    moments = [torch.empty_like(p) for p in moving for _ in range(2)]  # of an optimiser like Adam
    ledger.own(moments, "optimiser")
    with search.trainer.precision_plugin.forward_context():
        signal = search.teacher_signal(rows)
        teacher_flops = ledger.flops
        drawn = []
        for number in range(min(2, search.draws)):
            before = ledger.flops
            drawn.append(draw(search, rows, signal, search.sample(number)))
    ledger.flops += (search.draws - min(2, search.draws)) * (ledger.flops - before)
    return Counted(teacher_flops)


def _recover(recovery: Recovery, batch: Batch, ledger: Ledger, gpu: bool) -> Counted:
    """Run a second step, in which the optimiser's state and the gradients of the first are held already."""
    trained = [p for p in recovery.model.parameters() if p.requires_grad]
    optimizer = recovery.optimizer(trained)
    for callback in getattr(recovery.trainer, "callbacks"):  # noqa: B009 (mypy)
        if isinstance(callback, Sparsify):
            callback.prepare(optimizer, recovery.model)
        if isinstance(callback, AveragedWeights):
            callback.average = {str(n): torch.empty_like(p) for n, p in enumerate(trained)}
            ledger.own(list(callback.average.values()), "optimiser")
    for group in optimizer.param_groups:
        if gpu and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # torch's choice on GPUs, at the price of temporaries
    for p in trained:
        p.grad = torch.empty_like(p)
        p.register_post_accumulate_grad_hook(lambda p: ledger.own([p.grad], "gradients"))
    ledger.own([p.grad for p in trained], "gradients")
    optimizer.step()
    for state in optimizer.state.values():
        ledger.own([x for x in state.values() if isinstance(x, Tensor)], "optimiser")
    ledger.peak.clear()
    before, recovery.training = ledger.flops, False  # it judges the cut, also where training begins whole
    with recovery.trainer.precision_plugin.forward_context(), torch.no_grad():
        recovery.distillation.measured(recovery.step(Supervised.of(batch)))
    validation, validation_peak = ledger.flops - before, dict(ledger.peak)
    ledger.flops, recovery.training = before, True
    ledger.peak.clear()
    with recovery.trainer.precision_plugin.forward_context():
        loss = recovery.losses(Supervised.of(batch))["loss"]
    optimizer.zero_grad()  # Lightning's order
    loss.backward()
    flops = ledger.flops
    with ledger.step():
        optimizer.step()
    ledger.flops = flops
    assert isinstance(recovery.teacher, PlannedTeacher)
    return Counted(recovery.teacher.flops, validation, validation_peak)


def _cache(cache: CacheTeacher, batch: Batch, ledger: Ledger, gpu: bool) -> Counted:
    with cache.trainer.precision_plugin.forward_context():
        cache.signal(batch)
    return Counted(ledger.flops)


STEPS: dict[type, Callable[..., Counted]] = {MaskSearch: _search, Recovery: _recover, CacheTeacher: _cache}
