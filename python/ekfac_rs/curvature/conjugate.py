"""Conjugate gradients for blocks that are known by their products."""

from collections.abc import Callable

import torch
from torch import Tensor

from ekfac_rs.errors import NumericalError

Operator = Callable[[Tensor], Tensor]


def conjugate_gradients(
    product: Operator,
    preconditioner: Operator,
    V: Tensor,
    damping: float,
    tolerance: float | None,
    max_iterations: int,
) -> Tensor:
    """Solve ``(H + damping I) X = V`` by preconditioned conjugate gradients.

    Parameters
    ----------
    product : callable
        With ``H``, positive semi-definite.
    preconditioner : callable
        Near the inverse of the damped operator.
    V : Tensor
        One system, or several in one: together they have one residual.
    damping : float
    tolerance : float, optional
        Relative residual to stop at. Default 1e-6 in float32, 1e-12 in float64.
    max_iterations : int

    Raises
    ------
    NumericalError
        They did not reach the tolerance.
    """
    if tolerance is None:
        tolerance = default_tolerance(V.dtype)
    X, residual = torch.zeros_like(V), V.clone()
    direction, before = torch.zeros_like(V), 1.0
    wanted = tolerance * _size(V)
    for _ in range(max_iterations):
        if _size(residual) <= wanted:
            return X
        steered = preconditioner(residual)
        now = _inner(residual, steered)
        direction = steered + (now / before) * direction
        moved = product(direction) + damping * direction
        step = now / _inner(direction, moved)
        X += step * direction
        residual -= step * moved
        before = now
    reached = _size(product(X) + damping * X - V)
    if reached <= wanted:
        return X
    raise NumericalError(
        f"solve: expected a residual of at most {wanted:g} after {max_iterations} iterations "
        f"of conjugate gradients, got {reached:g} with damping {damping}"
    )


def default_tolerance(dtype: torch.dtype) -> float:
    """Return the relative residual to stop at where none is given."""
    return 1e-6 if dtype == torch.float32 else 1e-12


def _inner(V: Tensor, W: Tensor) -> float:
    return float((V * W).sum(dtype=torch.float64))


def _size(V: Tensor) -> float:
    return float(torch.linalg.vector_norm(V.double()))
