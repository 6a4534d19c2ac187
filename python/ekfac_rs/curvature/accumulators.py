"""One mini-batch into a layer's block."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ekfac_rs import _core
from ekfac_rs._tensors import accumulation_dtype, borrow
from ekfac_rs.curvature.curvature import kept_strata
from ekfac_rs.curvature.diagonal import DiagonalBlock
from ekfac_rs.curvature.kronecker import KroneckerSum
from ekfac_rs.curvature.settings import DIAGONAL, PassSettings
from ekfac_rs.layers import AffineLayer, Geometry, Units


class KroneckerAccumulator:
    """Sums of a layer's factors over mini-batches, lower triangles only."""

    def __init__(self, layer: AffineLayer, settings: PassSettings) -> None:
        dtype = accumulation_dtype(layer.like.dtype)
        like = torch.empty((), dtype=dtype, device=layer.like.device)
        terms = len(_core.strata()[settings.approximation])
        self.approximation = settings.approximation
        self.precision = settings.precision
        self.append_one = layer.has_shift(settings.coordinates)
        self.examples = 0
        # A stratum without degrees of freedom in a mini-batch (one example, say) has no gradient
        # factor there, and the mini-batch is left out of that factor's mean.
        self.gradient_examples = [0] * terms
        shape_A, shape_G = layer.factor_shapes(settings.coordinates)
        self.A = [like.new_zeros(shape_A) for _ in range(terms)]
        self.G = [like.new_zeros(shape_G) for _ in range(terms)]

    def add_inputs(self, units: Units) -> None:
        """Take a mini-batch's inputs."""
        a, geometry = units
        out = [borrow(A) for A in self.A]
        if geometry is None:
            degrees_of_freedom = _core.accumulate_gram(
                borrow(a), out, self.approximation, "input", self.append_one, 1.0, self.precision
            )
        else:
            degrees_of_freedom = _core.accumulate_patch_gram(
                borrow(a),
                out,
                self.approximation,
                *geometry,
                self.append_one,
                1.0,
                self.precision,
            )
        self.examples += len(a)
        for k, dof in enumerate(degrees_of_freedom):
            self.gradient_examples[k] += len(a) if dof else 0

    def add_gradients(self, g: Tensor, weight: float) -> None:
        """Take gradients of the mini-batch whose inputs came last."""
        out = [borrow(G) for G in self.G]
        _core.accumulate_gram(
            borrow(g), out, self.approximation, "gradient", False, weight, self.precision
        )

    def block(self) -> KroneckerSum:
        """Mean over examples; a stratum that never had a degree of freedom is no term."""
        terms = []
        for k in kept_strata(self.gradient_examples):
            A, G = self.A[k] / self.examples, self.G[k] / self.gradient_examples[k]
            _core.symmetrize(borrow(A))
            _core.symmetrize(borrow(G))
            terms.append((A, G))
        return KroneckerSum(terms)


class DiagonalAccumulator:
    """Sum over examples of squared per-example gradients, ``sum_n (sum_t g_nt a_nt^T)**2``."""

    def __init__(self, layer: AffineLayer, settings: PassSettings) -> None:
        dtype = accumulation_dtype(layer.like.dtype)
        self.layer = layer
        self.append_one = layer.has_shift(settings.coordinates)
        shape = layer.shape(settings.coordinates)
        self.values = torch.zeros(shape, dtype=dtype, device=layer.like.device)
        self.units: Units | None = None
        self.gradient_examples = [0]

    def add_inputs(self, units: Units) -> None:
        """Keep a mini-batch's inputs for its gradients."""
        self.units = Units(units.values.to(self.values.dtype), units.geometry)
        self.gradient_examples[0] += len(units.values)

    def add_gradients(self, g: Tensor, weight: float) -> None:
        """Take gradients of the mini-batch whose inputs came last."""
        assert self.units is not None
        g = g.to(self.values.dtype)
        values = self.values[:, :-1] if self.append_one else self.values
        self._add_squares(values, self.units, g, weight)
        if self.append_one:
            totals = g if g.dim() == 2 else g.sum(dim=1)
            self.values[:, -1].add_(totals.square().sum(dim=0), alpha=weight)

    def _add_squares(self, values: Tensor, units: Units, g: Tensor, weight: float) -> None:
        groups = self.layer.groups
        if units.geometry is None and g.dim() == 2 and groups == 1:
            values.addmm_(g.square().T, units.values.square(), alpha=weight)
            return
        # A slice of examples at a time bounds the memory their gradients take.
        share = max(1, _DIAGONAL_ELEMENTS // values.numel())
        for start in range(0, len(g), share):
            a, own = units.values[start : start + share], g[start : start + share]
            if units.geometry is None:
                per_example = _outer_by_group(a, own, groups)
            else:
                per_example = _conv_weight_gradients(a, own, units.geometry, groups)
            values.add_(per_example.square().sum(dim=0), alpha=weight)

    def block(self) -> DiagonalBlock:
        """Mean over examples."""
        return DiagonalBlock(self.values / self.gradient_examples[0])


# Of per-example gradients held at a time: 256 MB in float32.
_DIAGONAL_ELEMENTS = 1 << 26


def _outer_by_group(a: Tensor, g: Tensor, groups: int) -> Tensor:
    """``sum_t g_nt a_nt^T`` of each example and group, shape (N, D, K)."""
    a, g = (x.reshape(len(x), -1, groups, x.shape[-1] // groups) for x in (a, g))
    return torch.einsum("ntgd,ntgk->ngdk", g, a).flatten(1, 2)


def _conv_weight_gradients(x: Tensor, g: Tensor, geometry: Geometry, groups: int) -> Tensor:
    """Gradient of a convolution's weights for each example, shape (N, D, K).

    One convolution of all examples at once: each is a group of its own.
    """
    N, C, D = len(x), x.shape[1], g.shape[-1]
    x = F.pad(x, [side for sides in reversed(geometry.padding) for side in sides])
    sizes = [
        (length - d * (k - 1) - 1) // s + 1
        for length, k, s, d in zip(x.shape[2:], *geometry[:3], strict=True)
    ]
    weight = x.new_zeros(()).expand(N * D, C // groups, *geometry.kernel)
    _, gradient, _ = torch.ops.aten.convolution_backward(
        g.transpose(1, 2).reshape(1, N * D, *sizes),
        x.reshape(1, N * C, *x.shape[2:]),
        weight,
        None,
        geometry.stride,
        [0] * len(sizes),
        geometry.dilation,
        False,
        [0] * len(sizes),
        N * groups,
        [False, True, False],
    )
    per_example: Tensor = gradient.reshape(N, D, -1)
    return per_example


Accumulator = KroneckerAccumulator | DiagonalAccumulator


def accumulator(layer: AffineLayer, settings: PassSettings) -> Accumulator:
    """Return the accumulator that makes a layer's block under these settings."""
    if settings.approximation == DIAGONAL:
        return DiagonalAccumulator(layer, settings)
    return KroneckerAccumulator(layer, settings)
