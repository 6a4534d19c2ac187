"""Scales and shifts of normalisations that no layer feeds: a 2x2 block for each channel."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from cases import (
    APPROXIMATIONS,
    COORDINATES,
    LOSSES,
    ClassesFirst,
    MeanOverLocations,
    MeanOverSequence,
    Network,
    OverLocations,
    dense_block,
    errors_to_exact,
    estimate,
    with_head,
)
from oracle import (
    block_from_units,
    dense,
    diagonal_from_units,
    exact_block,
    pair_terms,
    relative_error,
    strata_terms,
    units_of,
    within_groups,
)

EXACT = 1e-10
DIFFERENT = 1e-2
MERGED = {"coordinates": "merged", "statistics": "batch"}
MODES = [
    {"coordinates": coordinates, "statistics": statistics}
    for coordinates in COORDINATES
    for statistics in ("batch", "running")
]


class TwoConsumers(nn.Module):
    """As in a DenseNet: a convolution's output goes to a BatchNorm and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return torch.cat([h, self.norm(h).tanh()], 1)


class PreActivation(nn.Module):
    """A residual block whose BatchNorm comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.relu(self.norm(x)))


@dataclass(frozen=True)
class Case:
    """A network body without its Linear head, and which of its layers is looked at."""

    body: Callable[[], Sequence[nn.Module]]
    shape: tuple[int, ...]
    layer: str

    @property
    def network(self) -> Network:
        return Network(lambda: with_head(self.body(), self.shape), self.shape, (3,))


# The second normalisation makes what the first one feeds interact.
BATCHNORMS = {
    "features": Case(lambda: [nn.BatchNorm1d(3), nn.Tanh()], (3,), "0"),
    "one channel": Case(lambda: [nn.BatchNorm2d(1), nn.Tanh()], (1, 2, 2), "0"),
    "images": Case(
        lambda: [nn.BatchNorm2d(3), nn.Tanh(), nn.BatchNorm2d(3), nn.ReLU()], (3, 2, 2), "0"
    ),
    "series": Case(
        lambda: [nn.BatchNorm1d(2), nn.Tanh(), nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU()],
        (2, 4),
        "0",
    ),
    "volumes": Case(lambda: [nn.BatchNorm3d(2), nn.Tanh()], (2, 2, 1, 2), "0"),
    "after an activation": Case(
        lambda: [
            nn.Conv2d(2, 3, 2),
            nn.ReLU(),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.Conv2d(3, 2, 1),
            nn.BatchNorm2d(2),
            nn.Tanh(),
        ],
        (2, 3, 3),
        "2",
    ),
    "after pooling": Case(
        lambda: [nn.Conv2d(2, 3, 1), nn.AvgPool2d(2), nn.BatchNorm2d(3), nn.Tanh()],
        (2, 2, 4),
        "2",
    ),
    "pre-activation": Case(lambda: [PreActivation(), nn.Tanh()], (2, 2, 2), "0.norm"),
    "two consumers": Case(lambda: [TwoConsumers(), nn.Tanh()], (2, 2, 2), "0.norm"),
    "behind a transposition": Case(
        lambda: [nn.Linear(3, 2), OverLocations(2), nn.Tanh()], (4, 3), "1.norm"
    ),
}

OTHERS = {
    "LayerNorm of features": Case(lambda: [nn.LayerNorm(4), nn.Tanh()], (4,), "0"),
    "LayerNorm at locations": Case(
        lambda: [nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh()], (3, 4), "1"
    ),
    "LayerNorm of images": Case(
        lambda: [nn.LayerNorm((2, 2, 2)), nn.Tanh(), nn.BatchNorm2d(2)], (2, 2, 2), "0"
    ),
    "LayerNorm of rows": Case(lambda: [nn.LayerNorm(3), nn.Tanh()], (2, 2, 3), "0"),
    "LayerNorm without shift": Case(lambda: [nn.LayerNorm(3, bias=False), nn.Tanh()], (2, 3), "0"),
    "RMSNorm": Case(lambda: [nn.RMSNorm(3), nn.Tanh()], (2, 3), "0"),
    "GroupNorm of features": Case(lambda: [nn.GroupNorm(2, 4), nn.Tanh()], (4,), "0"),
    "GroupNorm of images": Case(
        lambda: [nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.BatchNorm2d(4), nn.Tanh()],
        (2, 2, 2),
        "1",
    ),
    "InstanceNorm": Case(
        lambda: [nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, affine=True), nn.Tanh()], (2, 3, 3), "1"
    ),
}
CASES = BATCHNORMS | OTHERS


def shift_rows(matrix: Tensor) -> Tensor:
    """Of 2x2 blocks, the entries that belong to shifts alone."""
    return matrix[1::2, 1::2]


# --- the oracle itself --------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("name", CASES)
def test_the_two_forms_of_the_exact_block_agree(name, statistics):
    case = CASES[name]
    model, (batch,) = case.network.make(), case.network.batches("cross_entropy", (3,))
    of_example = LOSSES["cross_entropy"].of_example
    modes = {"coordinates": "merged", "statistics": statistics}
    units = units_of(model, case.layer, batch, of_example, **modes)
    block = exact_block(model, case.layer, batch, of_example, **modes)
    assert relative_error(block_from_units(units), block) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_the_exact_block_is_that_of_the_modules_own_parameters(name):
    case = CASES[name]
    model, ((x, y),) = case.network.make().eval(), case.network.batches("mse", (3,))
    module = model.get_submodule(case.layer)
    names = [f"{case.layer}.{key}" for key, _ in module.named_parameters()]

    def outputs(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), x)

    parameters = [p.detach() for p in module.parameters()]
    by_scale, *by_shift = torch.func.jacrev(outputs, tuple(range(len(names))))(*parameters)
    if name in BATCHNORMS:
        # gamma = sigma s and beta = t + mu s for the merged scale s and shift t.
        sigma = (module.running_var + module.eps).sqrt()
        by_scale = sigma * by_scale + module.running_mean * by_shift[0]
    jacobian = torch.stack([by_scale, *by_shift], -1).flatten(2)
    expected = torch.einsum("nip,niq->pq", jacobian, jacobian) * 2 / 3 / len(x)
    modes = {"coordinates": "merged", "statistics": "running"}
    block = exact_block(model, case.layer, (x, y), LOSSES["mse"].of_example, **modes)
    assert relative_error(within_groups(expected, module.weight.numel()), block) < EXACT


# --- definitions --------------------------------------------------------------------------


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("name", CASES)
def test_factors_are_the_strata_of_each_channel(name, modes, device):
    case = CASES[name]
    model, batches = case.network.make(), case.network.batches("cross_entropy", (3, 4))
    if name in BATCHNORMS and modes["coordinates"] == "raw":
        curvature = estimate(model, batches, "cross_entropy", device, **modes)
        assert case.layer not in curvature
        assert {f"{case.layer}.weight", f"{case.layer}.bias"} <= set(curvature.uncovered)
        return
    of_example = LOSSES["cross_entropy"].of_example
    units = [units_of(model, case.layer, batch, of_example, **modes) for batch in batches]
    channels = model.get_submodule(case.layer).weight.numel()
    for approximation in APPROXIMATIONS:
        options = {"approximation": approximation, **modes}
        curvature = estimate(model, batches, "cross_entropy", device, **options)
        assert curvature.uncovered == () or modes["coordinates"] == "raw"
        block = curvature[case.layer]
        expected = dense(strata_terms(approximation, units))
        assert block.shape == (channels, len(expected) // channels)
        assert relative_error(dense_block(block), expected) < EXACT, approximation
        assert relative_error(block.dense().cpu(), expected) < EXACT, approximation


@pytest.mark.parametrize("modes", [m for m in MODES if m["coordinates"] == "merged"])
@pytest.mark.parametrize("name", CASES)
def test_the_diagonal_is_made_of_each_examples_gradient(name, modes):
    case = CASES[name]
    model, (batch,) = case.network.make(), case.network.batches("bce", (3,))
    options = {"approximation": "diagonal", **modes}
    block = estimate(model, [batch], "bce", **options)[case.layer]
    units = units_of(model, case.layer, batch, LOSSES["bce"].of_example, **modes)
    assert relative_error(block.values, diagonal_from_units(units)) < EXACT
    if modes["statistics"] == "running":
        exact = exact_block(model, case.layer, batch, LOSSES["bce"].of_example, **modes)
        assert relative_error(block.values.flatten(), exact.diagonal()) < EXACT


@pytest.mark.parametrize("name", CASES)
def test_pair_form_equals_strata_form(name):
    case = CASES[name]
    model, (batch,) = case.network.make(), case.network.batches("mse", (4,))
    block = estimate(model, [batch], "mse", approximation="xkfac", **MERGED)[case.layer]
    units = units_of(model, case.layer, batch, LOSSES["mse"].of_example, **MERGED)
    assert relative_error(dense_block(block), dense(pair_terms(units))) < EXACT


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", CASES)
def test_every_factor_is_positive_semidefinite_and_symmetric(name, approximation):
    case = CASES[name]
    model, batches = case.network.make(), case.network.batches("bce", (3, 2))
    curvature = estimate(model, batches, "bce", approximation=approximation, **MERGED)
    for factor in itertools.chain.from_iterable(curvature[case.layer].terms):
        assert torch.equal(factor, factor.mT)
        values = torch.linalg.eigvalsh(factor)
        assert (values[..., 0] >= -1e-13 * values.abs().max()).all()


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", CASES)
def test_single_precision_is_close_to_double(name, approximation, device):
    case = CASES[name]
    model, batches = case.network.make(), case.network.batches("cross_entropy", (4, 3))
    options = {"approximation": approximation, **MERGED}
    double = estimate(model, batches, "cross_entropy", **options)[case.layer]
    single = [(x.float(), y) for x, y in batches]
    found = estimate(model.float(), single, "cross_entropy", device, **options)[case.layer]
    assert found.dtype == torch.float32
    assert relative_error(dense_block(found), dense_block(double)) < 1e-5


# --- known answers ------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize(
    "name", [n for n in CASES if n not in ("RMSNorm", "LayerNorm without shift")]
)
def test_what_a_shift_feels_is_exact_whoever_interacts(name, statistics):
    case = CASES[name]
    model, (batch,) = case.network.make(), case.network.batches("cross_entropy", (4,))
    modes = {"coordinates": "merged", "statistics": statistics}
    exact = exact_block(model, case.layer, batch, LOSSES["cross_entropy"].of_example, **modes)
    errors = {}
    for approximation in APPROXIMATIONS:
        options = {"approximation": approximation, **modes}
        block = estimate(model, [batch], "cross_entropy", **options)[case.layer]
        errors[approximation] = relative_error(shift_rows(dense_block(block)), shift_rows(exact))
        if approximation != "kfac-expand":
            assert relative_error(dense_block(block), exact) > 1e-3
    assert errors["xkfac"] < EXACT
    assert errors["xkfac-nested"] < EXACT
    if len(case.shape) > 1 and name != "LayerNorm of images":
        assert errors["kfac-expand"] > DIFFERENT


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("labels", ["type2", "exact"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "name", ["features", "LayerNorm of features", "LayerNorm of images", "GroupNorm of features"]
)
def test_one_example_with_one_location_is_exact(name, loss, labels, approximation):
    case = CASES[name]
    options = {"labels": labels, "approximation": approximation, "coordinates": "merged"}
    model = case.network.make()
    errors = errors_to_exact(model, case.network.batches(loss, (1,)), loss, **options)
    assert errors[case.layer] < EXACT
    options |= {"labels": "exact"}
    errors = errors_to_exact(model, case.network.batches(loss, (3,)), loss, **options)
    assert errors[case.layer] > 1e-3


EXPAND = ("kfac-expand", "xkfac", "xkfac-nested")
REDUCE = ("kfac-reduce", "xkfac-nested")


def linear(*body: Callable[[], nn.Module], shape, output_shape) -> Network:
    return Network(lambda: nn.Sequential(*(make() for make in body)), shape, output_shape)


# What follows the normalisation is linear, and the loss is on every location or on their mean.
EVERYWHERE = {
    "BatchNorm": linear(
        lambda: nn.BatchNorm2d(3),
        lambda: nn.Conv2d(3, 2, 1),
        shape=(3, 2, 2),
        output_shape=(2, 2, 2),
    ),
    "LayerNorm": linear(
        lambda: nn.LayerNorm(3),
        lambda: nn.Linear(3, 2),
        ClassesFirst,
        shape=(4, 3),
        output_shape=(2, 4),
    ),
    "RMSNorm": linear(
        lambda: nn.RMSNorm(3), lambda: nn.Linear(3, 2), shape=(4, 3), output_shape=(4, 2)
    ),
    "GroupNorm": linear(
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.Conv1d(4, 2, 1),
        shape=(4, 3),
        output_shape=(2, 3),
    ),
    "InstanceNorm": linear(
        lambda: nn.InstanceNorm2d(2, affine=True),
        lambda: nn.BatchNorm2d(2),
        shape=(2, 2, 2),
        output_shape=(2, 2, 2),
    ),
}
POOLED = {
    "BatchNorm": linear(
        lambda: nn.BatchNorm2d(3),
        lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"),
        MeanOverLocations,
        shape=(3, 2, 2),
        output_shape=(2,),
    ),
    "LayerNorm": linear(
        lambda: nn.LayerNorm(3),
        MeanOverSequence,
        lambda: nn.Linear(3, 2),
        shape=(4, 3),
        output_shape=(2,),
    ),
    "RMSNorm": linear(lambda: nn.RMSNorm(3), MeanOverSequence, shape=(4, 3), output_shape=(3,)),
    "GroupNorm": linear(
        lambda: nn.GroupNorm(2, 4), MeanOverLocations, shape=(4, 3), output_shape=(4,)
    ),
    # Over the locations that it normalised itself, the mean would be the shift alone.
    "InstanceNorm": linear(
        lambda: nn.InstanceNorm2d(2, affine=True),
        lambda: nn.Conv2d(2, 2, (1, 2)),
        MeanOverLocations,
        shape=(2, 2, 2),
        output_shape=(2,),
    ),
}


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_linear_with_squared_error_at_every_location_is_exact_for_expand(name, approximation):
    network = EVERYWHERE[name]
    batches = network.batches("mse", (4, 1, 2))
    options = {"approximation": approximation, "coordinates": "merged"}
    error = errors_to_exact(network.make(), batches, "mse", **options)["0"]
    assert error < EXACT if approximation in EXPAND else error > DIFFERENT


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", [n for n in POOLED if n != "InstanceNorm"])
def test_linear_with_pooling_and_squared_error_is_exact_for_reduce(name, approximation):
    network = POOLED[name]
    batches = network.batches("mse", (4, 1, 2))
    options = {"approximation": approximation, "coordinates": "merged"}
    error = errors_to_exact(network.make(), batches, "mse", **options)["0"]
    assert error < EXACT if approximation in REDUCE else error > DIFFERENT


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("setting", [EVERYWHERE, POOLED])
@pytest.mark.parametrize("name", EVERYWHERE)
def test_linear_with_cross_entropy_is_not_exact(name, setting, approximation):
    network = setting[name]
    batches = network.batches("cross_entropy", (4,))
    options = {"approximation": approximation, "coordinates": "merged"}
    errors = errors_to_exact(network.make(), batches, "cross_entropy", **options)
    assert errors["0"] > 1e-3


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_a_linear_network_of_features_is_exact_for_unequal_batches(approximation):
    network = linear(
        lambda: nn.BatchNorm1d(3),
        lambda: nn.Linear(3, 4),
        lambda: nn.Linear(4, 2),
        shape=(3,),
        output_shape=(2,),
    )
    batches = network.batches("mse", (5, 1, 2))
    options = {"approximation": approximation, "coordinates": "merged"}
    assert max(errors_to_exact(network.make(), batches, "mse", **options).values()) < EXACT
    options |= {"labels": "empirical"}
    assert errors_to_exact(network.make(), batches, "mse", **options)["0"] > DIFFERENT


@pytest.mark.parametrize("approximation", EXPAND)
def test_a_later_batchnorm_in_train_mode_breaks_it(approximation):
    network = linear(
        lambda: nn.BatchNorm1d(3),
        lambda: nn.Linear(3, 4),
        lambda: nn.BatchNorm1d(4),
        lambda: nn.Linear(4, 2),
        shape=(3,),
        output_shape=(2,),
    )
    batches = network.batches("mse", (5,))
    options = {"approximation": approximation, "coordinates": "merged"}
    running = errors_to_exact(network.make(), batches, "mse", **options)
    assert max(running.values()) < EXACT
    batch = errors_to_exact(network.make(), batches, "mse", statistics="batch", **options)
    assert batch["0"] > 0.1
    # In merged coordinates the second BatchNorm is part of the layer before it.
    assert max(batch["1"], batch["3"]) < EXACT


# --- invariances --------------------------------------------------------------------------


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", CASES)
def test_order_of_examples_merging_and_memory_layout(name, approximation):
    case = CASES[name]
    model, batches = case.network.make(), case.network.batches("cross_entropy", (4, 2, 3))
    options = {"approximation": approximation, **MERGED}

    def block(part):
        return dense_block(estimate(model, part, "cross_entropy", **options)[case.layer])

    whole = block(batches)
    (x, y), *rest = batches
    order = torch.tensor([2, 0, 3, 1])
    assert relative_error(block([(x[order], y[order]), *rest]), whole) < EXACT
    strided = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    assert relative_error(block([(strided, y), *rest]), whole) < EXACT
    first, others = (
        estimate(model, part, "cross_entropy", **options) for part in (batches[:1], rest)
    )
    assert relative_error(dense_block(first.merge(others)[case.layer]), whole) < 1e-12


def test_a_batchnorm_of_its_own_is_a_layer_of_ones_before_it():
    channels = BATCHNORMS["images"]
    model, batches = channels.network.make(), channels.network.batches("cross_entropy", (4,))
    depthwise = nn.Conv2d(3, 3, 1, groups=3, bias=False).double()
    nn.init.ones_(depthwise.weight)
    with_ones = nn.Sequential(depthwise, *model)
    for approximation in (*APPROXIMATIONS, "diagonal"):
        options = {"approximation": approximation, **MERGED}
        found = estimate(model, batches, "cross_entropy", **options)["0"]
        expected = estimate(with_ones, batches, "cross_entropy", **options)["0"]
        assert relative_error(found.diagonal(), expected.diagonal()) < 1e-12
        V = torch.randn(3, 2, dtype=torch.float64)
        assert relative_error(found.product(V), expected.product(V)) < 1e-12


def test_a_batchnorm_without_parameters_has_no_block():
    network = linear(
        lambda: nn.BatchNorm2d(3, affine=False),
        lambda: nn.Conv2d(3, 2, 2),
        MeanOverLocations,
        shape=(3, 3, 3),
        output_shape=(2,),
    )
    curvature = estimate(network.make(), network.batches("mse", (4,)), "mse", **MERGED)
    assert tuple(curvature) == ("1",)
