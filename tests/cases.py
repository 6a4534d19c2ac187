"""Case tables shared by the tests: networks, losses, data."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ekfac_rs as ek
from oracle import (
    Batch,
    ExampleLoss,
    dense,
    exact_block_of_loader,
    example_loss,
    relative_error,
)

Builder = Callable[[], nn.Sequential]

BATCHNORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
NORMALIZATIONS = (
    *BATCHNORMS.values(),
    nn.InstanceNorm2d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class Network:
    """A network of float64 layers and the shape of one example."""

    build: Builder
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def make(self, seed: int = 0) -> nn.Sequential:
        """Random weights, and normalisations' parameters and statistics off their defaults."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build().double()
            for module in model.modules():
                if isinstance(module, NORMALIZATIONS):
                    for tensor in _present(module, "running_var", "weight"):
                        nn.init.uniform_(tensor, 0.5, 1.5)
                    for tensor in _present(module, "running_mean", "bias"):
                        nn.init.normal_(tensor, std=0.3)
        return model

    def batches(self, loss: str, sizes: tuple[int, ...], seed: int = 1) -> list[Batch]:
        """Mini-batches of the given sizes with targets that fit the loss."""
        generator = torch.Generator().manual_seed(seed)
        return [self._batch(loss, size, generator) for size in sizes]

    def _batch(self, loss: str, size: int, generator: torch.Generator) -> Batch:
        shift = torch.randn(self.input_shape, generator=generator, dtype=torch.float64)
        x = torch.randn(size, *self.input_shape, generator=generator, dtype=torch.float64) + shift
        return x, LOSSES[loss].targets((size, *self.output_shape), generator)


@dataclass(frozen=True)
class TokenNetwork(Network):
    """A network whose inputs are numbers of tokens, some of which are never seen."""

    tokens: int = 7

    def _batch(self, loss: str, size: int, generator: torch.Generator) -> Batch:
        shape = (size, *self.input_shape)
        # Low numbers are seen more often than high ones, and the last is not.
        x = (torch.rand(shape, generator=generator).square() * (self.tokens - 1)).long()
        return x, LOSSES[loss].targets((size, *self.output_shape), generator)


def _present(module: nn.Module, *names: str) -> list[Tensor]:
    tensors = (getattr(module, name, None) for name in names)
    return [tensor for tensor in tensors if tensor is not None]


@dataclass(frozen=True)
class Loss:
    """A loss by name, its definition for one example and a source of targets."""

    name: str
    targets: Callable[[tuple[int, ...], torch.Generator], Tensor]
    reduction: str = "mean"

    @property
    def of_example(self) -> ExampleLoss:
        return example_loss(self.name, self.reduction)

    @property
    def argument(self) -> str | ek.likelihood.Likelihood:
        """The loss as `estimate_curvature` takes it."""
        if self.reduction == "mean":
            return self.name
        kinds = {
            "cross_entropy": ek.likelihood.CrossEntropy,
            "mse": ek.likelihood.MSE,
            "bce": ek.likelihood.BCE,
        }
        return kinds[self.name](reduction=self.reduction)


def _classes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)


def _reals(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _bits(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=generator).double()


LOSSES = {
    "cross_entropy": Loss("cross_entropy", _classes),
    "mse": Loss("mse", _reals),
    "bce": Loss("bce", _bits),
    "cross_entropy-sum": Loss("cross_entropy", _classes, "sum"),
    "mse-sum": Loss("mse", _reals, "sum"),
    "bce-sum": Loss("bce", _bits, "sum"),
}


class OverLocations(nn.Module):
    """Applies a BatchNorm over the last axis of ``[N, T, features]``."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Residual(nn.Module):
    """A layer beside the identity."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class ClassesFirst(nn.Module):
    """``[N, T, C]`` to ``[N, C, T]``, as torch's cross-entropy wants it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class MeanOverSequence(nn.Module):
    """Mean pooling over T of ``[N, T, features]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class SumOverSequence(nn.Module):
    """Sum pooling over T of ``[N, T, features]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


class MeanOverLocations(nn.Module):
    """Global average pooling of ``[N, C, ...]`` to ``[N, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


class SumOverLocations(nn.Module):
    """Global sum pooling of ``[N, C, ...]`` to ``[N, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).sum(2)


def with_head(body: Sequence[nn.Module], input_shape: tuple[int, ...]) -> nn.Sequential:
    """A Linear with three outputs on top of all that the body makes."""
    features = math.prod(nn.Sequential(*body)(torch.zeros(2, *input_shape)).shape[1:])
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(features, 3))


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def _mlp_bn() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 5, bias=False),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


def _mlp_bn_plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.ReLU(),
        nn.Linear(6, 5),
        nn.BatchNorm1d(5, affine=False),
        nn.Tanh(),
        nn.Linear(5, 3),
        nn.BatchNorm1d(3),
    )


def _linear_stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, 3))


def _linear_stack_bn() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 5, bias=False),
        nn.BatchNorm1d(5),
        nn.Linear(5, 3),
    )


def _linear_residual() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6), Residual(nn.Linear(6, 6)), nn.AvgPool1d(2), nn.Linear(3, 3)
    )


def _locations_linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), ClassesFirst())


def _locations_pooled_linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), MeanOverSequence())


def _locations_summed_linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), SumOverSequence())


def _locations_bn() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 4),
        OverLocations(4),
        nn.ReLU(),
        nn.Linear(4, 3),
        OverLocations(3),
        nn.ReLU(),
        MeanOverSequence(),
        nn.Linear(3, 3),
    )


NETWORKS = {
    "mlp": Network(_mlp, (4,), (3,)),
    "mlp-bn": Network(_mlp_bn, (4,), (3,)),
    "mlp-bn-plain": Network(_mlp_bn_plain, (4,), (3,)),
    "linear-stack": Network(_linear_stack, (4,), (3,)),
    "linear-stack-bn": Network(_linear_stack_bn, (4,), (3,)),
    "linear-residual": Network(_linear_residual, (4,), (3,)),
    "locations-linear": Network(_locations_linear, (3, 4), (3, 3)),
    "locations-pooled-linear": Network(_locations_pooled_linear, (3, 4), (3,)),
    "locations-summed-linear": Network(_locations_summed_linear, (3, 4), (3,)),
    "locations-bn": Network(_locations_bn, (3, 4), (3,)),
}


def _embedding() -> nn.Sequential:
    return nn.Sequential(
        nn.Embedding(7, 4), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)
    )


def _embedding_locations() -> nn.Sequential:
    return nn.Sequential(
        nn.Embedding(7, 4, padding_idx=1),
        OverLocations(4),
        nn.Tanh(),
        nn.Linear(4, 3),
        OverLocations(3),
        nn.ReLU(),
        MeanOverSequence(),
        nn.Linear(3, 3),
    )


def _embedding_before_batchnorm() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def _embedding_linear() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))


def _embedding_linear_locations() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), ClassesFirst())


def _embedding_pooled() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 4), MeanOverSequence(), nn.Linear(4, 3))


EMBEDDINGS = {
    "token": TokenNetwork(_embedding, (), (3,)),
    "token before BatchNorm": TokenNetwork(_embedding_before_batchnorm, (), (3,)),
    "sequence with padding": TokenNetwork(_embedding_locations, (5,), (3,)),
    "linear token": TokenNetwork(_embedding_linear, (), (3,)),
    "linear sequence": TokenNetwork(_embedding_linear_locations, (4,), (3, 4)),
    "linear pooled": TokenNetwork(_embedding_pooled, (4,), (3,)),
}

APPROXIMATIONS = ("kfac-expand", "kfac-reduce", "xkfac", "xkfac-nested")
COORDINATES = ("raw", "merged")


def estimate(
    model: nn.Module, batches: Iterable[Batch], loss: str, device: str = "cpu", **options: Any
) -> ek.Curvature:
    """A curvature pass of the package over the model, elsewhere than on a CPU over a copy there.

    Labels are summed over exactly and coordinates are raw unless the options say otherwise.
    """
    options = {"labels": "exact", "coordinates": "raw", **options}
    model = model if device == "cpu" else copy.deepcopy(model).to(device)
    return ek.estimate_curvature(model, batches, loss=LOSSES[loss].argument, **options)


def dense_block(block: ek.KroneckerSum) -> Tensor:
    """The block as a matrix, built here from its factors."""
    return dense(block.to(device="cpu").terms)


def exact_blocks(
    model: nn.Module, batches: list[Batch], loss: str, **modes: str
) -> Callable[[str], Tensor]:
    """The exact GGN's block of a layer, by name, each made once."""
    of_example = LOSSES[loss].of_example
    return functools.cache(
        lambda layer: exact_block_of_loader(model, layer, batches, of_example, **modes)
    )


def errors_to_exact(
    model: nn.Module,
    batches: list[Batch],
    loss: str,
    device: str = "cpu",
    *,
    exact: Callable[[str], Tensor] | None = None,
    coordinates: str = "raw",
    statistics: str = "running",
    **options: Any,
) -> dict[str, float]:
    """Relative error of every layer's block to the exact GGN of the same coordinates.

    `exact` has that GGN's blocks where several curvatures are held against the same one.
    """
    modes = {"coordinates": coordinates, "statistics": statistics}
    exact = exact or exact_blocks(model, batches, loss, **modes)
    return {
        layer: relative_error(dense_block(block), exact(layer))
        for layer, block in estimate(model, batches, loss, device, **options, **modes).items()
    }
