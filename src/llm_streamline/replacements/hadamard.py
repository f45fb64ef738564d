"""Rotations that spread every channel over all others: Hadamard matrices, and a cosine transform where there is none.

SciPy knows orders that are powers of two only, and the widths of models (576, 2560, 5120 ...) often are not.
"""

import math
from functools import cache

import torch
from torch import Tensor


def rotation(size: int) -> Tensor:
    """An orthogonal (size, size) float64 matrix whose entries are all of about the same size.

    It is a normalised Hadamard matrix where one can be made of the constructions below, which is so for every width in
    common use; otherwise the orthonormal cosine transform (DCT-II), whose entries are at most sqrt(2 / size).
    """
    matrix = hadamard(size)
    if matrix is not None:
        return matrix / math.sqrt(size)
    n = torch.arange(size, dtype=torch.float64)
    cosines = torch.cos(math.pi / size * (n + 0.5)[:, None] * n[None, :]) * math.sqrt(2 / size)
    cosines[:, 0] /= math.sqrt(2)
    return cosines


@cache
def hadamard(size: int) -> Tensor | None:
    """A (size, size) float64 matrix of 1 and -1 with orthogonal rows, or None if none of the constructions gives it.

    Paley (1933): of order q + 1 for a prime q = 3 mod 4, and 2 (q + 1) for a prime q = 1 mod 4; and Sylvester's
    product of any two.
    """
    if size in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:size, :size]
    if size % 4:
        return None
    if _is_prime(size - 1):
        border = torch.ones(size, size, dtype=torch.float64)
        border[1:, 0] = -1
        border[1:, 1:] = _jacobsthal(size - 1)
        border[0, 0] = 0
        return border + torch.eye(size, dtype=torch.float64)
    for divisor in range(2, math.isqrt(size) + 1):
        if size % divisor == 0:
            small, large = hadamard(divisor), hadamard(size // divisor)
            if small is not None and large is not None:
                return torch.kron(small, large)
    half = size // 2
    if half % 4 == 2 and _is_prime(half - 1):
        border = torch.ones(half, half, dtype=torch.float64)
        border[1:, 1:] = _jacobsthal(half - 1)
        border[0, 0] = 0
        signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(border, signs) + torch.kron(torch.eye(half, dtype=torch.float64), diagonal)
    return None


def _jacobsthal(q: int) -> Tensor:
    """(q, q) matrix of the quadratic characters of i - j modulo the prime q."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    i = torch.arange(q)
    return character[(i[:, None] - i[None, :]) % q]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))
