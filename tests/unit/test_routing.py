"""Laws of the few masks for many prompts, and of the router to them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.errors import ConfigError
from src.mask import Mask
from src.routing.clusters import clusters
from src.routing.router import Router
from src.units.alternating import Alternating
from src.units.groups import InEach
from src.units.spaces import AnyOf, Space

SPACES: list[Space] = [AnyOf(8, 5), AnyOf(8, 5, {0, 3}), Alternating(8, 4), InEach(2, AnyOf(4, 3))]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("space", SPACES)
def test_one_mask_is_the_best_for_all_and_as_many_as_differ_give_each_its_own(space: Space) -> None:
    scores_PU = noise(12, 8)
    one = clusters(scores_PU, space, 1)
    assert torch.equal(one.masks_KU[0], space.argmax(scores_PU.sum(0)))
    assert set(one.of_P.tolist()) == {0}
    own_PU = space.argmax(scores_PU)
    every = clusters(scores_PU, space, len(own_PU.unique(dim=0)))
    assert torch.equal(every.masks_KU[every.of_P], own_PU)
    worths = [clusters(scores_PU, space, k).worth for k in range(1, len(every.masks_KU) + 1)]
    assert worths == sorted(worths)
    assert worths[-1] == pytest.approx(float((scores_PU * own_PU).sum()))


@pytest.mark.parametrize("space", SPACES)
def test_masks_are_legal_and_neither_step_can_improve_them(space: Space) -> None:
    scores_PU = noise(20, 8, seed=1)
    found = clusters(scores_PU, space, 3)
    assert all(space.legal(mask_U.nonzero().flatten().tolist()) for mask_U in found.masks_KU)
    worth_PK = scores_PU @ found.masks_KU.T
    assert torch.equal(worth_PK.argmax(1), found.of_P)
    for number, mask_U in enumerate(found.masks_KU):
        assert torch.equal(space.argmax(scores_PU[found.of_P == number].sum(0)), mask_U)
    assert found.worth == pytest.approx(float(worth_PK.amax(1).sum()))


def test_kinds_of_prompts_are_told_apart_as_by_trying_all_masks() -> None:
    space = AnyOf(6, 4)
    kinds_KU = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]]).double()
    scores_PU = 3 * kinds_KU.repeat(5, 1) + 0.3 * noise(15, 6)
    found = clusters(scores_PU, space, 3)
    assert {tuple(m) for m in found.masks_KU.tolist()} == {tuple(m) for m in kinds_KU.tolist()}
    gates_MU = torch.stack([torch.zeros(6).index_fill(0, torch.tensor(kept), 1.0) for kept in space]).double()
    worth_PM = scores_PU @ gates_MU.T
    best = max(float(worth_PM[:, list(t)].amax(1).sum()) for t in itertools.combinations(range(15), 3))
    assert found.worth == pytest.approx(best)


def test_more_masks_than_the_prompts_have_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"--clusters: 2 given, but 4 calibration prompts have 1 different masks.*collapsed"
    ):
        clusters(torch.arange(8.0).repeat(4, 1), AnyOf(8, 5), 2)


def router(seed: int = 0) -> Router:
    table, weight, bias, read = noise(30, 4), noise(8, 4, seed=seed), noise(8, seed=3), noise(6, 4, seed=4)
    return Router(table.float(), weight.float(), bias.float(), read.float(), (0, 3), "sha256:ab")


def test_a_checkpoint_is_worth_the_sum_of_what_it_keeps() -> None:
    """Whatever the order of the prompt's tokens; a prompt that is said twice goes where it goes once."""
    one, masks_KU = router(), torch.stack([SPACES[0].argmax(noise(8, seed=s)) for s in (5, 6, 7)])
    prompts = [[3, 7, 7, 1], [20], [4, 29, 0]]
    units_PU, cuts_PK = one.scores(one.read(prompts)), one.to(masks_KU).scores(one.read(prompts))
    torch.testing.assert_close(cuts_PK, units_PU @ masks_KU.float().T)
    chosen = one.to(masks_KU).route(prompts)
    assert chosen == cuts_PK.argmax(1).tolist()
    assert one.to(masks_KU).route([ids[::-1] * 2 for ids in prompts]) == chosen
    assert one.route([]) == []


def test_a_router_is_read_as_it_was_written_and_refuses_another_mask(tmp_path: Path) -> None:
    path, one = tmp_path / "router.safetensors", router()
    one.save(path)
    again = Router.load(path)
    for name in ("table_VD", "weight_UD", "bias_U", "prompts_PD"):
        assert torch.equal(getattr(one, name), getattr(again, name))
    assert (again.pinned, again.fingerprint) == (one.pinned, one.fingerprint)
    mask = replace(Mask.by_hand("m", 8, range(5)), fingerprint="sha256:ab")
    again.check(mask)
    for other in (replace(mask, fingerprint="sha256:cd"), replace(mask, num_layers=9)):
        with pytest.raises(ConfigError, match=r"router: it was trained for 8 units"):
            again.check(other)


@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_a_missing_or_damaged_router_is_one_message(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "router.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"router: .* cannot be read .*prompts.yaml"):
        Router.load(path)
