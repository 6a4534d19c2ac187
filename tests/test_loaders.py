"""One checked way into a loader: all calls take the same mini-batches and refuse the same ones."""

import copy
import itertools
import math
from collections import UserDict
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ekfac_rs as ek
from cases import APPROXIMATIONS, ClassesFirst
from ekfac_rs import errors
from ekfac_rs.likelihood import CrossEntropy
from ekfac_rs.loading import Inputs, Loader
from nets import classification_loader, mlp
from oracle import relative_error

PAIRS = classification_loader(5, 2, examples=28, batch_size=8)  # the last mini-batch is of 4
INF = math.inf


def model():
    return mlp(5, 6, 2)


# --- what each call makes of a loader -------------------------------------------------------------


def tensors_of(curvature):
    return {"loss": curvature.loss, "examples": curvature.examples} | curvature.tensors()


def estimated(net, loader, **functions):
    return tensors_of(ek.estimate_curvature(net, loader, labels="empirical", **functions))


def reparameterized(net, loader, **functions):
    functions.pop("target_fn", None)
    functions.pop("output_fn", None)
    ek.reparameterize(net, loader, **functions)
    return net.state_dict()


def learner(net, **options):
    return ek.ContinualLearner(net, labels="empirical", damping=0.1, **options)


def fitted(net, loader, epochs=1, **functions):
    history = learner(net, **functions).fit(loader, epochs=epochs, lr=0.01)
    return {"history": history} | net.state_dict()


def consolidated(net, loader, **functions):
    learning = learner(net, **functions)
    learning.consolidate(loader)
    return tensors_of(learning.curvatures[0]) | learning.anchor


def evaluated(net, loader, **functions):
    return learner(net, **functions).evaluate([loader])


CALLS = {
    "estimate_curvature": estimated,
    "reparameterize": reparameterized,
    "fit": fitted,
    "consolidate": consolidated,
    "evaluate": evaluated,
}
all_calls = pytest.mark.parametrize("call", CALLS)


class WithoutLength:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from self.batches


class Stream(IterableDataset):
    def __iter__(self):
        for x, y in PAIRS:
            yield from zip(x, y, strict=True)


def in_dictionaries(kind):
    return [kind({"input": x, "labels": y}) for x, y in PAIRS]


class Item(NamedTuple):
    weight: int
    picture: torch.Tensor
    label: torch.Tensor


# Loaders of the very mini-batches in PAIRS, and the functions that they need.
FORMS = {
    "lists": (lambda: [[x, y] for x, y in PAIRS], {}),
    "a function": (lambda: lambda: iter(PAIRS), {}),
    "without a length": (lambda: WithoutLength(PAIRS), {}),
    "a stream of examples": (lambda: DataLoader(Stream(), batch_size=8), {}),
    "dictionaries": (lambda: in_dictionaries(dict), {}),
    "user dictionaries": (lambda: in_dictionaries(UserDict), {}),
    "arguments": (lambda: [((x,), y) for x, y in PAIRS], {}),
    "arguments as collated": (lambda: [[[x], y] for x, y in PAIRS], {}),
    "keyword arguments": (lambda: [({"input": x}, y) for x, y in PAIRS], {}),
    "named tuples of three": (
        lambda: [Item(1, x, y) for x, y in PAIRS],
        {"input_fn": lambda batch: batch.picture, "target_fn": lambda batch: batch.label},
    ),
    "dictionaries under other names": (
        lambda: [{"x": x, "y": y} for x, y in PAIRS],
        {"input_fn": lambda batch: {"input": batch["x"]}, "target_fn": lambda batch: batch["y"]},
    ),
    "labels in int32": (lambda: [(x, y.int()) for x, y in PAIRS], {}),
    "labels in uint8": (lambda: [(x, y.to(torch.uint8)) for x, y in PAIRS], {}),
    "labels in bool": (lambda: [(x, y.bool()) for x, y in PAIRS], {}),
    "labels as probabilities": (
        lambda: [(x, F.one_hot(y, 2).double()) for x, y in PAIRS],
        {},
    ),
    "empty mini-batches between": (
        lambda: [(PAIRS[0][0][:0], PAIRS[0][1][:0]), *PAIRS, (PAIRS[0][0][:0], PAIRS[0][1][:0])],
        {},
    ),
}
# A schedule counts mini-batches before it sees that they are empty: its cosine is another one.
RESCHEDULED = ("empty mini-batches between", "fit")


@pytest.mark.parametrize(
    ("form", "call"), [case for case in itertools.product(FORMS, CALLS) if case != RESCHEDULED]
)
def test_the_form_of_a_loader_makes_no_difference(form, call):
    make, functions = FORMS[form]
    expected = CALLS[call](model(), PAIRS)
    found = CALLS[call](model(), make(), **functions)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("call", ["estimate_curvature", "consolidate", "evaluate"])
def test_an_iterator_will_do_where_one_pass_does(call):
    expected, found = CALLS[call](model(), PAIRS), CALLS[call](model(), iter(PAIRS))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_inputs_alone_will_do_for_new_statistics():
    expected = reparameterized(model(), PAIRS)
    for loader in (
        [x for x, _ in PAIRS],
        [(x,) for x, _ in PAIRS],
        [{"input": x} for x, _ in PAIRS],
        DataLoader(TensorDataset(torch.cat([x for x, _ in PAIRS])), batch_size=8),
    ):
        torch.testing.assert_close(reparameterized(model(), loader), expected, rtol=0, atol=0)


class Several(nn.Module):
    """Takes two tensors, one by name, and returns more than outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = mlp(5, 6, 2), mlp(5, 4, 2, seed=1)

    def forward(self, x, *, other, scale=1.0):
        return {"logits": self.first(x) + scale * self.second(other), "loss": None}


class Plain(Several):
    """The same function of one tensor, with one output."""

    def forward(self, both):
        return self.first(both[:, :5]) + self.second(both[:, 5:])


@all_calls
@pytest.mark.parametrize("wrap", [dict, lambda outputs: SimpleNamespace(**outputs)])
def test_several_inputs_and_an_output_to_be_picked(call, wrap):
    class Wrapped(Several):
        def forward(self, *args, **kwargs):
            return wrap(super().forward(*args, **kwargs))

    functions = {
        "input_fn": lambda batch: {"x": batch[0], "other": batch[1]},
        "target_fn": lambda batch: batch[2],
        "output_fn": lambda outputs: outputs["logits"] if wrap is dict else outputs.logits,
    }
    if call == "reparameterize":
        del functions["target_fn"], functions["output_fn"]

    class Keywords(Wrapped):
        def forward(self, x, other):
            return super().forward(x, other=other)

    batches = [(x, x.flip(1), y) for x, y in PAIRS]
    joined = [(torch.cat([x, other], 1), y) for x, other, y in batches]
    found = CALLS[call](Keywords(), batches, **functions)
    torch.testing.assert_close(found, CALLS[call](Plain(), joined), rtol=1e-12, atol=1e-14)


def test_a_nested_batch_is_cut_and_taken_along():
    inputs = Inputs.of({"x": [torch.zeros(4, 2), {"y": torch.ones(4)}], "table": torch.zeros(3)})
    assert inputs.examples == 4
    x, table = inputs.first(2).kwargs["x"], inputs.first(2).kwargs["table"]
    assert (len(x[0]), len(x[1]["y"]), len(table)) == (2, 2, 3)
    assert [t.device.type for t in inputs.to(torch.device("meta")).tensors()] == ["meta"] * 3


@pytest.mark.parametrize(("limit", "seen"), [(1, [1]), (8, [8]), (9, [8]), (10, [8, 2])])
def test_a_limit_leaves_no_example_alone(limit, seen):
    loader = Loader(PAIRS, torch.device("cpu"))
    assert [b.examples for b in loader.batches(limit, at_least_two=True)] == seen
    assert sum(b.examples for b in loader.batches(limit)) == limit


# --- examples and locations on one axis -----------------------------------------------------------


class Flat(nn.Module):
    """Makes ``[N * T, K]`` of ``[N, T, K]``."""

    def forward(self, x):
        return x.flatten(0, 1)


def language_models():
    """The same function with outputs ``[N, C, T]``, flattened at the end and before the head."""
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6)), nn.Linear(6, 3)
    ends = ([head, ClassesFirst()], [head, Flat()], [Flat(), head])
    return [nn.Sequential(body, *end).double() for end in ends]


def sequences():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(10, 5, 4, generator=generator).double()
    y = torch.randint(3, (10, 5), generator=generator)
    y[2:4, 3:] = -100
    return [(x[:6], y[:6]), (x[6:], y[6:])]


def probabilities(y):
    """``[N, T, C]``; 0 where ignored."""
    return F.one_hot(y.clamp(min=0), 3).double() * (y >= 0)[..., None]


@pytest.mark.parametrize("approximation", [*APPROXIMATIONS, "diagonal"])
@pytest.mark.parametrize("labels", ["exact", "empirical"])
def test_outputs_may_have_examples_and_locations_on_one_axis(labels, approximation):
    plain, *flat = language_models()
    options = {"labels": labels, "approximation": approximation}
    pairs = sequences()
    expected = ek.estimate_curvature(plain, pairs, **options)
    soft = ek.estimate_curvature(
        plain, [(x, probabilities(y).movedim(2, 1)) for x, y in pairs], **options
    )
    for network in flat:
        for target, reference in (
            (lambda y: y, expected),
            (torch.flatten, expected),
            (probabilities, soft),
            (lambda y: probabilities(y).flatten(0, 1), soft),
        ):
            found = ek.estimate_curvature(network, [(x, target(y)) for x, y in pairs], **options)
            assert found.loss == pytest.approx(reference.loss, rel=1e-12)
            assert found.examples == 10
            for one, other in zip(found.values(), reference.values(), strict=True):
                assert relative_error(one.dense(), other.dense()) < 1e-12


def test_flat_outputs_count_examples_in_the_limit():
    plain, flat, _ = language_models()
    options = {"labels": "exact", "max_examples": 7, "statistics": "running"}
    expected = ek.estimate_curvature(plain, sequences(), **options)
    flattened = [(x, y.flatten()) for x, y in sequences()]
    found = ek.estimate_curvature(flat, flattened, **options)
    assert found.examples == 7
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_flat_outputs_of_losses_without_classes(loss):
    _, flat, before_head = language_models()
    apart = nn.Sequential(flat[0], flat[1])
    x = torch.cat([x for x, _ in sequences()])
    target = torch.rand(10, 5, 3, generator=torch.Generator().manual_seed(3)).double()
    options = {"labels": "exact", "loss": loss, "approximation": "xkfac-nested"}
    expected = ek.estimate_curvature(apart, [(x, target)], **options)
    for network in (flat, before_head):
        for t in (target, target.flatten(0, 1)):
            found = ek.estimate_curvature(network, [(x, t)], **options)
            assert found.loss == pytest.approx(expected.loss, rel=1e-12)
            for one, other in zip(found.values(), expected.values(), strict=True):
                assert relative_error(one.dense(), other.dense()) < 1e-12


def test_a_learner_of_flat_outputs_is_one_of_outputs_apart():
    def run(network):
        learning = learner(network)
        history = learning.fit(sequences(), epochs=2)
        learning.consolidate(sequences())
        return history, learning.evaluate([sequences()]), list(network.state_dict().values())

    plain, *_ = language_models()
    _, flat, _ = language_models()
    torch.testing.assert_close(run(flat), run(plain), rtol=1e-12, atol=1e-14)


def test_accuracy_is_over_the_targets_that_count():
    z = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]]).double()
    y = torch.tensor([0, 0, 1, -100])
    soft = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.3], [0.0, 0.0]]).double()
    net = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
    for targets in (y, soft):
        loader = [(z[:1], targets[:1]), (z[1:], targets[1:])]
        assert ek.ContinualLearner(net).evaluate([loader]) == [pytest.approx(1 / 3)]
        [epoch] = ek.ContinualLearner(net).fit(loader, lr=0.0)
        assert epoch["accuracy"] == pytest.approx(1 / 3)


# --- how long a fit takes -------------------------------------------------------------------------


def rates(loader, **options):
    """The learning rate of every step."""
    seen, learning = [], learner(nn.Sequential(nn.Linear(5, 2)).double())
    original = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        history = learning.fit(loader, lr=1.0, **options)
    return seen, len(history)


def cosine(steps):
    return [0.5 + 0.5 * math.cos(math.pi * k / steps) for k in range(steps)]


@pytest.mark.parametrize("loader", [PAIRS, WithoutLength(PAIRS), lambda: iter(PAIRS)])
def test_a_loader_without_a_length_gets_the_schedule_of_one_with(loader):
    seen, history = rates(loader, epochs=3)
    assert seen == pytest.approx(cosine(12))
    assert history == 3


@pytest.mark.parametrize(("steps", "passes"), [(3, 1), (4, 1), (6, 2), (9, 3)])
def test_steps_in_place_of_epochs(steps, passes):
    for loader in (PAIRS, WithoutLength(PAIRS)):
        seen, history = rates(loader, steps=steps)
        assert seen == pytest.approx(cosine(steps))
        assert history == passes


def test_an_endless_loader_is_read_no_further_than_the_steps():
    read = []

    def endless():
        while True:
            read.append(1)
            yield PAIRS[0]

    rates(endless(), steps=5)
    assert len(read) == 5


def test_counting_a_loader_draws_no_order_from_the_random_state():
    data = TensorDataset(torch.cat([x for x, _ in PAIRS]), torch.cat([y for _, y in PAIRS]))

    class Hidden:
        def __init__(self):
            self.loader = DataLoader(data, batch_size=8, shuffle=True)

        def __iter__(self):
            return iter(self.loader)

    def run(loader):
        torch.manual_seed(5)
        return fitted(model(), loader, epochs=2)

    torch.testing.assert_close(run(Hidden()), run(Hidden().loader), rtol=0, atol=0)


def test_the_rate_stays_low_where_a_loader_yields_more_than_its_length():
    class Lying(list):
        def __len__(self):
            return 2

    seen, _ = rates(Lying(PAIRS))
    assert seen == pytest.approx([1.0, 0.5, 0.0, 0.0])


SCHEDULES = {
    "epochs and steps": (lambda: PAIRS, {"epochs": 1, "steps": 2}, "epochs or steps"),
    "no steps": (lambda: PAIRS, {"steps": 0}, "steps.*0"),
    "no epochs": (lambda: PAIRS, {"epochs": 0}, "epochs.*0"),
    "an iterator and epochs": (lambda: iter(PAIRS), {"epochs": 2}, "3 times.*iterator"),
    "an iterator without a length": (lambda: iter(PAIRS), {}, "2 times.*iterator"),
    "an iterator shorter than the steps": (lambda: iter(PAIRS), {"steps": 5}, "iterator"),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_a_schedule_that_cannot_be_kept_is_refused(case):
    make, options, message = SCHEDULES[case]
    net = model()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(errors.OptionError, match=message):
        learner(net).fit(make(), **options)
    if "shorter" not in case:
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_an_iterator_for_a_later_task_is_refused_before_its_statistics_are_taken():
    learning = learner(model())
    learning.fit(PAIRS)
    learning.consolidate(PAIRS)
    before = copy.deepcopy(learning.model.state_dict())
    with pytest.raises(errors.OptionError, match="2 times.*new statistics"):
        learning.fit(iter(PAIRS), steps=2)
    torch.testing.assert_close(learning.model.state_dict(), before, rtol=0, atol=0)


# --- what no call takes ---------------------------------------------------------------------------

X, Y = PAIRS[0]


class Unsized:
    pass


REFUSED = {
    "no mini-batches": (list, errors.EmptyLoaderError, "loader"),
    "no examples": (lambda: [(X[:0], Y[:0])], errors.EmptyLoaderError, "loader"),
    "no loader": (lambda: None, errors.OptionError, "loader.*iterable.*NoneType"),
    "an object": (Unsized, errors.OptionError, "loader.*iterable.*Unsized"),
    "an empty tuple": (lambda: [()], errors.LabelError, "loader.*pairs.*tuple of 0"),
    "three items": (lambda: [(X, X, Y)], errors.LabelError, "loader.*pairs.*of 3.*input_fn="),
    "words as inputs": (lambda: [("words", Y)], errors.LabelError, "loader.*inputs.*str"),
    "a number as input": (lambda: [(torch.tensor(1.0), Y)], errors.LabelError, "axis 0"),
    "inputs in float32": (
        lambda: [(X.float(), Y)],
        errors.DtypeError,
        "model.*parameters of float64.*got float32",
    ),
    "inputs in uint8": (
        lambda: [(X.to(torch.uint8), Y)],
        errors.DtypeError,
        "model.*float64.*got uint8",
    ),
    "token ids": (lambda: [(X.long(), Y)], errors.DtypeError, "model.*float64.*got int64"),
}
REFUSED_WITH_TARGETS = {
    "bare tensors": (lambda: [X], errors.LabelError, "loader.*pairs.*Tensor"),
    "no targets": (lambda: [(X,)], errors.LabelError, "loader.*pairs.*tuple of 1"),
    "a mapping without labels": (
        lambda: [{"input": X, "y": Y}],
        errors.LabelError,
        "loader.*'labels'.*'y'.*target_fn=",
    ),
    "a number as target": (lambda: [(X, 3)], errors.LabelError, "loader.*tensor of targets.*int"),
    "a list of targets": (lambda: [(X, [1, 2])], errors.LabelError, "loader.*targets.*list"),
    "fewer targets than inputs": (lambda: [(X, Y[:5])], errors.LabelError, "loader.*5.*8"),
    "no targets for inputs": (lambda: [(X, Y[:0])], errors.LabelError, "loader.*0.*8"),
    "targets for no inputs": (lambda: [(X[:0], Y)], errors.LabelError, "loader.*8.*0"),
    "twice the targets": (lambda: [(X, Y.repeat(2))], errors.LabelError, r"8 examples.*\(16,\)"),
    "labels out of range": (lambda: [(X, Y + 1)], errors.LabelError, r"0\.\.1.*2"),
    "labels out of range later": (
        lambda: [(X, Y), (X, Y + 1)],
        errors.LabelError,
        r"0\.\.1.*2",
    ),
    "labels of another shape": (lambda: [(X, Y[:, None])], errors.LabelError, r"\(8,\).*\(8, 1\)"),
}


def refuse(call, make, error, message, net=None):
    """Hold a call to an error that leaves no hooks, flags or gradients behind."""
    net = model() if net is None else net
    net.train()
    net[2].eval()
    modes, random_state = [m.training for m in net.modules()], torch.get_rng_state()
    with pytest.raises(error, match=message):
        CALLS[call](net, make())
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(m.track_running_stats for m in net if isinstance(m, nn.BatchNorm1d))


@all_calls
@pytest.mark.parametrize("case", REFUSED)
def test_all_calls_refuse(case, call):
    refuse(call, *REFUSED[case])


@pytest.mark.parametrize("call", [call for call in CALLS if call != "reparameterize"])
@pytest.mark.parametrize("case", REFUSED_WITH_TARGETS)
def test_all_calls_that_need_targets_refuse(case, call):
    refuse(call, *REFUSED_WITH_TARGETS[case])


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize("call", ["estimate_curvature", "fit", "consolidate", "evaluate"])
def test_outputs_that_are_no_tensor_are_refused(call):
    network = model().append(Pair())
    refuse(
        call, lambda: PAIRS, errors.UnsupportedLossError, "model.*tuple.*output_fn=", net=network
    )


@pytest.mark.parametrize("call", ["estimate_curvature", "fit", "consolidate"])
def test_a_last_mini_batch_of_one_is_refused_under_batch_statistics(call):
    loader = [(X[:7], Y[:7]), (X[7:], Y[7:])]
    refuse(call, lambda: loader, errors.BatchNormError, "at least 2.*drop_last=True")


@all_calls
def test_a_last_mini_batch_of_one_is_taken_where_batchnorms_are_frozen(call):
    net = model().train()
    net[1].eval()
    CALLS[call](net, [(X[:7], Y[:7]), (X[7:], Y[7:])])


def test_a_label_of_a_masked_class_is_refused_by_all():
    class Mask(nn.Module):
        def forward(self, z):
            return z.masked_fill(torch.tensor([True, False]), -INF)

    for call in ("estimate_curvature", "fit", "consolidate", "evaluate"):
        refuse(
            call, lambda: [(X, Y)], errors.LabelError, "not masked, got 0", model().append(Mask())
        )
        CALLS[call](model().append(Mask()), [(X, torch.ones_like(Y))])


def test_outputs_that_are_not_finite_have_no_accuracy():
    net = model()
    with torch.no_grad():
        net[3].bias[0] = math.nan
    with pytest.raises(errors.NonFiniteError, match="model"):
        learner(net).evaluate([PAIRS])


def test_an_embedding_says_what_it_was_given():
    net = nn.Sequential(nn.Embedding(4, 3).requires_grad_(False), nn.Flatten(), nn.Linear(15, 2))
    with pytest.raises(errors.DtypeError, match="model.*float32.*Long, Int"):
        ek.estimate_curvature(net, [(X.float(), Y)])
    tokens = X.long().clamp(0, 3)
    assert list(ek.estimate_curvature(net, [(tokens, Y)])) == ["2"]


def test_other_errors_of_the_model_stay_themselves():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="^broken$"):
        learner(model().append(Broken())).fit(PAIRS)


def test_sums_take_mini_batches_of_ignored_labels():
    ignored, net = [(x, torch.full_like(y, -100)) for x, y in PAIRS[:1]], model().train()
    with torch.no_grad():
        total = sum(F.cross_entropy(net(x), y, reduction="sum").item() for x, y in PAIRS)
        hits = sum(int((net(x).argmax(1) == y).sum()) for x, y in PAIRS)
    [epoch] = learner(net, loss=CrossEntropy("sum")).fit([*ignored, *PAIRS], lr=0.0)
    assert epoch["loss"] == pytest.approx(total / 36)
    assert epoch["accuracy"] == pytest.approx(hits / 28)
