"""What a caller has switched on around us, and half precision, change no result."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn

import ekfac_rs as ek
from ekfac_rs.errors import UnsupportedLayerError
from nets import classification_loader, mlp
from oracle import relative_error


def network(dtype=torch.float64):
    return mlp(5, 6, 6, 3, dtype=dtype)


def loader(dtype=torch.float64, seed=0):
    return classification_loader(5, 3, seed=seed, dtype=dtype)


@contextlib.contextmanager
def default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "another default dtype": default_dtype,
    "another default device": lambda: torch.device("meta"),
    "deterministic algorithms": deterministic,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
}


def curvature(model, batches):
    found = ek.estimate_curvature(model, batches, labels="type2", generator=seeded())
    return {name: block.dense() for name, block in found.items()}


def seeded():
    return torch.Generator("cpu").manual_seed(0)


def put_back(model, batches):
    ek.reparameterize(model, batches)
    return dict(model.state_dict())


def exported(model, batches):
    ek.merge_batchnorm(model)
    return dict(model.state_dict())


def learnt(model, batches, tasks=2, **options):
    learner = ek.ContinualLearner(model, damping=0.1, generator=seeded(), **options)
    for _ in range(tasks):
        learner.fit(batches, lr=0.01)
        learner.consolidate(batches)
    return {
        "accuracy": torch.tensor(learner.evaluate([batches]), device="cpu", dtype=torch.float64)
    } | dict(model.state_dict())


def learnt_in_every_way(model, batches):
    return learnt(
        model,
        batches,
        tasks=4,
        head="new",
        max_terms=3,
        scale="auto",
        own=True,
        weights="first",
        freeze_bn_after=0.5,
    )


CALLS = {
    "estimate_curvature": curvature,
    "merged_weights": lambda model, batches: dict(ek.merged_weights(model)),
    "merged_weights, observed": lambda model, batches: dict(
        ek.merged_weights(model, example=batches[0][0])
    ),
    "raw_weights": lambda model, batches: dict(ek.raw_weights(model)),
    "reparameterize": put_back,
    "merge_batchnorm": exported,
    "learner": learnt,
    "learner in every way": learnt_in_every_way,
    "describe": lambda model, batches: ek.describe(model).factor_bytes,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_around_a_call_changes_nothing(mode, call):
    expected = CALLS[call](network(), loader())
    model, batches = network(), loader()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own, on switching anomaly mode on
        around = MODES[mode]()
    with around:
        found = CALLS[call](model, batches)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("call", ["estimate_curvature", "reparameterize", "learner"])
def test_inputs_made_in_inference_mode_are_as_good_as_others(call):
    expected = CALLS[call](network(), loader())
    with torch.inference_mode():
        batches = loader()
        found = CALLS[call](network_outside(), batches)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def network_outside():
    with torch.inference_mode(False):
        return network()


@pytest.mark.parametrize("call", [name for name in CALLS if name != "describe"])
def test_a_model_made_in_inference_mode_is_told_in_one_sentence(call):
    with torch.inference_mode():
        model = network()
    with pytest.raises(UnsupportedLayerError, match=r"inference_mode\(\).*outside"):
        CALLS[call](model, loader())


# --- compiled models -----------------------------------------------------------------------------


def part_compiled():
    model = network()
    model[3] = torch.compile(model[3], backend="eager")
    model[4] = torch.compile(model[4], backend="eager")
    return model


COMPILED = {
    "whole": lambda: torch.compile(network(), backend="eager"),
    "some modules": part_compiled,
    "in place": lambda: in_place(network()),
}


def in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("call", ["estimate_curvature", "merged_weights, observed"])
@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_model_is_what_it_was_compiled_from(how, call):
    found = CALLS[call](COMPILED[how](), loader())
    torch.testing.assert_close(found, CALLS[call](network(), loader()), rtol=0, atol=0)


# A warning of the compiler about itself, while it looks at what a hook keeps.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", COMPILED)
def test_the_penalty_of_a_compiled_model(how):
    model, plain = COMPILED[how](), network()
    values = []
    for own in (model, plain):
        found = ek.estimate_curvature(own, loader(), labels="type2", generator=seeded())
        anchor = ek.merged_weights(own, example=loader()[0][0])
        with ek.QuadraticPenalty(own, found, anchor, damping=0.1) as penalty:
            with torch.no_grad():
                for parameter in own.parameters():
                    parameter.add_(0.1)
            own.train()(loader()[0][0])
            values.append(float(penalty().detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", COMPILED)
def test_a_learner_of_a_compiled_model(how):
    def learn(model):
        learner = ek.ContinualLearner(model, damping=0.1, labels="type2", generator=seeded())
        for _ in range(2):
            learner.fit(loader(), lr=0.01)
            learner.consolidate(loader())
        return learner.evaluate([loader()]), learner.anchor, list(model.state_dict().values())

    torch.testing.assert_close(learn(COMPILED[how]()), learn(network()), rtol=1e-12, atol=1e-14)


def test_a_compiled_model_is_compiled_again_afterwards():
    calls = []

    def backend(graph, inputs):
        calls.append(1)
        return graph.forward

    model = torch.compile(nn.Sequential(nn.Linear(5, 3)).double(), backend=backend)
    ek.estimate_curvature(model, loader())
    assert calls == []
    model(loader()[0][0])
    assert calls == [1]


def test_describe_uses_plain_names():
    names = [p.name for p in ek.describe(COMPILED["whole"]()).parameters]
    assert names == [name for name, _ in network().named_parameters()]


def test_a_parallel_wrapper_is_told_to_be_taken_off():
    with pytest.raises(UnsupportedLayerError, match=r"DataParallel.*\.module"):
        ek.estimate_curvature(nn.DataParallel(network()), loader())


# --- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_has_float32_factors_anchor_and_penalty(dtype):
    model = network(dtype)
    exact = copy.deepcopy(model).double()
    batches = loader(dtype)
    wide = [(x.double(), y) for x, y in batches]
    found = ek.estimate_curvature(model, batches, labels="exact", statistics="running")
    expected = ek.estimate_curvature(exact, wide, labels="exact", statistics="running")
    tolerance = 20 * torch.finfo(dtype).eps
    for name, block in found.items():
        assert block.dtype == torch.float32
        assert relative_error(block.dense().double(), expected[name].dense()) < tolerance
    anchor = ek.merged_weights(model)
    for name, weight in ek.merged_weights(exact).items():
        assert anchor[name].dtype == torch.float32
        assert relative_error(anchor[name].double(), weight) < 1e-6
    with ek.QuadraticPenalty(model.eval(), found, anchor, damping=0.1) as penalty:
        assert float(penalty().detach()) < 1e-9
        with torch.no_grad():
            model[0].weight.add_(0.25)
        value = penalty()
        value.backward()
    assert float(value.detach()) > 1e-3
    assert model[0].weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_that_moved_are_noticed(dtype):
    model = network(dtype)
    found = ek.estimate_curvature(model, loader(dtype), statistics="running")
    with torch.no_grad():
        model[0].weight.mul_(1.05)
    with pytest.raises(ek.errors.ModelChangedError, match="'0'"):
        ek.QuadraticPenalty(model, found, ek.merged_weights(model))


@pytest.mark.parametrize("coordinates", ["merged", "raw"])
def test_a_learner_in_half_precision_learns_as_one_in_single(coordinates):
    def learn(model, dtype):
        options = {"coordinates": coordinates, "damping": 0.1, "labels": "type2"}
        learner = ek.ContinualLearner(model, generator=seeded(), **options)
        for seed in (0, 1):
            history = learner.fit(loader(dtype, seed), epochs=4, lr=0.01)
            learner.consolidate(loader(dtype, seed))
        return learner, history

    half, found = learn(network(torch.bfloat16), torch.bfloat16)
    _, expected = learn(network(torch.bfloat16).float(), torch.float32)
    assert all(p.dtype == torch.bfloat16 for p in half.model.parameters())
    assert {weight.dtype for weight in half.anchor.values()} == {torch.float32}
    assert {block.dtype for block in half.curvatures[1].values()} == {torch.float32}
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)
        assert one["penalty"] == pytest.approx(other["penalty"], rel=0.2, abs=1e-3)


def test_the_penalty_of_half_precision_in_train_mode_is_that_of_the_same_weights():
    model, batches = network(torch.bfloat16), loader(torch.bfloat16)
    found = ek.estimate_curvature(model, batches, labels="exact")
    anchor = ek.merged_weights(model)
    with torch.no_grad():
        model[0].weight.add_(0.25)
    wide = copy.deepcopy(model).float()
    values, gradients = [], []
    for own in (model, wide):
        # The batch statistics of the BatchNorms are taken of inputs in the model's dtype.
        with ek.QuadraticPenalty(own, found, anchor, damping=0.1) as penalty:
            own.train()(batches[0][0].to(own[0].weight.dtype))
            value = penalty()
            value.backward()
        values.append(value.item())
        gradients.append(own[0].weight.grad.float())
    assert values[0] == pytest.approx(values[1], rel=0.05)
    assert relative_error(gradients[0], gradients[1]) < 0.05


class InAutocast(nn.Module):
    """Runs a network with or without autocast, whatever there is around it."""

    def __init__(self, inner, enabled):
        super().__init__()
        self.inner, self.enabled = inner, enabled

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.inner(x)


def test_autocast_around_a_learner_is_autocast_around_its_model():
    """Weights are rounded anew after every step, and with gradients after passes without."""

    def learn(model):
        learner = ek.ContinualLearner(model, damping=0.1, labels="type2", generator=seeded())
        batches = loader(torch.float32)
        history = []
        for _ in range(2):
            history += learner.fit(batches, epochs=3, lr=0.05)
            history += learner.evaluate([batches])
            learner.consolidate(batches)
        return history, list(model.state_dict().values())

    expected = learn(InAutocast(network(torch.float32), enabled=True))
    plain = learn(network(torch.float32))
    model = network(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = learn(model)
        assert torch.is_autocast_cache_enabled()
        x = loader(torch.float32)[0][0]
        inside = model.eval()(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found[0] != plain[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), inside, rtol=0, atol=0)


@pytest.mark.parametrize("approximation", ["kfac-reduce", "xkfac", "diagonal"])
def test_autocast_rounds_the_model_and_nothing_else(approximation):
    def blocks():
        model = InAutocast(network(torch.float32), enabled=False)
        found = ek.estimate_curvature(
            model, loader(torch.float32), labels="exact", approximation=approximation
        )
        return {name: block.dense() for name, block in found.items()} | ek.merged_weights(
            model, example=loader(torch.float32)[0][0]
        )

    expected = blocks()
    with torch.autocast("cpu", torch.bfloat16):
        found = blocks()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_autocast_leaves_factors_in_float32_and_near_the_exact_ones():
    model, batches = network(torch.float32), loader(torch.float32)
    expected = curvature(model, batches)
    with torch.autocast("cpu", torch.bfloat16):
        found = curvature(model, batches)
    for name, block in found.items():
        assert block.dtype == torch.float32
        assert relative_error(block, expected[name]) < 0.1
