"""The step that stays stable on a penalty: linearly implicit, layer by layer."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ekfac_rs._lanczos import top_eigenpair
from ekfac_rs.curvature import Block
from ekfac_rs.errors import ModelChangedError, NumericalError
from ekfac_rs.layers import AffineLayer
from ekfac_rs.stability.bounds import Part, bound_of
from ekfac_rs.stability.eigenvalue import Hessian, seen_from_parameters
from ekfac_rs.stability.view import Moves, Situation, View

# Of the top eigenvalue of ``(I + lr K)^-1 lr H``: below 2, where even descent without momentum
# is stable, with some room for what changes until the next look.
SAFE = 1.5
# Products with the Hessian to find it, and its accuracy.
_PRODUCTS, _TOLERANCE = 16, 0.02
# Between two strengths that are tried, and how often one is raised before giving up.
_FACTOR, _MOST_FACTORS = 1.5, 40

# Steps between two looks at where the model is: in the beginning, and once it has got going.
_FIRST_INTERVAL, _INTERVAL = 10, 100
# A learning rate or scale that rises is prepared for this much more; a scale may fall this far.
_HEADROOM, _SLACK = 1.5, 2.0


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
    damping : float
        The penalty's.
    hessian : callable
        Product with ``scale * block + damping``, given ``scale``.
    like : Tensor of shape (D, K)
        Weights that the penalty is on.

    Attributes
    ----------
    strength : float
        Factor at ``K``; 1 is an upper bound of each part of the Hessian.
    top : float
        Top eigenvalue of ``(I + lr K)^-1 lr H`` when last looked at, ``H`` the Hessian; from
        below, and roughly where it is far from what is safe.
    """

    def __init__(
        self,
        layer: AffineLayer,
        merged: bool,
        block: Block | None,
        damping: float,
        hessian: Callable[[float], Hessian],
        like: Tensor,
    ) -> None:
        self._layer = layer
        self._merged = merged and layer.batchnorm is not None
        self._block, self._damping, self._like = block, damping, like
        self._hessian_at = hessian
        self._taken: tuple[float, Block | None] | None = None
        self._view: View | None = None
        self._parts: list[Part] = []
        self._found: dict[bool, Tensor] = {}
        self.strength = 0.0
        self.top = 0.0

    def prepare(
        self, situation: Situation | None, lr: float, scale: float, own: Block | None
    ) -> None:
        """Take ``K`` where the model is now, as strong as learning rates up to ``lr`` need it.

        And penalties up to ``scale``, beside the present task's own curvature.
        """
        self._take(scale, own)
        seen = situation if self._merged else None
        self._view = view = View(self._layer, seen, with_gradients=True)
        self._parts, self.top = [], 0.0
        if not view.parameters or self._bound.is_zero or lr == 0.0:
            return
        self.top = self._top(view, [], 0.0, lr)
        if self.top <= SAFE:
            return  # the explicit step is stable here
        # The strength is yet to be found, and may grow.
        parts = list(self._bound.parts(view, _FACTOR**2 * self.strength * lr))
        self._parts = self._at_safe_strength(view, parts, lr)

    def apply(self, lr: float) -> None:
        """Multiply the gradients that there are, in place."""
        gradients = {p: p.grad for p in self._parameters() if p.grad is not None}
        for part in self._parts:
            X = part.gathered(gradients)
            if X is not None:
                X = part.operator.inverse(X, self.strength * lr)
                for parameter, gradient in part.scattered(X, gradients).items():
                    gradients[parameter].copy_(gradient)

    def moving(self) -> tuple[bool, ...]:
        """Tell which of the layer's parameters have gradients, and move in the next step."""
        return tuple(p.grad is not None for p in self._parameters())

    def rooted(self, moves: Moves, lr: float, *, transposed: bool) -> dict[nn.Parameter, Tensor]:
        """Multiply moves of the layer's parameters by ``L``, or ``L^T``.

        ``L L^T`` is the inverse that `apply` multiplies by. What is not touched is left out.
        """
        return _rooted(self._parts, self.strength * lr, moves, transposed)

    def penalised(self, moves: Moves) -> dict[nn.Parameter, Tensor]:
        """Multiply moves of the layer's parameters by the penalty's Hessian, as prepared."""
        assert self._view is not None
        its_own = self._view.parameters
        if not any(p in moves for p in its_own):
            return {}
        every = {p: moves[p] if p in moves else torch.zeros_like(p) for p in its_own}
        seen = self._view.pulled(self._of_penalty(self._view.pushed(every)))
        return {p: gradient for p, gradient in seen.items() if p in moves}

    def _take(self, scale: float, own: Block | None) -> None:
        if self._taken is not None and self._taken[0] == scale and self._taken[1] is own:
            return
        self._taken = scale, own
        blocks = [] if self._block is None else [(scale, self._block)]
        self._hessian = self._of_penalty = self._hessian_at(scale)
        if own is not None:
            blocks.append((1.0, own))
            self._hessian = _sum_of(self._hessian, own.product)
        self._bound = bound_of(blocks, self._damping, self._like)
        self._least_strength = 1.0 / (SAFE * self._bound.terms)
        self.strength = self.strength or self._bound.terms**-0.5

    def _parameters(self) -> Iterator[nn.Parameter]:
        return self._layer.parameters("merged" if self._merged else "raw")

    def _at_safe_strength(self, view: View, parts: Sequence[Part], lr: float) -> list[Part]:
        """Find the smallest strength that is safe; return what is enough of the parts there."""

        def at(strength: float) -> tuple[list[Part], float]:
            enough = [part.narrowed(lr * strength) for part in parts]
            return enough, self._top(view, enough, strength, lr)

        strength = self.strength
        enough, top = at(strength)
        for _ in range(_MOST_FACTORS):
            if top <= SAFE:
                break
            # With so many times more of K the eigenvalue is no less than divided by that.
            least = math.floor(math.log(top / SAFE) / math.log(_FACTOR))
            strength *= _FACTOR ** max(1, least)
            enough, top = at(strength)
        else:
            raise NumericalError(
                f"layer {self._layer.name!r}: expected a step that is stable at lr {lr:g}, got "
                f"none up to {strength:g} times the penalty's own strength: the network may have "
                "diverged on its own loss, which a lower learning rate or own=True prevents"
            )
        if strength == self.strength:
            while strength > self._least_strength:
                less = strength / _FACTOR
                # With a share of K the eigenvalue is no larger than divided by that share.
                while less > self._least_strength and top * strength * _FACTOR <= SAFE * less:
                    less /= _FACTOR
                enough_of_less, less_top = at(less)
                if less_top > SAFE:
                    break
                strength, enough, top = less, enough_of_less, less_top
        self.strength, self.top = strength, top
        return enough

    def _top(self, view: View, parts: Sequence[Part], strength: float, lr: float) -> float:
        """Top eigenvalue of ``L^T lr H L`` with ``L L^T = (I + lr strength K)^-1``."""

        def with_roots(v: Tensor, transposed: bool) -> Tensor:
            moves = view.layout.unflattened(v)
            return view.layout.flat(moves | _rooted(parts, lr * strength, moves, transposed))

        def product(v: Tensor) -> Tensor:
            moved = seen_from_parameters(view, self._hessian, with_roots(v, transposed=False))
            return with_roots(moved, transposed=True)

        # From one strength, and one look, to the next the top direction turns a little.
        start = view.layout.start(near=self._found.get(bool(parts)))
        top, self._found[bool(parts)] = top_eigenpair(
            product, start, _PRODUCTS, _TOLERANCE, SAFE / lr
        )
        return lr * top


def next_look(count: int) -> int:
    """Return the step for the next look, after one at step ``count``."""
    # Gains and inputs move fastest in the beginning.
    return count + min(_INTERVAL, max(_FIRST_INTERVAL, count))


def _rooted(
    parts: Sequence[Part], c: float, moves: Moves, transposed: bool
) -> dict[nn.Parameter, Tensor]:
    """Multiply moves by the roots of ``(I + c K)^-1``: each parameter is in one part."""
    rooted: dict[nn.Parameter, Tensor] = {}
    for part in parts:
        X = part.gathered(moves)
        if X is not None:
            root = part.operator.root_transposed if transposed else part.operator.root
            rooted |= part.scattered(root(X, c), moves)
    return rooted


def _sum_of(first: Hessian, second: Hessian) -> Hessian:
    return lambda V: first(V).add_(second(V.contiguous()))


class StableSteps:
    """The layers' stable steps, and when they look at the model anew.

    Attributes
    ----------
    steps : dict of str to StableStep
    """

    def __init__(self) -> None:
        self.steps: dict[str, StableStep] = {}
        self._situations: dict[str, Situation | None] = {}
        self._modes: tuple[bool, ...] = ()
        self._prepared: tuple[float, float] | None = None
        self._moving: list[tuple[bool, ...]] = []
        self._own: Mapping[str, Block] = {}
        self._count, self._next = 0, 0

    def is_due(self, modes: tuple[bool, ...]) -> bool:
        """Whether to look at the situation: BatchNorms' modes changed, or it is long ago."""
        # Nobody may ever ask for a stable step: one look is kept for the first, no more.
        return modes != self._modes or (bool(self.steps) and self._count >= self._next)

    def look(self, situations: dict[str, Situation | None], modes: tuple[bool, ...]) -> None:
        """Take the layers' situations."""
        self._situations, self._modes, self._prepared = situations, modes, None
        self._next = next_look(self._count)

    def take_own(self, own: Mapping[str, Block]) -> None:
        """Take the present task's own curvature, for all steps until another is taken."""
        self._own, self._prepared = own, None

    @property
    def prepared_lr(self) -> float:
        """Up to which learning rate the steps are ready."""
        return 0.0 if self._prepared is None else self._prepared[0]

    def prepare(self, lr: float, scale: float) -> bool:
        """Make the steps ready for a learning rate and a penalty's scale; return whether anew."""
        if not self._situations:
            raise ModelChangedError("precondition: expected a call of penalty() before, got none")
        # What stays as it is turns the steps of what does not: K is of what moves alone.
        moving = [step.moving() for step in self.steps.values()]
        if self._is_prepared(lr, scale) and moving == self._moving:
            return False
        self._moving = moving
        lr_and_scale = self._with_headroom(lr, scale)
        self._prepared = None  # One that fails leaves steps half prepared.
        for name, step in self.steps.items():
            step.prepare(self._situations[name], *lr_and_scale, self._own.get(name))
        self._prepared = lr_and_scale
        return True

    def apply(self, lr: float) -> None:
        """Multiply the gradients of all layers, for a learning rate that they are ready for."""
        for step in self.steps.values():
            step.apply(lr)
        self._count += 1

    def _is_prepared(self, lr: float, scale: float) -> bool:
        if self._prepared is None:
            return False
        prepared_lr, prepared_scale = self._prepared
        # A step for a much larger penalty would be stable, too, but slow.
        return lr <= prepared_lr and prepared_scale / _SLACK <= scale <= prepared_scale

    def _with_headroom(self, lr: float, scale: float) -> tuple[float, float]:
        """Prepare for more of what rises: in a warm-up, say, not every step needs another look."""
        if self._prepared is None:
            return lr, scale
        prepared_lr, prepared_scale = self._prepared
        return (
            lr * (_HEADROOM if lr > prepared_lr > 0.0 else 1.0),
            scale * (_HEADROOM if scale > prepared_scale else 1.0),
        )
