"""Stability of training steps on a penalty, in the model's own parameters."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ekfac_rs.errors import NumericalError

_ITERATIONS = 24
_TOLERANCE = 1e-5


def top_eigenvalue_of_parameters(
    weight: Tensor, parameters: Sequence[nn.Parameter], hessian: Callable[[Tensor], Tensor]
) -> float:
    """Top eigenvalue of ``J^T H J``: a Hessian in weights, seen from the parameters they depend on.

    Parameters
    ----------
    weight : Tensor of shape (D, K)
        Computed from the parameters, with its graph; ``J`` is its derivative.
    parameters : sequence of Parameter
    hessian : callable
        The product with ``H``, a positive semi-definite operator on matrices of shape (D, K).

    Returns
    -------
    float
        From below, to a relative 1e-3 or better in most cases (Lanczos; Golub & Van Loan 2013,
        section 10.1). 0 without parameters.

    Raises
    ------
    NumericalError
        The products overflow: the weights or the Hessian are much too large.
    """
    if not parameters:
        return 0.0
    # J v is the derivative of J^T u, which is linear in u, in the direction v.
    dual = torch.zeros_like(weight, requires_grad=True)
    pulled = torch.autograd.grad(
        weight, parameters, dual, create_graph=True, materialize_grads=True
    )

    def product(v: Tensor) -> Tensor:
        parts = [
            part.view_as(p).to(p.dtype)
            for part, p in zip(torch.split(v, sizes), parameters, strict=True)
        ]
        (moved,) = torch.autograd.grad(pulled, dual, parts, retain_graph=True)
        gradients = torch.autograd.grad(
            weight, parameters, hessian(moved), retain_graph=True, materialize_grads=True
        )
        return torch.cat([g.reshape(-1).to(v.dtype) for g in gradients])

    sizes = [p.numel() for p in parameters]
    # A start of one's own: the user's random state stays as it is.
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(sum(sizes), generator=generator, dtype=torch.float64, device="cpu")
    return _lanczos(product, start.to(weight))


def _lanczos(product: Callable[[Tensor], Tensor], start: Tensor) -> float:
    """Top eigenvalue of a positive semi-definite operator."""
    basis = start.new_empty(min(_ITERATIONS, start.numel()), start.numel())
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    top = 0.0
    for i in range(len(basis)):
        w = product(basis[i])
        diagonal.append(float(w @ basis[i]))
        if not math.isfinite(diagonal[-1]):
            raise NumericalError("top eigenvalue: the product with the penalty overflows")
        # Against all earlier directions, once more where rounding has left something of them.
        earlier = basis[: i + 1]
        for _ in range(2):
            w = w - earlier.T @ (earlier @ w)
        before, top = top, _top_of_tridiagonal(diagonal, beside)
        size = float(w.norm())
        if abs(top - before) <= _TOLERANCE * top or size <= 1e-12 * max(top, 1e-300):
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
