"""The top eigenvalue of a penalty's Hessian, as a model's own parameters see it."""

from collections.abc import Callable

from torch import Tensor

from ekfac_rs._lanczos import top_eigenvalue
from ekfac_rs.stability.view import View

Hessian = Callable[[Tensor], Tensor]


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
    return top_eigenvalue(lambda v: seen_from_parameters(view, hessian, v), view.layout.start())


def seen_from_parameters(view: View, hessian: Hessian, v: Tensor) -> Tensor:
    """Apply ``J^T H J`` to all parameters of a layer, laid out in one vector."""
    return view.layout.flat(view.pulled(hessian(view.pushed(view.layout.unflattened(v)))))
