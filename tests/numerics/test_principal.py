"""Laws of the regression: the directions are those that fits without each row in turn predict it best by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from src.policies.principal import regression


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def centred(rows: int, inputs: int) -> Tensor:
    read_PD = noise(rows, inputs, seed=1) * torch.logspace(1, -1, inputs).double()
    return read_PD - read_PD.mean(0)


@pytest.mark.parametrize(("rows", "inputs"), [(14, 4), (8, 11)])
@pytest.mark.parametrize("kinds", [0, 1, 3])
def test_the_directions_are_the_best_of_all_fits_without_one_row(rows: int, inputs: int, kinds: int) -> None:
    read_PD = centred(rows, inputs)
    right_DR = torch.linalg.svd(read_PD, full_matrices=False)[2].T
    own_PU = 5 + 2 * read_PD @ right_DR[:, :kinds] @ noise(kinds, 3, seed=2) + noise(rows, 3, seed=3)
    tried = range(min(inputs, rows // 2) + 1)

    def fitted(keep: list[int], count: int) -> Tensor:
        """Least squares on so many directions and a constant."""
        seen = torch.cat([read_PD @ right_DR[:, :count], torch.ones(rows, 1).double()], 1)
        return seen @ torch.linalg.lstsq(seen[keep], own_PU[keep]).solution

    def left_out(count: int) -> float:
        without = [fitted([i for i in range(rows) if i != row], count)[row] for row in range(rows)]
        return float((own_PU - torch.stack(without)).square().sum())

    predicted_PU = own_PU.mean(0) + read_PD @ regression(read_PD, own_PU)
    torch.testing.assert_close(predicted_PU, fitted([*range(rows)], min(tried, key=left_out)))


def test_what_is_linear_is_found_and_of_noise_nothing() -> None:
    read_PD, true_DU = centred(40, 5), noise(5, 2, seed=2)
    torch.testing.assert_close(regression(read_PD, read_PD @ true_DU - 7), true_DU)
    assert not regression(read_PD, noise(40, 200, seed=3)).any()
    assert not regression(torch.zeros(40, 5), noise(40, 2, seed=3)).any(), "equal inputs tell nothing"
