"""Transposed convolutions: blocks by definition over what reaches each output location."""

import copy
import itertools
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import ekfac_rs as ek
from cases import (
    APPROXIMATIONS,
    BATCHNORMS,
    COORDINATES,
    LOSSES,
    MeanOverLocations,
    Network,
    SumOverLocations,
    dense_block,
    errors_to_exact,
    estimate,
    with_head,
)
from ekfac_rs.errors import ShapeError
from ekfac_rs.layers import find_layers
from ekfac_rs.layers.base import AffineCall, kind_of
from oracle import (
    block_from_units,
    dense,
    diagonal_from_units,
    exact_block,
    pair_terms,
    relative_error,
    strata_terms,
    transposed_patches,
    units_of,
)

EXACT = 1e-10
DIFFERENT = 1e-3
MODES = [
    {"coordinates": coordinates, "statistics": statistics}
    for coordinates in COORDINATES
    for statistics in ("batch", "running")
]

# Every transposed convolution with the shape of one example.
TRANSPOSED = {
    "1d": (partial(nn.ConvTranspose1d, 2, 3, 3), (2, 3)),
    "1d stride, padding, no bias": (
        partial(nn.ConvTranspose1d, 2, 3, 3, stride=2, padding=1, bias=False),
        (2, 3),
    ),
    "1d output padding": (
        partial(nn.ConvTranspose1d, 2, 3, 2, stride=3, output_padding=2),
        (2, 2),
    ),
    "1d dilation": (partial(nn.ConvTranspose1d, 2, 3, 2, dilation=3, padding=1), (2, 2)),
    "1d groups": (partial(nn.ConvTranspose1d, 4, 6, 3, groups=2), (4, 2)),
    "1d more padding than the kernel reaches": (
        partial(nn.ConvTranspose1d, 2, 3, 2, padding=2),
        (2, 5),
    ),
    "1d stride over the kernel": (partial(nn.ConvTranspose1d, 2, 3, 1, stride=3), (2, 3)),
    "2d": (partial(nn.ConvTranspose2d, 2, 3, 2), (2, 2, 3)),
    "2d stride, uneven": (
        partial(
            nn.ConvTranspose2d, 2, 3, (2, 3), stride=(2, 1), padding=(1, 0), output_padding=(1, 0)
        ),
        (2, 2, 2),
    ),
    "2d groups, no bias": (
        partial(nn.ConvTranspose2d, 4, 2, 2, stride=2, groups=2, bias=False),
        (4, 2, 2),
    ),
    "2d depthwise": (partial(nn.ConvTranspose2d, 3, 3, 2, groups=3), (3, 2, 2)),
    "2d depthwise, multiplier": (
        partial(nn.ConvTranspose2d, 2, 4, 2, stride=2, groups=2),
        (2, 2, 2),
    ),
    "2d 1x1": (partial(nn.ConvTranspose2d, 3, 4, 1), (3, 2, 2)),
    "2d one output": (partial(nn.ConvTranspose2d, 2, 3, 1), (2, 1, 1)),
    "3d": (partial(nn.ConvTranspose3d, 2, 3, 2), (2, 1, 2, 2)),
    "3d everything": (
        partial(
            nn.ConvTranspose3d,
            *(2, 4, (2, 1, 2)),
            stride=(1, 2, 1),
            padding=(1, 0, 1),
            output_padding=(0, 1, 0),
            groups=2,
            dilation=(1, 1, 2),
        ),
        (2, 2, 1, 2),
    ),
}
SOME = ["1d stride, padding, no bias", "1d groups", "2d stride, uneven", "2d depthwise", "3d"]


def network_with(name: str, *, batchnorm: bool = True) -> Network:
    """The layer, a BatchNorm if wanted, Tanh and a Linear on all of it."""
    make, shape = TRANSPOSED[name]

    def build() -> nn.Sequential:
        conv = make()
        norm = [BATCHNORMS[len(shape) - 1](conv.out_channels)] if batchnorm else []
        return with_head([conv, *norm, nn.Tanh()], shape)

    return Network(build, shape, (3,))


def _decoder() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 2, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 3, padding=1, groups=1),
        nn.ReLU(),
        nn.BatchNorm2d(3),
        MeanOverLocations(),
        nn.Linear(3, 3),
    )


DECODER = Network(_decoder, (2, 3, 3), (3,))
LAYERS = ("0", "3", "6")


def assert_definition(network, batches, loss, layers, device="cpu", **modes):
    """Every block of every approximation is made of the oracle's units."""
    model = network.make()
    of_example = LOSSES[loss].of_example
    units = {
        layer: [units_of(model, layer, batch, of_example, **modes) for batch in batches]
        for layer in layers
    }
    for approximation in APPROXIMATIONS:
        curvature = estimate(model, batches, loss, device, approximation=approximation, **modes)
        for layer in layers:
            expected = dense(strata_terms(approximation, units[layer]))
            assert relative_error(dense_block(curvature[layer]), expected) < EXACT, approximation
            assert relative_error(curvature[layer].dense().cpu(), expected) < EXACT, approximation


# --- the oracle itself, and the matrix of weights -----------------------------------------


@pytest.mark.parametrize("name", TRANSPOSED)
def test_patches_times_the_matrix_of_weights_are_the_layer(name):
    make, shape = TRANSPOSED[name]
    conv = make().double()
    [layer] = find_layers(conv)
    assert layer.shape("raw")[0] == conv.out_channels
    weight = layer.weight().reshape(conv.groups, conv.out_channels // conv.groups, -1)
    x = torch.randn(2, *shape, dtype=torch.float64)
    h = torch.einsum("gdk,ntgk->ngdt", weight, transposed_patches(conv, x)).flatten(1, 2)
    if conv.bias is not None:
        h = h + conv.bias[:, None]
    assert relative_error(h, conv(x).flatten(2)) < 1e-12
    assert torch.equal(layer.as_stored(layer.weight()), conv.weight)


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("name", SOME)
def test_the_two_forms_of_the_exact_block_agree(name, modes):
    network = network_with(name)
    model, (batch,) = network.make(), network.batches("cross_entropy", (3,))
    of_example = LOSSES["cross_entropy"].of_example
    units = units_of(model, "0", batch, of_example, **modes)
    block = exact_block(model, "0", batch, of_example, **modes)
    assert relative_error(block_from_units(units), block) < 1e-12


# --- definitions --------------------------------------------------------------------------


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("name", TRANSPOSED)
def test_factors_are_the_strata_of_what_reaches_each_location(name, modes, device):
    network = network_with(name)
    batches = network.batches("cross_entropy", (3, 2))
    assert_definition(network, batches, "cross_entropy", ["0"], device, **modes)


@pytest.mark.parametrize("modes", MODES)
def test_factors_in_a_decoder(modes):
    batches = DECODER.batches("cross_entropy", (3, 4))
    assert_definition(DECODER, batches, "cross_entropy", sorted(LAYERS), **modes)


@pytest.mark.parametrize("name", SOME)
def test_factors_without_batchnorm(name):
    network = network_with(name, batchnorm=False)
    batches = network.batches("bce", (3, 1))
    assert_definition(network, batches, "bce", ["0"], coordinates="merged")


def test_factors_of_an_output_whose_size_was_asked_for():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.ConvTranspose1d(2, 3, 3, stride=2)

        def forward(self, x):
            return self.conv(x, output_size=[8])

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1)

        def forward(self, x):
            return self.conv(x)

    sized, padded = (
        Network(
            partial(lambda kind: with_head([kind(), nn.BatchNorm1d(3), nn.Tanh()], (2, 3)), kind),
            (2, 3),
            (3,),
        )
        for kind in (Sized, Padded)
    )
    batches = sized.batches("mse", (3,))
    found, expected = (
        estimate(network.make(), batches, "mse")["0.conv"] for network in (sized, padded)
    )
    assert relative_error(found.dense(), expected.dense()) < 1e-12


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("name", TRANSPOSED)
def test_the_diagonal_is_made_of_each_examples_gradient(name, modes):
    network = network_with(name)
    model, batches = network.make(), network.batches("cross_entropy", (3,))
    block = estimate(model, batches, "cross_entropy", approximation="diagonal", **modes)["0"]
    units = units_of(model, "0", batches[0], LOSSES["cross_entropy"].of_example, **modes)
    assert relative_error(block.values, diagonal_from_units(units)) < EXACT


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("name", SOME)
def test_pair_form_equals_strata_form(name, coordinates):
    network = network_with(name)
    model, (batch,) = network.make(), network.batches("cross_entropy", (3,))
    modes = {"coordinates": coordinates}
    block = estimate(model, [batch], "cross_entropy", approximation="xkfac", **modes)["0"]
    units = units_of(model, "0", batch, LOSSES["cross_entropy"].of_example, **modes)
    assert relative_error(dense_block(block), dense(pair_terms(units))) < EXACT


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", SOME)
def test_single_precision_is_close_to_double(name, approximation, device):
    network = network_with(name)
    model, batches = network.make(), network.batches("cross_entropy", (4, 3))
    options = {"approximation": approximation, "coordinates": "merged"}
    double = estimate(model, batches, "cross_entropy", **options)["0"]
    single = [(x.float(), y) for x, y in batches]
    found = estimate(model.float(), single, "cross_entropy", device, **options)["0"]
    assert relative_error(dense_block(found), dense_block(double)) < 1e-5


# --- known answers ------------------------------------------------------------------------

EXPAND = ("kfac-expand", "xkfac", "xkfac-nested")
REDUCE = ("kfac-reduce", "xkfac-nested")
PIXELS = Network(
    lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2, padding=1)), (2, 3, 2), (3, 4, 2)
)
POOLED = {
    pool: Network(
        partial(lambda pool: nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2), pool()), pool),
        (2, 2, 3),
        (3,),
    )
    for pool in (MeanOverLocations, SumOverLocations)
}


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_one_layer_with_squared_error_on_every_pixel_is_exact_for_expand(approximation):
    batches = PIXELS.batches("mse", (4, 1, 2))
    errors = errors_to_exact(PIXELS.make(), batches, "mse", approximation=approximation)
    assert errors["0"] < EXACT if approximation in EXPAND else errors["0"] > DIFFERENT


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("pool", POOLED)
def test_one_layer_with_pooling_and_squared_error_is_exact_for_reduce(pool, approximation):
    network = POOLED[pool]
    batches = network.batches("mse", (4, 1, 2))
    errors = errors_to_exact(network.make(), batches, "mse", approximation=approximation)
    assert errors["0"] < EXACT if approximation in REDUCE else errors["0"] > DIFFERENT


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_one_location_is_a_linear_layer(approximation):
    conv = nn.ConvTranspose2d(3, 4, 1).double()
    linear = nn.Linear(3, 4).double()
    linear.weight.data.copy_(conv.weight[:, :, 0, 0].T)
    linear.bias.data.copy_(conv.bias)
    x = torch.randn(5, 3, dtype=torch.float64)
    tail = nn.Sequential(nn.Tanh(), nn.Linear(4, 3)).double()
    as_image = nn.Sequential(conv, nn.Flatten(), *tail)
    y = torch.arange(5) % 3
    options = {"approximation": approximation}
    found = estimate(as_image, [(x[..., None, None], y)], "cross_entropy", **options)["0"]
    expected = estimate(nn.Sequential(linear, *tail), [(x, y)], "cross_entropy", **options)["0"]
    assert relative_error(found.dense(), expected.dense()) < 1e-12


@pytest.mark.parametrize("approximation", [*APPROXIMATIONS, "diagonal"])
def test_with_stride_1_it_is_the_convolution_with_the_kernel_backwards(approximation):
    transposed = nn.ConvTranspose2d(2, 3, (2, 3), padding=(0, 1)).double()
    conv = nn.Conv2d(2, 3, (2, 3), padding=(1, 1)).double()
    conv.weight.data.copy_(transposed.weight.transpose(0, 1).flip(2, 3))
    conv.bias.data.copy_(transposed.bias)
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    assert relative_error(conv(x), transposed(x)) < 1e-12
    head = nn.Sequential(nn.Tanh(), MeanOverLocations())
    batches = [(x, torch.arange(4) % 3)]
    options = {"approximation": approximation}
    found, expected = (
        estimate(nn.Sequential(layer, *head), batches, "cross_entropy", **options)["0"]
        for layer in (transposed, conv)
    )
    assert relative_error(found.dense(), expected.dense()) < 1e-12


# --- geometry -----------------------------------------------------------------------------


@st.composite
def geometries(draw):
    """A layer, and an input, of any geometry that torch accepts."""
    dimensions = draw(st.integers(1, 3))
    largest = (7, 4, 2)[dimensions - 1]

    def per_dimension(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(dimensions)]

    size, kernel, stride = per_dimension(1, largest), per_dimension(1, 3), per_dimension(1, 3)
    dilation, padding = per_dimension(1, 3), per_dimension(0, 3)
    extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    outputs = [
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, k, s, d, p, e in zip(size, kernel, stride, dilation, padding, extra, strict=True)
    ]
    assume(min(outputs) >= 1)
    groups, bias = draw(st.integers(1, 2)), draw(st.booleans())
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    conv = kind(
        *(2 * groups, groups, kernel, stride, padding, extra),
        *(groups, bias, dilation),
    ).double()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(2, 2 * groups, *size, generator=generator, dtype=torch.float64)
    return conv, x


def units_by_autograd(conv: nn.Module, x: Tensor) -> Tensor:
    """Inputs of all units, ``[U, groups, K]``: derivatives of outputs by the matrix of weights."""
    [layer] = find_layers(conv)
    bias = layer.bias() is not None

    def outputs(matrix: Tensor) -> Tensor:
        weights = {"weight": layer.as_stored(matrix[:, :-1] if bias else matrix)}
        if bias:
            weights["bias"] = matrix[:, -1]
        return torch.func.functional_call(conv, weights, x).flatten(2)

    matrix = layer.raw_weight().detach()
    jacobian = torch.func.jacrev(outputs)(matrix)  # [N, D, T, D, K], here with one row a group
    rows = torch.arange(len(matrix))
    return (
        jacobian[:, rows, :, rows].transpose(0, 1).flatten(0, 0).permute(0, 2, 1, 3).flatten(0, 1)
    )


@settings(max_examples=60, deadline=None)
@given(geometries())
def test_the_gram_of_units_is_autograds_for_any_geometry(case):
    conv, x = case
    [layer] = find_layers(conv)
    names = kind_of(conv).functions[F.conv_transpose1d]
    values = (
        *(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.output_padding),
        *(conv.groups, conv.dilation),
    )
    arguments = dict(zip(names, values, strict=True))
    units = layer.units(AffineCall(conv, F.conv_transpose1d, arguments))
    shape_A, _ = layer.factor_shapes("raw")
    gram = torch.zeros(shape_A, dtype=torch.float64)
    units.accumulate([gram], "kfac-expand", conv.bias is not None, "ieee", None)
    gram = gram.reshape(conv.groups, *gram.shape[-2:])
    a = units_by_autograd(conv, x)
    expected = torch.einsum("ugk,ugl->gkl", a, a) * len(x) / len(a)
    torch.testing.assert_close(gram.tril(), expected.tril(), rtol=1e-10, atol=1e-12)


# --- merging, penalties, files, what is refused -------------------------------------------


@pytest.mark.parametrize("example", [None, "given"], ids=["traced", "observed"])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_batchnorm_after_it_is_paired_and_merged_and_put_back(name, example):
    network = network_with(name)
    model, ((x, _),) = network.make().eval(), network.batches("mse", (5,))
    [first, _] = find_layers(model, example=x if example else None)
    assert (first.name, first.batchnorm_name) == ("0", "1")
    before = model(x)
    for weights in ("kept", "merged"):
        changed = copy.deepcopy(model)
        ek.reparameterize(changed, [x], weights=weights)
        assert relative_error(changed(x), before) < 1e-10
        assert not torch.equal(changed[1].running_mean, model[1].running_mean)
    ek.merge_batchnorm(model, example=x if example else None)
    assert relative_error(model(x), before) < 1e-12
    assert model[1].running_var.eq(1.0 - model[1].eps).all()


@pytest.mark.parametrize("name", SOME)
def test_the_merged_weights_make_the_merged_function(name):
    network = network_with(name)
    model, ((x, _),) = network.make().eval(), network.batches("mse", (3,))
    [layer, _] = find_layers(model)
    merged = ek.merged_weights(model)["0"]
    plain = copy.deepcopy(model[0])
    plain.weight.data.copy_(layer.as_stored(merged[:, :-1]))
    plain.bias = nn.Parameter(merged[:, -1].clone())
    assert relative_error(plain(x), model[1](model[0](x))) < 1e-12


@pytest.mark.parametrize("approximation", [*APPROXIMATIONS, "diagonal"])
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_penalty_is_the_quadratic_form_of_the_block(training, coordinates, approximation):
    model, batches = DECODER.make(), DECODER.batches("cross_entropy", (6,))
    options = {"approximation": approximation, "coordinates": coordinates}
    curvature = ek.estimate_curvature(model, batches, **options)
    anchor_of = ek.merged_weights if coordinates == "merged" else ek.raw_weights
    penalty = ek.QuadraticPenalty(model, curvature, anchor_of(model), damping=0.1, scale=2.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.train(training)(batches[0][0])
    deviations = penalty.deviations()
    expected = sum(
        curvature[name].quadratic(D) + 0.05 * D.detach().square().sum().item()
        for name, D in deviations.items()
    )
    value = penalty()
    assert value.item() == pytest.approx(expected, rel=1e-9)
    value.backward()
    assert all(model.get_submodule(name).weight.grad.abs().sum() > 0 for name in LAYERS)


@pytest.mark.parametrize("storage", ["full", "triangle", "half"])
def test_files_keep_it(storage, tmp_path):
    model, batches = DECODER.make(), DECODER.batches("cross_entropy", (6,))
    curvature = ek.estimate_curvature(model, batches)
    curvature.save(tmp_path / "file", storage=storage)
    loaded = ek.Curvature.load(tmp_path / "file")
    for name, block in curvature.items():
        error = relative_error(loaded[name].dense(), block.dense())
        assert error < (1e-3 if storage == "half" else 1e-15)


def test_it_is_described_with_its_groups_and_its_batchnorm():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), nn.BatchNorm2d(6))
    words = [p.block for p in ek.describe(model).parameters]
    assert words == ["Kronecker, 2 groups of 3 x 9, merged with 1"] * 3


def test_order_and_merging_of_passes():
    network = network_with("2d stride, uneven")
    model, batches = network.make(), network.batches("cross_entropy", (4, 2, 3))
    for approximation in APPROXIMATIONS:
        parts = (batches, batches[:1], batches[1:])
        options = {"approximation": approximation, "coordinates": "merged"}
        whole, *rest = (estimate(model, p, "cross_entropy", **options) for p in parts)
        merged = dense_block(rest[0].merge(rest[1])["0"])
        assert relative_error(merged, dense_block(whole["0"])) < 1e-12


def test_an_image_without_examples_is_refused():
    model = nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.Flatten(0), nn.Unflatten(0, (2, -1)))
    with pytest.raises(ShapeError, match="'0'.*\\[N, C, L\\]"):
        estimate(model.double(), [(torch.randn(2, 3).double(), torch.zeros(2, 6).double())], "mse")


@pytest.mark.parametrize("change", ["groups", "bias"])
def test_another_call_than_its_own_is_refused(change):
    class Other(nn.ConvTranspose1d):
        def forward(self, x):
            bias = None if change == "bias" else self.bias
            return F.conv_transpose1d(x, self.weight, bias)

    model = nn.Sequential(Other(2, 2, 2))
    if change == "groups":
        model[0].groups = 2
    for example in (None, torch.randn(2, 2, 3)):
        with pytest.raises(ek.errors.UnsupportedLayerError, match=f"'0'.*{change}"):
            find_layers(model, example=example)


def test_factors_are_symmetric_and_positive_semidefinite():
    network = network_with("2d stride, uneven")
    curvature = estimate(network.make(), network.batches("bce", (3, 2)), "bce")
    for factor in itertools.chain.from_iterable(curvature["0"].terms):
        assert torch.equal(factor, factor.mT)
        assert torch.linalg.eigvalsh(factor)[0] >= -1e-13 * factor.abs().max()
