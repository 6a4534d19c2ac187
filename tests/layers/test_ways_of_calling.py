"""Layers called in other ways than through their module: allowed where their weights are theirs."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ekfac_rs as ek
from ekfac_rs.errors import UnsupportedLayerError
from ekfac_rs.layers import find_layers
from oracle import relative_error

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BATCHES = [(X, torch.arange(6) % 3)]


class Parts(nn.Module):
    """Two Linears with a BatchNorm after the first; subclasses call them in their own ways."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.second(self.norm(self.first(x)).tanh())


class FromTheParent(Parts):
    def forward(self, x):
        h = F.linear(x, self.first.weight, self.first.bias)
        return F.linear(self.norm(h).tanh(), self.second.weight, self.second.bias)


class ByKeywords(Parts):
    def forward(self, x):
        h = F.linear(input=x, bias=self.first.bias, weight=self.first.weight)
        return self.second(self.norm(h).tanh())


class WithItsOwnParametersHandedOver(Parts):
    def forward(self, x):
        h = functional_call(self.first, dict(self.first.named_parameters()), (x,))
        return self.second(self.norm(h).tanh())


class Checkpointed(Parts):
    def inner(self, x):
        return self.norm(self.first(x)).tanh()

    def forward(self, x):
        return self.second(checkpoint(self.inner, x, use_reentrant=False))


class CheckpointedWhole(Parts):
    def inner(self, x):
        return super().forward(x)

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class CheckpointedTheOldWay(Checkpointed):
    def forward(self, x):
        return self.second(checkpoint(self.inner, x, use_reentrant=True))


SAME = [
    FromTheParent,
    ByKeywords,
    WithItsOwnParametersHandedOver,
    Checkpointed,
    CheckpointedWhole,
]


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen first"])
@pytest.mark.parametrize("labels", ["mc", "type2"])
@pytest.mark.parametrize("kind", SAME)
def test_the_same_function_in_another_way_has_the_same_curvature(kind, labels, frozen):
    curvatures = []
    for model in (Parts(), kind()):
        if frozen:
            model.first.requires_grad_(False)
            model.norm.requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        curvatures.append(
            ek.estimate_curvature(model, BATCHES, labels=labels, draws=2, generator=generator)
        )
    expected, found = curvatures
    assert list(found) == list(expected)
    assert found.batchnorms == expected.batchnorms
    for name, block in expected.items():
        assert relative_error(found[name].dense(), block.dense()) < 1e-12


class WithOthersHandedOver(Parts):
    def forward(self, x):
        others = {name: p.detach().clone() for name, p in self.first.named_parameters()}
        return self.second(self.norm(functional_call(self.first, others, (x,))).tanh())


class WithScaledOnesHandedOver(Parts):
    def forward(self, x):
        others = {name: 2 * p for name, p in self.first.named_parameters()}
        return self.second(self.norm(functional_call(self.first, others, (x,))).tanh())


class BiasHandedOver(Parts):
    def forward(self, x):
        others = {"bias": torch.zeros(5, dtype=x.dtype)}
        return self.second(self.norm(functional_call(self.first, others, (x,))).tanh())


class StatisticsOfAnother(Parts):
    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm1d(5, affine=False).double()

    def forward(self, x):
        h = F.batch_norm(
            self.first(x),
            *(self.other.running_mean, self.other.running_var),
            *(self.norm.weight, self.norm.bias),
        )
        return self.second(self.other(h).tanh())


OTHER = {
    WithOthersHandedOver: "'first': .*(used by 'detach'|one call)",
    WithScaledOnesHandedOver: "'first': .*used by 'r?mul'",
    BiasHandedOver: "'first': .*(another bias|its own parameters)",
    StatisticsOfAnother: "'norm': .*running statistics",
}


@pytest.mark.parametrize("kind", OTHER)
def test_other_tensors_handed_over_are_refused(kind):
    model = kind().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedLayerError, match=OTHER[kind]):
        find_layers(model, example=X)
    with pytest.raises(UnsupportedLayerError, match=OTHER[kind]):
        ek.estimate_curvature(model, BATCHES, statistics="running")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_whole_model_under_functional_call_computes_with_its_own_weights():
    model = Parts().eval()
    [first, second] = find_layers(model, example=X)
    expected = first.merged_weight()
    with torch.no_grad():
        other = {name: 2 * p for name, p in model.named_parameters()}
        functional_call(model, other, (X,))
    assert torch.equal(first.merged_weight(), expected)
    assert (first.batchnorm_name, second.batchnorm_name) == ("norm", None)


def test_reentrant_checkpoints_hide_their_gradients_and_are_refused_by_name():
    model = CheckpointedTheOldWay()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnsupportedLayerError, match="'first'"):
            ek.estimate_curvature(model, BATCHES)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("observed", [False, True], ids=["traced", "observed"])
def test_a_shared_bias_is_refused_as_a_shared_weight_is(observed):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].bias = model[0].bias
    with pytest.raises(UnsupportedLayerError, match="'0': .*shared by 0.bias, 2.bias"):
        find_layers(model, example=X if observed else None)
