"""The top eigenvalue of an operator that is known by its products."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ekfac_rs.errors import NumericalError

# So far below its limit, a value found by a few products will not get there.
_FAR = 0.2
# What is left of a product by so many roundings or less is nothing new.
_ROUNDINGS = 8.0
# What of a direction at random is put beside the one found last, to begin with.
_RANDOM = 0.1


def start_vector(size: int, like: Tensor, near: Tensor | None = None) -> Tensor:
    """Return a direction to begin with; the user's random state stays as it is.

    Parameters
    ----------
    size : int
    like : Tensor
        Of its dtype and device.
    near : Tensor of shape (size,), optional
        One that was found last, of a similar operator; another shape says nothing.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(size, generator=generator, dtype=like.dtype, device="cpu").to(like.device)
    if near is None or near.shape != start.shape:
        return start
    return near + start * (_RANDOM / _norm(start))


def top_eigenvalue(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    iterations: int = 24,
    tolerance: float = 1e-5,
) -> float:
    """Top eigenvalue of a positive semi-definite operator on vectors, from below.

    As `top_eigenpair`.
    """
    return top_eigenpair(product, start, iterations, tolerance)[0]


def top_eigenpair(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    iterations: int = 24,
    tolerance: float = 1e-5,
    limit: float | None = None,
) -> tuple[float, Tensor]:
    """Top eigenvalue of a symmetric operator on vectors, from below, and its vector.

    By Lanczos (Golub & Van Loan 2013, section 10.1). The vector has length 1, and the eigenvalue
    is its Rayleigh quotient.

    Parameters
    ----------
    product : callable
    start : Tensor of shape (n,)
    iterations : int
        At most so many products.
    tolerance : float
        Stop when two more change the value by less than this share.
    limit : float, optional
        Only which side of it the value is on matters: stop when that is settled. Of operators
        that are positive semi-definite.

    Raises
    ------
    NumericalError
        A product is not finite.
    """
    basis = start.new_empty(min(iterations, start.numel()), start.numel())
    basis[0] = start / _norm(start)
    rounding = _ROUNDINGS * torch.finfo(start.dtype).eps
    diagonal: list[float] = []
    beside: list[float] = []
    before = top = 0.0
    weights = basis.new_ones(1)
    for i in range(len(basis)):
        w = product(basis[i])
        diagonal.append(float(w @ basis[i]))
        if not math.isfinite(diagonal[-1]):
            raise NumericalError("top eigenvalue: the product overflows")
        # Against all earlier directions, or rounding brings them back; twice, because where little
        # is left over, much of it is rounding again.
        earlier = basis[: i + 1]
        for _ in range(2):
            w = w - earlier.T @ (earlier @ w)
        earlier_top, before = before, top
        top, weights = _top_of_tridiagonal(diagonal, beside)
        size = _norm(w)
        # Twice in a row: it may rest for one product on its way.
        at_rest = top >= 0.0 and top - earlier_top <= tolerance * top
        settled = limit is not None and (top > limit or (i > 2 and top < _FAR * limit))
        largest = max(map(abs, (*diagonal, *beside)))
        if at_rest or settled or size <= rounding * largest:
            break
        if i + 1 < len(basis):
            beside.append(size)
            basis[i + 1] = w / size
    return top, basis[: len(weights)].T @ weights.to(basis)


def _norm(v: Tensor) -> float:
    """Norm whose squares neither overflow nor vanish in single precision."""
    return float(torch.linalg.vector_norm(v, dtype=torch.float64))


def _top_of_tridiagonal(diagonal: Sequence[float], beside: Sequence[float]) -> tuple[float, Tensor]:
    n = len(diagonal)
    matrix = torch.zeros(n, n, dtype=torch.float64, device="cpu")
    for i, value in enumerate(diagonal):
        matrix[i, i] = value
    for i, value in enumerate(beside):
        matrix[i, i + 1] = matrix[i + 1, i] = value
    values, vectors = torch.linalg.eigh(matrix)
    return float(values[-1]), vectors[:, -1]
