"""The top eigenvalue of a penalty's Hessian, as a model's own parameters see it."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ekfac_rs.errors import NumericalError
from ekfac_rs.stability.view import View

Hessian = Callable[[Tensor], Tensor]

# So far below its limit, a value found by a few products will not get there.
_FAR = 0.2


def top_eigenvalue_of_parameters(view: View, hessian: Hessian) -> float:
    """Top eigenvalue of ``J^T H J``: a Hessian in merged weights, seen from a layer's parameters.

    Parameters
    ----------
    view : View
        ``J`` is its derivative.
    hessian : callable
        The product with ``H``, a positive semi-definite operator on matrices of shape (D, K).

    Returns
    -------
    float
        From below, to a relative 1e-3 or better in most cases. 0 without parameters.

    Raises
    ------
    NumericalError
        The products overflow: the weights or the Hessian are much too large.
    """
    if not view.parameters:
        return 0.0
    return top_eigenvalue(lambda v: seen_from_parameters(view, hessian, v), view.start())


def seen_from_parameters(view: View, hessian: Hessian, v: Tensor) -> Tensor:
    """Apply ``J^T H J`` to all parameters of a layer, laid out in one vector."""
    return view.flat(view.pulled(hessian(view.pushed(view.unflattened(v)))))


def top_eigenvalue(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    iterations: int = 24,
    tolerance: float = 1e-5,
    limit: float | None = None,
) -> float:
    """Top eigenvalue of a positive semi-definite operator on vectors, from below.

    By Lanczos (Golub & Van Loan 2013, section 10.1).

    Parameters
    ----------
    product : callable
    start : Tensor of shape (n,)
    iterations : int
        At most so many products.
    tolerance : float
        Stop when two more change the value by less than this share.
    limit : float, optional
        Only which side of it the value is on matters: stop when that is settled.
    """
    basis = start.new_empty(min(iterations, start.numel()), start.numel())
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    before = top = 0.0
    for i in range(len(basis)):
        w = product(basis[i])
        diagonal.append(float(w @ basis[i]))
        if not math.isfinite(diagonal[-1]):
            raise NumericalError("top eigenvalue: the product with the penalty overflows")
        # Against all earlier directions, or rounding brings them back.
        earlier = basis[: i + 1]
        w = w - earlier.T @ (earlier @ w)
        earlier_top, before, top = before, top, _top_of_tridiagonal(diagonal, beside)
        size = float(w.norm())
        # Twice in a row: it may rest for one product on its way.
        at_rest = top - earlier_top <= tolerance * top
        settled = limit is not None and (top > limit or (i > 2 and top < _FAR * limit))
        if at_rest or settled or size <= 1e-12 * max(top, 1e-300):
            break
        if i + 1 < len(basis):
            beside.append(size)
            basis[i + 1] = w / size
    return top


def _top_of_tridiagonal(diagonal: Sequence[float], beside: Sequence[float]) -> float:
    n = len(diagonal)
    matrix = torch.zeros(n, n, dtype=torch.float64, device="cpu")
    for i, value in enumerate(diagonal):
        matrix[i, i] = value
    for i, value in enumerate(beside):
        matrix[i, i + 1] = matrix[i + 1, i] = value
    return float(torch.linalg.eigvalsh(matrix)[-1])
