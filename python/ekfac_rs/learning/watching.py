"""What is read of a task's steps while they are made; on a GPU nothing waits for it."""

import math
from typing import Any

import torch
from torch import Tensor

from ekfac_rs._ranks import Ranks
from ekfac_rs.errors import NumericalError
from ekfac_rs.scales import Selection


class Copied:
    """A tensor's values, on their way to the host: reading them waits for their copy alone."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            # Reading the tensor later would wait for all that is queued by then; the event is
            # over as soon as the copy is.
            stream = torch.cuda.current_stream(values.device)
            self._values = values.to("cpu", non_blocking=True)
            self._copied = stream.record_event()

    def read(self) -> Tensor:
        """Return them, on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


class FiniteCheck:
    """Refuses a step's total that is not finite: at once or, deferred, during the next step.

    A GPU's host would otherwise wait in every step for the device to get there. Deferred, it has
    one step queued in the meantime and never more.
    """

    def __init__(self, deferred: bool) -> None:
        self.deferred = deferred
        self._pending: tuple[int, Copied] | None = None

    def add(self, step: int, total: Tensor) -> None:
        """Take a step's total and check it or, deferred, the one before."""
        if self.deferred:
            self.finish()
        self._pending = step, Copied(total)
        if not self.deferred:
            self.finish()

    def finish(self) -> None:
        """Check what has not been checked yet."""
        if self._pending is None:
            return
        (step, copied), self._pending = self._pending, None
        total = float(copied.read())
        if not math.isfinite(total):
            since = "; the weights have moved on by one step" if self.deferred else ""
            raise NumericalError(f"fit: expected a finite loss, got {total} at step {step}{since}")


class Means:
    """Running means, summed where the values are: only the result is waited for.

    Of loss and penalty over examples, of hits over the targets that count.
    """

    def __init__(self, device: torch.device) -> None:
        self.examples = 0
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(
        self, loss: Tensor, penalty: Tensor, examples: int, correct: Tensor, counted: Tensor
    ) -> None:
        """Take a mini-batch's: loss and penalty are means."""
        self.examples += examples
        loss, penalty, correct, counted = (
            value.to(self.sums) for value in (loss, penalty, correct, counted)
        )
        self.sums += torch.stack([examples * loss, examples * penalty, correct, counted])

    def over(self, ranks: Ranks) -> "Means":
        """Return those of what all ranks added."""
        if ranks.alone:
            return self
        total = Means(self.sums.device)
        total.sums.copy_(ranks.sum_(self.sums.clone(), "means"))
        [examples] = ranks.totals([self.examples], "examples")
        total.examples = round(examples)
        return total

    def result(self) -> dict[str, float]:
        """Return the means of what was added."""
        loss, penalty, correct, counted = self.sums.tolist()
        return {
            "loss": loss / self.examples,
            "penalty": penalty / self.examples,
            "accuracy": correct / counted if counted else math.nan,
        }


class Scalars:
    """Tells a writer each step's numbers; on a GPU one step later, so that nothing waits.

    Parameters
    ----------
    writer
        Called as ``writer.add_scalar(tag, value, step)``.
    task : int
        In the tags: ``task0/loss``.
    selection : Selection or None
        Whose scale and predicted increase are told, too.
    """

    def __init__(self, writer: Any, task: int, selection: Selection | None) -> None:
        self._writer, self._task, self._selection = writer, task, selection
        self._pending: tuple[int, Copied] | None = None

    def add(self, step: int, loss: Tensor, penalty: Tensor) -> None:
        """Take a step's loss and penalty."""
        self.finish()
        self._pending = step, Copied(torch.stack([loss.double(), penalty.double()]))
        if not loss.is_cuda:
            self.finish()

    def finish(self) -> None:
        """Tell what has not been told yet."""
        if self._pending is None:
            return
        (step, copied), self._pending = self._pending, None
        loss, penalty = copied.read().tolist()
        self._tell("loss", loss, step)
        if self._selection is not None:
            self._tell("penalty", penalty, step)
            self._tell("scale", self._selection.scale[step - 1], step)
            self._tell("predicted increase", self._selection.increase[step - 1], step)

    def _tell(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(f"task{self._task}/{name}", value, step)
