"""A learner as a plugin of Avalanche's strategies (``avalanche-lib`` 0.6).

Install with ``pip install 'ekfac-rs[avalanche]'``.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ekfac_rs._packages import missing
from ekfac_rs.integrations.part import LearnersPart
from ekfac_rs.learning import ContinualLearner
from ekfac_rs.loading import Source

try:
    from avalanche.models import MultiTaskModule
    from avalanche.training.plugins import SupervisedPlugin
except ImportError as error:
    raise missing(error, "avalanche", "avalanche-lib", "avalanche") from error

__all__ = ["CurvaturePlugin"]


class _Strategy(Protocol):
    """What the plugin uses of a strategy."""

    model: nn.Module
    optimizer: Optimizer
    loss: Tensor
    mbatch: Sequence[Tensor]
    experience: Any
    dataloader: Any
    train_epochs: int
    train_mb_size: int


class CurvaturePlugin(SupervisedPlugin):  # type: ignore[misc]
    """Holds on to earlier experiences by their curvature, in any supervised strategy.

    The strategy trains, with its own optimiser, loss, data, metrics and loggers. Before an
    experience after the first, the BatchNorms take its statistics
    (`ContinualLearner.reparameterize`). In each iteration the penalty is added to
    ``strategy.loss`` before the backward pass, and the gradients are made those of a stable step
    before the update (`QuadraticPenalty.precondition`). After an experience it is consolidated, on
    its own training data in mini-batches of at most ``train_mb_size`` in random order, with the
    transformations of training. With ``freeze_bn_after`` BatchNorms are frozen after that part of
    the iterations, until the experience is over.

    What the plugin does goes by the options of a learner, of which the strategy's model is the
    model: ``CurvaturePlugin(ContinualLearner(model, scale=3.0))``. The learner holds all that is
    remembered, and everything of it works in between: `ContinualLearner.report`, ``selection``,
    `ContinualLearner.save`.

    Parameters
    ----------
    learner : ContinualLearner
        Its ``loss`` has to be the strategy's criterion. Its ``input_fn`` and ``target_fn``, where
        given, are called with the mini-batches of the experience's data set, ``(x, y, task)``;
        otherwise x is what the model is called with, and ``(x, task)`` where it is a
        `MultiTaskModule`. Heads that tasks have of their own, in such a module, are left out by
        naming the others with ``layers``.

    Attributes
    ----------
    learner : ContinualLearner

    Raises
    ------
    OptionError
        The learner has options of a training loop of its own: ``head``, ``optimizer``,
        ``scheduler``, ``momentum``, ``scale="halving"``.

    Examples
    --------
    >>> learner = ek.ContinualLearner(model, scale=3.0, damping=0.01)  # doctest: +SKIP
    >>> strategy = Naive(  # doctest: +SKIP
    ...     model=model, optimizer=optimizer, plugins=[CurvaturePlugin(learner)]
    ... )
    >>> strategy.train(experience)  # doctest: +SKIP
    """

    def __init__(self, learner: ContinualLearner) -> None:
        super().__init__()
        self._part = LearnersPart(learner, "Avalanche")
        # Of the iteration going on, without penalty.
        self._loss: Tensor | None = None

    @property
    def learner(self) -> ContinualLearner:
        """What is held on to, and how."""
        return self._part.learner

    def before_training_exp(self, strategy: _Strategy, *args: Any, **kwargs: Any) -> None:
        """Take the experience's statistics into the BatchNorms, and make the penalty.

        Raises
        ------
        ModelChangedError
            The strategy's model is not the learner's.
        EkfacError
            As `ContinualLearner.fit` before its first step.
        """
        self._part.require_within(strategy.model)
        steps = len(strategy.dataloader) * strategy.train_epochs
        self._part.begin(self._source(strategy, **kwargs), steps, [strategy.optimizer])

    def before_forward(self, strategy: _Strategy, *args: Any, **kwargs: Any) -> None:
        """Freeze BatchNorms where it is time, and see to the task's own curvature."""
        self._part.before_forward(self._as_told(strategy.mbatch))

    def before_backward(self, strategy: _Strategy, *args: Any, **kwargs: Any) -> None:
        """Add the penalty to the strategy's loss."""
        self._loss = strategy.loss.detach().clone().reshape(())
        penalty = self._part.penalty()
        if penalty is not None:
            strategy.loss = strategy.loss + penalty

    def before_update(self, strategy: _Strategy, *args: Any, **kwargs: Any) -> None:
        """Make the gradients those of a stable step, and let the scale's rule see the step."""
        if self._loss is not None:
            self._part.before_step(strategy.optimizer, self._loss)
            self._loss = None

    def after_training_exp(self, strategy: _Strategy, *args: Any, **kwargs: Any) -> None:
        """Consolidate the experience.

        Raises
        ------
        EkfacError
            As `ContinualLearner.consolidate`.
        """
        self._part.consolidate(self._source(strategy, **kwargs))

    def _source(self, strategy: _Strategy, num_workers: int = 0, **kwargs: Any) -> Source:
        """Return the experience's training data in mini-batches of about the same size."""
        data = strategy.experience.dataset.train()
        generator = torch.Generator().manual_seed(self.learner.task)
        order = torch.randperm(len(data), generator=generator)
        count = -(-len(data) // strategy.train_mb_size)
        batches = [indices.tolist() for indices in order.tensor_split(count)] if count else []
        loader = DataLoader(
            data,
            batch_sampler=batches,
            collate_fn=data.collate_fn,
            num_workers=num_workers,
            generator=generator,
        )
        return lambda: self._read(loader)

    def _read(self, loader: DataLoader[Any]) -> Iterator[Any]:
        for batch in loader:
            yield self._as_told(batch)

    def _as_told(self, batch: Sequence[Tensor]) -> Any:
        """Return a mini-batch of data set or strategy as the learner reads it."""
        if self.learner.input_fn is not None or self.learner.target_fn is not None:
            return batch
        x, y, *others = batch
        if others and isinstance(self.learner.model, MultiTaskModule):
            return (x, others[-1]), y
        return x, y
