"""Convolutions: blocks by definition over explicit patches, known answers, invariances."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from cases import (
    APPROXIMATIONS,
    BATCHNORMS,
    COORDINATES,
    LOSSES,
    MeanOverLocations,
    Network,
    Residual,
    SumOverLocations,
    dense_block,
    errors_to_exact,
    estimate,
    exact_blocks,
    with_head,
)
from oracle import (
    all_relabelings,
    average_over_relabelings,
    block_from_units,
    conv_patches,
    dense,
    diagonal_from_units,
    exact_block,
    exact_block_of_loader,
    pair_terms,
    relative_error,
    strata_terms,
    units_of,
    weight_layers,
    within_groups,
)

# torch's advice on speed is no error.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

EXACT = 1e-10
DIFFERENT = 1e-3
MODES = [
    {"coordinates": coordinates, "statistics": statistics}
    for coordinates in COORDINATES
    for statistics in ("batch", "running")
]

# Every convolution with the shape of one example.
CONVOLUTIONS = {
    "1d": (partial(nn.Conv1d, 2, 3, 3), (2, 6)),
    "1d stride, zeros, no bias": (
        partial(nn.Conv1d, 2, 3, 3, stride=2, padding=2, bias=False),
        (2, 6),
    ),
    "1d circular, dilation": (
        partial(nn.Conv1d, 2, 3, 3, padding=2, dilation=2, padding_mode="circular"),
        (2, 5),
    ),
    "1d reflect": (partial(nn.Conv1d, 2, 3, 4, padding=3, padding_mode="reflect"), (2, 5)),
    "1d replicate, stride": (
        partial(nn.Conv1d, 2, 3, 3, stride=2, padding=2, padding_mode="replicate"),
        (2, 4),
    ),
    "1d same, even kernel": (partial(nn.Conv1d, 2, 3, 4, padding="same"), (2, 5)),
    "1d groups": (partial(nn.Conv1d, 4, 6, 3, groups=2), (4, 5)),
    "2d": (partial(nn.Conv2d, 2, 3, 3), (2, 5, 4)),
    "2d no bias": (partial(nn.Conv2d, 2, 3, (1, 2), bias=False), (2, 3, 4)),
    "2d zeros": (partial(nn.Conv2d, 2, 3, 3, padding=1), (2, 3, 4)),
    "2d stride, uneven": (
        partial(nn.Conv2d, 2, 3, (2, 3), stride=(2, 1), padding=(1, 2)),
        (2, 5, 3),
    ),
    "2d stride leaves a rest": (partial(nn.Conv2d, 2, 3, 2, stride=3), (2, 6, 7)),
    "2d circular": (partial(nn.Conv2d, 2, 3, 3, padding=1, padding_mode="circular"), (2, 3, 4)),
    "2d reflect": (
        partial(nn.Conv2d, 2, 3, 3, padding=(1, 2), padding_mode="reflect"),
        (2, 3, 4),
    ),
    "2d replicate": (
        partial(nn.Conv2d, 2, 3, 3, padding=(2, 1), stride=2, padding_mode="replicate"),
        (2, 3, 4),
    ),
    "2d valid": (partial(nn.Conv2d, 2, 3, 2, padding="valid"), (2, 3, 4)),
    "2d same, even kernel": (partial(nn.Conv2d, 2, 3, (2, 4), padding="same"), (2, 4, 4)),
    "2d same, circular, even kernel": (
        partial(nn.Conv2d, 2, 3, (4, 2), padding="same", padding_mode="circular"),
        (2, 4, 3),
    ),
    "2d same, reflect, dilation": (
        partial(nn.Conv2d, 2, 3, 2, padding="same", dilation=(1, 3), padding_mode="reflect"),
        (2, 4, 4),
    ),
    "2d dilation": (partial(nn.Conv2d, 2, 3, 2, padding=1, dilation=(2, 3)), (2, 4, 5)),
    "2d groups": (partial(nn.Conv2d, 4, 6, 2, padding=1, groups=2), (4, 2, 3)),
    "2d groups, no bias": (
        partial(nn.Conv2d, 6, 3, 2, stride=2, groups=3, bias=False),
        (6, 4, 4),
    ),
    "2d groups, circular": (
        partial(nn.Conv2d, 4, 4, 3, padding=1, groups=2, padding_mode="circular"),
        (4, 3, 3),
    ),
    "2d depthwise": (partial(nn.Conv2d, 3, 3, 3, padding=1, groups=3), (3, 3, 4)),
    "2d depthwise, multiplier": (partial(nn.Conv2d, 2, 4, 2, dilation=2, groups=2), (2, 4, 4)),
    "2d 1x1": (partial(nn.Conv2d, 3, 4, 1), (3, 2, 3)),
    "2d 1x1, stride": (partial(nn.Conv2d, 3, 4, 1, stride=2, bias=False), (3, 3, 4)),
    "2d 1x1, padding": (partial(nn.Conv2d, 2, 3, 1, padding=1), (2, 2, 3)),
    "2d 1x1, groups": (partial(nn.Conv2d, 4, 6, 1, groups=2), (4, 2, 3)),
    "2d 1x1, depthwise": (partial(nn.Conv2d, 3, 3, 1, groups=3), (3, 2, 3)),
    "2d one output": (partial(nn.Conv2d, 2, 3, 3), (2, 3, 3)),
    "3d": (partial(nn.Conv3d, 2, 3, 2), (2, 3, 2, 3)),
    "3d stride, zeros, dilation": (
        partial(nn.Conv3d, 2, 3, 2, stride=(1, 2, 1), padding=(0, 1, 1), dilation=(2, 1, 2)),
        (2, 3, 2, 3),
    ),
    "3d same, circular": (
        partial(nn.Conv3d, 1, 2, (2, 3, 1), padding="same", padding_mode="circular"),
        (1, 2, 3, 2),
    ),
    "3d reflect": (
        partial(nn.Conv3d, 1, 2, (2, 3, 1), padding=(1, 2, 0), padding_mode="reflect"),
        (1, 2, 3, 2),
    ),
    "3d replicate, groups": (
        partial(nn.Conv3d, 2, 2, 2, padding=(2, 0, 1), groups=2, padding_mode="replicate"),
        (2, 1, 2, 2),
    ),
    "3d groups": (partial(nn.Conv3d, 2, 4, 2, padding=1, groups=2), (2, 2, 1, 2)),
}
SOME = ["1d groups", "2d zeros", "2d same, even kernel", "2d depthwise", "2d 1x1", "3d"]


def network_with(name: str, *, batchnorm: bool = True) -> Network:
    """The convolution, a BatchNorm if wanted, Tanh and a Linear on all of it."""
    make, shape = CONVOLUTIONS[name]

    def build() -> nn.Sequential:
        conv = make()
        norm = [BATCHNORMS[len(shape) - 1](conv.out_channels)] if batchnorm else []
        return with_head([conv, *norm, nn.Tanh()], shape)

    return Network(build, shape, (3,))


def _deep() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 3, 2, stride=2),
        nn.ReLU(),
        MeanOverLocations(),
        nn.Linear(3, 3),
    )


DEEP = Network(_deep, (2, 4, 4), (3,))


def assert_definition(network, batches, loss, device="cpu", **modes):
    """Every block of every approximation is made of the oracle's units."""
    model = network.make()
    of_example = LOSSES[loss].of_example
    units = {
        layer: [units_of(model, layer, batch, of_example, **modes) for batch in batches]
        for layer in weight_layers(model)
    }
    for approximation in APPROXIMATIONS:
        curvature = estimate(model, batches, loss, device, approximation=approximation, **modes)
        assert tuple(curvature) == tuple(units)
        for layer, block in curvature.items():
            expected = dense(strata_terms(approximation, units[layer]))
            assert block.shape[0] * block.shape[1] == len(expected)
            assert relative_error(dense_block(block), expected) < EXACT, (approximation, layer)
            assert relative_error(block.dense().cpu(), expected) < EXACT, (approximation, layer)


# --- the oracle itself --------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_times_weights_are_the_convolution(name):
    make, shape = CONVOLUTIONS[name]
    conv = make().double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    groups = conv.groups
    weight = conv.weight.reshape(groups, conv.out_channels // groups, -1)
    h = torch.einsum("gdk,ntgk->ngdt", weight, conv_patches(conv, x)).flatten(1, 2)
    if conv.bias is not None:
        h = h + conv.bias[:, None]
    assert relative_error(h, conv(x).flatten(2)) < 1e-12


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("name", SOME)
def test_the_two_forms_of_the_exact_block_agree(name, modes):
    network = network_with(name)
    model, (batch,) = network.make(), network.batches("cross_entropy", (3,))
    of_example = LOSSES["cross_entropy"].of_example
    units = units_of(model, "0", batch, of_example, **modes)
    block = exact_block(model, "0", batch, of_example, **modes)
    assert relative_error(block_from_units(units), block) < 1e-12


def test_the_exact_block_is_that_of_the_modules_own_parameters():
    network = network_with("2d groups")
    model, ((x, y),) = network.make().eval(), network.batches("mse", (3,))

    def outputs(weight, bias):
        return torch.func.functional_call(model, {"0.weight": weight, "0.bias": bias}, x)

    weight, bias = (p.detach() for p in model[0].parameters())
    by_weight, by_bias = torch.func.jacrev(outputs, (0, 1))(weight, bias)
    jacobian = torch.cat([by_weight.flatten(3), by_bias[..., None]], -1).flatten(2)
    expected = torch.einsum("nip,niq->pq", jacobian, jacobian) * 2 / 3 / len(x)
    block = exact_block(model, "0", (x, y), LOSSES["mse"].of_example, statistics="running")
    assert relative_error(block, within_groups(expected, 2)) < 1e-12
    assert relative_error(expected, block) > DIFFERENT


# --- definitions --------------------------------------------------------------------------


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_factors_are_the_strata_of_the_patches(name, modes, device):
    network = network_with(name)
    batches = network.batches("cross_entropy", (3, 2))
    assert_definition(network, batches, "cross_entropy", device, **modes)


@pytest.mark.parametrize("modes", MODES)
def test_factors_of_convolutions_upon_convolutions(modes, device):
    batches = DEEP.batches("cross_entropy", (3, 4))
    assert_definition(DEEP, batches, "cross_entropy", device, **modes)


@pytest.mark.parametrize("name", SOME)
def test_factors_without_batchnorm(name):
    network = network_with(name, batchnorm=False)
    assert_definition(network, network.batches("bce", (3, 1)), "bce", coordinates="merged")


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_factors_under_a_loss_on_every_pixel(loss):
    network = Network(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)
        ),
        (2, 3, 2),
        (2, 3, 2),
    )
    assert_definition(network, network.batches(loss, (3, 2)), loss, coordinates="merged")


def test_factors_of_images_of_several_sizes():
    small, large = (Network(_deep, shape, (3,)) for shape in ((2, 2, 3), (2, 4, 4)))
    batches = small.batches("mse", (3,)) + large.batches("mse", (2, 4))
    assert_definition(large, batches, "mse")


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_diagonal_is_made_of_each_examples_gradient(name, modes):
    network = network_with(name)
    model, batches = network.make(), network.batches("cross_entropy", (3,))
    block = estimate(model, batches, "cross_entropy", approximation="diagonal", **modes)["0"]
    of_example = LOSSES["cross_entropy"].of_example
    units = units_of(model, "0", batches[0], of_example, **modes)
    assert relative_error(block.values, diagonal_from_units(units)) < EXACT
    exact = exact_block(model, "0", batches[0], of_example, **modes).diagonal()
    error = relative_error(block.values.flatten(), exact)
    # In merged coordinates no BatchNorm comes after this layer.
    interacting = modes == {"coordinates": "raw", "statistics": "batch"}
    assert error > DIFFERENT if interacting else error < EXACT


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("name", SOME)
def test_pair_form_equals_strata_form(name, coordinates):
    network = network_with(name)
    model, (batch,) = network.make(), network.batches("cross_entropy", (3,))
    modes = {"coordinates": coordinates}
    block = estimate(model, [batch], "cross_entropy", approximation="xkfac", **modes)["0"]
    units = units_of(model, "0", batch, LOSSES["cross_entropy"].of_example, **modes)
    pairs = pair_terms(units)
    assert relative_error(dense_block(block), dense(pairs)) < EXACT
    assert relative_error(dense_block(block), dense(pairs[:1])) > DIFFERENT


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_factor_is_positive_semidefinite_and_symmetric(name, approximation):
    network = network_with(name)
    batches = network.batches("bce", (3, 2))
    curvature = estimate(network.make(), batches, "bce", approximation=approximation)
    for factor in itertools.chain.from_iterable(curvature["0"].terms):
        assert torch.equal(factor, factor.mT)
        values = torch.linalg.eigvalsh(factor)
        assert (values[..., 0] >= -1e-13 * values.abs().max()).all()


@pytest.mark.parametrize(
    ("approximation", "make", "shape"),
    [
        ("xkfac", partial(nn.Conv1d, 2, 2, 2, groups=2), (2, 3)),
        ("xkfac-nested", partial(nn.Conv1d, 2, 3, 2), (2, 4)),
        ("xkfac-nested", partial(nn.Conv2d, 2, 4, (2, 1), groups=2), (2, 2, 3)),
    ],
)
def test_blocks_average_over_the_relabelings_their_units_allow(approximation, make, shape):
    norm = BATCHNORMS[len(shape) - 1]

    def build() -> nn.Sequential:
        conv = make()
        return with_head([conv, norm(conv.out_channels), nn.Tanh()], shape)

    network = Network(build, shape, (3,))
    model, (batch,) = network.make(), network.batches("mse", (3,))
    block = dense_block(estimate(model, [batch], "mse", approximation=approximation)["0"])
    units = units_of(model, "0", batch, LOSSES["mse"].of_example)
    nested = approximation == "xkfac-nested"
    relabelings = all_relabelings(3, units.locations, nested=nested)
    average, _ = average_over_relabelings(units, relabelings)
    assert relative_error(block, average) < EXACT
    assert relative_error(block, block_from_units(units)) > 0.1


# --- known answers ------------------------------------------------------------------------

# Square roots over a whole batch are exact where every unit stands alone; strata add units up.
LABELS = {
    "kfac-expand": ("type2", "exact"),
    "kfac-reduce": ("type2", "exact"),
    "xkfac": ("exact",),
    "xkfac-nested": ("exact",),
}
EXPAND = ("kfac-expand", "xkfac", "xkfac-nested")
REDUCE = ("kfac-reduce", "xkfac-nested")
# A strided or padded convolution alone has nothing that follows it, so all of these will do.
SINGLE = [
    "1d stride, zeros, no bias",
    "2d zeros",
    "2d stride, uneven",
    "2d same, circular, even kernel",
    "2d dilation",
    "2d groups",
    "2d depthwise",
    "2d 1x1",
    "3d",
]


def single(name: str, *pooling: nn.Module) -> Network:
    make, shape = CONVOLUTIONS[name]
    model = nn.Sequential(make(), *pooling)
    outputs = tuple(model(torch.zeros(1, *shape)).shape[1:])
    return Network(lambda: nn.Sequential(make(), *pooling), shape, outputs)


def found_errors(network, loss, approximation, labels=None, sizes=(4, 1, 2), **options):
    model, batches = network.make(), network.batches(loss, sizes)
    modes = {"coordinates": "raw", "statistics": "running"}
    modes = {mode: options.pop(mode, default) for mode, default in modes.items()}
    options |= {
        "approximation": approximation,
        "exact": exact_blocks(model, batches, loss, **modes),
    }
    found = [
        errors_to_exact(model, batches, loss, labels=labels, **modes, **options)
        for labels in labels or LABELS[approximation]
    ]
    return {layer: [errors[layer] for errors in found] for layer in found[0]}


def assert_exact(errors, layers=None):
    for layer in layers or errors:
        assert max(errors[layer]) < EXACT, (layer, errors)


def assert_different(errors, layers=None):
    for layer in layers or errors:
        assert min(errors[layer]) > DIFFERENT, (layer, errors)


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", SINGLE)
def test_one_convolution_with_squared_error_on_every_pixel_is_exact_for_expand(name, approximation):
    for loss in ("mse", "mse-sum"):
        errors = found_errors(single(name), loss, approximation)
        (assert_exact if approximation in EXPAND else assert_different)(errors)


@pytest.mark.parametrize("pooling", [MeanOverLocations, SumOverLocations])
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", SINGLE)
def test_one_convolution_and_pooling_are_exact_for_reduce(name, approximation, pooling):
    for loss in ("mse", "mse-sum"):
        errors = found_errors(single(name, pooling()), loss, approximation)
        (assert_exact if approximation in REDUCE else assert_different)(errors)


def test_one_convolution_with_cross_entropy_on_every_pixel_is_not_exact():
    for approximation in APPROXIMATIONS:
        errors = found_errors(single("2d zeros"), "cross_entropy", approximation)
        assert_different(errors)


@pytest.mark.parametrize("approximation", EXPAND)
def test_two_convolutions_under_squared_error_on_every_pixel(approximation):
    network = Network(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)),
        (2, 3, 4),
        (2, 3, 4),
    )
    errors = found_errors(network, "mse", approximation)
    assert_different(errors, ["0"])
    assert_exact(errors, ["1"])


def _pixelwise() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 1),
        nn.BatchNorm2d(3),
        Residual(nn.Conv2d(3, 3, 1, groups=3)),
        nn.Conv2d(3, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 2, 1),
    )


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_a_linear_stack_over_pixels_with_batchnorm_in_eval_mode_is_exact_for_expand(
    approximation, coordinates
):
    network = Network(_pixelwise, (2, 2, 3), (2, 2, 3))
    errors = found_errors(network, "mse", approximation, coordinates=coordinates)
    (assert_exact if approximation in EXPAND else assert_different)(errors)


def _circular(
    padding_mode: str = "circular", pooling: type[nn.Module] = MeanOverLocations
) -> nn.Sequential:
    conv = partial(nn.Conv2d, padding_mode=padding_mode)
    return nn.Sequential(
        conv(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        conv(3, 4, (1, 3), padding=(0, 1), bias=False),
        nn.AvgPool2d(2),
        Residual(conv(4, 4, 3, padding=1, groups=2)),
        nn.BatchNorm2d(4),
        pooling(),
        nn.Linear(4, 3),
    )


CIRCULAR = Network(_circular, (2, 4, 6), (3,))
CONVS = ["0", "2", "4.layer"]


@pytest.mark.parametrize("pooling", [MeanOverLocations, SumOverLocations])
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_deep_linear_circular_convolutions_and_pooling_are_exact_for_reduce(
    approximation, coordinates, pooling
):
    network = Network(partial(_circular, pooling=pooling), (2, 4, 6), (3,))
    for loss in ("mse", "mse-sum"):
        errors = found_errors(network, loss, approximation, coordinates=coordinates)
        assert_exact(errors, ["7"])
        (assert_exact if approximation in REDUCE else assert_different)(errors, CONVS)


@pytest.mark.parametrize("approximation", REDUCE)
def test_zero_padding_breaks_all_but_the_last_convolution(approximation):
    network = Network(partial(_circular, "zeros"), (2, 4, 6), (3,))
    errors = found_errors(network, "mse", approximation)
    assert_different(errors, CONVS[:-1])
    assert_exact(errors, [CONVS[-1], "7"])


@pytest.mark.parametrize("approximation", REDUCE)
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_batchnorm_in_train_mode_breaks_the_convolutions_before_it(approximation, coordinates):
    options = {"coordinates": coordinates, "statistics": "batch", "sizes": (4, 3)}
    errors = found_errors(CIRCULAR, "mse", approximation, **options)
    # In merged coordinates the last BatchNorm belongs to nobody: it follows a sum.
    assert_different(errors, CONVS)
    assert_exact(errors, ["7"])


@pytest.mark.parametrize("approximation", REDUCE)
def test_cross_entropy_or_the_true_labels_break_all_layers(approximation):
    assert_different(found_errors(CIRCULAR, "cross_entropy", approximation))
    assert_different(found_errors(CIRCULAR, "mse", approximation, labels=["empirical"]))


def _to_one_pixel() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, (2, 3), groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_example_with_one_output_location_is_exact(loss, approximation):
    network = Network(_to_one_pixel, (2, 2, 3), (3,))
    model, batches = network.make(), network.batches(loss, (1,))
    live = exact_block(model, "0", batches[0], LOSSES[loss].of_example, statistics="running")
    assert live.norm() > 1e-3
    for coordinates in COORDINATES:
        options = {"labels": ["type2", "exact"], "coordinates": coordinates}
        errors = found_errors(network, loss, approximation, sizes=(1,), **options)
        assert_exact(errors)
        more = found_errors(network, loss, approximation, sizes=(3,), coordinates=coordinates)
        assert_different(more, ["0"])


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_one_example_with_several_output_locations_is_not_exact(approximation):
    network = network_with("2d zeros", batchnorm=False)
    errors = found_errors(network, "cross_entropy", approximation, sizes=(1,))
    assert_different(errors, ["0"])


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_the_last_layer_with_squared_error_is_exact_on_convolutional_features(statistics):
    for approximation in ("kfac-expand", "xkfac", "xkfac-nested"):
        errors = found_errors(
            DEEP, "mse", approximation, sizes=(4,), statistics=statistics, labels=["exact"]
        )
        assert_exact(errors, ["12"])
        assert_different(errors, ["0", "3", "6", "9"])


def bias_block(matrix, width):
    """Rows and columns of the bias, the last of each row of ``[D, K]``."""
    return matrix.reshape(width, -1, width, matrix.shape[0] // width)[:, -1, :, -1]


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("name", ["1d groups", "2d zeros", "2d stride, uneven", "3d"])
def test_bias_blocks(name, statistics):
    network = network_with(name)
    model, batches = network.make(), network.batches("cross_entropy", (4,))
    modes = {"coordinates": "merged", "statistics": statistics}
    exact = exact_block(model, "0", batches[0], LOSSES["cross_entropy"].of_example, **modes)
    width = model[0].out_channels
    errors = {}
    for approximation in APPROXIMATIONS:
        options = {"approximation": approximation, **modes}
        block = dense_block(estimate(model, batches, "cross_entropy", **options)["0"])
        errors[approximation] = relative_error(bias_block(block, width), bias_block(exact, width))
    # All units' gradients added up are what a shift feels, whoever interacts. In merged
    # coordinates no BatchNorm comes after this layer.
    for approximation in ("kfac-reduce", "xkfac", "xkfac-nested"):
        assert errors[approximation] < EXACT
    assert errors["kfac-expand"] > DIFFERENT


def test_bias_block_of_one_output_location_is_exact_for_expand():
    network = Network(_to_one_pixel, (2, 2, 3), (3,))
    model, batches = network.make(), network.batches("cross_entropy", (5, 2))
    modes = {"coordinates": "merged", "statistics": "running"}
    options = {"approximation": "kfac-expand", "labels": "type2", **modes}
    block = dense_block(estimate(model, batches, "cross_entropy", **options)["0"])
    of_example = LOSSES["cross_entropy"].of_example
    exact = exact_block_of_loader(model, "0", batches, of_example, **modes)
    assert relative_error(bias_block(block, 4), bias_block(exact, 4)) < EXACT
    assert relative_error(block, exact) > DIFFERENT


@pytest.mark.parametrize("name", ["1d groups", "2d zeros", "2d depthwise", "3d"])
def test_batchnorm_straight_after_leaves_the_covariance_of_the_patches(name):
    network = network_with(name)
    model, batches = network.make(), network.batches("cross_entropy", (4,))
    units = units_of(model, "0", batches[0], LOSSES["cross_entropy"].of_example)
    _, g = units.flat
    assert g.sum(1).norm() < 1e-12 * g.norm()
    expected = torch.block_diag(
        *(
            torch.kron(torch.einsum("sud,sue->de", g, g) / 4, torch.cov(a.mT))
            for a, g in (group.flat for group in units.by_group())
        )
    )
    for approximation in ("xkfac", "kfac-expand"):
        options = {"approximation": approximation}
        block = dense_block(estimate(model, batches, "cross_entropy", **options)["0"])
        error = relative_error(block, expected)
        assert error < EXACT if approximation == "xkfac" else error > 0.1


@pytest.mark.parametrize("name", ["2d zeros", "2d depthwise"])
def test_square_roots_give_reduce_exactly_without_interaction(name, generator):
    network = network_with(name)
    model, batches = network.make(), network.batches("cross_entropy", (4, 3))
    for approximation in ("kfac-reduce", "kfac-expand"):
        for statistics in ("running", "batch"):
            options = {"approximation": approximation, "statistics": statistics}
            exact = estimate(model, batches, "cross_entropy", **options)["0"]
            options |= {"labels": "type2", "generator": generator}
            roots = estimate(model, batches, "cross_entropy", **options)["0"]
            error = relative_error(dense_block(roots), dense_block(exact))
            assert error < 1e-12 if statistics == "running" else error > DIFFERENT


# --- invariances --------------------------------------------------------------------------

convolutions = st.sampled_from(sorted(CONVOLUTIONS))
approximations = st.sampled_from(APPROXIMATIONS)
modes_of_pass = st.sampled_from(MODES)
seeds = st.integers(0, 2**16)
property_test = settings(max_examples=25, deadline=None, derandomize=True)


def close(first, second, tolerance=EXACT):
    """Whether two curvatures have the same layers and the same blocks."""
    return tuple(first) == tuple(second) and all(
        relative_error(dense_block(first[layer]), dense_block(second[layer])) < tolerance
        for layer in first
    )


@property_test
@given(convolutions, approximations, modes_of_pass, seeds, st.permutations(range(4)))
def test_order_of_examples(name, approximation, modes, seed, order):
    network = network_with(name)
    model, ((x, y),) = network.make(seed), network.batches("cross_entropy", (4,), seed)
    options = {"approximation": approximation, **modes}
    plain = estimate(model, [(x, y)], "cross_entropy", **options)
    assert close(estimate(model, [(x[order], y[order])], "cross_entropy", **options), plain)


@property_test
@given(convolutions, st.sampled_from(COORDINATES), seeds, st.integers(1, 5), st.booleans())
def test_splitting_a_batch_whose_examples_do_not_interact(name, coordinates, seed, at, expand):
    network = network_with(name)
    model, ((x, y),) = network.make(seed), network.batches("mse", (6,), seed)
    options = {"coordinates": coordinates, "statistics": "running"}
    options["approximation"] = "kfac-expand" if expand else "kfac-reduce"
    whole = estimate(model, [(x, y)], "mse", **options)
    pieces = list(zip(x.split([at, 6 - at]), y.split([at, 6 - at]), strict=True))
    assert close(estimate(model, pieces, "mse", **options), whole)


@pytest.mark.parametrize("approximation", ["kfac-expand", "xkfac", "xkfac-nested"])
def test_splitting_a_batch_that_interacts_does_change_it(approximation):
    network = network_with("2d zeros")
    model, ((x, y),) = network.make(), network.batches("mse", (6,))
    pieces = list(zip(x.split(3), y.split(3), strict=True))
    whole = estimate(model, [(x, y)], "mse", approximation=approximation)["0"]
    split = estimate(model, pieces, "mse", approximation=approximation)["0"]
    assert relative_error(dense_block(split), dense_block(whole)) > DIFFERENT


@property_test
@given(convolutions, approximations, modes_of_pass, seeds, st.lists(st.integers(2, 4), min_size=2))
def test_merging_two_passes_is_one_pass_over_both(name, approximation, modes, seed, sizes):
    sizes = tuple(sizes[:3])
    network = network_with(name)
    model, batches = network.make(seed), network.batches("cross_entropy", sizes, seed)
    options = {"approximation": approximation, **modes}
    both, first, rest = (
        estimate(model, part, "cross_entropy", **options)
        for part in (batches, batches[:1], batches[1:])
    )
    for merged in (first.merge(rest), rest.merge(first)):
        assert close(merged, both, 1e-12)
        assert merged.examples == sum(sizes)


def test_merging_a_pass_over_a_single_example():
    network = network_with("2d one output", batchnorm=False)
    model, batches = network.make(), network.batches("mse", (1, 3, 2))
    for approximation in APPROXIMATIONS:
        both, first, rest = (
            estimate(model, part, "mse", approximation=approximation)
            for part in (batches, batches[:1], batches[1:])
        )
        assert close(first.merge(rest), both, 1e-12)
        assert close(rest.merge(first), both, 1e-12)


@property_test
@given(st.sampled_from(APPROXIMATIONS), seeds, st.integers(0, 2), st.integers(0, 3))
def test_shifting_images_around_a_circle(approximation, seed, down, right):
    def build() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Conv2d(3, 3, 3, padding="same", groups=3, padding_mode="circular"),
            nn.Tanh(),
            MeanOverLocations(),
            nn.Linear(3, 3),
        )

    network = Network(build, (2, 3, 4), (3,))
    model, ((x, y),) = network.make(seed), network.batches("mse", (3,), seed)
    options = {"approximation": approximation, "coordinates": "merged"}
    plain = estimate(model, [(x, y)], "mse", **options)
    moved = estimate(model, [(x.roll((down, right), (2, 3)), y)], "mse", **options)
    assert close(moved, plain)


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("approximation", [*APPROXIMATIONS, "diagonal"])
def test_memory_layout_of_images_and_weights(approximation, modes):
    model, ((x, y),) = DEEP.make(), DEEP.batches("mse", (3,))
    options = {"approximation": approximation, **modes}
    plain = estimate(model, [(x, y)], "mse", **options)
    strided = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    channels_last = x.to(memory_format=torch.channels_last)
    for other in (strided, channels_last, x.transpose(0, 3).contiguous().transpose(0, 3)):
        assert not other.is_contiguous()
        assert same_blocks(estimate(model, [(other, y)], "mse", **options), plain)
    model = model.to(memory_format=torch.channels_last)
    assert same_blocks(estimate(model, [(channels_last, y)], "mse", **options), plain)


def same_blocks(first, second, tolerance=1e-12):
    """Whether all blocks agree, diagonal ones too."""
    return all(
        relative_error(first[layer].diagonal(), second[layer].diagonal()) < tolerance
        and relative_error(*(c[layer].product(probe(c[layer])) for c in (first, second)))
        < tolerance
        for layer in second
    )


def probe(block):
    """Some matrix the block acts on."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(block.shape, generator=generator, dtype=torch.float64).to(block.dtype)


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_single_precision_is_close_to_double(name, approximation, device):
    network = network_with(name)
    model, batches = network.make(), network.batches("cross_entropy", (4, 3))
    options = {"approximation": approximation, "coordinates": "merged"}
    double = estimate(model, batches, "cross_entropy", **options)
    batches = [(x.float().contiguous(memory_format=_format(x)), y) for x, y in batches]
    single = estimate(model.float(), batches, "cross_entropy", device, **options)
    assert single["0"].dtype == torch.float32
    for (a, g), (expected_a, expected_g) in zip(single["0"].terms, double["0"].terms, strict=True):
        assert relative_error(a.cpu(), expected_a) < 1e-5
        assert (g.cpu() - expected_g).norm() < 1e-5 * double["0"].terms[0][1].norm()


def _format(x):
    """channels_last for images, which is how they often come."""
    return torch.channels_last if x.ndim == 4 else torch.contiguous_format


def test_patches_far_from_zero_keep_their_spread_in_single_precision():
    network = Network(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), MeanOverLocations()), (2, 5, 5), (3,)
    )
    model, ((x, y),) = network.make(), network.batches("mse", (8,))
    x = (x - x.mean()).float() + 1000
    for approximation in ("xkfac", "xkfac-nested"):
        options = {"approximation": approximation}
        double = estimate(model.double(), [(x.double(), y)], "mse", **options)["0"]
        single = estimate(model.float(), [(x, y.float())], "mse", **options)["0"]
        for (a, _), (expected, _) in zip(single.terms, double.terms, strict=True):
            assert relative_error(a, expected) < 1e-5


def test_activations_that_overwrite_their_input():
    model, batches = DEEP.make(), DEEP.batches("cross_entropy", (4,))
    overwriting = DEEP.make()
    for module in overwriting.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    for coordinates in COORDINATES:
        plain, found = (
            estimate(m, batches, "cross_entropy", coordinates=coordinates)
            for m in (model, overwriting)
        )
        assert close(found, plain, 1e-13)


def test_a_convolution_that_pads_its_input_itself():
    class SamePadded(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)

    network = network_with("2d")
    model, ((x, y),) = network.make(), network.batches("mse", (4,))
    own = SamePadded(2, 3, 3).double()
    own.load_state_dict(model[0].state_dict())
    padded = nn.Sequential(own, *model[1:])
    for modes in MODES:
        expected = estimate(model, [(F.pad(x, (0, 1, 0, 1))[..., :5, :4], y)], "mse", **modes)
        found = estimate(padded, [(x[..., :4, :3], y)], "mse", **modes)
        reference = estimate(model, [(F.pad(x[..., :4, :3], (0, 1, 0, 1)), y)], "mse", **modes)
        assert close(found, reference)
        assert not close(found, expected, DIFFERENT)


def test_a_convolution_over_one_pixel_is_a_linear_layer():
    conv = Network(
        lambda: nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()),
        (4, 1, 1),
        (3,),
    )
    model, ((x, y),) = conv.make(), conv.batches("mse", (5,))
    linear = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()).double()
    state = {key: value.squeeze() for key, value in model.state_dict().items()}
    linear.load_state_dict(state)
    for approximation, modes in itertools.product(APPROXIMATIONS, MODES):
        options = {"approximation": approximation, **modes}
        found = estimate(model, [(x, y)], "mse", **options)
        expected = estimate(linear, [(x.flatten(1), y)], "mse", **options)
        assert close(found, expected, 1e-12)


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_groups_are_separate_convolutions(approximation):
    class Apart(nn.Module):
        def __init__(self, grouped):
            super().__init__()
            self.parts = nn.ModuleList(nn.Conv2d(2, 3, 2).double() for _ in range(2))
            for i, part in enumerate(self.parts):
                part.weight.data.copy_(grouped.weight[3 * i : 3 * i + 3])
                part.bias.data.copy_(grouped.bias[3 * i : 3 * i + 3])

        def forward(self, x):
            return torch.cat(
                [part(x[:, 2 * i : 2 * i + 2]) for i, part in enumerate(self.parts)], 1
            )

    def build() -> nn.Sequential:
        return with_head([nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.BatchNorm2d(6)], (4, 3, 3))

    network = Network(build, (4, 3, 3), (3,))
    model, batches = network.make(), network.batches("mse", (4,))
    apart = nn.Sequential(Apart(model[0]), *model[1:])
    grouped = estimate(model, batches, "mse", approximation=approximation)["0"]
    separate = estimate(apart, batches, "mse", approximation=approximation)
    expected = torch.block_diag(*(dense_block(separate[f"0.parts.{i}"]) for i in range(2)))
    assert relative_error(dense_block(grouped), expected) < 1e-12


def test_synchronised_batchnorm_in_one_process_is_batchnorm():
    model, batches = DEEP.make(), DEEP.batches("mse", (4,))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(DEEP.make())
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronised)
    for modes in MODES:
        expected = estimate(model, batches, "mse", **modes)
        assert close(estimate(synchronised, batches, "mse", **modes), expected, 1e-13)
