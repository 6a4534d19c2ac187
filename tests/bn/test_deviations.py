"""Merged weights of many layers at once, and moments of inputs, against autograd's own way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ekfac_rs import _core
from ekfac_rs._tensors import borrow
from ekfac_rs.batchnorm import Merging, deviations, merges_in_the_core, moments_of_all
from ekfac_rs.batchnorm.moments import on_host
from ekfac_rs.errors import DtypeError, OptionError, ShapeError
from ekfac_rs.layers import find_layers

KINDS = {
    "linear": lambda: (nn.Linear(5, 4), nn.BatchNorm1d(4)),
    "linear without a bias": lambda: (nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)),
    "one input": lambda: (nn.Linear(1, 3), nn.BatchNorm1d(3)),
    "nothing learnt by the BatchNorm": lambda: (
        nn.Linear(5, 4),
        nn.BatchNorm1d(4, affine=False, eps=0.3),
    ),
    "convolution": lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    "groups": lambda: (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)),
    "depthwise": lambda: (nn.Conv1d(4, 4, 2, groups=4), nn.BatchNorm1d(4)),
    "channels last": lambda: (
        nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        nn.BatchNorm2d(4),
    ),
    "more rows than a thread takes at a time": lambda: (nn.Linear(70, 900), nn.BatchNorm1d(900)),
}


def merging(kind: str, dtype: torch.dtype) -> Merging:
    """A layer with everything off its defaults."""
    torch.manual_seed(len(kind))
    layer, batchnorm = KINDS[kind]()
    model = nn.Sequential(layer, batchnorm).to(dtype)
    for parameter in batchnorm.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    [found] = find_layers(model, coordinates="merged")
    D, K = found.shape("merged")
    mean, variance, anchor = torch.randn(D), torch.rand(D) + 0.1, torch.randn(D, K)
    statistics = [x.to(dtype).requires_grad_() for x in (mean, variance)]
    return Merging(found, *statistics, anchor.to(dtype))


def parts(layer: Merging) -> list[Tensor]:
    return [*layer.layer.parameters("merged"), layer.mean, layer.variance]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("together", [[kind] for kind in KINDS] + [list(KINDS)])
def test_they_are_what_autograd_makes_of_them(together, dtype):
    layers = [merging(kind, dtype) for kind in together]
    assert all(merges_in_the_core(each.layer) for each in layers)
    got = deviations(layers)
    expected = [each.layer.merged_weight(each.mean, each.variance) - each.anchor for each in layers]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    for D, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(D, wanted, **tolerance)
    weights = [torch.randn_like(D) for D in got]
    every = [part for each in layers for part in parts(each)]
    sums = [sum((D * w).sum() for D, w in zip(of, weights, strict=True)) for of in (got, expected)]
    gradients = [torch.autograd.grad(total, every) for total in sums]
    for own, autograd_s in zip(*gradients, strict=True):
        scale = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {}
        torch.testing.assert_close(own, autograd_s, **scale)


def test_gradients_that_nobody_wants_are_not_made():
    first, second = merging("linear", torch.float64), merging("convolution", torch.float64)
    first.layer.module.weight.requires_grad_(False)
    used, unused = deviations([first, second])
    used.sum().backward()
    assert first.layer.module.weight.grad is None
    assert first.layer.batchnorm.weight.grad is not None
    assert all(part.grad is None for part in parts(second))
    assert unused.requires_grad


def test_constant_statistics_take_no_gradient():
    layer = merging("linear", torch.float64)
    layer = layer._replace(mean=layer.mean.detach(), variance=layer.variance.detach())
    deviations([layer])[0].square().sum().backward()
    assert layer.layer.module.weight.grad is not None


def test_a_shift_that_changes_afterwards_is_no_matter():
    layer = merging("linear", torch.float64)
    [D] = deviations([layer])
    with torch.no_grad():
        layer.layer.batchnorm.bias.add_(1.0)
    D.sum().backward()
    ones = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(layer.layer.batchnorm.bias.grad, ones)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.half(),
        lambda module: setattr(module, "weight", nn.Parameter(module.weight.double())),
    ],
    ids=["half precision", "two dtypes"],
)
def test_others_go_another_way(change):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    change(model[0])
    [layer] = find_layers(model, coordinates="merged")
    assert not merges_in_the_core(layer)
    [alone] = find_layers(nn.Sequential(nn.BatchNorm1d(2)), coordinates="merged")
    assert not merges_in_the_core(alone)


# --- moments of inputs ---------------------------------------------------------------------------

SHAPES = {
    "matrix": lambda: torch.randn(7, 5),
    "wide matrix": lambda: torch.randn(300, 517),
    "one channel": lambda: torch.randn(9, 1, 4),
    "images": lambda: torch.randn(6, 5, 4, 3),
    "channels last": lambda: torch.randn(6, 5, 4, 3).to(memory_format=torch.channels_last),
    "volumes": lambda: torch.randn(2, 3, 4, 3, 2),
    "many": lambda: torch.randn(40, 33, 31, 7),
    "many, channels last": lambda: torch.randn(40, 33, 31, 7).to(memory_format=torch.channels_last),
    "a part of a tensor": lambda: torch.randn(6, 10, 8, 3)[::2, 1::3, ::2],
    "turned": lambda: torch.randn(5, 6).T,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("together", [[shape] for shape in SHAPES] + [list(SHAPES)])
def test_moments_and_their_gradients_are_torch_s(together, dtype):
    torch.manual_seed(0)
    inputs = [(3.0 + SHAPES[shape]()).to(dtype).requires_grad_() for shape in together]
    got, expected = moments_of_all(inputs), []
    for x in inputs:
        others = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x, others, correction=0)
        expected.append((mean, variance))
    weights = [[torch.randn_like(moment) for moment in pair] for pair in got]
    gradients = []
    for found in (got, expected):
        total = sum(
            (moment * w).sum()
            for pair, ws in zip(found, weights, strict=True)
            for moment, w in zip(pair, ws, strict=True)
        )
        gradients.append(torch.autograd.grad(total, inputs))
    for own, other in zip(got, expected, strict=True):
        for moment, wanted in zip(own, other, strict=True):
            torch.testing.assert_close(moment, wanted)
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_numbers_that_lie_with_the_other_sign_are_read_right():
    x = torch.complex(torch.ones(4, 3), torch.randn(4, 3)).conj().imag
    assert x.is_neg()
    [(mean, _)] = moments_of_all([x])
    torch.testing.assert_close(mean, x.mean(0))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 12),
    st.sampled_from([0.0, 1e4]), st.sampled_from([1e-3, 1.0, 1e3]),
)  # fmt: skip
def test_moments_keep_their_digits(examples, channels, places, offset, spread):
    torch.manual_seed(examples)
    x = (offset + spread * torch.randn(examples, channels, places, dtype=torch.float64)).float()
    [(mean, variance)] = moments_of_all([x])
    wanted = x.double()
    torch.testing.assert_close(mean, wanted.mean((0, 2)).float(), rtol=1e-6, atol=0.0)
    exact = wanted.var((0, 2), correction=0).float()
    torch.testing.assert_close(variance, exact, rtol=1e-5, atol=1e-12)


def test_what_is_not_finite_stays_so():
    x = torch.randn(4, 3, 2)
    x[1, 1, 0] = torch.nan
    x[0, 2, 1] = torch.inf
    [(mean, variance)] = moments_of_all([x])
    assert mean.isfinite().tolist() == variance.isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (4, 3, 0)])
def test_nothing_has_no_moments(shape):
    [(mean, variance)] = moments_of_all([torch.zeros(shape)])
    assert mean.isnan().all()
    assert variance.isnan().all()
    assert mean.shape == variance.shape == (3,)


# --- what does not fit ---------------------------------------------------------------------------


def test_the_core_refuses_what_does_not_fit():
    x, row = torch.randn(4, 3, 2), torch.zeros(3)

    def moments(x: Tensor, mean: Tensor, variance: Tensor) -> None:
        _core.batch_moments([(on_host(x), on_host(mean), on_host(variance))])

    moments(x, row, torch.zeros(3))
    for wrong, error in [
        ((x[0], row, torch.zeros(3)), ShapeError),
        ((x, row, torch.zeros(2)), ShapeError),
        ((x, row, torch.zeros(6)[::2]), ShapeError),
        ((x, row, torch.zeros(3).double()), DtypeError),
        ((x.half(), row.half(), torch.zeros(3).half()), DtypeError),
    ]:
        with pytest.raises(error):
            moments(*wrong)

    def back(x: Tensor, mean: Tensor, of_mean: Tensor, out: Tensor) -> None:
        _core.moments_backward(*map(borrow, (x, mean, of_mean)), None, borrow(out), False)

    back(x, row, row, torch.zeros(4, 3, 2))
    for wrong, error in [
        ((x[0], row, row, torch.zeros(3, 2)), ShapeError),
        ((x, row, row, torch.zeros(4, 3, 1)), ShapeError),
        ((x, row[:2], row, torch.zeros(4, 3, 2)), ShapeError),
        ((x, row, torch.zeros(6)[::2], torch.zeros(4, 3, 2)), ShapeError),
        ((x, row, row, torch.zeros(1, 3, 2).expand(4, 3, 2)), ShapeError),
        ((x, row.double(), row, torch.zeros(4, 3, 2)), DtypeError),
        ((x, row, row, torch.zeros(4, 3, 2).double()), DtypeError),
        ((x.half(), row.half(), row.half(), torch.zeros(4, 3, 2).half()), DtypeError),
        ((x, row, row, x), OptionError),
    ]:
        with pytest.raises(error):
            back(*wrong)

    weight, anchor = torch.randn(3, 2), torch.randn(3, 3)

    def merge(weight: Tensor, mean: Tensor, anchor: Tensor, out: Tensor) -> None:
        layer = borrow(weight), None, None, borrow(mean), borrow(row), 1e-5
        _core.merge([(layer, None, borrow(anchor), borrow(out))])

    merge(weight, row, anchor, torch.zeros(3, 3))
    for wrong, error in [
        ((weight[0], row, anchor, torch.zeros(3, 3)), ShapeError),
        ((weight.T, row, anchor, torch.zeros(3, 3)), ShapeError),
        ((weight, row[:2], anchor, torch.zeros(3, 3)), ShapeError),
        ((weight, row, anchor[:, 1:], torch.zeros(3, 3)), ShapeError),
        ((weight, row, anchor, torch.zeros(3, 2)), ShapeError),
        ((weight, row.double(), anchor, torch.zeros(3, 3)), DtypeError),
    ]:
        with pytest.raises(error):
            merge(*wrong)
