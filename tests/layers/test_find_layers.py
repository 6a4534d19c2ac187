"""The BatchNorm a Linear feeds is found from the data flow; what cannot be handled is named."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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


REFUSED = {
    "output used twice": (OutputUsedTwice, "'first'.*only consumer"),
    "output returned too": (OutputReturnedToo, "'second'.*only consumer"),
    "linear called twice": (SharedLinear, "'first'.*one call"),
    "batchnorm called twice": (SharedBatchNorm, "'bn_of_first'.*called once"),
    "unused linear": (Unused, "'second'.*one call"),
    "activation between": (ActivationBetween, "'bn_of_(first|second).*BatchNorm"),
    "in-place activation between": (
        InPlaceActivationBetween,
        "'(bn_of_(first|second)|first).*(BatchNorm|only consumer)",
    ),
    "tied weights": (tied, "'(first|second)'.*shared"),
    "layernorm": (with_layernorm, "'1.weight'.*LayerNorm"),
    "free parameter": (with_free_parameter, "'temperature'"),
    "no linear": (nn.ReLU, "Linear"),
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


def test_frozen_parameters_need_no_block():
    model = with_layernorm()
    model[1].requires_grad_(False)
    assert [layer.name for layer in find_layers(model)] == ["0", "2"]
    model[0].requires_grad_(False)
    assert [layer.name for layer in find_layers(model)] == ["2"]


def test_named_layers_are_found_in_a_model_with_unsupported_ones():
    assert [layer.name for layer in find_layers(with_layernorm(), layers=["2"])] == ["2"]


def test_raw_coordinates_look_for_no_batchnorm():
    found = find_layers(Crossed(), coordinates="raw")
    assert [layer.batchnorm for layer in found] == [None, None]


@pytest.mark.parametrize("layers", [["third"], [], ["bn_of_first"]])
def test_unknown_layer_names_are_refused(layers):
    with pytest.raises(OptionError, match="layers"):
        find_layers(Crossed(), layers=layers)


def test_finding_leaves_hooks_and_gradients_alone():
    model = Crossed()
    find_layers(model, example=X)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
