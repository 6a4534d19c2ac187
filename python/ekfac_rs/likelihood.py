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

from ekfac_rs._checks import is_finite, require_choice, require_finite
from ekfac_rs._tensors import accumulation_dtype
from ekfac_rs.errors import (
    DtypeError,
    LabelError,
    NonFiniteError,
    ShapeError,
    UnsupportedLossError,
)

__all__ = ["BCE", "MSE", "CrossEntropy", "Likelihood", "resolve"]

LABELS = ("mc", "type2", "empirical", "exact")


class Likelihood(ABC):
    """A loss whose scores are known.

    Parameters
    ----------
    reduction : {"mean", "sum"}
        How a single example's loss is made of its outputs or locations. Over examples the loss is
        always a mean.

    Attributes
    ----------
    has_classes : bool
        Whether outputs can hit a target.
    """

    has_classes = False

    def __init__(self, reduction: str = "mean") -> None:
        require_choice("reduction", reduction, ("mean", "sum"))
        self.reduction = reduction

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def arranged(self, outputs: Tensor, targets: Tensor, examples: int) -> tuple[Tensor, Tensor]:
        """Return outputs and targets with examples on axis 0, in the dtypes the loss takes.

        Outputs of half precision become float32. Nothing is looked at, so that nothing waits for
        a GPU.

        Parameters
        ----------
        outputs : Tensor of shape (N, ...) or (N * T, C)
            In the second form examples and locations share an axis, the locations of one example
            one after another.
        targets : Tensor
            As the loss takes them for such outputs; for (N * T, C) also with N and T apart.
        examples : int
            N.

        Raises
        ------
        ShapeError, DtypeError, LabelError
            Neither form; outputs that are not real numbers; targets of other examples.
        """
        if outputs.dim() == 0 or len(outputs) == 0 or len(outputs) % examples:
            raise ShapeError(
                f"model: expected outputs with {examples} examples on axis 0, "
                f"got {tuple(outputs.shape)}"
            )
        if outputs.numel() == 0:
            raise ShapeError(f"model: expected outputs, got none in shape {tuple(outputs.shape)}")
        if not outputs.is_floating_point():
            raise DtypeError(f"model: expected floating-point outputs, got {outputs.dtype}")
        if targets.is_complex():
            raise LabelError(f"loss: expected real targets, got {targets.dtype}")
        outputs = outputs.to(accumulation_dtype(outputs.dtype))
        if len(outputs) != examples:
            outputs, targets = self._by_example(outputs, targets, examples)
        if targets.dim() == 0 or len(targets) != examples:
            raise LabelError(
                f"loss: expected targets of {examples} examples on axis 0, "
                f"got shape {tuple(targets.shape)}"
            )
        return outputs, self._cast(outputs, targets)

    def _by_example(self, outputs: Tensor, targets: Tensor, examples: int) -> tuple[Tensor, Tensor]:
        """Split the axis that examples and locations share; locations become axis 1."""
        if outputs.dim() != 2:
            raise ShapeError(
                f"model: expected outputs with {examples} examples on axis 0, or [N * T, C] with "
                f"the locations of {examples} examples, got {tuple(outputs.shape)}"
            )
        if targets.dim() and len(targets) == len(outputs):
            targets = targets.reshape(examples, -1, *targets.shape[1:])
        return outputs.reshape(examples, -1, outputs.shape[1]), targets

    def _cast(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets in the dtype that the loss takes."""
        return targets.to(outputs.dtype)

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise `NonFiniteError` or `LabelError` unless the loss is finite at these outputs."""
        if not is_finite(outputs):
            raise NonFiniteError("model: expected finite outputs, got NaN or infinity")

    @abstractmethod
    def validate(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise `LabelError` or `NonFiniteError` unless ``targets`` fit ``outputs``."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over examples of the per-example loss, a scalar."""

    def correct(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """How many targets the outputs hit and how many count; 0 and 0 without classes."""
        none = outputs.new_zeros((), dtype=torch.int64)
        return none, none

    def classes_in(self, targets: Tensor) -> int:
        """Return how many classes outputs need for these targets; 0 where they do not tell."""
        return 0

    @abstractmethod
    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Weight ``c`` of each target in its example's loss, broadcastable to ``outputs``.

        The reduction constant times the target's mass: 0 where it is ignored.
        """

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

    Outputs are logits of shape ``(N, C)`` or ``(N, C, ...)``, classes on axis 1. Logits of minus
    infinity mask their classes: probability 0, and no target may lie there.

    Probabilities ``t`` need not sum to 1: the loss is torch's, ``-sum_c t_c log p_c``, whose GGN
    is ``(sum_c t_c) (diag p - p p^T)``. So rows of zeros count for nothing, and weights can be
    folded in. Where torch makes NaN of a masked class's ``0 * -inf``, the term is 0 here.

    Parameters
    ----------
    reduction : {"mean", "sum"}
        Over the locations of one example. "mean" divides, as torch does, by the number of
        locations of the mini-batch that are not ignored; with probabilities by that of all.
    ignore_index : int
        Class index of targets that count for nothing.
    """

    has_classes = True

    def __init__(self, reduction: str = "mean", ignore_index: int = -100) -> None:
        super().__init__(reduction)
        self.ignore_index = ignore_index

    def _by_example(self, outputs: Tensor, targets: Tensor, examples: int) -> tuple[Tensor, Tensor]:
        outputs, targets = super()._by_example(outputs, targets, examples)
        if targets.shape == outputs.shape:  # probabilities
            targets = targets.movedim(-1, 1)
        return outputs.movedim(-1, 1), targets

    def _cast(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return targets.to(outputs.dtype if targets.is_floating_point() else torch.int64)

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        if is_finite(outputs):
            return
        masked = outputs.isneginf()
        if not bool((masked | outputs.isfinite()).all()):
            raise NonFiniteError(
                "model: expected logits that are finite, or minus infinity at masked classes, "
                "got NaN or infinity"
            )
        if bool(masked.all(dim=1).any()):
            raise NonFiniteError(
                "model: expected a class of probability above 0 for every target, got logits that "
                "are all minus infinity"
            )
        self._require_targets_off(masked, targets)

    def _require_targets_off(self, masked: Tensor, targets: Tensor) -> None:
        if targets.is_floating_point():
            if bool((masked & (targets > 0)).any()):
                raise LabelError(
                    "cross_entropy: expected probability 0 at masked classes, whose logits are "
                    "minus infinity, got more"
                )
            return
        classes = self._indices(targets).unsqueeze(1)
        wrong = masked.gather(1, classes).squeeze(1) & self._counted(targets)
        if bool(wrong.any()):
            raise LabelError(
                "cross_entropy: expected labels of classes that are not masked, got "
                f"{int(targets[wrong].reshape(-1)[0])}, whose logit is minus infinity"
            )

    def validate(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.dim() < 2:
            raise LabelError(
                f"cross_entropy: expected logits of shape (N, C, ...), got {tuple(outputs.shape)}"
            )
        if targets.is_floating_point():
            self._validate_probabilities(outputs, targets)
        else:
            self._validate_indices(outputs, targets)

    @staticmethod
    def _validate_probabilities(outputs: Tensor, targets: Tensor) -> None:
        _require_same_shape("cross_entropy", outputs, targets, "class probabilities")
        require_finite("cross_entropy: targets", targets)
        if bool((targets < 0).any()):
            raise LabelError("cross_entropy: expected class probabilities >= 0, got a negative")

    def _validate_indices(self, outputs: Tensor, targets: Tensor) -> None:
        expected = (outputs.shape[0], *outputs.shape[2:])
        if tuple(targets.shape) != expected:
            raise LabelError(
                f"cross_entropy: expected class indices of shape {expected}, "
                f"got {tuple(targets.shape)}"
            )
        classes, counted = outputs.shape[1], self._counted(targets)
        wrong = counted & ((targets < 0) | (targets >= classes))
        if bool(wrong.any()):
            raise LabelError(
                f"cross_entropy: expected labels in 0..{classes - 1}, "
                f"got {int(targets[wrong].reshape(-1)[0])}"
            )
        if self.reduction == "mean" and not bool(counted.any()):
            raise LabelError("cross_entropy: expected a target that counts, got only ignore_index")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            terms = targets * outputs.log_softmax(dim=1)
            # Not 0 * -inf, which is NaN, where a class is masked.
            total = -torch.where(targets > 0, terms, 0.0).sum()
            locations = outputs.numel() // outputs.shape[1]
            return total / (locations if self.reduction == "mean" else outputs.shape[0])
        total = F.cross_entropy(
            outputs, targets, ignore_index=self.ignore_index, reduction=self.reduction
        )
        return total if self.reduction == "mean" else total / outputs.shape[0]

    def correct(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if targets.is_floating_point():
            classes, counted = targets.argmax(dim=1), targets.sum(dim=1) > 0
        else:
            classes, counted = targets, self._counted(targets)
        hit = counted & (outputs.argmax(dim=1) == classes)
        return hit.sum(), counted.sum()

    def classes_in(self, targets: Tensor) -> int:
        if targets.is_floating_point():
            return targets.shape[1] if targets.dim() > 1 else 0
        counted = targets[self._counted(targets)]
        return int(counted.max()) + 1 if counted.numel() else 0

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            masses = targets.sum(dim=1, keepdim=True)
            total = masses.new_full((), masses.numel())
        else:
            masses = self._counted(targets).to(outputs.dtype).unsqueeze(1)
            total = masses.sum()
        return masses if self.reduction == "sum" else masses * (outputs.shape[0] / total)

    def sampled_score(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        probabilities = outputs.softmax(dim=1)
        by_class = probabilities.movedim(1, -1)
        rows = by_class.reshape(-1, outputs.shape[1]).float()
        drawn = torch.multinomial(rows, 1, generator=generator).reshape(by_class.shape[:-1])
        return self._minus_one_hot(probabilities, drawn)

    def empirical_score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        probabilities = outputs.softmax(dim=1)
        if targets.is_floating_point():
            # Of targets of mass 1: `constant` has the mass. One of mass 0 counts for nothing.
            mass = targets.sum(dim=1, keepdim=True)
            return probabilities - targets / mass.masked_fill(mass == 0, 1.0)
        return self._minus_one_hot(probabilities, self._indices(targets))

    def _counted(self, targets: Tensor) -> Tensor:
        return targets != self.ignore_index

    def _indices(self, targets: Tensor) -> Tensor:
        """Class indices, and some class where a target is ignored."""
        return targets.masked_fill(~self._counted(targets), 0)

    def root_column(self, outputs: Tensor, column: int) -> Tensor:
        # Column (class k, location t) of sqrt(diag p - p p^T) = (I - p 1^T) diag sqrt(p).
        probabilities = outputs.softmax(dim=1)
        flat = probabilities.flatten(2) if outputs.dim() > 2 else probabilities[:, :, None]
        k, location = divmod(column, flat.shape[2])
        result = torch.zeros_like(flat)
        root = flat[:, k, location].sqrt()
        result[:, :, location] = -flat[:, :, location] * root[:, None]
        result[:, k, location] += root
        return result.reshape(outputs.shape)

    @staticmethod
    def _minus_one_hot(probabilities: Tensor, classes: Tensor) -> Tensor:
        ones = torch.ones_like(probabilities[:, :1])
        return probabilities.scatter_add(1, classes.unsqueeze(1), -ones)


class _Elementwise(Likelihood):
    """A likelihood that factorises over the output's elements."""

    name: str

    def validate(self, outputs: Tensor, targets: Tensor) -> None:
        _require_same_shape(self.name, outputs, targets, "targets")
        require_finite(f"{self.name}: targets", targets)

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
