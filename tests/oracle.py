"""Exact curvature by brute force, in float64, sharing no code with the package.

Everything here follows the definitions alone: the Jacobian of the network's outputs by
automatic differentiation, the Hessian of the loss with respect to them, and sums over all
pairs of units written out. Nothing is fast and nothing is clever.

A *unit* is one application of a layer: one example, or one location of one example where the
layer's input is ``[N, T, K]`` or where a convolution has several output locations. Blocks are
``[D * K, D * K]`` with weights flattened row by row, so a Kronecker term ``G V A`` is
``kron(G, A)``. A convolution with groups has a block for each group, on the diagonal, and a
normalisation's scale and shift one for each channel.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Batch = tuple[Tensor, Tensor]
Term = tuple[Tensor, Tensor]
Relabeling = tuple[Tensor, Tensor]
ExampleLoss = Callable[[Tensor, Tensor], Tensor]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius distance in units of the expected tensor's norm."""
    expected = expected.to(torch.float64)
    distance = torch.linalg.vector_norm(actual.to(expected) - expected)
    return (distance / torch.linalg.vector_norm(expected)).item()


def dense(terms: Iterable[Term]) -> Tensor:
    """The matrix of ``V -> sum_k G_k V A_k`` for V flattened row by row.

    Factors of three axes hold one pair for each group, whose rows of V follow one another.
    """
    return sum(
        torch.kron(g, a)
        if a.ndim == 2
        else torch.block_diag(*map(torch.kron, g.unbind(), a.unbind()))
        for a, g in terms
    )


def within_groups(matrix: Tensor, groups: int) -> Tensor:
    """A block with zeros where rows and columns belong to different groups."""
    size = len(matrix) // groups
    return torch.block_diag(
        *(matrix[i : i + size, i : i + size] for i in range(0, len(matrix), size))
    )


# --- losses, one example at a time --------------------------------------------------------


def example_loss(kind: str, reduction: str = "mean") -> ExampleLoss:
    """The loss of one example, reduced over its outputs or locations."""
    functions = {
        "cross_entropy": lambda z, y: F.cross_entropy(z[None], y[None], reduction=reduction),
        "mse": lambda z, y: F.mse_loss(z, y, reduction=reduction),
        "bce": lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction=reduction),
    }
    return functions[kind]


def output_hessians(outputs: Tensor, targets: Tensor, loss: ExampleLoss) -> Tensor:
    """Hessian of every example's loss with respect to its outputs, ``[N, C, C]``."""
    count = outputs[0].numel()
    # Examples side by side: one after the other takes most of the time of all tests.
    hessians = vmap(jacrev(jacrev(loss)))(outputs.detach(), targets)
    return hessians.reshape(len(outputs), count, count)


def square_root(matrix: Tensor) -> Tensor:
    """A symmetric square root of positive semi-definite matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT


# --- one affine map -----------------------------------------------------------------------


def conv_patches(conv: _ConvNd, x: Tensor) -> Tensor:
    """The patch at every output location, ``[N, T, groups, K]``, one kernel offset at a time."""
    sides = []
    for axis, (size, gap) in enumerate(zip(conv.kernel_size, conv.dilation, strict=True)):
        if conv.padding == "same":
            before = gap * (size - 1) // 2
            sides.append((before, gap * (size - 1) - before))
        else:
            sides.append((0, 0) if conv.padding == "valid" else (conv.padding[axis],) * 2)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, [side for pair in reversed(sides) for side in pair], mode=mode)
    reach = [gap * (size - 1) for size, gap in zip(conv.kernel_size, conv.dilation, strict=True)]
    at_offset = []
    for offset in itertools.product(*map(range, conv.kernel_size)):
        window = [
            slice(gap * o, length - r + gap * o, step)
            for gap, o, length, r, step in zip(
                conv.dilation, offset, x.shape[2:], reach, conv.stride, strict=True
            )
        ]
        at_offset.append(x[:, :, *window].flatten(2))
    patches = torch.stack(at_offset, 2)
    return patches.reshape(len(x), conv.groups, -1, patches.shape[-1]).permute(0, 3, 1, 2)


def transposed_patches(conv: _ConvTransposeNd, x: Tensor) -> Tensor:
    """What reaches every output location through every kernel offset, ``[N, T, groups, K]``.

    Input location i goes to output location ``stride * i - padding + dilation * offset``. Offsets
    are in reversed order.
    """
    sizes = conv_transposed(conv, x[:1], conv.weight.detach(), None).shape[2:]
    reached = []
    for offset in itertools.product(*(range(size - 1, -1, -1) for size in conv.kernel_size)):
        patch = x.new_zeros(*x.shape[:2], *sizes)
        for source in itertools.product(*map(range, x.shape[2:])):
            target = tuple(
                step * i - zeros + gap * o
                for step, i, zeros, gap, o in zip(
                    conv.stride, source, conv.padding, conv.dilation, offset, strict=True
                )
            )
            if all(0 <= i < size for i, size in zip(target, sizes, strict=True)):
                patch[:, :, *target] += x[:, :, *source]
        reached.append(patch.flatten(2))
    patches = torch.stack(reached, 2)
    return patches.reshape(len(x), conv.groups, -1, patches.shape[-1]).permute(0, 3, 1, 2)


def conv_transposed(
    conv: _ConvTransposeNd, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The module's own function with other parameters."""
    functions = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    return functions[x.ndim - 3](
        *(x, weight, bias, conv.stride, conv.padding, conv.output_padding),
        *(conv.groups, conv.dilation),
    )


def transposed_weight(conv: _ConvTransposeNd, matrix: Tensor) -> Tensor:
    """The weight ``[C, D / groups, *kernel]`` that a matrix ``[D, K]`` stands for."""
    rows = conv.out_channels // conv.groups
    inputs = conv.in_channels // conv.groups
    kernel = matrix.reshape(conv.groups, rows, inputs, *conv.kernel_size)
    kernel = kernel.flip(list(range(3, kernel.ndim)))
    return torch.cat([group.transpose(0, 1) for group in kernel])


def normalized(module: nn.Module, x: Tensor) -> Tensor:
    """What a normalisation scales and shifts; for a BatchNorm, merged, its very input."""
    if isinstance(module, _BatchNorm):
        return x
    if isinstance(module, nn.RMSNorm):
        axes = tuple(range(-len(module.normalized_shape), 0))
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        return x / (x.square().mean(axes, keepdim=True) + eps).sqrt()
    if isinstance(module, nn.LayerNorm):
        together = x.flatten(-len(module.normalized_shape))
    elif isinstance(module, nn.GroupNorm):
        together = x.reshape(len(x), module.num_groups, -1)
    else:
        together = x.flatten(2)  # InstanceNorm
    variance, mean = torch.var_mean(together, -1, correction=0, keepdim=True)
    return ((together - mean) / (variance + module.eps).sqrt()).reshape(x.shape)


class AffineMap:
    """The map a module's weights make up: ``[D, K]``, K counting the shift if there is one."""

    def __init__(self, module: nn.Module, *, merged: bool) -> None:
        self.module = module
        self.has_shift = merged or getattr(module, "bias", None) is not None
        if isinstance(module, nn.Embedding):
            rows, self.groups = module.weight.T, 1
        elif isinstance(module, _ConvTransposeNd):
            rows = torch.empty(module.out_channels, module.weight[:, 0].numel() // module.groups)
            self.groups = module.groups
        elif isinstance(module, nn.Linear | _ConvNd):
            rows = module.weight.flatten(1)
            self.groups = getattr(module, "groups", 1)
        else:
            rows = module.weight.reshape(-1, 1)
            self.groups = len(rows)
        self.features_last = isinstance(
            module, nn.Linear | nn.Embedding | nn.LayerNorm | nn.RMSNorm
        )
        self.shape = len(rows), rows.shape[1] + self.has_shift

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """The module's own function with other weights; it is linear in them."""
        shift = weight[:, -1] if self.has_shift else None
        scale = weight[:, :-1] if self.has_shift else weight
        if isinstance(self.module, nn.Linear):
            return F.linear(x, scale, shift)
        if isinstance(self.module, nn.Embedding):
            return F.embedding(x, scale.T, self.module.padding_idx)
        if isinstance(self.module, _ConvTransposeNd):
            return conv_transposed(self.module, x, transposed_weight(self.module, scale), shift)
        if isinstance(self.module, _ConvNd):
            return self.module._conv_forward(x, scale.reshape(self.module.weight.shape), shift)
        shape = self.module.weight.shape if self.features_last else (-1, *[1] * (x.ndim - 2))
        result = normalized(self.module, x) * scale.reshape(shape)
        return result if shift is None else result + shift.reshape(shape)

    def inputs(self, x: Tensor) -> Tensor:
        """The units' inputs ``[N, T, groups * K]``, with a 1 appended for the shift."""
        if isinstance(self.module, nn.Linear):
            a = x.reshape(len(x), -1, 1, x.shape[-1])
        elif isinstance(self.module, nn.Embedding):
            a = F.one_hot(x.reshape(len(x), -1, 1), self.shape[1]).to(self.module.weight)
            if self.module.padding_idx is not None:
                a[..., self.module.padding_idx] = 0  # its row gets no gradient
        elif isinstance(self.module, _ConvTransposeNd):
            a = transposed_patches(self.module, x)
        elif isinstance(self.module, _ConvNd):
            a = conv_patches(self.module, x)
        else:
            a = self.as_units(normalized(self.module, x))[..., None]
        if self.has_shift:
            a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
        return a.flatten(2)

    def as_units(self, h: Tensor) -> Tensor:
        """The map's output, or anything of its shape, as units ``[N, T, D]``."""
        if self.features_last:
            return h.reshape(len(h), -1, self.shape[0])
        return h.reshape(len(h), self.shape[0], -1).transpose(1, 2)

    def from_units(self, units: Tensor, like: Tensor) -> Tensor:
        """The same the other way round."""
        return (units if self.features_last else units.transpose(1, 2)).reshape(like.shape)


# --- the network around one layer ---------------------------------------------------------


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the Linear layers in order of definition."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def weight_layers(model: nn.Module) -> list[str]:
    """Names of the Linear layers and convolutions in order of definition."""
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | _ConvNd)
    ]


def batchnorm_after(model: nn.Sequential, layer: str) -> str | None:
    """Name of the BatchNorm that follows a Linear or convolution in a Sequential, if any."""
    if not isinstance(model.get_submodule(layer), nn.Linear | _ConvNd):
        return None
    children = dict(model.named_children())
    for name, following in itertools.pairwise(children):
        if name == layer and isinstance(children[following], _BatchNorm):
            return following
    return None


def curvature_mode(model: nn.Module, statistics: str, frozen: Collection[str] = ()) -> nn.Module:
    """A copy in eval mode; with ``statistics="batch"`` BN uses the batch's own statistics.

    Those named in ``frozen`` keep their running ones.
    """
    model = copy.deepcopy(model).eval()
    if statistics == "batch":
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and name not in frozen:
                module.track_running_stats = False
                module.running_mean = module.running_var = None
    return model


class Perturbed:
    """The network with an additive perturbation of one layer's affine map, and its loss.

    In raw coordinates the perturbation enters at the layer's own output. In merged
    coordinates it enters at the output of the BatchNorm the layer feeds, because the merged
    map is the one from the layer's input to that output; for a BatchNorm that is a layer of its
    own, from its own input.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        batch: Batch,
        loss: ExampleLoss,
        *,
        coordinates: str = "raw",
        statistics: str = "batch",
        frozen: Collection[str] = (),
    ) -> None:
        self.model = curvature_mode(model, statistics, frozen)
        self.x, self.targets = batch
        self.loss = loss
        module = self.model.get_submodule(layer)
        following = layer if isinstance(module, _BatchNorm) else None
        if coordinates == "merged" and following is None:
            following = batchnorm_after(self.model, layer)
        self.map = AffineMap(module, merged=following is not None)
        module.register_forward_pre_hook(self._keep_input)
        target = module if following is None else self.model.get_submodule(following)
        target.register_forward_hook(self._perturb)
        self.change: Callable[[Tensor], Tensor] = torch.zeros_like
        with torch.no_grad():
            self.outputs = self.model(self.x)
        self.a = self.map.inputs(self.input)

    def _keep_input(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.input = inputs[0]

    def _perturb(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + self.change(output)

    def outputs_for_weights(self, delta: Tensor) -> Tensor:
        """Outputs ``[N, C]`` when ``delta`` ``[D, K]`` is added to the affine map."""
        self.change = lambda output: self.map(self.input, delta)
        return self.model(self.x).flatten(1)

    def outputs_for_units(self, shift: Tensor) -> Tensor:
        """Outputs ``[N, C]`` when ``shift`` ``[N, T, D]`` is added to the map's output."""
        self.change = lambda output: self.map.from_units(shift, output)
        return self.model(self.x).flatten(1)

    def output_hessians(self) -> Tensor:
        """Hessian of every example's loss with respect to its outputs."""
        return output_hessians(self.outputs, self.targets, self.loss)


def exact_block(
    model: nn.Module, layer: str, batch: Batch, loss: ExampleLoss, **modes: Any
) -> Tensor:
    """The layer's block of the GGN of the mean loss over one mini-batch.

    It takes the module's own function: nothing here knows of units.
    """
    net = Perturbed(model, layer, batch, loss, **modes)
    jacobian = jacrev(net.outputs_for_weights)(net.outputs.new_zeros(net.map.shape)).flatten(2)
    total = torch.einsum("nip,nij,njq->pq", jacobian, net.output_hessians(), jacobian)
    return within_groups(total.detach() / len(net.x), net.map.groups)


def exact_block_of_loader(
    model: nn.Module, layer: str, batches: Sequence[Batch], loss: ExampleLoss, **options: Any
) -> Tensor:
    """The same over several mini-batches, each weighted by its number of examples."""
    total = sum(len(x) for x, _ in batches)
    return sum(
        len(batch[0]) / total * exact_block(model, layer, batch, loss, **options)
        for batch in batches
    )


def empirical_fisher(model: nn.Module, layer: str, batch: Batch, loss: ExampleLoss) -> Tensor:
    """Mean outer product of the examples' gradients at the true labels, BN in eval mode."""
    net = Perturbed(model, layer, batch, loss, statistics="running")

    def losses(delta: Tensor) -> Tensor:
        outputs = net.outputs_for_weights(delta).reshape(net.outputs.shape)
        return torch.stack([loss(z, y) for z, y in zip(outputs, net.targets, strict=True)])

    gradients = jacrev(losses)(net.outputs.new_zeros(net.map.shape)).flatten(1).detach()
    return gradients.mT @ gradients / len(net.x)


# --- units: what the Kronecker approximations are made of ---------------------------------


@dataclass(frozen=True)
class Units:
    """A layer's inputs and the scores at its outputs for one mini-batch.

    ``a`` is ``[N, T, K]``. ``g`` is ``[S, N, T, D]``: for each of the S = N C independent
    score directions the gradient of the summed loss at every unit. A sum over S replaces
    the expectation over sampled labels. With groups, the last axes of both are made of as many
    equal parts.
    """

    a: Tensor
    g: Tensor
    groups: int = 1

    @property
    def examples(self) -> int:
        return self.a.shape[0]

    @property
    def locations(self) -> int:
        return self.a.shape[1]

    @property
    def flat(self) -> tuple[Tensor, Tensor]:
        """Units in one axis: ``[U, K]`` and ``[S, U, D]``."""
        return self.a.flatten(0, 1), self.g.flatten(1, 2)

    def by_group(self) -> list[Units]:
        """The units of each group."""
        parts = (x.chunk(self.groups, -1) for x in (self.a, self.g))
        return list(itertools.starmap(Units, zip(*parts, strict=True)))


def units_of(model: nn.Module, layer: str, batch: Batch, loss: ExampleLoss, **modes: Any) -> Units:
    """Inputs and score directions of a layer for one mini-batch."""
    net = Perturbed(model, layer, batch, loss, **modes)
    examples, locations = net.a.shape[:2]
    width = net.map.shape[0]
    jacobian = jacrev(net.outputs_for_units)(net.outputs.new_zeros(examples, locations, width))
    roots = square_root(net.output_hessians())
    scores = torch.einsum("nij,nimtd->njmtd", roots, jacobian).flatten(0, 1)
    return Units(net.a.detach(), scores.detach(), net.map.groups)


def block_from_units(units: Units) -> Tensor:
    """The exact block again: every pair of units, ``1/N E sum_uv (g_u g_v^T) (x) (a_u a_v^T)``."""
    blocks = []
    for group in units.by_group():
        a, g = group.flat
        samples = torch.einsum("sud,uk->sdk", g, a).flatten(1)
        blocks.append(samples.mT @ samples / units.examples)
    return torch.block_diag(*blocks)


def diagonal_from_units(units: Units) -> Tensor:
    """Squares of every example's own gradient, as though no example depended on another."""
    squares = []
    for group in units.by_group():
        per_example = torch.einsum("sntd,ntk->sndk", group.g, group.a)
        squares.append(per_example.square().sum((0, 1)) / units.examples)
    return torch.cat(squares)


def relabel(units: Units, relabeling: Relabeling) -> Units:
    """The units with inputs in another order: ``relabeling`` picks (example, location)."""
    examples, locations = relabeling
    return replace(units, a=units.a[examples, locations])


def _relabeling(order: Sequence[int] | Tensor, examples: int, locations: int) -> Relabeling:
    flat = torch.as_tensor(order).reshape(examples, locations)
    return flat // locations, flat % locations


def all_relabelings(examples: int, locations: int, *, nested: bool) -> Iterator[Relabeling]:
    """Every relabeling: of all units, or of examples and of locations inside each example.

    Relabeling both sides alike changes nothing in the exact block, so independent
    relabelings of the two sides are covered by relabeling one of them.
    """
    if not nested:
        for order in itertools.permutations(range(examples * locations)):
            yield _relabeling(order, examples, locations)
        return
    inner = list(itertools.permutations(range(locations)))
    for outer in itertools.permutations(range(examples)):
        for orders in itertools.product(inner, repeat=examples):
            yield torch.tensor(outer)[:, None].expand(-1, locations), torch.tensor(orders)


def random_relabelings(
    examples: int, locations: int, *, nested: bool, generator: torch.Generator
) -> Iterator[Relabeling]:
    """Independent uniformly random relabelings, without end."""
    while True:
        if nested:
            outer = torch.randperm(examples, generator=generator)[:, None].expand(-1, locations)
            inner = torch.rand(examples, locations, generator=generator).argsort(1)
            yield outer, inner
        else:
            order = torch.randperm(examples * locations, generator=generator)
            yield _relabeling(order, examples, locations)


def average_over_relabelings(
    units: Units, on_a: Iterable[Relabeling], on_g: Iterable[Relabeling] | None = None
) -> tuple[Tensor, Tensor]:
    """Average of the exact block over relabelings, and the standard error of the average.

    The inputs are relabelled by ``on_a`` and, independently, the scores by ``on_g``.
    """
    mean = square = torch.zeros((), dtype=torch.float64)
    count = 0
    for index, relabeling in enumerate(on_a):
        scores = units.g
        if on_g is not None:
            examples, locations = next(on_g)
            scores = scores[:, examples, locations]
        block = block_from_units(replace(relabel(units, relabeling), g=scores))
        mean = mean + (block - mean) / (index + 1)
        square = square + (block**2 - square) / (index + 1)
        count = index + 1
    return mean, ((square - mean**2).clamp(min=0) / count).sqrt()


# --- the approximations as method definitions ---------------------------------------------


def _same_pair(x: Tensor) -> Tensor:
    """Sum over units of the outer product with itself; a leading axis is summed too."""
    flat = x.reshape(-1, x.shape[-1])
    return flat.mT @ flat


def _project(x: Tensor, stratum: str) -> Tensor:
    """The part of ``x`` (``[..., N, T, features]``) inside a stratum."""
    grand = x.mean((-3, -2), keepdim=True)
    example = x.mean(-2, keepdim=True)
    parts = {
        "total": x,
        "mean": grand.expand_as(x),
        "within batch": x - grand,
        "between examples": (example - grand).expand_as(x),
        "within example": x - example,
    }
    return parts[stratum]


def strata(approximation: str, examples: int, locations: int) -> dict[str, int]:
    """Strata of an approximation and their degrees of freedom; empty ones are left out."""
    units = examples * locations
    table = {
        "kfac-expand": {"total": units},
        "kfac-reduce": {"total": units},
        "xkfac": {"within batch": units - 1, "mean": 1},
        "xkfac-nested": {
            "within example": examples * (locations - 1),
            "between examples": examples - 1,
            "mean": 1,
        },
    }
    return {name: dof for name, dof in table[approximation].items() if dof}


def _by_group(terms: Callable[[list[Units]], list[Term]], batches: Sequence[Units]) -> list[Term]:
    """Terms of every group, stacked; without groups the terms themselves."""
    groups = [list(parts) for parts in zip(*(units.by_group() for units in batches), strict=True)]
    if len(groups) == 1:
        return terms(groups[0])
    per_group = zip(*map(terms, groups), strict=True)
    return [tuple(map(torch.stack, zip(*stratum, strict=True))) for stratum in per_group]


def strata_terms(approximation: str, batches: Sequence[Units]) -> list[Term]:
    """Factors ``(A_k, G_k)`` per stratum, averaged over mini-batches weighted by examples.

    In a mini-batch their product is ``SS(a) / dof`` times ``SS(g) / N``. The number of rows is
    shared so that neither factor grows with the mini-batch, and a mini-batch without degrees of
    freedom in a stratum is left out of the mean of its G.
    """
    return _by_group(lambda group: _strata_terms(approximation, group), batches)


def _strata_terms(approximation: str, batches: Sequence[Units]) -> list[Term]:
    total = sum(units.examples for units in batches)
    averages: dict[str, Term] = {}
    counted: dict[str, int] = {}
    for units in batches:
        a, g = units.a, units.g
        if approximation == "kfac-reduce":
            a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
        weight = units.examples / total
        for name, dof in strata(approximation, *a.shape[:2]).items():
            rows = a.shape[0] * a.shape[1]
            factor_a = weight * _same_pair(_project(a, name)) / rows
            factor_g = _same_pair(_project(g, name)) * rows / dof
            sum_a, sum_g = averages.get(name, (0, 0))
            averages[name] = (sum_a + factor_a, sum_g + factor_g)
            counted[name] = counted.get(name, 0) + units.examples
    return [(A, G / counted[name]) for name, (A, G) in averages.items()]


def pair_terms(units: Units) -> list[Term]:
    """XK-FAC of one mini-batch as the same-unit and the different-unit term."""
    return _by_group(lambda group: _pair_terms(*group), [units])


def _pair_terms(units: Units) -> list[Term]:
    a, g = units.flat
    count = len(a)
    total_a, total_g = a.sum(0), g.sum(1)
    same_a, same_g = _same_pair(a), _same_pair(g)
    different_a = torch.outer(total_a, total_a) - same_a
    different_g = total_g.mT @ total_g - same_g
    return [
        (same_a / count, same_g / units.examples),
        (different_a / (count * (count - 1)), different_g / units.examples),
    ]
