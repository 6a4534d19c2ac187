"""Corrections of curvature blocks from the gradients of whole mini-batches.

Under sampled labels, the gradient ``W = sum_u g_u a_u^T`` of a mini-batch of N examples is a sample
of the exact block: ``E[vec W vec W^T] / N = H``, whatever interacts (method: corrections). A
correction is a sequence of passes, each of which looks at new samples and makes a better block of
what it has.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ekfac_rs._ranks import Ranks
from ekfac_rs._tensors import accumulation_dtype
from ekfac_rs.curvature.block import Block
from ekfac_rs.curvature.columnwise import ColumnwiseSum, sum_of_terms
from ekfac_rs.curvature.diagonal import DiagonalBlock
from ekfac_rs.curvature.eigenbasis import EigenbasisSum
from ekfac_rs.curvature.kronecker import KroneckerSum, eigh
from ekfac_rs.curvature.settings import PassSettings
from ekfac_rs.layers import AffineLayer, Units

# Of a mini-batch whose examples do not depend on each other: each part is a sample of its own.
_PARTS = 4

# Rounds through the terms for one side's nearest factors, and the share of their squares by which
# the last must have moved them for another one.
_ROUNDS = 16
_MOVED = 1e-6

Factors = list[Tensor]


# --- what samples say, and how surely -------------------------------------------------------------


class Mean:
    """Weighted mean over samples of some tensors, and the variance of that mean.

    Samples of a part of a mini-batch stand for as many examples. Those of the columns of a root
    (labels "type2") add up and are not all alike, but count as draws: their variance is rather
    taken too large.
    """

    def __init__(self, shapes: Sequence[Tensor]) -> None:
        self._sums = [torch.zeros_like(x) for x in shapes]
        zero = torch.zeros((), dtype=torch.float64, device=shapes[0].device)
        self._squares, self._of_batch = zero, zero
        self._examples, self._batch = 0, 0
        self._weights_squared = 0.0
        self._scores, self._shares_squared = 0.0, 0.0

    def begin(self, examples: int) -> None:
        """Begin a mini-batch."""
        self._end()
        self._batch = examples
        self._examples += examples

    def add(self, sample: Sequence[Tensor], weight: float, examples: int) -> None:
        """Take a sample, not yet divided by the examples that it is of."""
        square = self._of_batch.new_zeros(())
        for total, part in zip(self._sums, sample, strict=True):
            total.add_(part, alpha=weight)
            square = square + torch.linalg.vector_norm(part).double().square()
        self._of_batch = self._of_batch + square * (weight / examples)
        self._scores += weight * examples / self._batch
        self._shares_squared += (weight * examples) ** 2

    def result(self) -> tuple[list[Tensor], float]:
        """Return the mean, and the sum of its entries' variances; infinite for a single sample."""
        self._end()
        means = [total / self._examples for total in self._sums]
        share = self._weights_squared / self._examples**2
        if share >= 1.0 - 1e-9:
            return means, float("inf")
        spread = float(self._squares) / self._examples - _square(means)
        return means, max(spread, 0.0) * share / (1.0 - share)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums: no copies."""
        return {
            "sums": self._sums,
            "squares": (self._squares, self._of_batch),
            "examples": (self._examples, self._batch),
            "weights": (self._weights_squared, self._scores, self._shares_squared),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for total, saved in zip(self._sums, state["sums"], strict=True):
            total.copy_(saved)
        self._squares, self._of_batch = (saved.to(self._squares) for saved in state["squares"])
        self._examples, self._batch = state["examples"]
        self._weights_squared, self._scores, self._shares_squared = state["weights"]

    def reduce(self, ranks: Ranks) -> None:
        """Take the samples of all ranks together."""
        self._end()
        for total in self._sums:
            ranks.sum_(total, "correction")
        numbers = [float(self._squares), self._examples, self._weights_squared]
        squares, examples, self._weights_squared = ranks.totals(numbers, "spread")
        self._squares = torch.full_like(self._squares, squares)
        self._examples = round(examples)

    def _end(self) -> None:
        """Close a mini-batch: only now is known how many scores its labels have."""
        if self._scores:
            self._squares = self._squares + self._of_batch * self._scores
            self._weights_squared += self._shares_squared / self._scores**2
        self._of_batch = torch.zeros_like(self._of_batch)
        self._scores = self._shares_squared = 0.0


class Estimate:
    """Mean over samples, shrunk towards what the present block says in their place.

    First the best multiple of the latter: its factor is shrunk towards 1, then the mean towards
    that multiple; each by the share of its squared distance that is variance (James & Stein 1961,
    the positive part). So few samples change little, and many are taken as they are.

    Parameters
    ----------
    expected : sequence of Tensor
        What the samples' mean would be if the present block were exact.
    exact : bool
        Whether samples have no variance, as with labels that are summed over exactly.
    """

    def __init__(self, expected: Sequence[Tensor], exact: bool) -> None:
        self._expected, self._exact = list(expected), exact
        self._size = _square(expected)
        self._mean = Mean(self._expected)
        self._factor = Mean([torch.zeros((), dtype=torch.float64, device=expected[0].device)])

    def begin(self, examples: int) -> None:
        """Begin a mini-batch."""
        self._mean.begin(examples)
        self._factor.begin(examples)

    def add(self, sample: Sequence[Tensor], weight: float, examples: int) -> None:
        """Take a sample, not yet divided by the examples that it is of."""
        self._mean.add(sample, weight, examples)
        if self._size:
            along = sum(
                (x * y).sum(dtype=torch.float64)
                for x, y in zip(sample, self._expected, strict=True)
            )
            self._factor.add([torch.as_tensor(along) / self._size], weight, examples)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums: no copies."""
        return {"mean": self._mean.state_dict(), "factor": self._factor.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._mean.load_state_dict(state["mean"])
        self._factor.load_state_dict(state["factor"])

    def reduce(self, ranks: Ranks) -> None:
        """Take the samples of all ranks together."""
        if not ranks.alone:
            self._mean.reduce(ranks)
            self._factor.reduce(ranks)

    def result(self) -> list[Tensor]:
        """Return the estimate."""
        means, variance = self._mean.result()
        if self._exact:
            return means
        factor = 1.0
        if self._size:
            (multiple,), of_multiple = self._factor.result()
            (shrunk,) = _shrunk([multiple], of_multiple, [torch.ones_like(multiple)])
            factor = float(shrunk)
        return _shrunk(means, variance, [factor * x for x in self._expected])


def _shrunk(means: Sequence[Tensor], variance: float, target: Sequence[Tensor]) -> list[Tensor]:
    distance = _square([x - y for x, y in zip(means, target, strict=True)])
    kept = 1.0 - variance / distance if variance < distance else 0.0
    return [torch.lerp(y, x, kept) for x, y in zip(means, target, strict=True)]


def _square(tensors: Sequence[Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(x).double()) ** 2 for x in tensors)


# --- one pass of a correction ---------------------------------------------------------------------


class Step(ABC):
    """What a pass looks at, and the better block that it makes of it.

    Attributes
    ----------
    block : Block
        What it begins with. A step made of that is the same one.
    """

    block: Block

    @property
    @abstractmethod
    def expected(self) -> list[Tensor]:
        """What `of` would be on average, divided by the examples, if the block were exact."""

    @abstractmethod
    def of(self, W: Tensor) -> list[Tensor]:
        """Return what is averaged of a gradient, quadratic in it."""

    @abstractmethod
    def corrected(self, values: list[Tensor]) -> Block:
        """Return the better block."""


class BestScale(Step):
    """The block times its best scalar, ``<H, H_X> / <H_X, H_X>``."""

    def __init__(self, block: Block) -> None:
        self.block, self._square = block, block.norm() ** 2

    @property
    def expected(self) -> list[Tensor]:
        return [torch.ones((), dtype=torch.float64, device=self.block.device)]

    def of(self, W: Tensor) -> list[Tensor]:
        share = self.block.quadratic(W) / self._square if self._square else 0.0
        return [torch.full_like(self.expected[0], share)]

    def corrected(self, values: list[Tensor]) -> Block:
        return self.block * float(values[0])


class Diagonal(Step):
    """The diagonal of the exact block: the nearest diagonal one."""

    def __init__(self, block: DiagonalBlock) -> None:
        self.block: DiagonalBlock = block

    @property
    def expected(self) -> list[Tensor]:
        return [self.block.values]

    def of(self, W: Tensor) -> list[Tensor]:
        return [W.square()]

    def corrected(self, values: list[Tensor]) -> Block:
        return DiagonalBlock(*values)


class Eigenvalues(Step):
    """The diagonal of the exact block in the eigenbasis of the summed factors."""

    def __init__(self, block: EigenbasisSum) -> None:
        self.block: EigenbasisSum = block

    @property
    def expected(self) -> list[Tensor]:
        return [self.block.terms[0].values]

    def of(self, W: Tensor) -> list[Tensor]:
        return [self.block.terms[0].inside(W).square()]

    def corrected(self, values: list[Tensor]) -> Block:
        return self.block.with_values(*values)


class NearestFactors(Step):
    """The nearest factors on one side, those on the other being kept.

    With the others kept, ``|sum_k G_k (x) A_k - H|**2`` knows of ``H`` only the matrices
    ``M_k = <A_k, H>``, of which each sample has ``W A_k W^T``. One term has ``G = M / |A|**2``: a
    power step. For several, each factor in turn is the nearest positive semi-definite one, so that
    the error falls and every term stays one.
    """

    def __init__(self, block: KroneckerSum | ColumnwiseSum) -> None:
        self.block = block
        self._diagonal = isinstance(block, ColumnwiseSum)
        self._terms = block.terms

    @property
    def expected(self) -> list[Tensor]:
        inner = _inner_products(self._kept)
        sought = list(enumerate(self._sought))
        return [
            torch.stack([_for_each(inner[..., k, j], X) * X for j, X in sought]).sum(0)
            for k in range(len(sought))
        ]

    def corrected(self, values: list[Tensor]) -> Block:
        inner = _inner_products(self._kept)
        nearest = list(self._sought)
        for _ in range(_ROUNDS if len(nearest) > 1 else 1):
            before = list(nearest)
            for k, M in enumerate(values):
                square = _for_each(inner[..., k, k], M)
                others = [
                    _for_each(inner[..., k, j], X) * X for j, X in enumerate(nearest) if j != k
                ]
                # A mean of squares is positive semi-definite, what others leave of it need not be.
                left = _positive_part(M - torch.stack(others).sum(0)) if others else M
                there = square > 0.0
                nearest[k] = torch.where(there, left / torch.where(there, square, 1.0), nearest[k])
            moved = _square([X - Y for X, Y in zip(nearest, before, strict=True)])
            if moved <= _MOVED * _square(nearest):
                break
        return self._with([X if X.dim() == 1 else 0.5 * (X + X.mT) for X in nearest])

    @property
    @abstractmethod
    def _kept(self) -> Factors: ...

    @property
    @abstractmethod
    def _sought(self) -> Factors: ...

    @abstractmethod
    def _with(self, factors: Factors) -> Block: ...

    def _by_group(self, W: Tensor) -> Tensor:
        G = self._terms[0][1]
        return W.reshape(*G.shape[:-1], W.shape[-1])


class NearestG(NearestFactors):
    """The gradients' side."""

    @property
    def _kept(self) -> Factors:
        return [A for A, _ in self._terms]

    @property
    def _sought(self) -> Factors:
        return [G for _, G in self._terms]

    def of(self, W: Tensor) -> list[Tensor]:
        W = self._by_group(W)
        return [(W * A if self._diagonal else W @ A) @ W.mT for A in self._kept]

    def _with(self, factors: Factors) -> Block:
        return sum_of_terms(list(zip(self._kept, factors, strict=True)))


class NearestA(NearestFactors):
    """The inputs' side."""

    @property
    def _kept(self) -> Factors:
        return [G for _, G in self._terms]

    @property
    def _sought(self) -> Factors:
        return [A for A, _ in self._terms]

    def of(self, W: Tensor) -> list[Tensor]:
        W = self._by_group(W)
        if self._diagonal:
            return [((G @ W) * W).sum(-2) for G in self._kept]
        return [W.mT @ (G @ W) for G in self._kept]

    def _with(self, factors: Factors) -> Block:
        return sum_of_terms(list(zip(factors, self._kept, strict=True)))


def _inner_products(factors: Factors) -> Tensor:
    """Return ``<F_k, F_j>``, of each group: ``[..., terms, terms]``."""
    stacked = torch.stack(factors, dim=-3 if factors[0].dim() > 1 else 0)
    flat = stacked.flatten(-2) if factors[0].dim() > 1 else stacked
    return flat @ flat.mT


def _for_each(number: Tensor, factor: Tensor) -> Tensor:
    """Give a number, or one for each group, the axes of a factor, or of a stack of them."""
    return number[(..., *(None,) * (factor.dim() - number.dim()))]


def _positive_part(factor: Tensor) -> Tensor:
    """Return the nearest positive semi-definite matrix, or diagonal."""
    if factor.dim() == 1:
        return factor.clamp_min(0.0)
    symmetric = 0.5 * (factor + factor.mT)
    if not bool(torch.linalg.cholesky_ex(symmetric).info.any()):
        return symmetric
    values, vectors = eigh(symmetric)
    return (vectors * values.clamp_min(0.0)[..., None, :]) @ vectors.mT


# Both sides twice: the error is then within a tenth of that of the nearest.
_NEAREST = (NearestG, NearestA, NearestG, NearestA)
_PASSES = {"scale": 1, "eigenvalues": 1, "nearest": len(_NEAREST)}


def passes_of(correction: str | None) -> int:
    """Return how many passes a correction takes at most."""
    return 0 if correction is None else _PASSES[correction]


def step_of(correction: str, block: Block, index: int) -> Step | None:
    """Return what a correction's pass of this number does for a block; None for nothing.

    Eigenvalues are corrected of blocks that are in their eigenbases already.
    """
    if correction == "scale":
        return BestScale(block) if index == 0 else None
    if isinstance(block, DiagonalBlock):
        return Diagonal(block) if index == 0 else None
    if correction == "eigenvalues":
        assert isinstance(block, EigenbasisSum)
        return Eigenvalues(block)
    assert isinstance(block, KroneckerSum | ColumnwiseSum)
    return _NEAREST[index](block)


class Correcting:
    """Takes a layer's mini-batches in one pass of a correction.

    Parameters
    ----------
    layer : AffineLayer
    settings : PassSettings
    step : Step
    independent : bool
        Whether examples of a mini-batch do not depend on each other: each part of it then is a
        sample.
    """

    def __init__(
        self, layer: AffineLayer, settings: PassSettings, step: Step, independent: bool
    ) -> None:
        exact = settings.labels == "exact"
        self._layer, self._step = layer, step
        self._append_one = layer.has_shift(settings.coordinates)
        self._parts = _PARTS if independent and not exact else 1
        self._dtype = accumulation_dtype(layer.like.dtype)
        self._estimate = Estimate(step.expected, exact)
        self._units: Units | None = None

    def add_inputs(self, units: Units) -> None:
        """Keep a mini-batch's inputs for its gradients."""
        self._units = units.to(self._dtype)
        self._estimate.begin(len(units))

    def add_gradients(self, g: Tensor, weight: float) -> None:
        """Take gradients of the mini-batch whose inputs came last."""
        assert self._units is not None
        share = -(-len(g) // self._parts)
        for start in range(0, len(g), share):
            examples = slice(start, start + share)
            part = g[examples].to(self._dtype)
            W = self._gradient(self._units.part(examples), part)
            self._estimate.add(self._step.of(W), weight, len(part))

    def end_batch(self) -> None:
        """Let go of the mini-batch's inputs: all its gradients have come."""
        self._units = None

    def state_dict(self) -> dict[str, Any]:
        """Return the sums between two mini-batches: no copies."""
        return self._estimate.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._estimate.load_state_dict(state)

    def reduce(self, ranks: Ranks) -> None:
        """Take the samples of all ranks together."""
        self._estimate.reduce(ranks)

    def block(self) -> Block:
        """Return the corrected block."""
        return self._step.corrected(self._estimate.result())

    def _gradient(self, units: Units, g: Tensor) -> Tensor:
        W = self._layer.gradient(units, g)
        if not self._append_one:
            return W.contiguous()
        return torch.cat([W, g.reshape(-1, g.shape[-1]).sum(0)[:, None]], 1)
