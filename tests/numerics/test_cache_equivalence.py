"""The equivalence certificate: cached, live, dense, padded, packed and split train the same student."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule
from transformers import AutoModelForCausalLM, PreTrainedModel

from src.cache import Cache, CachedCorpus
from src.cache.shards import Rows
from src.data.batches import supervised
from src.losses.distill import Distillation
from src.losses.signals import Signal, TopK, live_signal
from src.models.gated import freeze
from src.models.head import OutputHead
from src.teachers import LiveTeacher
from tests.cached import Workspace, small, tokenizer, workspace
from tests.marks import slow

torch.set_num_threads(1)
Batch = dict[str, torch.Tensor]
FAMILIES = ["llama", slow("gemma2")]  # gemma2 caps its logits


@pytest.fixture(scope="module", params=FAMILIES)
def ws(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.mktemp(request.param), request.param, rows=24)


def teacher_of(ws: Workspace) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(ws.model)
    freeze(model)
    return model


def live(model: PreTrainedModel, batch: Batch, k: int | None) -> Signal:
    head = OutputHead(model)
    index = supervised(batch["labels"], batch.get("position_ids"))
    with torch.no_grad():
        return live_signal(head, head.hidden(batch).flatten(0, 1)[index], k)


def cached(batch: Batch) -> TopK:
    return TopK(*(batch[f"teacher_{name}"] for name in ("ids", "log_probs", "entropy", "log_rest")))


def gradient(student: PreTrainedModel, batch: Batch, signal: Signal, loss: Distillation) -> torch.Tensor:
    """Loss and flat gradient of all weights, laid end to end, times the number of positions."""
    head = OutputHead(student)
    index = supervised(batch["labels"], batch.get("position_ids"))
    hidden = head.hidden(batch).flatten(0, 1)[index]
    student.zero_grad()
    value = loss(head, hidden, batch["labels"].flatten()[index + 1], signal)["loss"]
    value.backward()
    grads = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    return torch.cat([value.detach()[None], *grads]) * len(index)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (a - b).norm() <= tolerance * b.norm()


def test_cached_whole_vocabulary_is_the_dense_teacher(ws: Workspace) -> None:
    path = ws.write("all", precision="float32", k=1000)
    batch = next(iter(CachedCorpus(tokenizer=ws.model, train=path, batch_size=6).train_dataloader()))
    student, dense = small(ws.family, seed=1), live(teacher_of(ws), batch, None)
    for threshold in (0.0, 1.00003 * float(dense.entropy.median())):
        loss = Distillation(k=None, chunk_tokens=50, reverse_below=threshold)
        expected = gradient(student, batch, dense, loss)
        close(gradient(student, batch, cached(batch), loss), expected)


def train(ws: Workspace, path: str, live_k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Fifty optimiser steps from cached or live signals of the same documents: losses and weights."""
    student, teacher = small(ws.family, seed=1).train(), teacher_of(ws)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    head, loss = OutputHead(student), Distillation(k=10, weight="linear", alpha=0.9)
    loader, losses = CachedCorpus(tokenizer=ws.model, train=path, batch_size=4).train_dataloader(), []
    while len(losses) < 50:
        for batch in loader:
            signal = cached(batch) if live_k is None else live(teacher, batch, live_k)
            index = supervised(batch["labels"])
            hidden = head.hidden(batch).flatten(0, 1)[index]
            value = loss(head, hidden, batch["labels"].flatten()[index + 1], signal)["loss"]
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.detach())
    weights = torch.cat([p.detach().flatten() for p in student.parameters()])
    return torch.stack(losses[:50]), weights


def test_fifty_steps_from_the_cache_are_fifty_steps_from_the_live_teacher(ws: Workspace) -> None:
    """Bounds: float32 differs by summation order alone; the others by their rounding, far below the loss."""
    path = ws.write("float32", precision="float32")
    losses, weights = train(ws, path, live_k=10)
    start = torch.cat([p.detach().flatten() for p in small(ws.family, seed=1).parameters()])
    assert losses[-5:].mean() < 0.8 * losses[:5].mean(), "the trajectory must go somewhere"
    bounds = {"float32": (1e-5, 1e-5), "float16": (3e-4, 3e-3), "compact": (5e-3, 0.03)}
    for precision, (loss_bound, weight_bound) in bounds.items():
        path = ws.write(precision, precision=precision)
        ours, now = train(ws, path, live_k=None)
        assert ((ours - losses).abs() / losses).max() < loss_bound, precision
        assert (now - weights).norm() < weight_bound * (weights - start).norm(), precision


def test_what_is_stored_at_a_token_is_said_one_token_before(ws: Workspace) -> None:
    """Entry j of a document is the model's own prediction of its supervised token j, and nothing later."""
    rows = Cache(ws.write("shift", precision="float32", supervise="answer")).read(0)
    count, length = int(rows.counts[0]), int(rows.lengths[0])
    assert count < length - 1
    ids = torch.tensor(rows.tokens[:length]).long()
    at = torch.tensor(rows.supervised[:length]).nonzero()[:, 0]
    log_p = teacher_of(ws)(ids[None]).logits[0].detach().log_softmax(-1)[at - 1]
    assert len(at) == count
    expected = log_p.topk(10)
    assert torch.equal(torch.tensor(rows.ids[:count]).long(), expected.indices)
    entropy = -(log_p.exp() * log_p).sum(-1)
    for stored, own in ((rows.log_probs, expected.values), (rows.entropy, entropy)):
        torch.testing.assert_close(torch.tensor(stored[:count]), own, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(ws: Workspace) -> None:
    batch = next(iter(ws.corpus(batch_size=5).predict_dataloader()))
    wide = {
        key: torch.nn.functional.pad(value, (0, 9), value=-100 if key == "labels" else 0)
        for key, value in batch.items()
    }
    teacher, student, loss = teacher_of(ws), small(ws.family, seed=1), Distillation()
    expected = gradient(student, batch, live(teacher, batch, 10), loss)
    close(gradient(student, wide, live(teacher, wide, 10), loss), expected)


def test_packing_and_batch_split_change_nothing(ws: Workspace) -> None:
    """The sum over a corpus of loss and gradient; the mean of the token weights is the corpus's."""
    teacher, student, sums = teacher_of(ws), small(ws.family, seed=1), []
    loss = Distillation(mean_entropy=2.0)
    for options in ({"batch_size": 6}, {"batch_size": 1}, {"packing": "documents", "batch_size": 3}):
        batches = list(ws.corpus(**options).predict_dataloader())
        sums.append(sum(gradient(student, b, live(teacher, b, 10), loss) for b in batches))
    close(sums[1], sums[0])
    close(sums[2], sums[0])


def test_packed_and_padded_corpora_give_the_same_rows(ws: Workspace) -> None:
    def table(path: str) -> list[tuple[list[int], list[float]]]:
        cache = Cache(path)
        rows = Rows.concatenate([cache.read(i) for i in range(len(cache.shards))])
        tokens, entropies = rows.lengths.cumsum(), rows.counts.cumsum()
        return sorted(
            (rows.tokens[t - n : t].tolist(), rows.entropy[e - c : e].round(4).tolist())
            for t, n, e, c in zip(tokens, rows.lengths, entropies, rows.counts, strict=True)
        )

    padded = table(ws.write("padded", precision="float32"))
    packed = table(ws.write("packed", precision="float32", packing="documents", batch_size=2))
    assert [tokens for tokens, _ in packed] == [tokens for tokens, _ in padded]
    for (_, a), (_, b) in zip(packed, padded, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-3, atol=1e-3)


def test_no_loss_and_no_gradient_when_the_student_is_the_teacher(ws: Workspace) -> None:
    batch = next(iter(ws.corpus().predict_dataloader()))
    student, loss = teacher_of(ws).requires_grad_(True), Distillation()
    away = gradient(small(ws.family, seed=1), batch, live(student, batch, 10), loss)
    assert gradient(student, batch, live(student, batch, 10), loss).norm() < 1e-5 * away.norm()


def test_a_checkpoint_of_a_recovery_can_hold_no_teacher(ws: Workspace) -> None:
    module = LightningModule()
    module.distillation, module.teacher = Distillation(), LiveTeacher(ws.model)
    module.head, module.data = SimpleNamespace(vocabulary=len(tokenizer())), ws.corpus()
    module.teacher.setup(module)
    assert not module.state_dict()
    assert not list(module.parameters())
