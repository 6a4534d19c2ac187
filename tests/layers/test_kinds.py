"""A kind of layer is one class: defined here, it is known everywhere."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ekfac_rs as ek
from ekfac_rs.errors import UnsupportedLayerError
from ekfac_rs.layers import base, find_layers
from ekfac_rs.layers.base import AffineLayer, Units
from oracle import relative_error

APPROXIMATIONS = ("kfac-expand", "kfac-reduce", "xkfac", "xkfac-nested", "diagonal")


def flipped(input, weight, bias=None):  # noqa: A002
    """A Linear of its input read backwards, as a function that torch's modes can see."""
    if torch.overrides.has_torch_function((input, weight)):
        return torch.overrides.handle_torch_function(
            flipped, (input, weight), input, weight, bias=bias
        )
    return F.linear(input.flip(-1), weight, bias)


class Flipped(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return flipped(x, self.weight, self.bias)


@pytest.fixture
def kind() -> Iterator[type[AffineLayer]]:
    known = list(base._KINDS)

    class FlippedLayer(AffineLayer):
        noun = "a Flipped"
        modules = (Flipped,)
        functions = {flipped: ("input", "weight", "bias")}  # noqa: RUF012

        def channel_axis(self, dimensions):
            return dimensions - 1

        def units(self, call):
            return Units(call.input.flip(-1))

    yield FlippedLayer
    base._KINDS[:] = known


def networks(kind):
    """A net of the new kind and the same of a Linear, and inputs for both."""
    torch.manual_seed(0)
    new = nn.Sequential(kind(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double().eval()
    old = nn.Sequential(nn.Linear(4, 3), *(new[i] for i in (1, 2, 3))).double().eval()
    old[0].load_state_dict({"weight": new[0].weight.flip(1), "bias": new[0].bias})
    nn.init.uniform_(new[1].running_var, 0.5, 2.0)
    return new, old, torch.randn(5, 4, dtype=torch.float64)


def test_an_unknown_module_is_refused_and_a_known_one_found(kind):
    new, _, x = networks(Flipped)
    for example in (None, x):
        [first, last] = find_layers(new, example=example)
        assert (type(first), first.batchnorm_name, last.name) == (kind, "1", "3")
    words = {p.name: p.block for p in ek.describe(new, example=x).parameters}
    assert words["0.weight"] == words["1.bias"] == "Kronecker 3 x 5, merged with 1"
    with pytest.raises(UnsupportedLayerError, match="a Linear.* or a Flipped, but a PReLU"):
        find_layers(nn.Sequential(*new, nn.PReLU()), example=x)
    base._KINDS.remove(kind)
    with pytest.raises(UnsupportedLayerError, match="'0.weight'.*Flipped has no"):
        find_layers(new, example=x)


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_its_curvature_files_and_penalty_are_those_of_the_same_function(
    kind, approximation, tmp_path
):
    new, old, x = networks(Flipped)
    batches = [(x, torch.arange(5) % 2)]
    options = {"approximation": approximation, "labels": "exact"}
    found, expected = (ek.estimate_curvature(m, batches, **options) for m in (new, old))
    # Columns in the other order, the bias' last.
    order = [3, 2, 1, 0, 4]
    diagonal = expected["0"].diagonal()[:, order]
    assert relative_error(found["0"].diagonal(), diagonal) < 1e-12
    found.save(tmp_path / "new")
    loaded = ek.Curvature.load(tmp_path / "new")
    values = []
    for model, curvature in ((new, loaded), (old, expected)):
        example = {"example": x}
        penalty = ek.QuadraticPenalty(model, curvature, ek.merged_weights(model, **example))
        with torch.no_grad():
            model[0].weight.mul_(1.5)
        values.append(penalty().item())
    assert values[0] == pytest.approx(values[1], rel=1e-10)
    assert values[0] > 0.0


def test_merging_and_putting_back_keep_its_function(kind):
    new, _, x = networks(Flipped)
    before = new(x)
    ek.reparameterize(new, [x])
    assert relative_error(new(x), before) < 1e-12
    ek.merge_batchnorm(new, example=x)
    assert relative_error(new(x), before) < 1e-12


def test_a_call_with_another_bias_is_refused(kind):
    class Careless(Flipped):
        def forward(self, x):
            return flipped(x, self.weight)

    new, _, x = networks(Careless)
    with pytest.raises(UnsupportedLayerError, match="'0': .*another bias or none"):
        find_layers(new, example=x)
