"""The step that stays stable on a penalty: linearly implicit, layer by layer."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ekfac_rs._lanczos import top_eigenvalue
from ekfac_rs.curvature import Block
from ekfac_rs.errors import NumericalError
from ekfac_rs.layers import AffineLayer
from ekfac_rs.stability.bounds import Part, bound_of
from ekfac_rs.stability.eigenvalue import Hessian, SeenFromParameters
from ekfac_rs.stability.view import Situation, View

# Of the top eigenvalue of ``(I + lr K)^-1 lr H``: below 2, where even descent without momentum
# is stable, with some room for what changes until the next look.
_SAFE = 1.5
_PRODUCTS = 16
_TOLERANCE = 0.02
_FACTOR = 1.5
_MOST_FACTORS = 40


class StableStep:
    """``(I + lr K)^-1`` on the gradients of one layer's parameters (method: stable step).

    ``K`` is one operator of a simple form near the Hessian of the penalty in these parameters,
    taken apart into weights, shift and scale. Its strength is the smallest that a few products
    with the Hessian find safe.

    Parameters
    ----------
    layer : AffineLayer
    merged : bool
        Whether the penalty is on the layer's merged weights.
    block : Block or None
        Of all tasks.
    scale, damping : float
        The penalty's.
    hessian : callable
        Product with ``scale * block + damping``.
    like : Tensor of shape (D, K)
        Weights that the penalty is on.

    Attributes
    ----------
    strength : float
        Factor at ``K``; 1 is an upper bound of each part of the Hessian.
    top : float
        Top eigenvalue of ``(I + lr K)^-1 lr H`` when last looked at, ``H`` the Hessian.
    """

    def __init__(
        self,
        layer: AffineLayer,
        merged: bool,
        block: Block | None,
        scale: float,
        damping: float,
        hessian: Hessian,
        like: Tensor,
    ) -> None:
        self._layer = layer
        self._merged = merged and layer.batchnorm is not None
        self._hessian = hessian
        self._bound = bound_of(block, scale, damping, like)
        self._least_strength = 1.0 / (_SAFE * self._bound.terms)
        self._parts: list[Part] = []
        self.strength = self._bound.terms**-0.5
        self.top = 0.0

    def prepare(self, situation: Situation | None, lr: float) -> None:
        """Take ``K`` where the model is now, as strong as learning rates up to ``lr`` need it."""
        parameters = [p for p in self._parameters() if p.requires_grad]
        self._parts = []
        if not parameters or self._bound.is_zero:
            return
        view = View.of(self._layer, situation if self._merged else None)
        with torch.enable_grad():
            weight = view.weight()
        seen = SeenFromParameters(weight, parameters, self._hessian)
        parts = list(self._bound.parts(view))
        self.strength, self.top = self._safe_strength(seen, parts, parameters, lr)
        for part in parts:
            part.operator = part.operator.narrowed(self.strength * lr)
        self._parts = parts

    def apply(self, lr: float) -> None:
        """Multiply the gradients that there are, in place."""
        gradients = {p: p.grad for p in self._parameters() if p.grad is not None}
        for part in self._parts:
            X = part.gathered(gradients)
            if X is not None:
                X = part.operator.inverse(X, self.strength * lr)
                for parameter, gradient in part.scattered(X, gradients).items():
                    gradients[parameter].copy_(gradient)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return self._layer.parameters("merged" if self._merged else "raw")

    def _safe_strength(
        self,
        seen: SeenFromParameters,
        parts: Sequence[Part],
        parameters: Sequence[nn.Parameter],
        lr: float,
    ) -> tuple[float, float]:
        """Return the smallest strength whose top eigenvalue is safe, and that eigenvalue."""

        def top(strength: float) -> float:
            return _top_under(seen, parts, parameters, strength * lr) * lr

        strength = self.strength
        value = top(strength)
        if value > _SAFE:
            for _ in range(_MOST_FACTORS):
                strength *= _FACTOR
                value = top(strength)
                if value <= _SAFE:
                    return strength, value
            raise NumericalError(
                f"layer {self._layer.name!r}: expected a step that is stable at lr {lr:g}, got "
                f"none up to {strength:g} times the penalty's own strength"
            )
        while strength > self._least_strength:
            less = top(strength / _FACTOR)
            if less > _SAFE:
                break
            strength, value = strength / _FACTOR, less
        return strength, value


def _top_under(
    seen: SeenFromParameters, parts: Sequence[Part], parameters: Sequence[nn.Parameter], c: float
) -> float:
    """Top eigenvalue of ``L^T H L`` with ``L L^T = (I + c K)^-1``."""

    def with_roots(v: Tensor, transposed: bool) -> Tensor:
        gradients = dict(zip(parameters, seen.split(v), strict=True))
        for part in parts:
            X = part.gathered(gradients)
            if X is not None:
                operator = part.operator
                X = operator.root_transposed(X, c) if transposed else operator.root(X, c)
                gradients |= part.scattered(X, gradients)
        return seen.joined([gradients[p] for p in parameters])

    def product(v: Tensor) -> Tensor:
        return with_roots(seen.product(with_roots(v, transposed=False)), transposed=True)

    return top_eigenvalue(product, seen.start(), _PRODUCTS, _TOLERANCE)
