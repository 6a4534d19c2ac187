"""Error of K-FAC and XK-FAC to the exact train-mode GGN in trained networks with BatchNorm.

`measure` returns one row per layer; ``benchmarks/accuracy.py`` prints them as a table.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from cases import COORDINATES, LOSSES, dense_block, estimate
from oracle import Batch, exact_block, linear_layers, relative_error

SHAPES = ((6, 12, 12, 12, 4), (8, 12, 12, 12, 3), (6, 16, 12, 8, 4), (10, 12, 12, 12, 5))
SEEDS = range(4)
SIZES = (16, 48)
STEPS = 300

Draw = Callable[[int, torch.Generator], Batch]


@dataclass(frozen=True)
class Row:
    """One layer's relative Frobenius errors."""

    shape: tuple[int, ...]
    seed: int
    size: int
    coordinates: str
    layer: str
    interacting: bool  # fed by a ReLU, and a train-mode BN acts on what it computes
    kfac: float
    xkfac: float

    @property
    def ratio(self) -> float:
        return self.xkfac / self.kfac


def noisy_classes(inputs: int, classes: int, generator: torch.Generator) -> Draw:
    """Classes by a random linear map of normal inputs, with noise on the logits."""
    teacher = torch.randn(inputs, classes, generator=generator, dtype=torch.float64)

    def draw(count: int, generator: torch.Generator) -> Batch:
        x = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
        noise = torch.randn(count, classes, generator=generator, dtype=torch.float64)
        return x, (x @ teacher + 2 * noise).argmax(1)

    return draw


def shifted_noisy_classes(inputs: int, classes: int, generator: torch.Generator) -> Draw:
    """The same, but the network sees inputs with mean one instead of zero."""
    draw = noisy_classes(inputs, classes, generator)

    def shifted(count: int, generator: torch.Generator) -> Batch:
        x, y = draw(count, generator)
        return x + 1, y

    return shifted


def separable_clusters(inputs: int, classes: int, generator: torch.Generator) -> Draw:
    """Normal clusters far from one another: the network becomes certain of its answers."""
    centres = 2 * torch.randn(classes, inputs, generator=generator, dtype=torch.float64)

    def draw(count: int, generator: torch.Generator) -> Batch:
        y = torch.randint(classes, (count,), generator=generator)
        x = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
        return centres[y] + x, y

    return draw


def random_classes(inputs: int, classes: int, generator: torch.Generator) -> Draw:
    """Labels that nothing predicts."""

    def draw(count: int, generator: torch.Generator) -> Batch:
        x = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
        return x, torch.randint(classes, (count,), generator=generator)

    return draw


PROBLEMS = {
    "noisy": noisy_classes,
    "noisy, shifted inputs": shifted_noisy_classes,
    "separable": separable_clusters,
    "random labels": random_classes,
}


def build(shape: tuple[int, ...], seed: int) -> nn.Sequential:
    """Linear, BN, ReLU for every hidden layer, and a Linear on top."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        *hidden, classes = shape
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(hidden):
            layers += [nn.Linear(fan_in, fan_out), nn.BatchNorm1d(fan_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(hidden[-1], classes)).double()


def train(model: nn.Module, draw: Draw, generator: torch.Generator) -> None:
    """Plain momentum SGD on fresh mini-batches of 64."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        x, y = draw(64, generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def interacts(model: nn.Sequential, layer: str, coordinates: str) -> bool:
    """Whether a ReLU feeds the layer and a BN acts on the output its coordinates describe."""
    location = [name for name, _ in model.named_children()].index(layer)
    fed = location > 0 and isinstance(model[location - 1], nn.ReLU)
    # In merged coordinates the BN right after the layer is part of the affine map.
    after = location + (2 if coordinates == "merged" else 1)
    return fed and any(isinstance(module, nn.BatchNorm1d) for module in model[after:])


def compare(model: nn.Sequential, batch: Batch, **labels: Any) -> list[Row]:
    """Both approximations against the exact blocks of one mini-batch."""
    coordinates = labels["coordinates"]
    curvatures = {
        approximation: estimate(
            model,
            [batch],
            "cross_entropy",
            approximation=approximation,
            coordinates=coordinates,
        )
        for approximation in ("kfac-expand", "xkfac")
    }
    rows = []
    for layer in linear_layers(model):
        of_example = LOSSES["cross_entropy"].of_example
        exact = exact_block(model, layer, batch, of_example, coordinates=coordinates)
        kfac, xkfac = (
            relative_error(dense_block(curvature[layer]), exact)
            for curvature in curvatures.values()
        )
        interacting = interacts(model, layer, coordinates)
        rows.append(Row(**labels, layer=layer, interacting=interacting, kfac=kfac, xkfac=xkfac))
    return rows


def measure(problem: str = "noisy", seeds: Iterable[int] = SEEDS) -> list[Row]:
    """Train every shape and seed, and compare both approximations with the exact blocks."""
    rows = []
    for shape, seed in itertools.product(SHAPES, seeds):
        generator = torch.Generator().manual_seed(100 + seed)
        draw = PROBLEMS[problem](shape[0], shape[-1], generator)
        model = build(shape, seed)
        train(model, draw, generator)
        for size in SIZES:
            batch = draw(size, generator)
            for coordinates in COORDINATES:
                rows += compare(
                    model, batch, shape=shape, seed=seed, size=size, coordinates=coordinates
                )
    return rows


@dataclass(frozen=True)
class Summary:
    """Distribution of the errors and of their ratio XK-FAC over K-FAC."""

    layers: int
    kfac: float
    xkfac: float
    geometric_mean: float
    ninth_decile: float
    worst: float


def summarize(rows: list[Row]) -> Summary:
    ratios = torch.tensor([row.ratio for row in rows], dtype=torch.float64)
    return Summary(
        layers=len(rows),
        kfac=sum(row.kfac for row in rows) / len(rows),
        xkfac=sum(row.xkfac for row in rows) / len(rows),
        geometric_mean=ratios.log().mean().exp().item(),
        ninth_decile=ratios.quantile(0.9).item(),
        worst=ratios.max().item(),
    )


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return measure(seeds=SEEDS[:1])


def test_xkfac_halves_the_error_where_a_relu_feeds_a_layer_before_batchnorm(rows):
    chosen = [row for row in rows if row.interacting]
    assert len(chosen) == 24
    summary = summarize(chosen)
    assert summary.geometric_mean <= 0.55, summary
    assert summary.worst <= 0.8, max(chosen, key=lambda row: row.ratio)


def test_xkfac_is_not_worse_on_any_other_layer(rows):
    others = [row for row in rows if not row.interacting]
    assert len(others) == 40
    assert summarize(others).worst <= 1.02, max(others, key=lambda row: row.ratio)


def test_kfac_is_far_off_where_a_relu_feeds_a_layer_before_batchnorm(rows):
    assert summarize([row for row in rows if row.interacting]).kfac > 1.5
