"""A learner as a callback of Lightning's trainer (``lightning`` 2.6).

Install with ``pip install 'ekfac-rs[lightning]'``.
"""

import math
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ekfac_rs._packages import missing
from ekfac_rs.errors import OptionError
from ekfac_rs.integrations.part import LearnersPart
from ekfac_rs.learning import ContinualLearner
from ekfac_rs.loading import Source

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise missing(error, "lightning", "lightning", "lightning") from error

__all__ = ["CurvatureCallback"]


class CurvatureCallback(Callback):  # type: ignore[misc]
    """Holds on to earlier tasks by their curvature, each of them one ``trainer.fit``.

    The trainer trains, with the module's own optimiser and loss. When training begins, from the
    second task on, the BatchNorms take the new task's statistics
    (`ContinualLearner.reparameterize`). The penalty is added to the loss of each mini-batch,
    divided by ``accumulate_grad_batches`` as Lightning divides the loss: it counts once in each
    step. Before the step, and before gradients are clipped, they are made those of a stable one
    (`QuadraticPenalty.precondition`). When training ends the task is consolidated, on the training
    data loader as ``limit_train_batches`` cuts it; a task whose training was interrupted is not.
    With ``freeze_bn_after`` BatchNorms are frozen after that part of the trainer's steps, until
    training ends.
    The loss that ``training_step`` returned and what it logs stay without penalty.

    What the callback does goes by the options of a learner, made with the module or with the
    network in it. The learner holds all that is remembered; give the same callback, or one with the
    same learner, to each task's trainer. Lightning's checkpoints have it all but the weights, which
    are the module's: going on from one amid a task ends as if training had not been interrupted, as
    far as Lightning's own state goes.

    Parameters
    ----------
    learner : ContinualLearner
        Its ``loss`` has to be that of ``training_step``. Its ``input_fn`` and ``target_fn`` read
        the mini-batches of the training data loader, where they are not pairs ``(x, y)``.

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
    >>> learner = ek.ContinualLearner(module.network, scale=3.0, damping=0.01)  # doctest: +SKIP
    >>> callback = CurvatureCallback(learner)  # doctest: +SKIP
    >>> for loader in loaders:  # doctest: +SKIP
    ...     Trainer(max_epochs=3, callbacks=[callback]).fit(module, loader)
    """

    def __init__(self, learner: ContinualLearner) -> None:
        super().__init__()
        self._part = LearnersPart(learner, "Lightning")
        # Of the mini-batches since the last step: a sum as Lightning divides losses, and how many.
        self._loss: Tensor | None = None
        self._mini_batches = 0

    @property
    def learner(self) -> ContinualLearner:
        """What is held on to, and how."""
        return self._part.learner

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what the callback is not made for, before anything is done.

        Raises
        ------
        OptionError
            Manual optimisation, more than one process, or precision that scales losses.
        ModelChangedError
            The learner's model is no part of the module.
        """
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise OptionError(
                "automatic_optimization: expected True, got False: a training_step that calls "
                "backward itself adds learner.penalty() itself"
            )
        if trainer.world_size != 1:
            raise OptionError(f"trainer: expected one process, got {trainer.world_size}")
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise OptionError(
                "precision: expected one whose losses are not scaled, as '32-true' or "
                f"'bf16-mixed', got {trainer.precision!r}"
            )
        self._part.require_within(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the task's statistics into the BatchNorms, and make the penalty.

        Raises
        ------
        OptionError
            There is more than one training data loader.
        EkfacError
            As `ContinualLearner.fit` before its first step.
        """
        self._loss, self._mini_batches = None, 0
        steps = trainer.estimated_stepping_batches
        known = int(steps) if math.isfinite(steps) and steps > 0 else None
        self._part.begin(self._source(trainer), known, trainer.optimizers)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Freeze BatchNorms where it is time, and see to the task's own curvature."""
        self._part.before_forward(batch)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Add the penalty to the loss that goes backward, which is the trainer's own tensor."""
        # A copy: what is added below is not part of it.
        mean = loss.detach().to(torch.float64, copy=True)
        self._loss = mean if self._loss is None else self._loss + mean
        self._mini_batches += 1
        penalty = self._part.penalty()
        if penalty is not None:
            loss.add_(penalty / trainer.accumulate_grad_batches)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Make the gradients those of a stable step, and let the scale's rule see the step."""
        if self._loss is None:
            return  # Of mini-batches that were passed over.
        # The last step of an epoch may be of fewer mini-batches.
        loss = self._loss * (trainer.accumulate_grad_batches / self._mini_batches)
        self._loss, self._mini_batches = None, 0
        self._part.before_step(optimizer, loss)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Consolidate the task.

        Raises
        ------
        EkfacError
            As `ContinualLearner.consolidate`.
        """
        self._part.consolidate(self._source(trainer))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take the penalty's hooks from the module."""
        self._part.end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the penalty's hooks from the module, whatever ended training."""
        self._part.end()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on as from the checkpoint: what makes steps faster begins anew, here as there."""
        self._part.begin_anew()

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, but for the weights: tensors, numbers and words."""
        return self._part.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the module's weights are restored by themselves.

        Raises
        ------
        IncompatibleError
            The state is another one, or of another kind of learner or module. A failed call changes
            nothing.
        """
        self._part.load_state_dict(state_dict)

    @staticmethod
    def _source(trainer: Trainer) -> Source:
        """Return the training data loader, as far as the trainer goes through it."""
        loader = trainer.train_dataloader
        if not isinstance(loader, Iterable) or isinstance(loader, dict | list | tuple):
            raise OptionError(
                f"train_dataloader: expected one loader, got a {type(loader).__name__}"
            )
        limit = trainer.num_training_batches
        return lambda: islice(loader, int(limit) if math.isfinite(limit) else None)
