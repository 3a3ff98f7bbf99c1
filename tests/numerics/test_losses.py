"""Laws of the distillation losses: equalities, zeros and gradients against the plain formulas."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from src.data.batches import supervised
from src.errors import ConfigError
from src.losses.distill import Distillation
from src.losses.kl import kl
from src.losses.signals import FLOOR, Dense, TopK, dense_signal, live_signal, topk_signal
from src.models.head import OutputHead
from tests.tiny import FAMILIES, VOCAB, tiny_ids, tiny_model

torch.set_num_threads(1)
RULES = ("bucket", "renormalise", "zero")


def logits(seed: int, tokens: int = 6, vocabulary: int = 23) -> torch.Tensor:
    return 2 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def graded(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


def plain_kl(q: torch.Tensor, p: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    target, student = (p / temperature).log_softmax(-1), (q / temperature).log_softmax(-1)
    return F.kl_div(student, target, log_target=True, reduction="none").sum(-1)


def plain_topk(q: torch.Tensor, p: torch.Tensor, k: int, rule: str) -> torch.Tensor:
    """The table in src/losses/kl.py, written as probabilities and left to autograd, in float64."""
    p, q = p.double().softmax(-1), q.double().softmax(-1)
    ids = p.topk(k).indices
    p, q = p.gather(-1, ids), q.gather(-1, ids)
    r, s = 1 - p.sum(-1), 1 - q.sum(-1)
    if rule == "bucket":
        return (p * (p / q).log()).sum(-1) + r * (r / s).log()
    p = p / p.sum(-1, keepdim=True)
    q = q / q.sum(-1, keepdim=True) if rule == "renormalise" else q
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("rule", RULES)
def test_topk_divergence_is_its_formula_in_value_and_gradient(rule: str) -> None:
    ours, theirs, weights = graded(logits(0)), graded(logits(0)), torch.rand(6)
    value = kl(ours, topk_signal(logits(1), 5), rule)
    expected = plain_topk(theirs, logits(1), 5, rule)
    (value @ weights).backward()
    (expected @ weights.double()).backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("rule", [*RULES, None])
def test_the_whole_vocabulary_is_the_full_divergence(rule: str | None, temperature: float) -> None:
    teacher, ours, theirs = logits(1), graded(logits(0)), graded(logits(0))
    signal = topk_signal(teacher, 23) if rule else dense_signal(teacher)
    value = kl(ours, signal, rule or "bucket", temperature)
    expected = plain_kl(theirs, teacher, temperature)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_bucket_never_exceeds_the_full_divergence_and_grows_with_k() -> None:
    values = [kl(logits(0), topk_signal(logits(1), k), "bucket") for k in (1, 3, 8, 15, 23)]
    assert all((low <= high + 1e-6).all() for low, high in pairwise(values))


def test_zero_differs_from_renormalise_by_the_students_mass_outside() -> None:
    signal, student = topk_signal(logits(1), 5), logits(0)
    inside = student.log_softmax(-1).gather(-1, signal.ids).logsumexp(-1)
    torch.testing.assert_close(kl(student, signal, "zero"), kl(student, signal, "renormalise") - inside)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("form", ["dense", "bucket", "renormalise"])
def test_no_loss_and_no_gradient_at_student_equals_teacher(form: str, temperature: float) -> None:
    student = graded(logits(0))
    k = 23 if temperature != 1 and form == "bucket" else 5  # the rest at T != 1 is only bounded
    signal = dense_signal(logits(0)) if form == "dense" else topk_signal(logits(0), k)
    value = kl(student, signal, "bucket" if form == "dense" else form, temperature)
    value.sum().backward()
    assert value.abs().max() < 1e-6
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("form", ["dense", *RULES])
def test_impossible_tokens_give_finite_losses_and_gradients(form: str) -> None:
    teacher, student = logits(1), logits(0)
    teacher[:, 4:], student[:, 9:] = -torch.inf, -torch.inf
    signal = dense_signal(teacher) if form == "dense" else topk_signal(teacher, 7)
    student.requires_grad_()
    value = kl(student, signal, "bucket" if form == "dense" else form)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()
    if form != "renormalise":  # which leaves out of q what the others keep
        q, p = student.detach()[:, :9].log_softmax(-1)[:, :4], teacher[:, :4].log_softmax(-1)
        torch.testing.assert_close(value.detach(), (p.exp() * (p - q)).sum(-1))


def test_tempered_rest_is_a_lower_bound_exact_to_first_order_and_for_flat_tails() -> None:
    teacher, k = logits(1, vocabulary=50), 5
    signal = topk_signal(teacher, k)

    def mass(temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        truth = (teacher / temperature).softmax(-1).gather(-1, signal.ids)
        return signal.tempered(temperature, 50)[1].exp(), 1 - truth.sum(-1)

    for temperature in (0.5, 0.9, 1.1, 2.0, 4.0):
        ours, truth = mass(temperature)
        assert (ours <= truth + 1e-6).all()
    slopes = [(a - b) / 0.02 for a, b in zip(mass(1.01), mass(0.99), strict=True)]
    torch.testing.assert_close(*slopes, rtol=0.02, atol=1e-4)
    flat = logits(1, vocabulary=50)
    flat.scatter_(-1, flat.topk(45, largest=False).indices, -2.0)
    signal = topk_signal(flat, 5)
    whole = (flat / 3).log_softmax(-1).gather(-1, signal.ids)
    torch.testing.assert_close(signal.tempered(3.0, 50)[0], whole, rtol=1e-4, atol=1e-4)


def step(loss: Distillation, head: OutputHead, hidden: torch.Tensor, labels: torch.Tensor,
         signal: TopK | Dense) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Loss, and gradients of the hidden states and of the head."""
    hidden = graded(hidden)
    head.linear.zero_grad()
    out = loss(head, hidden, labels, signal)["loss"]
    out.backward()
    return out.detach(), hidden.grad, *(p.grad.clone() for p in head.parameters)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2", "granite", "phi"])
@pytest.mark.parametrize("k", [None, 10])
def test_chunked_equals_unchunked_and_the_models_own_logits(family: str, k: int | None) -> None:
    """Soft caps, logit scales and biases included; the reference knows none of this repository's code."""
    model, teacher = tiny_model(family), tiny_model(family, seed=1)
    batch = {"input_ids": tiny_ids(), "labels": tiny_ids()}
    index = supervised(batch["labels"])
    head = OutputHead(model)
    hidden = head.hidden(batch).detach().flatten(0, 1)[index]
    labels = batch["labels"].flatten()[index + 1]
    theirs = teacher(batch["input_ids"]).logits.detach()
    signal = live_signal(OutputHead(teacher), OutputHead(teacher).hidden(batch).flatten(0, 1)[index], k, 7)
    chunks = [Distillation(k=k, weight="none", alpha=0.7, chunk_tokens=c) for c in (5, 1000)]
    small, large = (step(c, head, hidden, labels, signal) for c in chunks)
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if k is None:
        model.zero_grad()
        own = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        full = 0.7 * plain_kl(own, theirs[:, :-1].flatten(0, 1)).mean() + 0.3 * F.cross_entropy(own, labels)
        torch.testing.assert_close(small[0], full.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "cohere2"])
def test_gradient_of_the_head_equals_autograd_and_a_frozen_head_gets_none(family: str) -> None:
    model = tiny_model(family)
    head, hidden, labels = OutputHead(model), torch.randn(9, 32), torch.arange(9)
    teacher = logits(3, 9, VOCAB)
    _, hidden_grad, weight_grad = step(
        Distillation(weight="none", chunk_tokens=4), head, hidden, labels, dense_signal(teacher)
    )
    reference = graded(hidden)
    model.zero_grad()
    plain_kl(head.logits(reference), teacher).mean().backward()
    torch.testing.assert_close(hidden_grad, reference.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weight_grad, head.linear.weight.grad, rtol=1e-5, atol=1e-7)
    model.requires_grad_(False)
    assert len(step(Distillation(chunk_tokens=4), head, hidden, labels, dense_signal(teacher))) == 2


def test_trained_head_under_bf16_autocast_gets_the_gradient_of_the_plain_loss() -> None:
    """Also after a pass without gradient, whose cached weight cast must not cut the graph."""
    head, hidden, labels = OutputHead(tiny_model("llama")), torch.randn(9, 32), torch.arange(9)
    teacher = logits(3, 9, VOCAB)
    loss = Distillation(weight="eakd", chunk_tokens=4)
    exact = step(loss, head, hidden, labels, dense_signal(teacher))
    with torch.autocast("cpu", torch.bfloat16):
        rough = step(loss, head, hidden, labels, dense_signal(teacher))
    assert len(exact) == len(rough) == 3
    for a, b in zip(exact, rough, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_autocast_leaves_everything_after_the_logits_in_float32(alpha: float) -> None:
    head = SimpleNamespace(logits=lambda h, _: h.contiguous(), parameters=(), vocabulary=VOCAB, sums=False)
    labels, signal = tiny_ids(1, 300)[0], topk_signal(logits(1, 300, VOCAB), 10)
    found = []
    for enabled in (False, True):
        x = graded(logits(0, 300, VOCAB))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = Distillation(alpha=alpha)(head, x, labels, signal)["loss"]
        loss.backward()
        found.append((loss.detach(), x.grad))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_no_gradient_is_made_in_evaluation() -> None:
    head = OutputHead(tiny_model("llama"))
    signal = topk_signal(logits(1, 4, VOCAB), 5)
    with torch.no_grad():
        out = Distillation()(head, graded(torch.randn(4, 32)), torch.arange(4), signal)
    assert not any(value.requires_grad for value in out.values())


def test_no_supervised_position_gives_zero_not_nan() -> None:
    head, none = OutputHead(tiny_model("llama")), torch.zeros(0, dtype=torch.long)
    signal = live_signal(head, torch.zeros(0, 32), 5)
    out = Distillation()(head, graded(torch.zeros(0, 32)), none, signal)
    out["loss"].backward()
    assert out["loss"] == 0


def test_a_model_in_training_with_dropout_is_understood_and_stays_as_it_was() -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    modes = [part.training for part in model.modules()]
    OutputHead(model).check()
    assert [part.training for part in model.modules()] == modes
    assert any(part.p > 0 for part in model.modules() if isinstance(part, torch.nn.Dropout))


@pytest.mark.parametrize("family", FAMILIES)
def test_head_is_the_models_own(family: str) -> None:
    OutputHead(tiny_model(family)).check()


@pytest.mark.parametrize("family", ["gemma2", "cohere2", "granite"])
def test_an_unknown_post_processing_is_refused(family: str) -> None:
    head = OutputHead(tiny_model(family))
    head.cap, head.scale = None, 1.0
    with pytest.raises(ConfigError, match=family):
        head.check()


def test_supervised_positions_are_one_before_their_labels() -> None:
    labels = torch.tensor([[-100, -100, 7, 8], [5, -100, 6, -100]])
    index = supervised(labels)
    assert index.tolist() == [1, 2, 5]
    assert labels.flatten()[index + 1].tolist() == [7, 8, 6]
    packed = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    assert supervised(labels, packed).tolist() == [2, 5]


@pytest.mark.parametrize("weight", ["linear", "ratio"])
def test_micro_batches_sum_to_the_whole_when_the_corpus_mean_is_known(weight: str) -> None:
    head, hidden, labels = OutputHead(tiny_model("llama")), torch.randn(12, 32), torch.arange(12)
    signal = topk_signal(logits(3, 12, VOCAB), 10)
    loss = Distillation(weight=weight, mean_entropy=float(signal.entropy.mean()))
    whole = step(loss, head, hidden, labels, signal)
    parts = [slice(0, 5), slice(5, 6), slice(6, 12)]
    split = [step(loss, head, hidden[at], labels[at], signal.select(at)) for at in parts]
    shares = [(at.stop - at.start) / 12 for at in parts]
    torch.testing.assert_close(whole[0], sum(n * s[0] for n, s in zip(shares, split, strict=True)))
    torch.testing.assert_close(whole[2], sum(n * s[2] for n, s in zip(shares, split, strict=True)))


@pytest.mark.parametrize(
    ("key", "value"),
    [("rule", "buckett"), ("weight", "liner"), ("k", 0), ("temperature", 0.0), ("alpha", 1.5)],
)
def test_faulty_settings_are_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        Distillation(**{key: value})


def test_signals_hold_no_infinity() -> None:
    cold = torch.tensor([[0.0, -1e9, -torch.inf]])
    assert dense_signal(cold).log_probs.min() == FLOOR
    assert topk_signal(cold, 2).log_rest.item() == FLOOR
