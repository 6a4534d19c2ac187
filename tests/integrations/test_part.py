"""A learner's part in somebody else's loop is what `ContinualLearner.fit` does in its own."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import ekfac_rs as ek
from ekfac_rs.errors import IncompatibleError, ModelChangedError, NumericalError, OptionError
from ekfac_rs.integrations.part import LearnersPart
from ekfac_rs.scales import Budget
from nets import classification_loader, mlp

LR = 0.05


def tasks(count=3, batches=6):
    return [classification_loader(8, 3, examples=16 * batches, seed=seed) for seed in range(count)]


def network():
    torch.manual_seed(0)
    return mlp(8, 12, 12, 3)


def part_of(model, **options):
    options = {"damping": 0.01, **options}
    generator = torch.Generator().manual_seed(0)
    return LearnersPart(ek.ContinualLearner(model, generator=generator, **options), "the test")


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def step(part, optimizer, x, y):
    model = part.learner.model
    part.before_forward((x, y))
    loss = nn.functional.cross_entropy(model(x), y)
    penalty = part.penalty()
    total = loss if penalty is None else loss + penalty
    optimizer.zero_grad()
    total.backward()
    part.before_step(optimizer, loss.detach())
    optimizer.step()


def train(part, loader, epochs=2):
    part.learner.model.train()
    optimizer = optimizer_of(part.learner.model)
    part.begin(loader, epochs * len(loader), [optimizer])
    for _ in range(epochs):
        # As libraries do, whatever is frozen.
        part.learner.model.train()
        for x, y in loader:
            step(part, optimizer, x, y)


def same(first, second):
    return all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 3.0},
        {"scale": "auto"},
        {"scale": "adaptive", "weights": "first"},
        {"approximation": None, "damping": 0.3},
        {"approximation": "kfac-expand", "coordinates": "raw", "step": "explicit"},
        {"max_terms": 3, "dropped": 0.1},
        {"freeze_bn_after": 0.4, "statistics": "running", "weights": "first", "own": True},
        {"freeze_bn_after": 0.0, "statistics": "running"},
        {"approximation": None, "damping": 0.0, "freeze_bn_after": 0.4},
    ],
    ids=[
        *("number", "auto", "adaptive", "L2", "raw and explicit", "compressed"),
        *("frozen and own", "frozen from the start", "frozen without a penalty"),
    ],
)
def test_a_loop_of_ones_own_ends_where_fit_does_bit_for_bit(options):
    model = network()
    part, other = part_of(model, **options), copy.deepcopy(model)
    learner = part_of(other, **options).learner
    learner.scheduler = None
    for loader in tasks():
        train(part, loader)
        part.consolidate(loader)
        learner.fit(loader, epochs=2, lr=LR)
        learner.consolidate(loader)
        assert same(model, other)
        assert all(module.training for module in model.modules())
    assert part.learner.task == 3
    assert part.learner.selection == learner.selection
    assert len(part.learner.selection) == (2 if part.learner.curvatures or learner.damping else 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head", "new"),
        ("optimizer", torch.optim.Adam),
        ("scheduler", None),
        ("momentum", 0.5),
    ],
)
def test_options_of_training_by_itself_are_refused(name, value):
    with pytest.raises(OptionError, match=f"learner: expected its {name} left at"):
        part_of(network(), **{name: value})


def test_what_is_no_learner_and_scales_by_restarts_are_refused():
    with pytest.raises(OptionError, match="expected a ContinualLearner, got a Sequential"):
        LearnersPart(network(), "the test")
    with pytest.raises(OptionError, match="begins training anew"):
        part_of(network(), scale="halving")
    part = part_of(network())
    part.learner.scale = "halving"
    with pytest.raises(OptionError, match="begins training anew"):
        part.begin(tasks(1)[0], 6, [optimizer_of(part.learner.model)])


@pytest.fixture
def consolidated():
    first, second, _ = tasks()
    part = part_of(network(), scale="auto")
    train(part, first)
    part.consolidate(first)
    return part, second


def test_a_rule_that_needs_the_number_of_steps_is_refused_without_it(consolidated):
    part, loader = consolidated
    before = copy.deepcopy(part.learner.model)
    optimizer = optimizer_of(part.learner.model)
    with pytest.raises(OptionError, match="nobody knows how many steps the test will make"):
        part.begin(loader, None, [optimizer])
    assert same(before, part.learner.model)
    assert part.learner.selection == []
    part.learner.scale, part.learner.freeze_bn_after = 2.0, 0.5
    with pytest.raises(OptionError, match="will make, got freeze_bn_after=0.5"):
        part.begin(loader, None, [optimizer])
    part.learner.freeze_bn_after = 0.0
    part.begin(loader, None, [optimizer])
    step(part, optimizer, *loader[0])
    assert part.learner.selection[-1].scale == [2.0]


def test_an_optimizer_that_wants_a_closure_is_refused(consolidated):
    part, loader = consolidated
    lbfgs = torch.optim.LBFGS(part.learner.model.parameters())
    with pytest.raises(OptionError, match="needs 'closure'"):
        part.begin(loader, 6, [lbfgs])


def test_explicit_steps_that_are_too_long_are_warned_of(consolidated):
    part, loader = consolidated
    part.learner.step, part.learner.scale = "explicit", 1e6
    with pytest.warns(ek.StabilityWarning, match="exceeds"):
        part.begin(loader, 6, [optimizer_of(part.learner.model)])
    part.end()


def test_a_loss_that_is_not_finite_is_an_error(consolidated):
    part, loader = consolidated
    optimizer = optimizer_of(part.learner.model)
    part.begin(loader, 6, [optimizer])
    x, y = loader[0]
    (nn.functional.cross_entropy(part.learner.model(x), y) + part.penalty()).backward()
    with pytest.raises(NumericalError, match="finite loss, got nan at step 1"):
        part.before_step(optimizer, torch.tensor(float("nan")))


def test_a_model_that_is_another_or_holds_the_learners():
    part = part_of(network())
    part.require_within(part.learner.model)
    part.require_within(nn.Sequential(part.learner.model))
    with pytest.raises(ModelChangedError, match="the one that the learner was made with"):
        part.require_within(network())


@pytest.mark.parametrize("end", ["end", "consolidate"])
def test_nothing_listens_to_the_model_when_a_task_is_over(consolidated, end):
    part, loader = consolidated
    train(part, loader)
    hooks = [m._forward_hooks for m in part.learner.model.modules()]
    assert any(hooks)
    part.end() if end == "end" else part.consolidate(loader)
    assert not any(hooks)
    assert part.penalty() is None


@pytest.mark.parametrize("options", [{"own": True}, {"freeze_bn_after": 0.25}], ids=str)
@pytest.mark.parametrize("done", [1, 3])
def test_a_state_taken_amid_a_task_goes_on_bit_for_bit(options, done):
    first, loader, _ = tasks()
    options = {"scale": "auto", **options}
    part = part_of(network(), **options)
    train(part, first)
    part.consolidate(first)
    optimizer = optimizer_of(part.learner.model)
    part.begin(loader, len(loader), [optimizer])
    for x, y in loader[:done]:
        step(part, optimizer, x, y)
    state, weights = copy.deepcopy((part.state_dict(), part.learner.model.state_dict()))
    optimized = copy.deepcopy(optimizer.state_dict())
    part.begin_anew()
    for x, y in loader[done:]:
        step(part, optimizer, x, y)
    part.consolidate(loader)

    other = part_of(network(), **options)
    other.learner.model.load_state_dict(weights)
    other.load_state_dict(state)
    resumed = optimizer_of(other.learner.model)
    resumed.load_state_dict(optimized)
    other.begin(loader, len(loader), [resumed])
    for x, y in loader[done:]:
        step(other, resumed, x, y)
    other.consolidate(loader)
    assert same(part.learner.model, other.learner.model)
    assert other.learner.selection == part.learner.selection


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {},
        lambda state: {"learner": state["learner"]},
        lambda state: {**state, "training": {"penalty": {}}},
        lambda state: {**state, "learner": {}},
    ],
)
def test_another_state_is_refused_and_changes_nothing(consolidated, spoil):
    part, loader = consolidated
    train(part, loader)
    state = part.state_dict()
    with pytest.raises(IncompatibleError, match="state: expected"):
        part.load_state_dict(spoil(state))
    assert part.learner.task == 1
    # Training goes on.
    x, y = loader[0]
    step(part, optimizer_of(part.learner.model), x, y)
    assert len(part.learner.selection[-1].scale) == 13


def test_a_learner_takes_new_statistics_in_a_loop_of_ones_own(consolidated):
    part, loader = consolidated
    learner = part.learner
    model = learner.model.eval()
    x = torch.cat([x for x, _ in loader])
    outputs, before = model(x), copy.deepcopy(model.state_dict())
    learner.reparameterize(loader)
    after = model.state_dict()
    assert not torch.allclose(before["1.running_mean"], after["1.running_mean"])
    torch.testing.assert_close(model(x), outputs)
    mean = model[0](x).mean(0)
    torch.testing.assert_close(after["1.running_mean"], mean)


@pytest.mark.parametrize("options", [{"coordinates": "raw"}, {}])
def test_without_anything_held_in_merged_coordinates_statistics_stay(options):
    learner = part_of(network(), **options).learner
    if options:
        learner.consolidate(tasks(1)[0])
    before = copy.deepcopy(learner.model)
    learner.reparameterize(partial(iter, tasks(1)[0]))
    assert same(before, learner.model)


def test_the_rule_goes_on_from_the_task_before(consolidated):
    part, loader = consolidated
    train(part, loader)
    part.consolidate(loader)
    train(part, tasks()[2])
    first, second = part.learner.selection
    assert second.scale[0] == pytest.approx(first.scale[-1], rel=0.5)
    assert first.rule == repr(Budget())
