"""Layers and the BatchNorm each feeds follow from the data flow; what has no block is named."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ekfac_rs import describe
from ekfac_rs.errors import OptionError, UnsupportedLayerError
from ekfac_rs.layers import find_layers

X = torch.randn(6, 4)


class Net(nn.Module):
    """Two Linears and two BatchNorms whose names say nothing about how they are wired."""

    def __init__(self):
        super().__init__()
        self.bn_of_second = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4)
        self.bn_of_first = nn.BatchNorm1d(4)
        self.first = nn.Linear(4, 4)


class Crossed(Net):
    def forward(self, x):
        h = F.relu(self.bn_of_first(self.first(x)))
        return self.bn_of_second(self.second(h))


class InPlaceAfterBatchNorm(Net):
    def forward(self, x):
        h = self.bn_of_first(self.first(x)).relu_()
        return self.bn_of_second(self.second(h))


class DataDependent(Crossed):
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return super().forward(x)


class OutputUsedTwice(Net):
    def forward(self, x):
        h = self.first(x)
        return self.bn_of_second(self.second(self.bn_of_first(h) + h))


class OutputReturnedToo(Net):
    def forward(self, x):
        h = self.second(F.relu(self.bn_of_first(self.first(x))))
        return self.bn_of_second(h), h


class SharedLinear(Net):
    def forward(self, x):
        return self.bn_of_second(self.second(self.bn_of_first(self.first(self.first(x)))))


class SharedBatchNorm(Net):
    def forward(self, x):
        return self.bn_of_first(self.second(self.bn_of_first(self.first(x))))


class Unused(Net):
    def forward(self, x):
        return self.bn_of_first(self.first(x))


class ActivationBetween(Net):
    def forward(self, x):
        return self.second(self.bn_of_first(F.relu(self.first(x))))


class InPlaceActivationBetween(Net):
    def forward(self, x):
        return self.second(self.bn_of_first(F.relu_(self.first(x))))


class Residual(Net):
    def forward(self, x):
        h = F.relu(self.bn_of_first(self.first(x)))
        return h + self.bn_of_second(self.second(h))


def tied():
    model = Crossed()
    model.second.weight = model.first.weight
    return model


def with_layernorm():
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def with_bilinear():
    return nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4), nn.Linear(4, 2))


def with_attention():
    return nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 2))


def with_rnn():
    return nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.Linear(4, 2))


def with_prelu():
    return nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2))


def with_free_parameter():
    model = Crossed()
    model.temperature = nn.Parameter(torch.ones(()))
    return model


PAIRS = {"first": "bn_of_first", "second": "bn_of_second"}


@pytest.mark.parametrize("example", [None, X], ids=["traced", "observed"])
@pytest.mark.parametrize("kind", [Crossed, InPlaceAfterBatchNorm, Residual])
def test_pairs_follow_the_data_flow_not_names_or_order(kind, example):
    found = find_layers(kind(), example=example)
    assert {layer.name: layer.batchnorm_name for layer in found} == PAIRS


def test_an_example_replaces_tracing_where_it_fails():
    with pytest.raises(UnsupportedLayerError, match="example="):
        find_layers(DataDependent())
    found = find_layers(DataDependent(), example=X)
    assert {layer.name: layer.batchnorm_name for layer in found} == PAIRS


# A BatchNorm that no layer alone feeds is a layer of its own, merged with itself.
UNPAIRED = {
    "output used twice": (
        OutputUsedTwice,
        {"first": None, "bn_of_first": "bn_of_first", "second": "bn_of_second"},
    ),
    "output returned too": (
        OutputReturnedToo,
        {"first": "bn_of_first", "second": None, "bn_of_second": "bn_of_second"},
    ),
    "activation between": (
        ActivationBetween,
        {"first": None, "bn_of_first": "bn_of_first", "second": None},
    ),
    "in-place activation between": (
        InPlaceActivationBetween,
        {"first": None, "bn_of_first": "bn_of_first", "second": None},
    ),
}


@pytest.mark.parametrize("example", [None, X], ids=["traced", "observed"])
@pytest.mark.parametrize("case", UNPAIRED)
def test_a_batchnorm_that_no_layer_alone_feeds_is_a_layer_of_its_own(case, example):
    make, expected = UNPAIRED[case]
    model = make()
    used = [name for name in expected if name in dict(model.named_modules())]
    for name, module in model.named_children():
        module.requires_grad_(name in used)
    found = find_layers(model, example=example)
    assert {layer.name: layer.batchnorm_name for layer in found} == expected


def found_pairs(model, example):
    return {x.name: x.batchnorm_name for x in find_layers(model, example=example)}


def test_an_example_tells_a_batchnorm_over_features_from_one_over_locations():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert found_pairs(model, torch.randn(6, 4)) == {"0": "1"}
    assert found_pairs(model, torch.randn(6, 3, 4)) == {"0": None, "1": "1"}


# BatchNorms whose axis 1 is not the Linear's outputs, with or without an example.
OVER_POSITIONS = {
    "another width": (nn.BatchNorm1d(5), (6, 5, 4)),
    "images": (nn.BatchNorm2d(3), (6, 3, 2, 4)),
    "volumes": (nn.BatchNorm3d(3), (6, 3, 2, 2, 4)),
}


@pytest.mark.parametrize("observed", [False, True], ids=["traced", "observed"])
@pytest.mark.parametrize("case", OVER_POSITIONS)
def test_a_batchnorm_that_must_be_over_locations_is_never_paired(case, observed):
    batchnorm, shape = OVER_POSITIONS[case]
    model = nn.Sequential(nn.Linear(4, 3), batchnorm)
    x = torch.randn(shape)
    assert found_pairs(model, x if observed else None) == {"0": None, "1": "1"}
    description = describe(model, example=x if observed else None)
    assert not any("merged with" in p.block for p in description.parameters)


REFUSED = {
    "linear called twice": (SharedLinear, "'first'.*one call"),
    "batchnorm called twice": (SharedBatchNorm, "'bn_of_(first|second)'.*one call"),
    "unused linear": (Unused, "'(second|bn_of_second)'.*one call"),
    "tied weights": (tied, "'(first|second)'.*shared"),
    "free parameter": (with_free_parameter, "'temperature'"),
    "bilinear": (with_bilinear, "'1.weight'.*Bilinear has no"),
    "attention": (with_attention, "'1.in_proj_weight'.*MultiheadAttention has no"),
    "LSTM": (with_rnn, "'1.weight_ih_l0'.*LSTM has no"),
    "PReLU": (with_prelu, "'1.weight'.*PReLU has no"),
    "no layer": (nn.ReLU, "at least one"),
}


@pytest.mark.parametrize("example", [None, X], ids=["traced", "observed"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_handled_is_refused_by_name(case, example):
    make, message = REFUSED[case]
    with pytest.raises(UnsupportedLayerError, match=message):
        find_layers(make(), example=example)


def test_one_module_under_two_names_is_one_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.alias = model[0]
    # fx sees nn.Sequential's children only through forward, so the alias is called too.
    with pytest.raises(UnsupportedLayerError, match="'0'.*one call"):
        find_layers(model)


@pytest.mark.parametrize("make", [with_layernorm, with_prelu])
def test_frozen_parameters_need_no_block(make):
    model = make()
    model[1].requires_grad_(False)
    assert [layer.name for layer in find_layers(model)] == ["0", "2"]
    model[0].requires_grad_(False)
    assert [layer.name for layer in find_layers(model)] == ["2"]


def test_named_layers_are_found_in_a_model_with_unsupported_ones():
    assert [layer.name for layer in find_layers(with_prelu(), layers=["2"])] == ["2"]


def test_raw_coordinates_look_for_no_batchnorm():
    found = find_layers(Crossed(), coordinates="raw")
    assert [layer.batchnorm for layer in found] == [None, None]


@pytest.mark.parametrize("layers", [["third"], [], ["bn_of_first"]])
def test_unknown_layer_names_are_refused(layers):
    with pytest.raises(OptionError, match="layers"):
        find_layers(Crossed(), layers=layers)


class Padding(nn.Conv2d):
    """A convolution that pads for itself, as ports of TensorFlow models have it."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


class Activated(nn.BatchNorm2d):
    """A BatchNorm with its activation inside, as in timm."""

    def forward(self, x):
        return F.relu(super().forward(x))


class Standardized(nn.Conv2d):
    """A convolution whose weights are not those it stores."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


IMAGES = torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize("example", [None, IMAGES], ids=["traced", "observed"])
def test_subclasses_are_known_by_the_functions_they_call(example):
    model = nn.Sequential(Padding(3, 4, 2, bias=False), Activated(4), nn.Flatten())
    [layer] = find_layers(model, example=example)
    assert (layer.name, layer.batchnorm_name) == ("0", "1")


@pytest.mark.parametrize("example", [None, IMAGES], ids=["traced", "observed"])
def test_a_layer_that_computes_with_other_weights_is_refused_by_name(example):
    model = nn.Sequential(Standardized(3, 4, 2), nn.BatchNorm2d(4))
    with pytest.raises(UnsupportedLayerError, match="'0': .*its weight.*used by 'mean'"):
        find_layers(model, example=example)


def test_finding_leaves_hooks_and_gradients_alone():
    model = Crossed()
    find_layers(model, example=X)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
