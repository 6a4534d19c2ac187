"""One layer's blocks of all tasks, made ready for the products of a training loop."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from ekfac_rs import _core
from ekfac_rs._tensors import borrow
from ekfac_rs.curvature import (
    Block,
    DiagonalBlock,
    KroneckerSum,
    ThinKroneckerSum,
    TruncatedSum,
)


class LayerProduct(NamedTuple):
    """What a penalty multiplies the deviation of one layer's weights by.

    Attributes
    ----------
    flops : int or None
        Floating-point operations of one product; None where nobody has counted them.
    columns : int or None
        How many columns of truncated roots it goes through; None where nothing is truncated.
    error : float
        Relative to the curvatures' sum, in Frobenius norm.
    """

    flops: int | None
    columns: int | None
    error: float


class Operator(ABC):
    """One layer's blocks of all tasks.

    Attributes
    ----------
    block : Block or None
        Their sum.
    packed : optional
        What the core multiplies by; the whole product is that and ``shift`` times V.
    shift : float
    """

    block: Block | None = None
    packed: _core.KroneckerOperator | None = None
    shift: float = 0.0

    @abstractmethod
    def apply(self, V: Tensor, out: Tensor) -> None:
        """Write the product."""

    @abstractmethod
    def describe(self) -> LayerProduct:
        """Tell what a product takes, and how exact it is."""

    def top_eigenvalue(self) -> float:
        """Largest eigenvalue of the blocks' sum."""
        return 0.0 if self.block is None else self.block.top_eigenvalue()


class _NoOperator(Operator):
    """No curvature: damping alone."""

    def apply(self, V: Tensor, out: Tensor) -> None:
        out.zero_()

    def describe(self) -> LayerProduct:
        return LayerProduct(0, None, 0.0)


class _DiagonalOperator(Operator):
    def __init__(self, block: DiagonalBlock) -> None:
        self.block, self._values = block, block.values

    def apply(self, V: Tensor, out: Tensor) -> None:
        torch.mul(self._values, V, out=out)

    def describe(self) -> LayerProduct:
        return LayerProduct(self._values.numel(), None, 0.0)


class _BlockOperator(Operator):
    """A block's own product."""

    def __init__(self, block: Block) -> None:
        self.block, self._product = block, block.product

    def apply(self, V: Tensor, out: Tensor) -> None:
        out.copy_(self._product(V))

    def describe(self) -> LayerProduct:
        return LayerProduct(None, None, 0.0)


class _PackedOperator(Operator):
    """Packed once, applied in every training step."""

    packed: _core.KroneckerOperator

    def apply(self, V: Tensor, out: Tensor) -> None:
        self.packed.apply(borrow(V), borrow(out))
        if self.shift:
            out.add_(V, alpha=self.shift)

    def describe(self) -> LayerProduct:
        return LayerProduct(self.packed.flops, None, 0.0)


class _KroneckerOperator(_PackedOperator):
    def __init__(self, block: KroneckerSum, precision: str) -> None:
        self.block = block
        terms = [(borrow(A), borrow(G)) for A, G in block.terms]
        self.packed = _core.KroneckerOperator(terms, precision)


class _ThinOperator(_PackedOperator):
    """Thin terms packed as such."""

    def __init__(self, block: ThinKroneckerSum, precision: str) -> None:
        self.block = block
        terms: list[tuple[_core.Factor, _core.Factor]]
        terms = [((borrow(R), 0.0), (borrow(Q), 0.0)) for R, Q in block.terms]
        terms += [((borrow(A), None), (borrow(G), None)) for A, G in block.rest.terms]
        self.packed = _core.KroneckerOperator.from_factors(block.shape, terms, precision)


class _TruncatedOperator(_PackedOperator):
    """Something near the blocks of all tasks, much cheaper."""

    def __init__(
        self,
        blocks: Sequence[KroneckerSum | ThinKroneckerSum],
        dropped: float,
        precision: str,
    ) -> None:
        self.block = reduce(add, blocks)
        self._near = TruncatedSum(blocks, dropped, precision)
        self.packed, self.shift = self._near.packed, self._near.shift

    def describe(self) -> LayerProduct:
        return LayerProduct(self._near.flops, self._near.columns, self._near.error())


def operator_of(
    blocks: Sequence[Block], like: Tensor, dropped: float, precision: str = "ieee"
) -> Operator:
    """Make one layer's blocks ready; where something is dropped and they allow it, near ones.

    Parameters
    ----------
    blocks : sequence of Block
    like : Tensor
        Tells device and dtype.
    dropped : float
        See `QuadraticPenalty`.
    precision : str
        Of products in float32 on a GPU: "ieee" or "tf32".
    """
    if not blocks:
        return _NoOperator()
    blocks = [block.to(like.device, like.dtype) for block in blocks]
    if dropped:
        products: list[KroneckerSum | ThinKroneckerSum]
        products = [b for b in blocks if isinstance(b, ThinKroneckerSum)]
        products += [b for b in blocks if isinstance(b, KroneckerSum) and b.groups == 1]
        if len(products) == len(blocks):
            return _TruncatedOperator(products, dropped, precision)
    total = reduce(add, blocks)
    if isinstance(total, KroneckerSum):
        return _KroneckerOperator(total, precision)
    if isinstance(total, ThinKroneckerSum):
        return _ThinOperator(total, precision)
    return _DiagonalOperator(total) if isinstance(total, DiagonalBlock) else _BlockOperator(total)


class InnerProducts(NamedTuple):
    """``<D, H D>`` and ``<D, D>`` of a layer: floats, or, on a GPU, tensors nobody waited for."""

    curved: float | Tensor
    flat: float | Tensor


def write_products(
    operators: Sequence[Operator],
    deviations: Sequence[Tensor],
    out: Sequence[Tensor],
    scale: float,
    damping: float,
) -> list[InnerProducts]:
    """Write ``scale H D + damping D`` for each layer.

    Parameters
    ----------
    operators : sequence of Operator
        The ``H``.
    deviations, out : sequence of Tensor
        The ``D``, contiguous and of each layer's shape (D, K), and where the results go.
    scale, damping : float
    """
    inner: list[InnerProducts | None] = [None] * len(operators)
    layers = list(zip(operators, deviations, out, strict=True))
    by_device: dict[torch.device, list[int]] = {}
    for index, (operator, D, target) in enumerate(layers):
        if operator.packed is None:
            inner[index] = _written(operator, D, target, scale, damping)
        else:
            by_device.setdefault(D.device, []).append(index)
    for device, indices in by_device.items():
        told = torch.empty(len(indices), 1, 2, dtype=torch.float64, device=device)
        packed = [layers[index] for index in indices]
        _core.apply_operators(_borrowed(packed, told, scale, damping), scale)
        pairs = told[:, 0] if told.is_cuda else told[:, 0].tolist()
        for index, (operator, _, _), (curved, flat) in zip(indices, packed, pairs, strict=True):
            inner[index] = InnerProducts(curved + operator.shift * flat, flat)
    return [products for products in inner if products is not None]


def _borrowed(
    layers: Sequence[tuple[Operator, Tensor, Tensor]], told: Tensor, scale: float, damping: float
) -> list[_core.Product]:
    products = []
    for (operator, D, target), inner in zip(layers, told, strict=True):
        assert operator.packed is not None
        damped = scale * operator.shift + damping
        tensors = borrow(D), borrow(target), damped, borrow(inner)
        products.append((operator.packed, *tensors))
    return products


def _written(
    operator: Operator, D: Tensor, out: Tensor, scale: float, damping: float
) -> InnerProducts:
    operator.apply(D, out)
    inner = InnerProducts(_inner(D, out), _inner(D, D) if damping else 0.0)
    out.mul_(scale)
    if damping:
        out.add_(D, alpha=damping)
    return inner


def _inner(V: Tensor, W: Tensor) -> Tensor:
    """Inner product in double precision; on a GPU nobody waits for it."""
    return (V * W).sum(dtype=torch.float64)
