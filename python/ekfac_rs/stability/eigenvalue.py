"""The top eigenvalue of a penalty's Hessian, as a model's own parameters see it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ekfac_rs._lanczos import top_eigenvalue

Hessian = Callable[[Tensor], Tensor]


def top_eigenvalue_of_parameters(
    weight: Tensor, parameters: Sequence[nn.Parameter], hessian: Hessian
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
    seen = SeenFromParameters(weight, parameters, hessian)
    return top_eigenvalue(seen.product, seen.start())


class SeenFromParameters:
    """The operator ``J^T H J`` on all parameters of a layer, laid out in one vector."""

    def __init__(
        self, weight: Tensor, parameters: Sequence[nn.Parameter], hessian: Hessian
    ) -> None:
        self._weight, self._parameters, self._hessian = weight, parameters, hessian
        self._sizes = [p.numel() for p in parameters]
        # J v is the derivative of J^T u, which is linear in u, in the direction v.
        self._dual = torch.zeros_like(weight, requires_grad=True)
        with torch.enable_grad():
            self._pulled = torch.autograd.grad(
                weight, parameters, self._dual, create_graph=True, materialize_grads=True
            )

    def start(self) -> Tensor:
        """Return a direction to begin with; the user's random state stays as it is."""
        generator = torch.Generator("cpu").manual_seed(0)
        size = sum(self._sizes)
        start = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
        return start.to(self._weight)

    def product(self, v: Tensor) -> Tensor:
        """Apply the operator."""
        (moved,) = torch.autograd.grad(self._pulled, self._dual, self.split(v), retain_graph=True)
        gradients = torch.autograd.grad(
            self._weight,
            self._parameters,
            self._hessian(moved),
            retain_graph=True,
            materialize_grads=True,
        )
        return self.joined(gradients)

    def split(self, v: Tensor) -> list[Tensor]:
        """Return the parts of a vector that belong to each parameter."""
        parts = torch.split(v, self._sizes)
        return [
            part.view_as(p).to(p.dtype) for part, p in zip(parts, self._parameters, strict=True)
        ]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Put parts back into one vector."""
        return torch.cat([part.reshape(-1).to(self._weight.dtype) for part in parts])
