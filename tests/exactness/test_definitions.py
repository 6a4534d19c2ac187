"""Every block is what its definition says, from the definition's own sums over units."""

import itertools

import pytest
import torch
from torch import nn

from cases import (
    APPROXIMATIONS,
    COORDINATES,
    LOSSES,
    NETWORKS,
    Network,
    dense_block,
    estimate,
)
from oracle import (
    Units,
    all_relabelings,
    average_over_relabelings,
    block_from_units,
    dense,
    exact_block,
    linear_layers,
    pair_terms,
    random_relabelings,
    relative_error,
    strata_terms,
    units_of,
)

EXACT = 1e-10
MEANS = ["cross_entropy", "mse", "bce"]


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("loss", MEANS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_two_forms_of_the_exact_block_agree(name, loss, coordinates, statistics):
    network = NETWORKS[name]
    model, (batch,) = network.make(), network.batches(loss, (4,))
    of_example = LOSSES[loss].of_example
    for layer in linear_layers(model)[:2]:
        options = {"coordinates": coordinates, "statistics": statistics}
        block = exact_block(model, layer, batch, of_example, **options)
        units = units_of(model, layer, batch, of_example, **options)
        assert relative_error(block_from_units(units), block) < 1e-12


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("loss", MEANS)
@pytest.mark.parametrize("name", NETWORKS)
def test_factors_are_the_strata_of_the_analysis_of_variance(
    name, loss, coordinates, statistics, device
):
    network = NETWORKS[name]
    model, batches = network.make(), network.batches(loss, (5, 3))
    modes = {"coordinates": coordinates, "statistics": statistics}
    if name == "locations-bn" and coordinates == "merged":
        pytest.skip("this BatchNorm normalises a transposed tensor: it is not merged")
    curvatures = {
        approximation: estimate(model, batches, loss, device, approximation=approximation, **modes)
        for approximation in APPROXIMATIONS
    }
    for layer in linear_layers(model):
        units = [
            units_of(model, layer, batch, LOSSES[loss].of_example, **modes) for batch in batches
        ]
        for approximation, curvature in curvatures.items():
            expected = dense(strata_terms(approximation, units))
            assert relative_error(dense_block(curvature[layer]), expected) < EXACT


@pytest.mark.parametrize("approximation", ["xkfac", "xkfac-nested"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_means_of_more_mini_batches_than_are_kept_are_all_there(loss, approximation, device):
    # Wide enough for roots of the mean to be kept, and more mini-batches than there is room for.
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(50, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3))

    network = Network(build, (50,), (3,))
    model, batches = network.make(), network.batches(loss, (3, 4, 3, 5, 3, 4, 3))
    curvature = estimate(model, batches, loss, device, approximation=approximation)
    for layer in linear_layers(model):
        units = [units_of(model, layer, batch, LOSSES[loss].of_example) for batch in batches]
        expected = dense(strata_terms(approximation, units))
        assert relative_error(dense_block(curvature[layer]), expected) < EXACT


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("name", ["mlp-bn", "mlp-bn-plain"])
def test_pair_form_equals_strata_form(name, coordinates):
    network = NETWORKS[name]
    model, batches = network.make(), network.batches("cross_entropy", (5,))
    curvature = estimate(
        model, batches, "cross_entropy", approximation="xkfac", coordinates=coordinates
    )
    for layer, block in curvature.items():
        units = units_of(
            model, layer, batches[0], LOSSES["cross_entropy"].of_example, coordinates=coordinates
        )
        same, different = pair_terms(units)
        assert relative_error(dense_block(block), dense([same, different])) < EXACT
        if layer == "0":
            assert relative_error(dense_block(block), dense([same])) > 0.1


def test_pair_form_equals_strata_form_with_shared_weights():
    network = NETWORKS["locations-bn"]
    model, batches = network.make(), network.batches("bce", (4,))
    curvature = estimate(model, batches, "bce", approximation="xkfac")
    for layer, block in curvature.items():
        units = units_of(model, layer, batches[0], LOSSES["bce"].of_example)
        assert relative_error(dense_block(block), dense(pair_terms(units))) < EXACT


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_every_factor_is_positive_semidefinite_and_symmetric(name, approximation):
    network = NETWORKS[name]
    batches = network.batches("bce", (5, 4, 2))
    curvature = estimate(network.make(), batches, "bce", approximation=approximation)
    for block in curvature.values():
        for factor in itertools.chain.from_iterable(block.terms):
            assert torch.equal(factor, factor.mT)
            values = torch.linalg.eigvalsh(factor)
            assert values[0] >= -1e-13 * values[-1].abs()


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_xkfac_is_the_average_of_the_exact_block_over_all_relabelings(coordinates):
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (5,))
    curvature = estimate(
        model, batches, "cross_entropy", approximation="xkfac", coordinates=coordinates
    )
    for layer in ("0", "3"):
        units = units_of(
            model, layer, batches[0], LOSSES["cross_entropy"].of_example, coordinates=coordinates
        )
        average, _ = average_over_relabelings(units, all_relabelings(5, 1, nested=False))
        block = dense_block(curvature[layer])
        assert relative_error(block, average) < EXACT
        assert relative_error(block, block_from_units(units)) > 0.1


@pytest.mark.parametrize(
    ("approximation", "examples", "locations"), [("xkfac", 3, 2), ("xkfac-nested", 3, 3)]
)
def test_shared_weights_average_over_the_relabelings_their_units_allow(
    approximation, examples, locations
):
    network = NETWORKS["locations-bn"]
    model = network.make()
    ((x, y),) = network.batches("mse", (examples,))
    batch = x[:, :locations], y
    curvature = estimate(model, [batch], "mse", approximation=approximation)
    for layer in ("0", "3"):
        units = units_of(model, layer, batch, LOSSES["mse"].of_example)
        averages = {
            nested: average_over_relabelings(
                units, all_relabelings(examples, locations, nested=nested)
            )[0]
            for nested in ([True, False] if approximation == "xkfac" else [True])
        }
        nested = approximation == "xkfac-nested"
        block = dense_block(curvature[layer])
        assert relative_error(block, averages.pop(nested)) < EXACT
        for other in averages.values():
            assert relative_error(block, other) > 1e-2


@pytest.mark.parametrize(
    ("name", "approximation", "size"),
    [("mlp-bn", "xkfac", 16), ("locations-bn", "xkfac", 6), ("locations-bn", "xkfac-nested", 6)],
)
def test_independent_random_relabelings_of_both_sides_average_to_it(
    name, approximation, size, generator
):
    network = NETWORKS[name]
    model, batches = network.make(), network.batches("cross_entropy", (size,))
    block = estimate(model, batches, "cross_entropy", approximation=approximation)["0"]
    units = units_of(model, "0", batches[0], LOSSES["cross_entropy"].of_example)
    relabelings = random_relabelings(
        units.examples,
        units.locations,
        nested=approximation == "xkfac-nested",
        generator=generator,
    )
    average, error = average_over_relabelings(
        units, itertools.islice(relabelings, 3000), relabelings
    )
    noise = error.norm().item()
    assert (dense_block(block) - average).norm().item() < 2 * noise
    assert (block_from_units(units) - average).norm().item() > 10 * noise


@pytest.mark.parametrize("name", ["mlp-bn", "mlp", "linear-stack-bn"])
def test_without_shared_weights_nested_and_plain_strata_coincide(name):
    network = NETWORKS[name]
    model, batches = network.make(), network.batches("bce", (6, 4))
    plain = estimate(model, batches, "bce", approximation="xkfac")
    nested = estimate(model, batches, "bce", approximation="xkfac-nested")
    for layer in plain:
        assert relative_error(dense_block(nested[layer]), dense_block(plain[layer])) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "mlp-bn", "linear-stack-bn"])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_without_interaction_xkfac_is_kfac(name, coordinates):
    network = NETWORKS[name]
    model, batches = network.make(), network.batches("cross_entropy", (5, 5))
    modes = {"coordinates": coordinates, "statistics": "running"}
    kfac = estimate(model, batches, "cross_entropy", approximation="kfac-expand", **modes)
    xkfac = estimate(model, batches, "cross_entropy", approximation="xkfac", **modes)
    for layer in kfac:
        assert relative_error(dense_block(xkfac[layer]), dense_block(kfac[layer])) < EXACT


def test_with_interaction_xkfac_is_not_kfac():
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (5, 5))
    kfac = estimate(model, batches, "cross_entropy", approximation="kfac-expand")
    xkfac = estimate(model, batches, "cross_entropy", approximation="xkfac")
    for layer in ("0", "3"):
        assert relative_error(dense_block(xkfac[layer]), dense_block(kfac[layer])) > 0.1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_locations_count_for_nothing(reduction):
    network = NETWORKS["locations-linear"]
    model = network.make()
    ((x, y),) = network.batches("cross_entropy", (4,))
    y[0, 1] = y[2, 0] = y[2, 2] = -100
    name = "cross_entropy-sum" if reduction == "sum" else "cross_entropy"
    curvature = estimate(model, [(x, y)], name, approximation="kfac-expand")
    of_example = LOSSES["cross_entropy-sum"].of_example
    counted = (y != -100).sum().item()
    scale = len(x) / counted if reduction == "mean" else 1.0
    for layer, block in curvature.items():
        units = units_of(model, layer, (x, y), of_example)
        expected = scale * dense(strata_terms("kfac-expand", [units]))
        assert relative_error(dense_block(block), expected) < EXACT


def test_class_probabilities_as_targets_give_the_same_block_as_class_indices():
    network = NETWORKS["mlp-bn"]
    model = network.make()
    ((x, y),) = network.batches("cross_entropy", (6,))
    probabilities = torch.full((6, 3), 0.2, dtype=torch.float64)
    probabilities[torch.arange(6), y] = 0.6
    by_index = estimate(model, [(x, y)], "cross_entropy")
    by_probability = estimate(model, [(x, probabilities)], "cross_entropy")
    for layer in by_index:
        assert (
            relative_error(dense_block(by_probability[layer]), dense_block(by_index[layer])) < 1e-12
        )


def test_a_constant_shift_of_the_inputs_leaves_the_within_stratum_alone():
    network = NETWORKS["mlp-bn"]
    model = network.make()
    ((x, y),) = network.batches("mse", (6,))
    units = units_of(model, "0", (x, y), LOSSES["mse"].of_example)
    shifted = Units(units.a + 7, units.g)
    (within, _), (moved, _) = (strata_terms("xkfac", [u])[0] for u in (units, shifted))
    assert relative_error(moved, within) < 1e-12
    far = estimate(model, [(x + 1e4, y)], "mse", approximation="xkfac")["0"]
    near = estimate(model, [(x, y)], "mse", approximation="xkfac")["0"]
    assert relative_error(far.terms[0][0], near.terms[0][0]) < 1e-10
