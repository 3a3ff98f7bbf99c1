"""A runner's short recovery is the plain training of its cut: rows in turn, one step each, and its cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from src.data.batches import Supervised
from src.losses.kl import kl
from src.losses.signals import topk_signal
from src.models.cut import cut
from src.policies import GumbelTopK
from src.policies.race import Race
from src.units.spaces import Kept
from tests.conftest import LAYERS
from tests.numerics.test_probe import batches, probe_of
from tests.tiny import mask_of, problem_rows

KEEP, RATE = (0, 2, 3, 5), 2e-3


def logits(model: Any, rows: Supervised) -> Tensor:
    """At the supervised positions, from the model's own forward pass."""
    inputs = {key: value for key, value in rows.batch.items() if key != "labels"}
    return model(**inputs, use_cache=False).logits.flatten(0, 1)[rows.index_N]


def trained_by_hand(teacher_dir: str, taught: list[Supervised], steps: int) -> float:
    """AdamW on the divergence of the teacher's top 10, its rate along half a cosine; then judged."""
    parent = AutoModelForCausalLM.from_pretrained(teacher_dir).eval()
    student = cut(parent, mask_of(KEEP, LAYERS)).requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        rows = taught[step % len(taught)]
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.no_grad():
            signal = topk_signal(logits(parent, rows), 10)
        optimizer.zero_grad()
        kl(logits(student, rows), signal).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    judged = [Supervised.of(batch) for batch in batches()]
    with torch.no_grad():
        sums = [
            kl(logits(student, rows), topk_signal(logits(parent, rows), 10)).sum().item() for rows in judged
        ]
    return sum(sums) / sum(map(len, judged))


@pytest.mark.parametrize("steps", [1, 5])
def test_it_is_the_training_written_by_hand(steps: int, teacher_dir: str) -> None:
    policy = GumbelTopK(init="random", candidates=1)
    probe = probe_of(teacher_dir, policy, "layer", 0.0)
    taught = [Supervised.of(problem_rows(count)) for count in (3, 2)]
    pairs = [(rows, probe.search.teacher_signal(rows)) for rows in taught]
    before = {name: tensor.clone() for name, tensor in probe.search.head.model.state_dict().items()}
    found = Race(runners=2, lr=RATE).recovered(probe, KEEP, pairs, steps)
    assert found == pytest.approx(trained_by_hand(teacher_dir, taught, steps), rel=1e-4)
    after = probe.search.head.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the parent stays as it was"


def test_more_steps_come_nearer_and_their_tokens_are_counted(teacher_dir: str) -> None:
    """A step costs three passes of the cut, the judgement one; each begins from the cut."""
    policy = GumbelTopK(init="random", candidates=1)
    probe = probe_of(teacher_dir, policy, "layer", 0.0)
    search, race = probe.search, Race(runners=2, lr=RATE)
    rows = Supervised.of(problem_rows(4))
    pairs = [(rows, search.teacher_signal(rows))]
    judged = sum(int(batch["attention_mask"].sum()) for batch in batches())
    values = list[float]()
    for steps in (1, 8, 1):
        before = search.forward_tokens
        values.append(race.recovered(probe, KEEP, pairs, steps))
        if len(values) > 1:  # the first has asked for the teacher's signal, too
            read = int(rows.batch["attention_mask"].sum())
            cost = (3 * steps * read + judged) * len(KEEP) / LAYERS
            assert search.forward_tokens - before == pytest.approx(cost)
    assert values[1] < values[0] == values[2]


def test_the_winner_is_the_one_that_recovers_best(teacher_dir: str) -> None:
    """Among all that ran in the last round, with the very numbers of their recoveries."""
    policy = GumbelTopK(init="random", candidates=1)
    probe = probe_of(teacher_dir, policy, "layer", 0.0)
    policy.initialise(probe)
    masks: list[Kept] = [KEEP, (0, 1, 2, 3), (1, 2, 3, 4)]
    probe.walk([policy.gates(kept) for kept in masks], "masks")
    ran = list[tuple[int, Kept, float]]()

    class Noted(Race):
        def recovered(self, *args: Any) -> float:
            ran.append((args[3], args[1], super().recovered(*args)))
            return ran[-1][2]

    winner, figures = Noted(runners=3, steps=1, lr=RATE)(probe, policy, [problem_rows(3)])
    last = [(value, kept) for steps, kept, value in ran if steps == max(each[0] for each in ran)]
    assert len(last) == 2
    assert (figures["kl_recovered"], winner) == min(last)
    assert figures["kl"] == probe.divergence(policy.gates(winner))
