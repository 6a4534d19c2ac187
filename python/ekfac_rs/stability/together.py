"""Steps that are stable in every layer by itself, and how much shorter all of them have to be."""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ekfac_rs._lanczos import top_eigenpair
from ekfac_rs._modes import own_modes
from ekfac_rs._ranks import Ranks
from ekfac_rs._tensors import put_back
from ekfac_rs.batchnorm.statistics import as_found, kept_statistics
from ekfac_rs.errors import NonFiniteError, NumericalError, OptionError
from ekfac_rs.stability.step import SAFE, StableStep
from ekfac_rs.stability.view import Layout, Moves

# Products with the Hessian to find the top eigenvalue, and its accuracy. Each takes as long as two
# backward passes.
_PRODUCTS, _TOLERANCE = 10, 0.05
# From one look to the next steps become longer by so much at most: a mini-batch may be flat by
# chance, and steps that are as long as they can be lead to where the loss is steeper.
_LONGER = 2.0
# Learning rates that differ by more are looked at by themselves.
_ALIKE = 2.0
# What torch says, in one way or another, where it cannot differentiate twice.
_NOT_TWICE_DIFFERENTIABLE = re.compile(
    r"derivative|differentiate twice|double backward|incompatible with \.grad"
)

Loss = Callable[[], Tensor]


class StabilityWarning(UserWarning):
    """Steps may diverge: on the penalty, or where nobody can see whether they do."""


@dataclass(frozen=True)
class _Look:
    """What a look found.

    Attributes
    ----------
    lr : float
        The learning rate that it was for.
    steepest : float
        Top eigenvalue of ``(I + lr K)^-1 H``.
    moving : frozenset of Parameter
        In which ``H`` is.
    """

    lr: float
    steepest: float
    moving: frozenset[nn.Parameter]


class Together:
    """The layers' stable steps together, on the whole of a loss (method: stable step).

    Parameters
    ----------
    model : torch.nn.Module
    ranks : Ranks
        That make the steps together: the loss is the mean of theirs.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks
        self._last: _Look | None = None
        self._holds = False
        self._found: Tensor | None = None
        self._warned = False

    def forget(self) -> None:
        """Look anew for the next step, whatever was found."""
        self._holds = False

    @property
    def top(self) -> float:
        """Top eigenvalue of ``(I + lr K)^-1 lr H`` when last looked at.

        ``H`` is the Hessian of loss and penalty in all parameters that have gradients. No less than
        half of what it was before, and 0 where the loss has no second derivative.
        """
        return 0.0 if self._last is None else self._last.lr * self._last.steepest

    def shortening(
        self,
        loss: Loss,
        steps: Sequence[StableStep],
        lr: float,
        step_lr: float,
        ready_lr: float,
        reach: float,
    ) -> float:
        """Return what to multiply gradients by, up to 1; look at the loss where that is due.

        Parameters
        ----------
        loss : callable
        steps : sequence of StableStep
            Of all layers.
        lr, step_lr : float
            As in `QuadraticPenalty.precondition`.
        ready_lr : float
            The highest that the layers' steps are ready for.
        reach : float
            How many times as far as plain descent the optimiser's steps are stable.

        Raises
        ------
        OptionError, NonFiniteError
            The loss is no finite scalar of the model's parameters.
        """
        limit = SAFE * reach
        moving = [p for p in self._model.parameters() if p.grad is not None and p.requires_grad]
        if lr > 0.0 and moving and self._is_due(moving, lr, limit):
            self._look(loss, moving, steps, self._lr_to_look_at(lr, ready_lr))
        # Up to the rate that was looked at, step times eigenvalue is no larger than there.
        top = self.top * (step_lr / lr if lr > 0.0 else 0.0)
        return 1.0 if top <= limit else limit / top

    def _is_due(self, moving: Sequence[nn.Parameter], lr: float, limit: float) -> bool:
        last = self._last
        if last is None or not self._holds or not last.moving.issuperset(moving):
            return True
        # Where steps are short enough at a higher rate, they are at this one.
        return lr > last.lr or (_ALIKE * lr < last.lr and self.top > limit)

    def _lr_to_look_at(self, lr: float, ready_lr: float) -> float:
        """Take the highest that is near enough, or not every step of a warm-up would be enough."""
        return ready_lr if ready_lr <= _ALIKE * lr else lr

    def _look(
        self, loss: Loss, moving: Sequence[nn.Parameter], steps: Sequence[StableStep], lr: float
    ) -> None:
        """Find out how large a step is, with gradients there and the layers' steps ready."""
        with (
            self._ranks.agreed("precondition"),
            own_modes(),
            torch.enable_grad(),
            _without_traces(self._model),
        ):
            value = _checked(loss())
            try:
                steepest = self._steepest(_Hessian(value, moving), moving, steps, lr)
            except (NumericalError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not _NOT_TWICE_DIFFERENTIABLE.search(
                    str(error)
                ):
                    raise
                self._warn(error)
                steepest = 0.0
        last, others = self._last, frozenset[nn.Parameter]()
        if last is not None:
            if lr <= _ALIKE * last.lr and last.lr <= _ALIKE * lr and steepest > 0.0:
                steepest = max(steepest, last.steepest / _LONGER)
            if self._holds:
                others = last.moving
        self._last, self._holds = _Look(lr, steepest, others.union(moving)), True

    def _steepest(
        self,
        hessian: "_Hessian",
        moving: Sequence[nn.Parameter],
        steps: Sequence[StableStep],
        lr: float,
    ) -> float:
        """Top eigenvalue of ``L^T H L`` with ``L L^T = (I + lr K)^-1``."""
        layout = Layout(moving)

        def product(v: Tensor) -> Tensor:
            moves = layout.unflattened(v)
            for step in steps:
                moves |= step.rooted(moves, lr, transposed=False)
            seen = hessian.product(moves)
            for step in steps:
                for p, gradient in step.penalised(moves).items():
                    seen[p] = seen[p] + gradient
            for step in steps:
                seen |= step.rooted(seen, lr, transposed=True)
            return self._ranks.mean(layout.flat(seen), "products with the Hessian")

        start = layout.start(near=self._found)
        top, self._found = top_eigenpair(product, start, _PRODUCTS, _TOLERANCE)
        return max(top, 0.0)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "precondition: expected a loss with second derivatives, to see whether steps that "
                f"are stable layer by layer are so together, got one of which is said: {error}",
                StabilityWarning,
                stacklevel=6,  # beyond torch.no_grad's own
            )


def reach_of(momentum: float, nesterov: bool) -> float:
    """How many times as far as plain descent steps with momentum are stable on a quadratic.

    ``1 + m`` for heavy-ball momentum (Polyak 1964), ``(1 + m) / (1 + 2 m)`` for Nesterov's, whose
    gradient is taken ahead: where a root of the recursion's characteristic polynomial passes -1.
    """
    return (1.0 + momentum) / (1.0 + 2.0 * momentum if nesterov else 1.0)


def _checked(value: object) -> Tensor:
    """Return a loss's value, or raise `OptionError` or `NonFiniteError`."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
        raise OptionError(f"loss: expected a call to return a real scalar tensor, got {got!r}")
    if not value.requires_grad:
        raise OptionError("loss: expected a tensor with gradients, got one without")
    if not bool(value.isfinite()):
        raise NonFiniteError(f"loss: expected a finite value, got {value.item()}")
    return value


class _Hessian:
    """Products with the Hessian of a loss, in some of the parameters."""

    def __init__(self, value: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        gradients = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise OptionError("loss: expected one of the model's parameters, got one of others")
        self._gradients = [
            (p, g)
            for p, g in zip(parameters, gradients, strict=True)
            if g is not None and g.requires_grad
        ]

    def product(self, moves: Moves) -> dict[nn.Parameter, Tensor]:
        """Multiply moves of all parameters."""
        products: Sequence[Tensor | None] = [None] * len(self._parameters)
        if self._gradients:
            products = torch.autograd.grad(
                [g for _, g in self._gradients],
                self._parameters,
                [moves[p].to(g) for p, g in self._gradients],
                retain_graph=True,
                allow_unused=True,
            )
        return {
            p: torch.zeros_like(p) if product is None else product
            for p, product in zip(self._parameters, products, strict=True)
        }


@contextmanager
def _without_traces(model: nn.Module) -> Iterator[None]:
    """Make passes that can be differentiated twice, and leave buffers and random states alone.

    Attention goes by plain products: its fused kernels have no second derivative.
    """
    before = kept_statistics(model)
    try:
        with as_found(model), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        put_back(before)
