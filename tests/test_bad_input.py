"""Bad input gets a typed error that names the layer or argument, and changes nothing."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import nn

import ekfac_rs as ek
from ekfac_rs import errors
from nets import classification_loader, mlp

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(8) % 3
LOADER = [(X, Y)]


def model(**options):
    return mlp(5, 6, 3, **options)


def estimate(loader=LOADER, net=None, **options):
    return ek.estimate_curvature(model() if net is None else net, loader, **options)


def block(dtype=torch.float64):
    return ek.KroneckerSum([(torch.eye(4, dtype=dtype), torch.eye(3, dtype=dtype))])


def penalty(net=None, curvatures=None, anchor=None, **options):
    net = model() if net is None else net
    curvatures = estimate(net=net) if curvatures is None else curvatures
    anchor = ek.merged_weights(net) if anchor is None else anchor
    return ek.QuadraticPenalty(net, curvatures, anchor, **options)


def with_value(name, value):
    net = model()
    with torch.no_grad():
        net.get_parameter(name).reshape(-1)[0] = value
    return net


def changed_anchor(change):
    net = model()
    anchor = ek.merged_weights(net)
    anchor["0"] = change(anchor["0"])
    return penalty(net, anchor=anchor)


def corrupted_file(tmp_path, damage):
    path = tmp_path / "curvature.safetensors"
    estimate().save(path)
    data = bytearray(path.read_bytes())
    path.write_bytes(damage(data))
    return ek.Curvature.load(path)


def flipped_header(data):
    data[8] ^= 0xFF
    return data


def foreign_file(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    return ek.Curvature.load(path)


def interrupting():
    yield LOADER[0]
    raise KeyboardInterrupt


def in_place_on_input():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3).double()

        def forward(self, x):
            a = x * 1.0
            out = self.fc(a.detach())
            a.mul_(2.0)
            return out

    return Net()


class Constant(nn.Module):
    """Its first layer does not reach the output."""

    def __init__(self):
        super().__init__()
        self.dead, self.head = nn.Linear(5, 2).double(), nn.Linear(5, 3).double()

    def forward(self, x):
        self.dead(x)
        return self.head(x)


class Row(NamedTuple):
    call: Callable
    error: type[Exception]
    names: str


NAN, INF = float("nan"), float("inf")

TABLE = {
    # --- options ---
    "unknown approximation": Row(
        lambda: estimate(approximation="kfac"), errors.OptionError, "approximation.*'kfac'"
    ),
    "unknown coordinates": Row(
        lambda: estimate(coordinates="cooked"), errors.OptionError, "coordinates.*'cooked'"
    ),
    "unknown statistics": Row(
        lambda: estimate(statistics="eval"), errors.OptionError, "statistics"
    ),
    "unknown precision": Row(
        lambda: estimate(precision="half"), errors.OptionError, "precision.*'half'"
    ),
    "tf32 on the CPU": Row(
        lambda: estimate(precision="tf32"), errors.OptionError, "precision.*'ieee'.*'tf32'"
    ),
    "tf32 on the CPU, of a diagonal": Row(
        lambda: estimate(precision="tf32", approximation="diagonal"),
        errors.OptionError,
        "precision.*'tf32'",
    ),
    "unknown labels": Row(lambda: estimate(labels="true"), errors.OptionError, "labels.*'true'"),
    "unknown loss": Row(lambda: estimate(loss="hinge"), errors.UnsupportedLossError, "'hinge'"),
    "loss module": Row(
        lambda: estimate(loss=nn.CrossEntropyLoss()), errors.UnsupportedLossError, "CrossEntropy"
    ),
    "unknown reduction": Row(
        lambda: ek.likelihood.MSE(reduction="none"), errors.OptionError, "reduction.*'none'"
    ),
    "unknown layer name": Row(lambda: estimate(layers=["1"]), errors.OptionError, "layers.*1"),
    "draws 0": Row(lambda: estimate(draws=0), errors.OptionError, "draws.*0"),
    "draws a float": Row(lambda: estimate(draws=1.0), errors.OptionError, "draws.*1.0"),
    "max_examples 0": Row(lambda: estimate(max_examples=0), errors.OptionError, "max_examples"),
    "negative damping of a penalty": Row(
        lambda: penalty(damping=-1.0), errors.OptionError, "damping.*-1.0"
    ),
    "huge scale of a penalty": Row(
        lambda: penalty(scale=10**400), errors.OptionError, "scale: expected a finite number"
    ),
    "precision of a penalty": Row(
        lambda: penalty(precision="bf16"), errors.OptionError, "precision.*'bf16'"
    ),
    "precision of a penalty on the CPU": Row(
        lambda: penalty(precision="tf32"), errors.OptionError, 'precision.*CPU.*"tf32"'
    ),
    "NaN scale of a penalty": Row(lambda: penalty(scale=NAN), errors.OptionError, "scale.*nan"),
    "negative damping of a solve": Row(
        lambda: block().solve(torch.ones(3, 4).double(), -0.1), errors.OptionError, "damping"
    ),
    "negative damping of a learner": Row(
        lambda: ek.ContinualLearner(model(), damping=-0.1), errors.OptionError, "damping"
    ),
    "epochs 0": Row(
        lambda: ek.ContinualLearner(model()).fit(LOADER, epochs=0), errors.OptionError, "epochs"
    ),
    "0 samples": Row(lambda: block().sample(0, 0.1), errors.OptionError, "n:.*0"),
    "no terms": Row(lambda: ek.KroneckerSum([]), errors.OptionError, "terms"),
    # --- loaders and targets ---
    "empty loader": Row(lambda: estimate([]), errors.EmptyLoaderError, "loader"),
    "loader of empty batches": Row(
        lambda: estimate([(X[:0], Y[:0])]), errors.EmptyLoaderError, "loader"
    ),
    "empty loader, reparameterize": Row(
        lambda: ek.reparameterize(model(), []), errors.EmptyLoaderError, "loader"
    ),
    "empty loader, fit": Row(
        lambda: ek.ContinualLearner(model()).fit([]), errors.EmptyLoaderError, "loader"
    ),
    "empty loader, evaluate": Row(
        lambda: ek.ContinualLearner(model()).evaluate([[]]), errors.EmptyLoaderError, "loader"
    ),
    "loader without targets": Row(lambda: estimate([X]), errors.LabelError, "loader.*pairs"),
    "fewer targets than inputs": Row(
        lambda: estimate([(X, Y[:5])]), errors.LabelError, "loader.*5.*8"
    ),
    "labels out of range": Row(
        lambda: estimate([(X, Y + 1)]), errors.LabelError, "cross_entropy.*0..2.*3"
    ),
    "negative label": Row(lambda: estimate([(X, Y - 1)]), errors.LabelError, "cross_entropy.*-1"),
    "labels of the wrong shape": Row(
        lambda: estimate([(X, Y[:, None])]), errors.LabelError, "cross_entropy.*shape"
    ),
    "class indices as targets of MSE": Row(
        lambda: estimate(loss="mse"), errors.LabelError, r"mse.*\(8, 3\).*\(8,\)"
    ),
    "targets of MSE of the wrong shape": Row(
        lambda: estimate([(X, X)], loss="mse"), errors.LabelError, r"mse.*\(8, 3\).*\(8, 5\)"
    ),
    "targets of BCE above 1": Row(
        lambda: estimate([(X, 2.0 * torch.ones(8, 3).double())], loss="bce"),
        errors.LabelError,
        "bce",
    ),
    # --- models ---
    "BN batch of one": Row(
        lambda: estimate([(X[:1], Y[:1])]), errors.BatchNormError, "'1'.*at least 2"
    ),
    "last batch of one": Row(
        lambda: estimate([(X[:7], Y[:7]), (X[7:], Y[7:])]), errors.BatchNormError, "'1'"
    ),
    "unsupported layer": Row(
        lambda: estimate(net=nn.Sequential(nn.Linear(5, 4), nn.PReLU()).double()),
        errors.UnsupportedLayerError,
        "'1.weight'.*PReLU",
    ),
    "recurrent layer": Row(
        lambda: estimate(net=nn.Sequential(nn.LSTM(2, 2)).double()),
        errors.UnsupportedLayerError,
        "'0.weight_ih_l0'.*LSTM",
    ),
    "convolution without a batch axis": Row(
        lambda: estimate([(X[:2], Y[:2])], net=nn.Sequential(nn.Conv1d(2, 2, 1)).double()),
        errors.ShapeError,
        r"'0'.*\[N, C, L\]",
    ),
    "layer without influence": Row(
        lambda: estimate(net=Constant()), errors.UnsupportedLayerError, "'dead'.*no gradient"
    ),
    "input overwritten in place": Row(
        lambda: estimate(net=in_place_on_input()), errors.UnsupportedLayerError, "'fc'.*in place"
    ),
    "merged model in train mode": Row(
        lambda: (lambda net: (ek.merge_batchnorm(net), estimate(net=net)))(model()),
        errors.BatchNormError,
        "'1'.*merge",
    ),
    "non-finite weight": Row(
        lambda: estimate(net=with_value("0.weight", NAN)), errors.NonFiniteError, "'0.weight'"
    ),
    "non-finite weight, merge": Row(
        lambda: ek.merge_batchnorm(with_value("1.weight", INF)), errors.NonFiniteError, "'0'"
    ),
    "non-finite input": Row(lambda: estimate([(X * INF, Y)]), errors.NonFiniteError, "finite|NaN"),
    "input of the wrong dtype": Row(
        lambda: estimate([(X.float(), Y)]), errors.DtypeError, "float64.*float32"
    ),
    # --- blocks ---
    "factor not square": Row(
        lambda: ek.KroneckerSum([(torch.ones(2, 3), torch.ones(2, 2))]),
        errors.ShapeError,
        r"terms\[0\] factor A.*\(2, 3\)",
    ),
    "factors of two dtypes": Row(
        lambda: ek.KroneckerSum([(torch.eye(2), torch.eye(2).double())]),
        errors.DtypeError,
        r"terms\[0\] factor G.*float64",
    ),
    "factor in float16": Row(
        lambda: ek.KroneckerSum([(torch.eye(2).half(), torch.eye(2).half())]).trace(),
        errors.DtypeError,
        "float16|half",
    ),
    "integer factor": Row(
        lambda: ek.KroneckerSum([(torch.eye(2).int(), torch.eye(2).int())]),
        errors.DtypeError,
        "int32",
    ),
    "factors on two devices": Row(
        lambda: ek.KroneckerSum([(torch.eye(2), torch.eye(2, device="meta"))]),
        errors.DeviceError,
        "factor G.*cpu.*meta",
    ),
    "non-finite factor": Row(
        lambda: ek.KroneckerSum([(torch.eye(2) * NAN, torch.eye(2))]),
        errors.NonFiniteError,
        "factor A",
    ),
    "V of the wrong shape": Row(
        lambda: block().product(torch.ones(4, 3).double()), errors.ShapeError, r"V.*\(3, 4\)"
    ),
    "V of the wrong dtype": Row(
        lambda: block().product(torch.ones(3, 4)), errors.DtypeError, "V.*float64.*float32"
    ),
    "V on another device": Row(
        lambda: block().product(torch.ones(3, 4, device="meta").double()),
        errors.DeviceError,
        "V.*cpu.*meta",
    ),
    "V not a tensor": Row(lambda: block().product([[1.0]]), errors.DtypeError, "V.*list"),
    "blocks of two shapes": Row(
        lambda: block() + ek.KroneckerSum([(torch.eye(2).double(), torch.eye(2).double())]),
        errors.IncompatibleError,
        r"\(3, 4\).*\(2, 2\)",
    ),
    "singular block": Row(
        lambda: ek.KroneckerSum([(torch.zeros(2, 2), torch.eye(2))]).logdet(),
        errors.NumericalError,
        "(?i)singular|positive definite",
    ),
    "unknown block": Row(lambda: estimate()["2"], errors.UnknownLayerError, "'2'"),
    # --- files ---
    "truncated file": Row(
        lambda tmp_path: corrupted_file(tmp_path, lambda data: data[:-40]),
        errors.FileFormatError,
        "curvature.safetensors",
    ),
    "corrupted header": Row(
        lambda tmp_path: corrupted_file(tmp_path, flipped_header),
        errors.FileFormatError,
        "curvature.safetensors",
    ),
    "empty file": Row(
        lambda tmp_path: corrupted_file(tmp_path, lambda data: b""),
        errors.FileFormatError,
        "curvature.safetensors",
    ),
    "foreign file": Row(foreign_file, errors.FileFormatError, "other.safetensors"),
    # --- combinations ---
    "merging two approximations": Row(
        lambda: estimate().merge(estimate(approximation="kfac-expand")),
        errors.IncompatibleError,
        "approximation.*'xkfac-nested'.*'kfac-expand'",
    ),
    "merging IEEE with TF32": Row(
        lambda: (lambda c: c.merge(replace(c, settings=replace(c.settings, precision="tf32"))))(
            estimate()
        ),
        errors.IncompatibleError,
        "precision.*'ieee'.*'tf32'",
    ),
    "merging passes at other weights": Row(
        lambda: estimate().merge(estimate(net=model(seed=1))), errors.IncompatibleError, "'0'"
    ),
    "curvature of another model": Row(
        lambda: penalty(mlp(4, 7, 3), curvatures=estimate()), errors.ModelChangedError, "'0'"
    ),
    "curvature of a deeper model": Row(
        lambda: penalty(curvatures=estimate(net=mlp(5, 6, 6, 3))),
        errors.ModelChangedError,
        "'[346]'",
    ),
    "curvature of a model since changed": Row(
        lambda: penalty(model(seed=2), curvatures=estimate()), errors.ModelChangedError, "'0'"
    ),
    "anchor of the wrong shape": Row(
        lambda: changed_anchor(lambda a: a[:, 1:]), errors.ShapeError, "'0': anchor"
    ),
    "anchor of the wrong dtype": Row(
        lambda: changed_anchor(lambda a: a.float()), errors.DtypeError, "'0': anchor"
    ),
    "anchor on another device": Row(
        lambda: changed_anchor(lambda a: a.to("meta")), errors.DeviceError, "'0': anchor"
    ),
    "non-finite anchor": Row(
        lambda: changed_anchor(lambda a: a * NAN), errors.NonFiniteError, "'0': anchor"
    ),
    "anchor without a layer": Row(
        lambda: penalty(anchor={"0": torch.zeros(6, 6).double()}),
        errors.UnknownLayerError,
        "'3'",
    ),
    "raw curvature in merged coordinates": Row(
        lambda: penalty(curvatures=[estimate(), estimate(coordinates="raw")]),
        errors.IncompatibleError,
        "coordinates",
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_gets_a_typed_error_that_names_it(case, tmp_path):
    call, error, names = TABLE[case]
    needs_path = call.__code__.co_varnames[: call.__code__.co_argcount] == ("tmp_path",)
    with pytest.raises(error) as caught:
        call(tmp_path) if needs_path else call()
    assert re.search(names, str(caught.value)), str(caught.value)


FAILING_PASSES = {
    "bad labels": (lambda: [(X, Y), (X, Y + 1)], errors.LabelError),
    "short last batch": (lambda: [(X[:7], Y[:7]), (X[7:], Y[7:])], errors.BatchNormError),
    "non-finite input": (lambda: [(X, Y), (X * NAN, Y)], errors.NonFiniteError),
    "interrupt": (interrupting, KeyboardInterrupt),
}


@pytest.mark.parametrize("case", FAILING_PASSES)
def test_a_failing_pass_leaves_everything_as_found(case):
    make_loader, error = FAILING_PASSES[case]
    net = model().train()
    net[2].eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    random_state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    generator_state = generator.get_state()
    with pytest.raises(error):
        estimate(make_loader(), net=net, generator=generator)
    assert torch.equal(generator.get_state(), generator_state)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(m.track_running_stats for m in net if isinstance(m, nn.BatchNorm1d))


def test_every_error_has_one_base_class():
    classes = [getattr(errors, name) for name in errors.__all__]
    assert all(issubclass(c, ek.EkfacError) for c in classes)


def test_a_good_call_passes_where_the_table_fails():
    assert len(estimate()) == 2
    assert float(penalty(damping=0.0).damping) == 0.0
    assert classification_loader(5, 3)
