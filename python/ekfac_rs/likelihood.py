"""Losses as likelihoods: label sampling and score vectors.

The curvature of a loss is that of the model's predictive distribution: its generalised
Gauss-Newton matrix (GGN) is the expectation of score vectors' outer products. A *score* is the
gradient, with respect to the model's output, of the loss summed over the mini-batch, where each
example's loss is multiplied by the reduction constant ``c`` (square-rooted, so that the outer
product carries ``c`` once).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ekfac_rs._checks import require_choice
from ekfac_rs.errors import LabelError, UnsupportedLossError

LABELS = ("mc", "type2", "empirical", "exact")


class Likelihood(ABC):
    """A loss whose scores are known.

    Parameters
    ----------
    reduction : {"mean", "sum"}
        How a single example's loss is made of its outputs or positions. Over examples the loss is
        always a mean.
    """

    def __init__(self, reduction: str = "mean") -> None:
        require_choice("reduction", reduction, ("mean", "sum"))
        self.reduction = reduction

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    @abstractmethod
    def validate(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise `LabelError` unless ``targets`` fit ``outputs``."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over examples of the per-example loss, a scalar."""

    @abstractmethod
    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Reduction constant ``c``, broadcastable to ``outputs``; 0 where a target is ignored."""

    @abstractmethod
    def sampled_score(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Score under labels drawn from the model, for ``c = 1``. Shape of ``outputs``."""

    @abstractmethod
    def empirical_score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient with respect to the output for ``c = 1`` and the given targets."""

    @abstractmethod
    def root_column(self, outputs: Tensor, column: int) -> Tensor:
        """One column of a square root of the output's GGN for ``c = 1``. Shape of ``outputs``.

        Columns are numbered over the flattened output of one example; a column is computed for
        all examples at once.
        """

    def scores(
        self,
        outputs: Tensor,
        targets: Tensor,
        *,
        labels: str,
        draws: int,
        generator: torch.Generator,
    ) -> Iterator[tuple[Tensor, float]]:
        """Yield score vectors and weights whose weighted outer products estimate the GGN.

        "type2" multiplies each example's column by an independent random sign: without it the
        columns of different examples mix, in the backward pass through a train-mode BatchNorm and
        in every stratum that adds gradients of several examples. Where neither happens, the sign
        changes nothing.

        Parameters
        ----------
        outputs : Tensor of shape (N, ...)
        targets : Tensor
        labels : {"mc", "type2", "empirical", "exact"}
        draws : int
            Number of label draws, for "mc".
        generator : torch.Generator

        Yields
        ------
        score : Tensor, shape of ``outputs``
        weight : float
        """
        outputs = outputs.detach()
        constant = self.constant(outputs, targets)
        root = constant.sqrt()
        if labels == "mc":
            for _ in range(draws):
                yield root * self.sampled_score(outputs, generator), 1.0 / draws
        elif labels == "empirical":
            yield constant * self.empirical_score(outputs, targets), 1.0
        else:
            for column in range(outputs[0].numel()):
                direction = root * self.root_column(outputs, column)
                if labels == "exact":
                    yield from ((single, 1.0) for single in _example_by_example(direction))
                else:
                    yield direction * _random_signs(direction, generator), 1.0


class CrossEntropy(Likelihood):
    """Softmax cross-entropy, targets as class indices or probabilities.

    Outputs are logits of shape ``(N, C)`` or ``(N, C, ...)``, classes on axis 1.

    Parameters
    ----------
    reduction : {"mean", "sum"}
        Over the positions of one example. "mean" divides, as torch does, by the number of
        positions of the mini-batch that are not ignored.
    ignore_index : int
        Class index of targets that count for nothing.
    """

    def __init__(self, reduction: str = "mean", ignore_index: int = -100) -> None:
        super().__init__(reduction)
        self.ignore_index = ignore_index

    def validate(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.dim() < 2:
            raise LabelError(
                f"cross_entropy: expected logits of shape (N, C, ...), got {tuple(outputs.shape)}"
            )
        if targets.is_floating_point():
            _require_same_shape("cross_entropy", outputs, targets, "class probabilities")
            if bool((targets < 0).any()):
                raise LabelError("cross_entropy: expected class probabilities >= 0, got a negative")
            return
        expected = (outputs.shape[0], *outputs.shape[2:])
        if tuple(targets.shape) != expected:
            raise LabelError(
                f"cross_entropy: expected class indices of shape {expected}, "
                f"got {tuple(targets.shape)}"
            )
        classes = outputs.shape[1]
        wrong = (targets != self.ignore_index) & ((targets < 0) | (targets >= classes))
        if bool(wrong.any()):
            raise LabelError(
                f"cross_entropy: expected labels in 0..{classes - 1}, "
                f"got {int(targets[wrong].reshape(-1)[0])}"
            )
        if bool((targets == self.ignore_index).all()):
            raise LabelError("cross_entropy: expected a target that counts, got only ignore_index")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        index = -100 if targets.is_floating_point() else self.ignore_index
        total = F.cross_entropy(outputs, targets, ignore_index=index, reduction=self.reduction)
        return total if self.reduction == "mean" else total / outputs.shape[0]

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        positions = outputs[:, :1]
        if targets.is_floating_point():
            counts = torch.ones_like(positions)
        else:
            counts = (targets != self.ignore_index).to(outputs.dtype).reshape(positions.shape)
        if self.reduction == "sum":
            return counts
        return counts * (outputs.shape[0] / counts.sum())

    def sampled_score(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        probabilities = outputs.softmax(dim=1)
        by_class = probabilities.movedim(1, -1)
        rows = by_class.reshape(-1, outputs.shape[1]).float()
        drawn = torch.multinomial(rows, 1, generator=generator).reshape(by_class.shape[:-1])
        return self._minus_one_hot(probabilities, drawn)

    def empirical_score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        probabilities = outputs.softmax(dim=1)
        if targets.is_floating_point():
            return probabilities * targets.sum(dim=1, keepdim=True) - targets
        ignored = targets == self.ignore_index
        return self._minus_one_hot(probabilities, targets.masked_fill(ignored, 0))

    def root_column(self, outputs: Tensor, column: int) -> Tensor:
        # Column (class k, position t) of sqrt(diag p - p p^T) = (I - p 1^T) diag sqrt(p).
        probabilities = outputs.softmax(dim=1)
        flat = probabilities.flatten(2) if outputs.dim() > 2 else probabilities[:, :, None]
        k, position = divmod(column, flat.shape[2])
        result = torch.zeros_like(flat)
        root = flat[:, k, position].sqrt()
        result[:, :, position] = -flat[:, :, position] * root[:, None]
        result[:, k, position] += root
        return result.reshape(outputs.shape)

    @staticmethod
    def _minus_one_hot(probabilities: Tensor, classes: Tensor) -> Tensor:
        ones = torch.ones_like(probabilities[:, :1])
        return probabilities.scatter_add(1, classes.unsqueeze(1), -ones)


class _Elementwise(Likelihood):
    """A likelihood that factorises over the output's elements."""

    name: str

    def validate(self, outputs: Tensor, targets: Tensor) -> None:
        if not targets.is_floating_point():
            raise LabelError(f"{self.name}: expected floating-point targets, got {targets.dtype}")
        _require_same_shape(self.name, outputs, targets, "targets")

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        elements = outputs[0].numel() if self.reduction == "mean" else 1
        return torch.full_like(outputs, 1.0 / elements)

    def root_column(self, outputs: Tensor, column: int) -> Tensor:
        result = torch.zeros_like(outputs).reshape(outputs.shape[0], -1)
        result[:, column] = self._root(outputs).reshape(result.shape)[:, column]
        return result.reshape(outputs.shape)

    @abstractmethod
    def _root(self, outputs: Tensor) -> Tensor:
        """Square root of the (diagonal) GGN of each element."""


class MSE(_Elementwise):
    """Squared error ``c * |f - y|**2`` per example, as `torch.nn.MSELoss`.

    Parameters
    ----------
    reduction : {"mean", "sum"}
        Over one example's outputs: ``c`` is one over their number, or 1.
    """

    name = "mse"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _mean_over_examples(F.mse_loss, outputs, targets, self.reduction)

    def sampled_score(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(
            outputs.shape, dtype=outputs.dtype, device=outputs.device, generator=generator
        )
        return self._root(outputs) * noise

    def empirical_score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 2.0 * (outputs - targets)

    def _root(self, outputs: Tensor) -> Tensor:
        return torch.full_like(outputs, 2.0**0.5)


class BCE(_Elementwise):
    """Binary cross-entropy with logits, as `torch.nn.BCEWithLogitsLoss`.

    Parameters
    ----------
    reduction : {"mean", "sum"}
        Over one example's outputs.
    """

    name = "bce"

    def validate(self, outputs: Tensor, targets: Tensor) -> None:
        super().validate(outputs, targets)
        if bool(((targets < 0) | (targets > 1)).any()):
            raise LabelError("bce: expected targets in [0, 1], got one outside")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _mean_over_examples(
            F.binary_cross_entropy_with_logits, outputs, targets, self.reduction
        )

    def sampled_score(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        probabilities = outputs.sigmoid()
        return probabilities - torch.bernoulli(probabilities, generator=generator)

    def empirical_score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sigmoid() - targets

    def _root(self, outputs: Tensor) -> Tensor:
        probabilities = outputs.sigmoid()
        return (probabilities * (1.0 - probabilities)).sqrt()


_BY_NAME: dict[str, type[Likelihood]] = {"cross_entropy": CrossEntropy, "mse": MSE, "bce": BCE}


def resolve(loss: str | Likelihood) -> Likelihood:
    """Return the likelihood of a name, or the object itself.

    Raises
    ------
    UnsupportedLossError
        The loss is neither a known name nor a `Likelihood`.
    """
    if isinstance(loss, Likelihood):
        return loss
    if isinstance(loss, str) and loss in _BY_NAME:
        return _BY_NAME[loss]()
    expected = ", ".join(repr(name) for name in _BY_NAME)
    raise UnsupportedLossError(f"loss: expected {expected} or a Likelihood, got {loss!r}")


def _require_same_shape(loss: str, outputs: Tensor, targets: Tensor, what: str) -> None:
    if targets.shape != outputs.shape:
        raise LabelError(
            f"{loss}: expected {what} of shape {tuple(outputs.shape)}, got {tuple(targets.shape)}"
        )


def _mean_over_examples(
    loss: Callable[..., Tensor], outputs: Tensor, targets: Tensor, reduction: str
) -> Tensor:
    total = loss(outputs, targets, reduction=reduction)
    return total if reduction == "mean" else total / outputs.shape[0]


def _example_by_example(direction: Tensor) -> Iterator[Tensor]:
    for example in range(direction.shape[0]):
        single = torch.zeros_like(direction)
        single[example] = direction[example]
        yield single


def _random_signs(direction: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(
        2, direction.shape[:1], generator=generator, device=direction.device, dtype=direction.dtype
    )
    return (2.0 * bits - 1.0).reshape(-1, *[1] * (direction.dim() - 1))
