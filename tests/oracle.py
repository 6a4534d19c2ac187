"""Exact curvature by brute force, in float64, sharing no code with the package.

Everything here follows the definitions alone: the Jacobian of the network's outputs by
automatic differentiation, the Hessian of the loss with respect to them, and sums over all
pairs of units written out. Nothing is fast and nothing is clever.

A *unit* is one application of a layer: one example, or one location of one example when the
layer's input is ``[N, T, K]``. Blocks are ``[D * K, D * K]`` with weights flattened row by
row, so a Kronecker term ``G V A`` is ``kron(G, A)``.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jacrev

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
    """The matrix of ``V -> sum_k G_k V A_k`` for V flattened row by row."""
    return sum(torch.kron(g, a) for a, g in terms)


# --- losses, one example at a time --------------------------------------------------------


def example_loss(kind: str, reduction: str = "mean") -> ExampleLoss:
    """The loss of one example, reduced over its outputs or positions."""
    functions = {
        "cross_entropy": lambda z, y: nn.functional.cross_entropy(
            z[None], y[None], reduction=reduction
        ),
        "mse": lambda z, y: nn.functional.mse_loss(z, y, reduction=reduction),
        "bce": lambda z, y: nn.functional.binary_cross_entropy_with_logits(
            z, y, reduction=reduction
        ),
    }
    return functions[kind]


def output_hessians(outputs: Tensor, targets: Tensor, loss: ExampleLoss) -> Tensor:
    """Hessian of every example's loss with respect to its outputs, ``[N, C, C]``."""
    count = outputs[0].numel()
    blocks = [
        jacrev(jacrev(lambda z, y=y: loss(z, y)))(z).reshape(count, count)
        for z, y in zip(outputs.detach(), targets, strict=True)
    ]
    return torch.stack(blocks)


def square_root(matrix: Tensor) -> Tensor:
    """A symmetric square root of positive semi-definite matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT


# --- the network around one layer ---------------------------------------------------------


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the Linear layers in order of definition."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def batchnorm_after(model: nn.Sequential, layer: str) -> str | None:
    """Name of the BatchNorm that follows a layer in a Sequential, if there is one."""
    children = dict(model.named_children())
    for name, following in itertools.pairwise(children):
        if name == layer and isinstance(children[following], nn.BatchNorm1d):
            return following
    return None


def curvature_mode(model: nn.Module, batchnorm: str) -> nn.Module:
    """A copy in eval mode; with ``batchnorm="batch"`` BN uses the batch's own statistics."""
    model = copy.deepcopy(model).eval()
    if batchnorm == "batch":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.track_running_stats = False
                module.running_mean = module.running_var = None
    return model


class Perturbed:
    """The network with an additive perturbation of one layer's affine map.

    In raw coordinates the perturbation enters at the layer's own output. In merged
    coordinates it enters at the output of the BatchNorm the layer feeds, because the merged
    map is the one from the layer's input to that output.
    """

    def __init__(
        self, model: nn.Module, layer: str, x: Tensor, *, coordinates: str, batchnorm: str
    ) -> None:
        self.model = curvature_mode(model, batchnorm)
        self.x = x
        linear = self.model.get_submodule(layer)
        following = batchnorm_after(self.model, layer) if coordinates == "merged" else None
        self.homogeneous = linear.bias is not None or following is not None
        linear.register_forward_hook(self._keep_input)
        target = linear if following is None else self.model.get_submodule(following)
        target.register_forward_hook(self._perturb)
        self.change: Callable[[Tensor], Tensor] = lambda a: a.new_zeros(())
        with torch.no_grad():
            self.outputs = self.model(x)
        self.a = self.input.detach()
        self.width = linear.out_features

    def _keep_input(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        a = inputs[0]
        self.input = torch.cat([a, torch.ones_like(a[..., :1])], -1) if self.homogeneous else a

    def _perturb(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + self.change(self.input)

    def outputs_for_weights(self, delta: Tensor) -> Tensor:
        """Outputs ``[N, C]`` when ``delta`` ``[D, K]`` is added to the affine map."""
        self.change = lambda a: a @ delta.mT
        return self.model(self.x).flatten(1)

    def outputs_for_units(self, shift: Tensor) -> Tensor:
        """Outputs ``[N, C]`` when ``shift`` is added to the map's output, unit by unit."""
        self.change = lambda a: shift
        return self.model(self.x).flatten(1)


def exact_block(
    model: nn.Module,
    layer: str,
    batch: Batch,
    loss: ExampleLoss,
    *,
    coordinates: str = "raw",
    batchnorm: str = "batch",
) -> Tensor:
    """The layer's block of the GGN of the mean loss over one mini-batch."""
    x, y = batch
    net = Perturbed(model, layer, x, coordinates=coordinates, batchnorm=batchnorm)
    origin = x.new_zeros(net.width, net.a.shape[-1])
    jacobian = jacrev(net.outputs_for_weights)(origin).flatten(2)
    curvature = output_hessians(net.outputs, y, loss)
    return torch.einsum("nip,nij,njq->pq", jacobian, curvature, jacobian).detach() / len(x)


def exact_block_of_loader(
    model: nn.Module, layer: str, batches: Sequence[Batch], loss: ExampleLoss, **options: str
) -> Tensor:
    """The same over several mini-batches, each weighted by its number of examples."""
    total = sum(len(x) for x, _ in batches)
    return sum(
        len(batch[0]) / total * exact_block(model, layer, batch, loss, **options)
        for batch in batches
    )


def empirical_fisher(model: nn.Module, layer: str, batch: Batch, loss: ExampleLoss) -> Tensor:
    """Mean outer product of the examples' gradients at the true labels, BN in eval mode."""
    x, y = batch
    net = Perturbed(model, layer, x, coordinates="raw", batchnorm="running")

    def losses(delta: Tensor) -> Tensor:
        outputs = net.outputs_for_weights(delta).reshape(net.outputs.shape)
        return torch.stack([loss(z, target) for z, target in zip(outputs, y, strict=True)])

    gradients = jacrev(losses)(x.new_zeros(net.width, net.a.shape[-1])).flatten(1).detach()
    return gradients.mT @ gradients / len(x)


# --- units: what the Kronecker approximations are made of ---------------------------------


@dataclass(frozen=True)
class Units:
    """A layer's inputs and the scores at its outputs for one mini-batch.

    ``a`` is ``[N, T, K]``. ``g`` is ``[S, N, T, D]``: for each of the S = N C independent
    score directions the gradient of the summed loss at every unit. A sum over S replaces
    the expectation over sampled labels.
    """

    a: Tensor
    g: Tensor

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


def units_of(
    model: nn.Module,
    layer: str,
    batch: Batch,
    loss: ExampleLoss,
    *,
    coordinates: str = "raw",
    batchnorm: str = "batch",
) -> Units:
    """Inputs and score directions of a layer for one mini-batch."""
    x, y = batch
    net = Perturbed(model, layer, x, coordinates=coordinates, batchnorm=batchnorm)
    examples = len(x)
    jacobian = jacrev(net.outputs_for_units)(x.new_zeros(*net.a.shape[:-1], net.width))
    jacobian = jacobian.reshape(examples, -1, examples, net.a[0, ..., 0].numel(), net.width)
    roots = square_root(output_hessians(net.outputs, y, loss))
    scores = torch.einsum("nij,nimtd->njmtd", roots, jacobian).flatten(0, 1)
    return Units(net.a.reshape(examples, -1, net.a.shape[-1]), scores.detach())


def block_from_units(units: Units) -> Tensor:
    """The exact block again: every pair of units, ``1/N E sum_uv (g_u g_v^T) (x) (a_u a_v^T)``."""
    a, g = units.flat
    samples = torch.einsum("sud,uk->sdk", g, a).flatten(1)
    return samples.mT @ samples / units.examples


def relabel(units: Units, relabeling: Relabeling) -> Units:
    """The units with inputs in another order: ``relabeling`` picks (example, location)."""
    examples, locations = relabeling
    return Units(units.a[examples, locations], units.g)


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
        block = block_from_units(Units(relabel(units, relabeling).a, scores))
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


def strata_terms(approximation: str, batches: Sequence[Units]) -> list[Term]:
    """Factors ``(A_k, G_k)`` per stratum, averaged over mini-batches weighted by examples.

    In a mini-batch their product is ``SS(a) / dof`` times ``SS(g) / N``. The number of rows is
    shared so that neither factor grows with the mini-batch, and a mini-batch without degrees of
    freedom in a stratum is left out of the mean of its G.
    """
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
