"""The curvature of the task that is being learnt, for the step that is stable on its loss, too."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ekfac_rs.curvature import Curvature
from ekfac_rs.loading import Batch, Inputs
from ekfac_rs.stability import next_look

# Mini-batches that it is taken of, the last ones seen.
_MINI_BATCHES = 4

Estimate = Callable[[Sequence[tuple[Inputs, Tensor]], torch.Generator], Curvature]
Loss = Callable[[Batch], Tensor]


class OwnCurvature:
    """The present task's own curvature, taken anew from time to time and when BatchNorms freeze.

    Parameters
    ----------
    estimate : callable
        Takes a curvature of mini-batches, with a generator for the labels that it draws.
    loss : callable
        Returns the loss of a mini-batch, a scalar with gradients.
    seed : int
        Of that generator; another one on each rank that takes the curvature.
    """

    def __init__(self, estimate: Estimate, loss: Loss, seed: int = 0) -> None:
        self._estimate, self._loss = estimate, loss
        self._batches: deque[tuple[Inputs, Tensor]] = deque(maxlen=_MINI_BATCHES)
        # The user's random state stays as it is.
        self._generator = torch.Generator().manual_seed(seed)
        self._count, self._next, self._frozen = 0, 0, False
        self._curvature: Curvature | None = None
        # The mini-batch of the present step.
        self._batch: Batch | None = None

    def begin_anew(self) -> None:
        """Take the curvature anew for the next step, whatever there was before."""
        self._count, self._next, self._curvature = 0, 0, None

    def state_dict(self) -> dict[str, Any]:
        """Return what `begin_anew` leaves."""
        batches = [(inputs.args, inputs.kwargs, targets) for inputs, targets in self._batches]
        return {"batches": batches, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for *inputs, targets in state["batches"]:
            # Files written before hold the inputs as one.
            made = inputs[0] if isinstance(inputs[0], Inputs) else Inputs(*inputs)
            self._batches.append((made, targets))
        self._generator.set_state(state["generator"].cpu())

    def at(self, batch: Batch, frozen: bool) -> Curvature:
        """Return the curvature for the step on this mini-batch, before the model is called."""
        self._batches.append((batch.inputs, batch.targets))
        self._batch = batch
        if self._curvature is None or frozen != self._frozen or self._count >= self._next:
            self._curvature = self._estimate(tuple(self._batches), self._generator)
            self._next, self._frozen = next_look(self._count), frozen
        self._count += 1
        return self._curvature

    def loss(self) -> Tensor:
        """Call the model with the mini-batch of the present step, after `at`."""
        assert self._batch is not None
        return self._loss(self._batch)
