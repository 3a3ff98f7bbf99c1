"""Build orthonormal Hadamard matrices of the sizes that hidden states have.

Sylvester's doubling times a base of Paley's, for a prime q: of order q + 1 where q = 3 (mod 4), of order
2 (q + 1) where q = 1 (mod 4). That covers hidden sizes such as 576, 896, 2304, 2880, 3584, 5120 and 6656.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(size: int) -> Tensor | None:
    """Return a matrix ``H [size, size]``, float64, with ``H H^T = I`` and entries of one magnitude.

    There is none for sizes above 2 that are no multiple of 4, and a few others are out of reach of both
    constructions; then None is returned.
    """
    base, doublings = _paley(size), 0
    while base is None and size % 2 ** (doublings + 1) == 0:
        doublings += 1
        base = _paley(size >> doublings)
    if base is None:
        return None
    for _ in range(doublings):
        base = torch.kron(base, base.new_tensor([[1.0, 1.0], [1.0, -1.0]]))
    return base / math.sqrt(size)


def _paley(order: int) -> Tensor | None:
    """Return a matrix of +1 and -1 by one of Paley's constructions over a prime; None if neither fits."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return torch.eye(order, dtype=torch.float64) + _bordered(order - 1, sign=-1.0)
    q = order // 2 - 1
    if order % 4 == 0 and _is_prime(q) and q % 4 == 1:
        cross = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        spread = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        eye = torch.eye(q + 1, dtype=torch.float64)
        return torch.kron(_bordered(q, sign=1.0), cross) + torch.kron(eye, spread)
    return None


def _bordered(q: int, sign: float) -> Tensor:
    """Return the quadratic characters of ``i - j`` modulo q, bordered by ones (the column times ``sign``)."""
    residue_q = torch.full((q,), -1.0, dtype=torch.float64)
    residue_q[torch.arange(q) ** 2 % q] = 1.0
    residue_q[0] = 0.0
    index = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 1:] = residue_q[(index[:, None] - index) % q]
    matrix[0, 1:], matrix[1:, 0] = 1.0, sign
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
