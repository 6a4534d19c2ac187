"""What a layer computes is read from its calls: anything else than it promises is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import ekfac_rs as ek
from ekfac_rs.errors import OptionError, UnsupportedLayerError
from ekfac_rs.layers import find_layers, survey_layers

# Old names of weight and spectral norm still make up weights.
pytestmark = pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).*:FutureWarning")

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(1))


class Encoder(nn.Module):
    """Two Linears; what is done with the first one's weight besides is the subclasses'."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 3)


def encoder(besides):
    class Net(Encoder):
        def forward(self, x):
            return self.second(besides(self.first(x).tanh(), self.first))

    return Net


def tied_decoder(h, layer):
    return F.linear(h, layer.weight.t())


def tied_by_an_attribute(h, layer):
    return h @ layer.weight.T


def detached(h, layer):
    return h @ layer.weight.detach()


def through_data(h, layer):
    return h @ layer.weight.data


def its_own_input(h, layer):
    return h + F.linear(h, layer.weight)


def as_another_layers_input(h, layer):
    return h + F.conv1d(layer.weight[None], torch.ones(4, 4, 1)).sum()


def normed(h, layer):
    return h / layer.weight.norm()


def bias_alone(h, layer):
    return h - layer.bias


def in_a_list(h, layer):
    return h + torch.cat([h[:1], layer.weight])[:1]


def written_to(h, layer):
    with torch.no_grad():
        layer.weight[0, 0] = 1.0
    return h


def written_to_in_place(h, layer):
    with torch.no_grad():
        layer.weight.mul_(2.0)
    return h


def written_to_by_an_operator(h, layer):
    with torch.no_grad():
        weight = layer.weight
        weight *= 2.0
    return h


def written_to_through_data(h, layer):
    layer.weight.data.mul_(2.0)
    return h


def initialised(h, layer):
    nn.init.zeros_(layer.weight)
    return h


def shape_alone(h, layer):
    return h * layer.weight.shape[0] + layer.weight.size(1)


def dtype_and_device(h, layer):
    return h.to(dtype=layer.weight.dtype, device=layer.weight.device)


MISUSED = {
    tied_decoder: "its weight.*used by 't'",
    tied_by_an_attribute: "its weight.*used by 'T'",
    detached: "its weight.*used by 'detach'",
    through_data: "its weight.*used by 'data'",
    its_own_input: "another bias",
    as_another_layers_input: "its weight.*used by",
    normed: "its weight.*used by 'norm'",
    bias_alone: "its bias.*used by",
    in_a_list: "its weight.*used by 'cat'",
}


class Conv(nn.Conv2d):
    """A convolution of which subclasses change the call."""

    def __init__(self):
        super().__init__(2, 4, 3, padding=1, groups=2)


class ConvWithoutBias(Conv):
    def forward(self, x):
        return F.conv2d(x, self.weight, None, padding=1, groups=2)


class ConvWithAnotherBias(Conv):
    def forward(self, x):
        return F.conv2d(x, self.weight, 2 * self.bias, padding=1, groups=2)


class ScaledConv(Conv):
    def forward(self, x):
        return F.conv2d(x, self.weight * 2, self.bias, padding=1, groups=2)


class OtherGroups(nn.Conv2d):
    def __init__(self):
        super().__init__(2, 4, 3, padding=1)
        self.groups = 2

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, padding=1)


class Patched(Conv):
    """Not a subclass's forward, but the instance's."""

    def __init__(self):
        super().__init__()
        self.forward = lambda x: F.conv2d(x, self.weight, None, padding=1, groups=2)


class Norm(nn.BatchNorm2d):
    """A BatchNorm of which subclasses change the call."""

    def __init__(self):
        super().__init__(4)

    def forward(self, x):
        kept = {} if self.training and not self.track_running_stats else self.statistics()
        arguments = {
            **dict.fromkeys(["running_mean", "running_var"]),
            **kept,
            "weight": self.weight,
            "bias": self.bias,
            "training": self.training,
            "eps": self.eps,
        }
        return F.batch_norm(x, **{**arguments, **self.changed()})

    def statistics(self):
        return {"running_mean": self.running_mean, "running_var": self.running_var}

    def changed(self):
        return {}


class OtherEps(Norm):
    def changed(self):
        return {"eps": 0.1}


class DefaultEps(nn.BatchNorm2d):
    """Keeps one eps and forgets to pass it."""

    def __init__(self):
        super().__init__(4, eps=0.1)

    def forward(self, x):
        statistics = (self.running_mean, self.running_var)
        if self.training and not self.track_running_stats:
            statistics = (None, None)
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training)


class OnePlusWeight(Norm):
    def changed(self):
        return {"weight": 1 + self.weight}


class Swapped(Norm):
    def statistics(self):
        return {"running_mean": self.running_var, "running_var": self.running_mean}


class OtherVariance(Norm):
    def statistics(self):
        return {"running_mean": self.running_mean, "running_var": 1.5 * self.running_var}


class DetachedBias(Norm):
    def changed(self):
        return {"bias": self.bias.detach()}


class WithoutBias(Norm):
    def changed(self):
        return {"bias": None}


class AlwaysOfTheBatch(Norm):
    def changed(self):
        return {"running_mean": None, "running_var": None, "training": True}


class KeptByHand(Norm):
    def forward(self, x):
        if self.training:
            self.running_mean.lerp_(x.mean((0, 2, 3)), 0.1)
        return super().forward(x)


CONVOLUTIONS = {
    ConvWithoutBias: "another bias or none",
    ConvWithAnotherBias: "(its bias.*used by 'r?mul'|another bias)",
    ScaledConv: "its weight.*used by 'mul'",
    OtherGroups: "2 groups, got 1",
    Patched: "another bias or none",
}
BATCHNORMS = {
    OtherEps: "its own eps 1e-05, got 0.1",
    DefaultEps: "its own eps 0.1, got 1e-05",
    OnePlusWeight: "its weight.*used by 'r?add'",
    Swapped: "its own running statistics",
    OtherVariance: "(its own running statistics|running_var.*used by 'r?mul')",
    DetachedBias: "(its bias.*used by 'detach'|another bias)",
    WithoutBias: "another bias or none",
    AlwaysOfTheBatch: "running statistics in its mode, got batch",
}


def convolutional(conv=Conv, norm=Norm):
    torch.manual_seed(0)
    return nn.Sequential(conv(), norm(), nn.Tanh(), nn.Flatten(), nn.Linear(100, 3)).eval()


def both_ways(x):
    return pytest.mark.parametrize("example", [None, x], ids=["traced", "observed"])


@both_ways(X)
@pytest.mark.parametrize("besides", MISUSED)
def test_a_weight_used_besides_its_own_call_is_refused_by_name(besides, example):
    model = encoder(besides)()
    with pytest.raises(UnsupportedLayerError, match=f"'first': .*({MISUSED[besides]})"):
        find_layers(model, example=example)
    # The other layer is what it is.
    [layer] = find_layers(model, layers=["second"], example=example)
    assert layer.name == "second"
    assert "first.weight" in survey_layers(model, example=example)[1]


WRITTEN_TO = {
    written_to: "__setitem__",
    written_to_in_place: "mul_",
    written_to_by_an_operator: "__i?mul__|mul_",
    written_to_through_data: "data",
    initialised: "normal_|zero_",
}


@pytest.mark.parametrize("besides", WRITTEN_TO)
def test_a_weight_written_to_during_a_pass_is_refused_and_stays(besides):
    model = encoder(besides)()
    before = copy.deepcopy(model.state_dict())
    message = f"'first': .*'({WRITTEN_TO[besides]})'"
    with pytest.raises(UnsupportedLayerError, match=message):
        find_layers(model, example=X)
    with pytest.raises(UnsupportedLayerError, match=message):
        ek.estimate_curvature(model, [(X, torch.zeros(6, dtype=torch.long))])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("besides", [shape_alone, dtype_and_device])
@both_ways(X)
def test_a_weights_shape_dtype_and_device_may_be_asked_for(besides, example):
    found = find_layers(encoder(besides)(), example=example)
    assert [layer.name for layer in found] == ["first", "second"]


@both_ways(IMAGES)
@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_a_convolution_is_what_its_call_computes(conv, example):
    with pytest.raises(UnsupportedLayerError, match=f"'0': .*{CONVOLUTIONS[conv]}"):
        find_layers(convolutional(conv=conv), example=example)


@both_ways(IMAGES)
@pytest.mark.parametrize("norm", BATCHNORMS)
def test_a_batchnorm_is_what_its_call_computes(norm, example):
    with pytest.raises(UnsupportedLayerError, match=f"'1': .*{BATCHNORMS[norm]}"):
        find_layers(convolutional(norm=norm), example=example)


@both_ways(IMAGES)
def test_subclasses_that_call_as_they_promise_are_paired(example):
    found = find_layers(convolutional(), example=example)
    assert [(x.name, x.batchnorm_name) for x in found] == [("0", "1"), ("4", None)]


def test_a_trace_in_train_mode_counts_no_batch():
    model = convolutional().train()
    before = copy.deepcopy(model.state_dict())
    assert len(find_layers(model)) == 2
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_statistics_kept_by_hand_are_refused_before_they_move():
    model = convolutional(norm=KeptByHand).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedLayerError, match="'1': .*its running_mean.*'lerp_'"):
        ek.estimate_curvature(model, [(IMAGES, torch.arange(3))])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_batchnorm_without_weight_that_no_trace_can_know_asks_for_an_example():
    class Plain(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(4, affine=False)

        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(UnsupportedLayerError, match="'1': .*example="):
        find_layers(convolutional(norm=Plain))
    [first, _] = find_layers(convolutional(norm=Plain), example=IMAGES)
    assert first.batchnorm_name == "1"


# --- in the pass itself --------------------------------------------------------------------------


class Turncoat(nn.Module):
    """Does as it promises for a number of calls, and then something else."""

    def __init__(self, calls, otherwise):
        super().__init__()
        self.layer, self.calls, self.otherwise = nn.Linear(4, 4), calls, otherwise

    def forward(self, x):
        self.calls -= 1
        return self.layer(x) if self.calls >= 0 else self.otherwise(self.layer, x)


OTHERWISE = {
    "another bias": lambda layer, x: F.linear(x, layer.weight, None),
    "used by 'mul'": lambda layer, x: F.linear(x, layer.weight * 2, layer.bias),
    "got none": lambda layer, x: x,
}


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("message", OTHERWISE)
def test_every_forward_of_a_pass_is_checked(message, calls):
    model = nn.Sequential(Turncoat(calls, OTHERWISE[message]), nn.Tanh(), nn.Linear(4, 3))
    batches = [(X, torch.zeros(6, dtype=torch.long))] * 3
    with pytest.raises(UnsupportedLayerError, match=f"'0.layer': .*{message}"):
        ek.estimate_curvature(model, batches)


def test_a_batchnorm_that_changes_its_eps_during_a_pass_is_refused():
    class Turning(Norm):
        calls = 0

        def changed(self):
            self.calls += 1
            return {"eps": self.eps if self.calls < 3 else 0.1}

    batches = [(IMAGES, torch.arange(3))] * 3
    with pytest.raises(UnsupportedLayerError, match="'1': .*eps 1e-05, got 0.1"):
        ek.estimate_curvature(convolutional(norm=Turning), batches)


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_a_pass_accepts_what_it_should(statistics):
    model = convolutional()
    curvature = ek.estimate_curvature(model, [(IMAGES, torch.arange(3))], statistics=statistics)
    assert list(curvature) == ["0", "4"]


def test_a_pass_over_an_exported_model_is_one_with_running_statistics():
    model = convolutional()
    ek.merge_batchnorm(model, example=IMAGES)
    batches = [(IMAGES, torch.arange(3))]
    assert list(ek.estimate_curvature(model, batches, statistics="running")) == ["0", "4"]


# --- weights that are made up of others ----------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrised(conv):
    torch.nn.utils.parametrize.register_parametrization(conv, "weight", Doubled())


def pruned(conv):
    prune.random_unstructured(conv, "weight", 0.5)


def pruned_bias(conv):
    prune.random_unstructured(conv, "bias", 0.5)


MADE_UP = [
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    torch.nn.utils.weight_norm,
    torch.nn.utils.spectral_norm,
    pruned,
    pruned_bias,
    parametrised,
]
CALLS = {
    "find_layers": lambda model, **options: find_layers(model, **options),
    "merged_weights": lambda model, **options: ek.merged_weights(model, **options),
    "merge_batchnorm": lambda model, **options: ek.merge_batchnorm(model, **options),
    "estimate_curvature": lambda model, layers=None, **_: ek.estimate_curvature(
        model, [(IMAGES, torch.arange(3))], layers=layers
    ),
}


@pytest.mark.parametrize("layers", [None, ["0"]], ids=["all", "named"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make_up", MADE_UP)
def test_a_weight_made_up_of_others_is_refused_before_anything_is_run(make_up, call, layers):
    model = convolutional()
    make_up(model[0])
    model.forward = None  # whoever runs it fails otherwise
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedLayerError, match="'0.*computed from others"):
        CALLS[call](model, layers=layers)
    if call != "estimate_curvature":
        with pytest.raises(UnsupportedLayerError, match="'0.*computed from others"):
            CALLS[call](model, layers=layers, example=IMAGES)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@both_ways(IMAGES)
@pytest.mark.parametrize("make_up", MADE_UP)
def test_describe_says_why_a_weight_made_up_of_others_has_no_block(make_up, example):
    model = convolutional()
    make_up(model[0])
    words = {p.name: p.block for p in ek.describe(model, example=example).parameters}
    assert all("computed from others" in words[name] for name in words if name.startswith("0"))
    # No layer is known to feed the BatchNorm: it is one of its own.
    assert words["1.weight"] == "channel affine, 4 of 1 x 2"


def test_a_layer_beside_one_of_made_up_weights_can_be_named():
    model = convolutional()
    parametrizations.weight_norm(model[0])
    batches = [(IMAGES, torch.arange(3))]
    assert list(ek.estimate_curvature(model, batches, layers=["1", "4"])) == ["1", "4"]


def test_a_quantisation_aware_linear_is_not_a_plain_one():
    qat = pytest.importorskip("torch.ao.nn.qat")
    quantization = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(
        qat.Linear(4, 4, qconfig=quantization.get_default_qat_qconfig("fbgemm")), nn.Linear(4, 3)
    ).eval()
    with pytest.raises(UnsupportedLayerError, match="'0': .*its weight"):
        find_layers(model, example=X)
    with pytest.raises(UnsupportedLayerError):
        find_layers(model)


# --- parameters that no core computes with -------------------------------------------------------


def test_a_lazy_layer_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    message = "'1.weight': .*initialised.*lazy"
    with pytest.raises(UnsupportedLayerError, match=message):
        find_layers(model, example=X)
    with pytest.raises(UnsupportedLayerError, match="'1': .*lazy"):
        find_layers(model, layers=["1"])
    with pytest.raises(UnsupportedLayerError, match=message):
        ek.estimate_curvature(model, [(X, torch.zeros(6, dtype=torch.long))])
    model(X)
    assert len(find_layers(model, example=X)) == 2


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_layer_is_refused_by_name(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, dtype=dtype))
    for call in (find_layers, ek.merged_weights):
        with pytest.raises(UnsupportedLayerError, match="'1.weight'.*real.*complex"):
            call(model)
    with pytest.raises(UnsupportedLayerError, match="'1': .*real.*complex"):
        find_layers(model, layers=["1"])
    with pytest.raises(UnsupportedLayerError, match="'1.weight'.*real.*complex"):
        ek.estimate_curvature(model, [(X, torch.zeros(6, dtype=torch.long))])


def test_a_layer_of_integers_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedLayerError, match="'0': .*real.*int8"):
        find_layers(model, layers=["0"])
    assert [layer.name for layer in find_layers(model, layers=["1"])] == ["1"]


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers", ["0", b"0", 3, [0], ["0", None], (name for name in "0"), {"0": 1, 2: 3}]
)
@pytest.mark.parametrize("call", CALLS)
def test_names_that_are_no_collection_of_strings_are_refused(call, layers):
    with pytest.raises(OptionError, match="layers: expected a collection of names"):
        CALLS[call](convolutional(), layers=layers)


@pytest.mark.parametrize("layers", [["0"], ("0",), {"0"}, {"0": None}, frozenset("0")])
def test_any_collection_of_names_will_do(layers):
    assert [layer.name for layer in find_layers(convolutional(), layers=layers)] == ["0"]
