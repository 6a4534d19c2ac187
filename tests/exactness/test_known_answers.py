"""Cases where a Kronecker approximation is known to equal the exact GGN, and their opposites."""

import itertools

import pytest
import torch
from torch import nn

from cases import APPROXIMATIONS, COORDINATES, LOSSES, NETWORKS, dense_block, estimate
from oracle import (
    empirical_fisher,
    exact_block,
    exact_block_of_loader,
    relative_error,
    units_of,
)

EXACT = 1e-10
DIFFERENT = 1e-2
KFAC = ["kfac-expand", "kfac-reduce"]


def errors(model, batches, loss, device="cpu", **options) -> dict[str, float]:
    """Relative error of every layer's block to the exact GGN of the same coordinates."""
    modes = {"coordinates": "raw", "statistics": "running"}
    modes |= {key: options[key] for key in modes.keys() & options.keys()}
    curvature = estimate(model, batches, loss, device, **options | modes)
    of_example = LOSSES[loss].of_example
    return {
        layer: relative_error(
            dense_block(block),
            exact_block_of_loader(model, layer, batches, of_example, **modes),
        )
        for layer, block in curvature.items()
    }


def identical(batch):
    x, y = batch
    return x[:1].expand_as(x).contiguous(), y[:1].expand_as(y).contiguous()


# --- one example --------------------------------------------------------------------------


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("labels", ["type2", "exact"])
@pytest.mark.parametrize(
    ("name", "loss"),
    [
        *(("mlp", loss) for loss in LOSSES),
        ("mlp-bn", "cross_entropy"),
        ("mlp-bn", "bce"),
        ("linear-residual", "cross_entropy"),
    ],
)
def test_one_example_is_exact(name, loss, labels, approximation, device):
    network = NETWORKS[name]
    batches = network.batches(loss, (1,))
    for coordinates in COORDINATES:
        options = {"labels": labels, "coordinates": coordinates, "approximation": approximation}
        assert max(errors(network.make(), batches, loss, device, **options).values()) < EXACT


@pytest.mark.parametrize("loss", LOSSES)
def test_two_examples_are_not_exact(loss):
    network = NETWORKS["mlp"]
    assert errors(network.make(), network.batches(loss, (2,)), loss)["0"] > DIFFERENT


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("approximation", "labels"),
    [("kfac-expand", "type2"), ("kfac-reduce", "type2"), ("xkfac", "exact")],
)
def test_identical_inputs_are_exact(loss, approximation, labels):
    network = NETWORKS["mlp"]
    batch = identical(network.batches(loss, (4,))[0])
    options = {"approximation": approximation, "labels": labels}
    assert max(errors(network.make(), [batch], loss, **options).values()) < EXACT


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("approximation", KFAC)
def test_one_example_with_its_own_label_gives_the_empirical_fisher(loss, approximation):
    network = NETWORKS["mlp"]
    model, batches = network.make(), network.batches(loss, (1,))
    curvature = estimate(model, batches, loss, labels="empirical", approximation=approximation)
    of_example = LOSSES[loss].of_example
    for layer, block in curvature.items():
        fisher = empirical_fisher(model, layer, batches[0], of_example)
        assert relative_error(dense_block(block), fisher) < EXACT
        ggn = exact_block(model, layer, batches[0], of_example)
        assert relative_error(dense_block(block), ggn) > DIFFERENT


# --- deep linear networks with squared error ----------------------------------------------


# Square roots over a whole batch are exact where every unit stands alone; strata add units up.
LABELS = {
    "kfac-expand": ("type2", "exact"),
    "kfac-reduce": ("type2", "exact"),
    "xkfac": ("exact",),
    "xkfac-nested": ("exact",),
}


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", ["linear-stack", "linear-stack-bn", "linear-residual"])
def test_deep_linear_with_squared_error_is_exact_for_unequal_batches(
    name, approximation, coordinates, device
):
    network = NETWORKS[name]
    for loss, labels in itertools.product(("mse", "mse-sum"), LABELS[approximation]):
        found = errors(
            network.make(),
            network.batches(loss, (5, 2, 1)),
            loss,
            device,
            labels=labels,
            approximation=approximation,
            coordinates=coordinates,
        )
        assert max(found.values()) < EXACT


def test_deep_linear_with_cross_entropy_is_not_exact():
    network = NETWORKS["linear-stack"]
    found = errors(network.make(), network.batches("cross_entropy", (5, 2)), "cross_entropy")
    assert min(found.values()) > DIFFERENT


def test_deep_linear_with_the_true_labels_is_not_exact():
    network = NETWORKS["linear-stack"]
    found = errors(network.make(), network.batches("mse", (5, 2)), "mse", labels="empirical")
    assert min(found.values()) > DIFFERENT


def test_deep_linear_with_train_mode_batchnorm_is_not_exact_before_it():
    network = NETWORKS["linear-stack-bn"]
    model, batches = network.make(), network.batches("mse", (6,))
    found = errors(model, batches, "mse", approximation="kfac-expand", statistics="batch")
    assert found["0"] > 0.5
    assert found["2"] > 0.5
    assert found["4"] < EXACT


# --- the last layer -----------------------------------------------------------------------


@pytest.mark.parametrize("approximation", ["kfac-expand", "xkfac"])
@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("name", ["mlp", "mlp-bn", "locations-bn"])
def test_last_layer_with_squared_error_is_exact_on_any_features(name, statistics, approximation):
    network = NETWORKS[name]
    options = {"approximation": approximation, "statistics": statistics}
    found = errors(network.make(), network.batches("mse", (6,)), "mse", **options)
    *earlier, last = found.values()
    assert last < EXACT
    assert min(earlier) > DIFFERENT


@pytest.mark.parametrize("approximation", ["kfac-expand", "xkfac"])
def test_zero_initialised_head_is_exact_with_cross_entropy(approximation):
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (6,))
    options = {"approximation": approximation, "statistics": "batch", "layers": ["6"]}
    assert errors(model, batches, "cross_entropy", **options)["6"] > DIFFERENT
    nn.init.zeros_(model.get_submodule("6").weight)
    assert errors(model, batches, "cross_entropy", **options)["6"] < EXACT


def test_one_linear_layer_with_squared_error_has_the_exact_inverse():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    batches = NETWORKS["mlp"].batches("mse", (7,))
    ggn = exact_block(model, "0", batches[0], LOSSES["mse"].of_example)
    block = estimate(model, batches, "mse", approximation="kfac-expand")["0"]
    V = torch.randn(3, 5, dtype=torch.float64)
    for damping in (0.0, 0.1):
        damped = ggn + damping * torch.eye(15, dtype=torch.float64)
        expected = torch.linalg.solve(damped, V.flatten()).reshape(3, 5)
        assert relative_error(block.solve(V, damping), expected) < 1e-10
        assert block.logdet(damping) == pytest.approx(torch.logdet(damped).item(), rel=1e-10)


# --- weight sharing -----------------------------------------------------------------------

SHARING = {
    "locations-linear": {"kfac-expand", "xkfac", "xkfac-nested"},
    "locations-pooled-linear": {"kfac-reduce", "xkfac-nested"},
    "locations-summed-linear": {"kfac-reduce", "xkfac-nested"},
}


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", SHARING)
def test_expand_and_reduce_are_each_exact_in_their_own_setting(name, approximation, device):
    network = NETWORKS[name]
    for loss, labels in itertools.product(("mse", "mse-sum"), LABELS[approximation]):
        batches = network.batches(loss, (5, 1, 3))
        options = {"approximation": approximation, "labels": labels}
        found = errors(network.make(), batches, loss, device, **options)
        if approximation in SHARING[name]:
            assert max(found.values()) < EXACT
        else:
            assert min(found.values()) > DIFFERENT


@pytest.mark.parametrize("name", SHARING)
def test_sharing_settings_are_not_exact_with_cross_entropy(name):
    network = NETWORKS[name]
    batches = network.batches("cross_entropy", (5,))
    for approximation in APPROXIMATIONS:
        found = errors(network.make(), batches, "cross_entropy", approximation=approximation)
        assert min(found.values()) > DIFFERENT


# --- bias-only blocks ---------------------------------------------------------------------


def bias_block(matrix, width):
    """Rows and columns of the bias, the last of each row of ``[D, K]``."""
    return matrix.reshape(width, -1, width, matrix.shape[0] // width)[:, -1, :, -1]


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
@pytest.mark.parametrize("name", ["mlp", "mlp-bn"])
def test_bias_block_without_interaction_is_exact(name, loss):
    network = NETWORKS[name]
    model, batches = network.make(), network.batches(loss, (5, 2))
    modes = {"coordinates": "merged", "statistics": "running"}
    options = {"approximation": "kfac-expand", "labels": "type2", **modes}
    for layer, block in estimate(model, batches, loss, **options).items():
        exact = exact_block_of_loader(model, layer, batches, LOSSES[loss].of_example, **modes)
        width = block.shape[0]
        expected = bias_block(exact, width)
        assert relative_error(bias_block(dense_block(block), width), expected) < EXACT


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_bias_block_under_interaction_is_exact_for_xkfac_alone(loss):
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches(loss, (7,))
    exact = exact_block(model, "0", batches[0], LOSSES[loss].of_example, coordinates="merged")
    found = {
        approximation: relative_error(
            bias_block(
                dense_block(
                    estimate(
                        model,
                        batches,
                        loss,
                        approximation=approximation,
                        coordinates="merged",
                    )["0"]
                ),
                6,
            ),
            bias_block(exact, 6),
        )
        for approximation in ("xkfac", "xkfac-nested", "kfac-expand")
    }
    assert found["xkfac"] < EXACT
    assert found["xkfac-nested"] < EXACT
    assert found["kfac-expand"] > 0.1


# --- BatchNorm straight after the layer ---------------------------------------------------


@pytest.mark.parametrize("labels", ["exact", "type2", "mc", "empirical"])
@pytest.mark.parametrize("layer", ["0", "3"])
def test_batchnorm_straight_after_leaves_no_curvature_in_the_bias(layer, labels):
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (6,))
    options = {"approximation": "xkfac", "labels": labels, "layers": [layer]}
    block = estimate(model, batches, "cross_entropy", **options)[layer]
    (_, within), (_, mean) = block.terms
    assert mean.norm() < 1e-12 * within.norm()
    if layer == "0":
        exact = exact_block(model, layer, batches[0], LOSSES["cross_entropy"].of_example)
        for matrix in (dense_block(block), exact):
            rows = matrix.reshape(6, 5, 6, 5)
            scale = matrix.norm()
            assert rows[:, -1].norm() < 1e-12 * scale
            assert rows[:, :, :, -1].norm() < 1e-12 * scale


@pytest.mark.parametrize("layer", ["0", "3"])
def test_batchnorm_straight_after_leaves_the_covariance_of_the_inputs(layer):
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (6,))
    units = units_of(model, layer, batches[0], LOSSES["cross_entropy"].of_example)
    a, g = units.flat
    assert g.sum(1).norm() < 1e-12 * g.norm()
    G = torch.einsum("sud,sue->de", g, g) / 6
    expected = torch.kron(G, torch.cov(a.mT))
    blocks = {
        approximation: dense_block(
            estimate(model, batches, "cross_entropy", approximation=approximation)[layer]
        )
        for approximation in ("xkfac", "kfac-expand")
    }
    assert relative_error(blocks["xkfac"], expected) < EXACT
    assert relative_error(blocks["kfac-expand"], expected) > 0.1


def test_merged_coordinates_give_scale_and_shift_real_curvature():
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (6,))
    curvature = estimate(model, batches, "cross_entropy", coordinates="merged")
    block = dense_block(curvature["0"])
    assert bias_block(block, 6).norm() > 1e-2 * block.norm()
    assert curvature["3"].shape == (5, 7)
    assert curvature.uncovered == ()


# --- the diagonal -------------------------------------------------------------------------


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
@pytest.mark.parametrize("name", ["mlp", "mlp-bn", "locations-linear", "locations-pooled-linear"])
def test_diagonal_without_interaction_is_that_of_the_exact_block(name, loss, coordinates):
    network = NETWORKS[name]
    model, batches = network.make(), network.batches(loss, (5, 3))
    modes = {"coordinates": coordinates, "statistics": "running"}
    curvature = estimate(model, batches, loss, approximation="diagonal", **modes)
    of_example = LOSSES[loss].of_example
    for layer, block in curvature.items():
        exact = exact_block_of_loader(model, layer, batches, of_example, **modes)
        assert relative_error(block.values.flatten(), exact.diagonal()) < EXACT


def test_diagonal_under_interaction_is_not_that_of_the_exact_block():
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("mse", (5,))
    block = estimate(model, batches, "mse", approximation="diagonal")["0"]
    exact = exact_block(model, "0", batches[0], LOSSES["mse"].of_example)
    assert relative_error(block.values.flatten(), exact.diagonal()) > 0.1
