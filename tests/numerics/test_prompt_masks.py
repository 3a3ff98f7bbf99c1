"""Laws of a mask for each prompt: rows do not see each other, exact counts, the router is the predictor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.data.arithmetic import build_tokenizer
from src.errors import ConfigError
from src.mask import Unit
from src.models.gated import freeze
from src.models.head import OutputHead
from src.policies import GumbelTopK, PromptMasks
from src.routing.clusters import mean_jaccard
from src.routing.search import PromptSearch
from src.search import MaskSearch
from src.units.kinds import KINDS
from tests.numerics.test_grain import SIZES
from tests.tiny import tiny_model

UNITS: list[Unit] = ["layer", "half", "kv_group", "channel"]


def predictor(unit: Unit = "layer", remove: int = 3, moved: float = 3.0, **keys: Any) -> PromptMasks:
    """A predictor of 12 units that reads embeddings of 5 numbers, as after some training."""
    policy = PromptMasks(hidden=4, init="zeros", **keys)
    policy.setup(remove=remove, **SIZES[unit])
    policy.reads(5)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        policy.up.weight.normal_(generator=noise).mul_(moved * policy.hidden)
        policy.logits.normal_(generator=noise)
    policy.meet(torch.randn(20, 5, generator=noise))
    return policy


def prompts(count: int = 8) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(7))


# ---------------------------------------------------------------------- gates of rows


@pytest.mark.parametrize("unit", UNITS)
def test_a_row_under_its_own_gates_is_what_it_is_alone(unit: Unit) -> None:
    """Hidden states, and the gradient of each row's gates; also for a unit that all rows close, or open."""
    model: PreTrainedModel = freeze(tiny_model("llama"))
    gates, head = KINDS[unit].gate(model), OutputHead(model)
    batch = {"input_ids": torch.arange(3, 33).view(3, 10)}
    given_BU = torch.rand(3, len(gates), generator=torch.Generator().manual_seed(0)).round(decimals=1)
    given_BU[:, :2], given_BU[0, 2:5], given_BU[:, 5:6] = 0.0, 0.0, 1.0
    together_BU = given_BU.clone().requires_grad_()
    with gates.use(together_BU):
        hidden_BTH = head.hidden(batch)
    (grad_BU,) = torch.autograd.grad(hidden_BTH.square().sum(), together_BU)
    for row in range(3):
        alone_U = given_BU[row].clone().requires_grad_()
        with gates.use(alone_U):
            own_BTH = head.hidden({"input_ids": batch["input_ids"][row : row + 1]})
        (own_U,) = torch.autograd.grad(own_BTH.square().sum(), alone_U)
        torch.testing.assert_close(hidden_BTH[row], own_BTH[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad_BU[row], own_U, rtol=1e-3, atol=1e-3 * float(own_U.abs().max()))


def test_rows_that_a_module_takes_as_one_are_refused() -> None:
    """Experts see tokens, not rows."""
    gates = KINDS["layer"].gate(freeze(tiny_model("llama")))
    with gates.use(torch.ones(3, len(gates))), pytest.raises(ConfigError, match="takes all rows as one"):
        gates._gate(0, torch.ones(30, 4))


# ---------------------------------------------------------------------- masks


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("gates_are", ["hard", "soft"])
def test_every_row_has_a_legal_mask_of_the_exact_count_and_rows_differ(unit: Unit, gates_are: Any) -> None:
    policy = predictor(unit, gates_are=gates_are)
    gates_BU = policy.masks(prompts())
    shares_BU = policy.shares(policy.scores(prompts()))
    for row_U in gates_BU:
        assert policy.space.legal(row_U.nonzero().flatten().tolist())
        assert int((row_U == 0).sum()) == policy.closed
    assert mean_jaccard(gates_BU.detach() > 0) < 1
    kept = policy.by_group(shares_BU[0]).sum(-1)
    torch.testing.assert_close(kept, torch.full_like(kept, policy.space.keep / policy.space.groups))
    hard_BU = (gates_BU > 0).float()
    expected_BU = hard_BU * shares_BU if gates_are == "soft" else hard_BU
    assert torch.equal(gates_BU, expected_BU)


def test_layers_that_must_stay_have_a_share_of_one_and_the_others_share_the_rest() -> None:
    policy = predictor(always_keep=[0, -1])
    shares_BU = policy.shares(policy.scores(prompts()))
    assert (shares_BU[:, [0, 11]] == 1).all()
    torch.testing.assert_close(shares_BU.sum(1), torch.full((8,), 9.0))
    assert (policy.masks(prompts())[:, [0, 11]] == 1).all()


def test_all_prompts_begin_with_one_mask_and_the_gradient_reaches_both_maps() -> None:
    policy = predictor(moved=0.0)
    assert torch.equal(policy.masks(prompts()), policy.sample(0, 0).expand(8, -1))
    told_BU = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))
    learner = torch.optim.Adam(policy.parameters(), lr=1.0)
    assert policy.down is not None
    for learned in ([policy.up.weight, policy.logits], [policy.down.weight, policy.up.weight, policy.logits]):
        learner.zero_grad()
        (policy.masks(prompts()) * told_BU).sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learned)
        learner.step()
    assert mean_jaccard(policy.hard(policy.scores(prompts()))) < 1


@pytest.mark.parametrize("gates_are", ["hard", "soft"])
def test_the_gradient_of_the_gates_is_that_of_the_shares(gates_are: Any) -> None:
    """Of hard gates all of it; of soft gates that of the kept units."""
    policy, told_BU = predictor(gates_are=gates_are), torch.randn(8, 12)
    gates_BU, shares_BU = policy.masks(prompts()), policy.shares(policy.scores(prompts()))
    through_BU = told_BU * (gates_BU > 0) if gates_are == "soft" else told_BU
    (grad,) = torch.autograd.grad((gates_BU * told_BU).sum(), policy.up.weight)
    (expected,) = torch.autograd.grad((shares_BU * through_BU).sum(), policy.up.weight)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("unit", UNITS)
def test_the_one_mask_is_the_best_for_the_mean_of_the_calibration_prompts(unit: Unit) -> None:
    policy = predictor(unit)
    assert policy.prompts is not None
    scores_PU = policy.scores(policy.prompts)
    torch.testing.assert_close(scores_PU.mean(0), policy.logits, rtol=0, atol=1e-5)
    assert torch.equal(policy.gates(policy.harden()), policy.space.argmax(scores_PU.mean(0).detach()))


def test_the_jaccard_index_by_hand() -> None:
    """The first and third are equal; the second shares one of three units with each."""
    masks_PU = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0]])
    assert mean_jaccard(masks_PU) == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert mean_jaccard(masks_PU[:1]) == 1
    assert mean_jaccard(torch.eye(3)) == 0


# ---------------------------------------------------------------------- search


def search(teacher_dir: str, unit: Unit = "layer", **keys: Any) -> PromptSearch:
    policy = keys.pop("policy", None) or PromptMasks(hidden=4, init="zeros")
    made = PromptSearch(teacher_dir, policy, unit=unit, remove=2, draws=1, **keys)
    made.configure_model()
    made._trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=5, world_size=1)  # type: ignore[assignment]
    made.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    return made


def rows(lengths: tuple[int, ...] = (4, 6, 3), answer: int = 5, width: int = 14) -> dict[str, Tensor]:
    """Padded rows of prompts of the given lengths, each with an answer."""
    noise = torch.Generator().manual_seed(3)
    ids_BT = torch.randint(3, len(build_tokenizer()), (len(lengths), width), generator=noise)
    place_BT, length_B1 = torch.arange(width)[None], torch.tensor(lengths)[:, None]
    real_BT = place_BT < length_B1 + answer
    labels_BT = ids_BT.masked_fill(~real_BT | (place_BT < length_B1), -100)
    return {"input_ids": ids_BT * real_BT, "attention_mask": real_BT.long(), "labels": labels_BT}


def trained(made: PromptSearch, batch: dict[str, Tensor]) -> PromptSearch:
    made.policy.meet(made.prompts(batch))
    with torch.no_grad():
        made.policy.up.weight.normal_(generator=torch.Generator().manual_seed(4)).mul_(8)
        made.policy.logits.normal_(generator=torch.Generator().manual_seed(5))
    return made


def test_a_prompt_is_read_alone_whatever_its_answer_and_padding(teacher_dir: str) -> None:
    made, batch = search(teacher_dir), rows()
    read_BH = made.prompts(batch)
    table = made.head.model.get_input_embeddings().weight
    torch.testing.assert_close(read_BH[1], table[batch["input_ids"][1, :6]].mean(0))
    other = rows(answer=8, width=30)
    inside = torch.arange(14) < torch.tensor([4, 6, 3])[:, None]
    other["input_ids"][:, :14] = torch.where(inside, batch["input_ids"], other["input_ids"][:, :14])
    torch.testing.assert_close(made.prompts(other), read_BH)
    with pytest.raises(ConfigError, match="no prompt to choose a mask by"):
        made.prompts({**batch, "labels": batch["input_ids"]})


def test_the_router_scores_a_prompt_as_the_predictor_does(teacher_dir: str) -> None:
    batch = rows()
    made = trained(search(teacher_dir), batch)
    router = made.policy.router(made.head.model.get_input_embeddings().weight, made.weights)
    said = [ids[:n].tolist() for ids, n in zip(batch["input_ids"], (4, 6, 3), strict=True)]
    expected_BU = made.policy.scores(made.prompts(batch))
    torch.testing.assert_close(router.scores(router.read(said)), expected_BU, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(router.scores(router.prompts_PD), expected_BU, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unit", ["layer", "half", "channel"])
def test_a_step_has_the_gradient_of_the_loss_through_the_shares(teacher_dir: str, unit: Unit) -> None:
    batch = rows()
    keys = {"policy": PromptMasks(hidden=4, init="zeros", gates_are="soft")}
    made = trained(search(teacher_dir, unit, **keys), batch)
    (grad,) = torch.autograd.grad(made.training_step(batch, 0), made.policy.up.weight)
    from src.data.batches import Supervised

    signal = made.teacher_signal(whole := Supervised.of(batch))
    gates_BU = made.policy.masks(made.prompts(batch))
    (direct,) = torch.autograd.grad(made.divergence(whole, signal, gates_BU), made.policy.up.weight)
    torch.testing.assert_close(grad, direct, rtol=1e-4, atol=1e-4 * float(direct.abs().max()))
    assert grad.abs().max() > 0


def test_what_a_search_of_prompts_cannot_use_is_refused(teacher_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"model.class_path to src.routing.search.PromptSearch"):
        MaskSearch(teacher_dir, PromptMasks(), remove=2).policy.refuse(None, False, False)
    with pytest.raises(ConfigError, match=r"Set model.draws to 1"):
        PromptSearch(teacher_dir, PromptMasks(), remove=2, draws=4)
    with pytest.raises(ConfigError, match="chooses for one count alone"):
        PromptSearch(teacher_dir, PromptMasks(), budgets=[0.25, 0.5], draws=1)
    with pytest.raises(ConfigError, match=r"model.policy: GumbelTopK reads no prompt"):
        PromptSearch(teacher_dir, GumbelTopK(), remove=2, draws=1)  # type: ignore[arg-type]
    made = PromptSearch(teacher_dir, PromptMasks(), remove=2, draws=1)
    with pytest.raises(ConfigError, match="FSDP2"):
        made.policy.refuse(None, False, in_parts=True)
    for shape in ({"packing": "documents", "supervise": "answer"}, {"packing": "padded", "supervise": "all"}):
        with pytest.raises(ConfigError, match=r"data.supervise to answer"):
            made.check_rows(SimpleNamespace(shape=shape))
