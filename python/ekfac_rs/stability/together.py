"""Steps that are stable in every layer by itself, and how much shorter all of them have to be."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from ekfac_rs._lanczos import start_vector, top_eigenpair
from ekfac_rs._modes import own_modes
from ekfac_rs._ranks import Ranks
from ekfac_rs._tensors import accumulation_dtype
from ekfac_rs.batchnorm.statistics import as_found
from ekfac_rs.errors import EkfacError, NonFiniteError, OptionError, StabilityWarning
from ekfac_rs.stability.step import SAFE, StableStep
from ekfac_rs.stability.view import Moves

# Products with the Hessian to find the top eigenvalue, and its accuracy. Each takes as long as two
# backward passes.
_PRODUCTS, _TOLERANCE = 12, 0.05
# From one look to the next steps become longer by so much at most: a mini-batch may be flat by
# chance, and steps that are as long as they can be lead to where the loss is steeper.
_LONGER = 2.0

Loss = Callable[[], Tensor]


class Together:
    """The layers' stable steps together, on the whole of a loss (method: stable step).

    Parameters
    ----------
    model : torch.nn.Module
    ranks : Ranks
        That make the steps together: the loss is the mean of theirs.

    Attributes
    ----------
    top : float or None
        Top eigenvalue of ``(I + lr K)^-1 lr H`` when last looked at, with ``H`` the Hessian of loss
        and penalty in all parameters that are moved; no less than half of what it was before, and
        0 where the loss has no second derivative that torch knows. None where it has to be looked
        at.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks
        self._found: Tensor | None = None
        # Of ``(I + lr K)^-1 H``, by the last look.
        self._steepest = 0.0
        self._warned = False
        self.top: float | None = None

    def forget(self) -> None:
        """Let go of what was found: it holds no longer."""
        self.top = None

    def look(self, loss: Loss, steps: Sequence[StableStep], lr: float) -> None:
        """Find out how large a step is, with gradients there and the layers' steps prepared.

        Raises
        ------
        OptionError, NonFiniteError, NumericalError
            The loss is no finite scalar, or products with its Hessian overflow.
        """
        moved = [p for p in self._model.parameters() if p.grad is not None]
        if not moved or lr == 0.0:
            self.top = 0.0
            return
        with own_modes(), torch.enable_grad(), _repeatable(self._model):
            value = _checked(loss())
            try:
                steepest = self._top(_Hessian(value, moved), moved, steps)
            except (EkfacError, torch.OutOfMemoryError):
                raise
            except RuntimeError as error:
                # What torch cannot differentiate twice it says in many ways.
                self._warn(error)
                steepest = self._steepest = 0.0
        self._steepest = max(steepest, self._steepest / _LONGER)
        self.top = lr * self._steepest

    def shortening(self, share: float, momentum: float) -> float:
        """Return what to multiply steps by, from 0 to 1.

        Parameters
        ----------
        share : float
            Of the learning rate that was looked at: that of the step.
        momentum : float
            Of the optimiser; heavy-ball steps are stable up to ``1 + momentum`` times as far.
        """
        reach = (self.top or 0.0) * share
        limit = SAFE * (1.0 + momentum)
        return 1.0 if reach <= limit else limit / reach

    def _top(
        self, hessian: "_Hessian", moved: list[nn.Parameter], steps: Sequence[StableStep]
    ) -> float:
        """Top eigenvalue of ``L^T H L`` with ``L L^T = (I + lr K)^-1``."""
        layout = _Layout(moved)

        def product(v: Tensor) -> Tensor:
            moves = layout.unflattened(v)
            for step in steps:
                moves |= step.rooted(moves, transposed=False)
            seen = hessian.product(moves)
            for step in steps:
                for p, gradient in step.penalised(moves).items():
                    seen[p] = seen[p] + gradient
            for step in steps:
                seen |= step.rooted(seen, transposed=True)
            return self._ranks.mean(layout.flat(seen), "products with the Hessian")

        start = start_vector(layout.size, layout.like, self._found)
        top, self._found = top_eigenpair(product, start, _PRODUCTS, _TOLERANCE)
        return top

    def _warn(self, error: RuntimeError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "precondition: expected a loss that can be differentiated twice, to see whether "
                "steps that are stable layer by layer are so together, got one that torch says "
                f"this of: {error}",
                StabilityWarning,
                stacklevel=2,
            )


class _Hessian:
    """Products with the Hessian of a loss, in some of the parameters."""

    def __init__(self, value: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        gradients = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
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
                [moves[p].to(g.dtype) for p, g in self._gradients],
                retain_graph=True,
                allow_unused=True,
            )
        return {
            p: torch.zeros_like(p) if product is None else product
            for p, product in zip(self._parameters, products, strict=True)
        }


def _checked(value: object) -> Tensor:
    """Return a loss's value, or raise `OptionError` or `NonFiniteError`."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise OptionError(f"loss: expected a scalar tensor with gradients, got {got}")
    if not bool(value.isfinite()):
        raise NonFiniteError(f"loss: expected a finite value, got {value.item()}")
    return value


class _Layout:
    """Parameters, one after another in one vector."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._sizes = [p.numel() for p in parameters]
        self.size = sum(self._sizes)
        dtype = accumulation_dtype(parameters[0].dtype)
        self.like = torch.empty(0, dtype=dtype, device=parameters[0].device)

    def flat(self, moves: Mapping[nn.Parameter, Tensor]) -> Tensor:
        return torch.cat([moves[p].reshape(-1).to(self.like) for p in self._parameters])

    def unflattened(self, v: Tensor) -> dict[nn.Parameter, Tensor]:
        parts = torch.split(v, self._sizes)
        return {p: part.view(p.shape) for p, part in zip(self._parameters, parts, strict=True)}


@contextmanager
def _repeatable(model: nn.Module) -> Iterator[None]:
    """Make passes that can be differentiated twice, and that leave nothing behind.

    BatchNorms keep their running statistics, and random states stay. Attention goes by plain
    products: its fused kernels have no second derivative.
    """
    with as_found(model), sdpa_kernel(SDPBackend.MATH):
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.training:
                module.track_running_stats = False
        yield
