"""Rules that choose the scale of a task's penalty, and what they tell of it."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ekfac_rs as ek
from ekfac_rs.errors import EkfacError, NumericalError, OptionError
from ekfac_rs.scales import Adaptive, Budget, Fixed, Halving, Selection, rule_of
from nets import classification_loader, mlp

LOADERS = [
    classification_loader(6, 3, examples=64, batch_size=16, dtype=torch.float32, seed=seed)
    for seed in (0, 1, 2)
]


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def learner_of(scale, **options):
    options = {"approximation": "xkfac", "damping": 0.01} | options
    generator = torch.Generator().manual_seed(0)
    return ek.ContinualLearner(net(), scale=scale, generator=generator, **options)


def after_first_task(scale, **options):
    learner = learner_of(scale, **options)
    learner.fit(LOADERS[0], epochs=3, lr=0.1)
    learner.consolidate(LOADERS[0])
    return learner


def weights(learner):
    return torch.cat([p.detach().flatten() for p in learner.model.state_dict().values()])


# --- every rule's report -------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0, "counting", "adaptive", "auto"])
def test_every_step_is_written_down(scale):
    learner = after_first_task(scale)
    assert learner.selection == []
    learner.fit(LOADERS[1], epochs=2, lr=0.1)
    (selection,) = learner.selection
    assert selection.tasks == 1
    for numbers in (selection.scale, selection.loss, selection.increase):
        assert len(numbers) == 2 * len(LOADERS[1])
        assert all(math.isfinite(number) for number in numbers)
    assert selection.increase[0] < 1e-3
    assert max(selection.increase) > 0.0


def test_what_is_predicted_is_the_quadratic_form_of_the_sum_of_curvatures():
    learner = after_first_task(5.0)
    learner.fit(LOADERS[1], lr=0.1)
    learner.consolidate(LOADERS[1])
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter += 0.1
    learner.model.eval()
    with learner.penalty() as penalty, torch.no_grad():
        value, increase = float(penalty()), float(penalty.predicted_increase())
        deviations = penalty.deviations()
    forms = [
        curvature[name].quadratic(D.detach().contiguous())
        for curvature in learner.curvatures
        for name, D in deviations.items()
    ]
    assert increase == pytest.approx(0.5 * sum(forms), rel=1e-5)
    squares = sum(float(D.square().sum()) for D in deviations.values())
    assert value == pytest.approx(5.0 * increase + 0.5 * 0.01 * squares, rel=1e-5)


def test_a_prediction_is_of_running_statistics_whatever_the_mini_batch():
    learner = after_first_task(5.0)
    with torch.no_grad():
        learner.model[0].weight += 0.1
    with learner.penalty() as penalty:
        learner.model.eval()
        penalty()
        settled = float(penalty.predicted_increase())
        learner.model.train()
        running = learner.model[1].running_var.clone()
        learner.model(LOADERS[1][0][0])
        learner.model[1].running_var.copy_(running)
        learner.model[1].running_mean.zero_()
        learner.model(LOADERS[1][1][0])
        penalty()
        in_between = float(penalty.predicted_increase())
        learner.model.eval()
        penalty()
        assert in_between == float(penalty.predicted_increase())
    assert in_between != pytest.approx(settled, rel=1e-3)


def test_a_report_is_a_mean_over_earlier_tasks():
    learner = after_first_task(1.0)
    learner.fit(LOADERS[1], lr=0.1)
    learner.consolidate(LOADERS[1])
    seen = []
    learner.fit(LOADERS[2], lr=0.1, callback=lambda step, _: seen.append(step))
    last = learner.selection[-1]
    assert last.tasks == 2
    penalties = [s * 2 * increase for s, increase in zip(last.scale, last.increase, strict=True)]
    history = learner.fit(LOADERS[2], lr=0.0)
    assert len(seen) == len(penalties)
    again = learner.selection[-1]
    mean = sum(s * 2 * i for s, i in zip(again.scale, again.increase, strict=True)) / len(seen)
    # Mini-batches add noise to what is held on to.
    assert history[0]["penalty"] >= mean > 0.0


def test_a_report_goes_with_the_state_and_is_drawn(tmp_path):
    learner = after_first_task("adaptive")
    learner.fit(LOADERS[1], lr=0.1)
    again = learner_of("adaptive")
    again.load_state_dict(learner.state_dict())
    assert again.selection == learner.selection
    learner.selection[0].plot(tmp_path / "selection.png")
    assert (tmp_path / "selection.png").read_bytes()[:4] == b"\x89PNG"


def test_states_from_before_there_were_reports_are_loaded():
    learner = after_first_task(1.0)
    state = learner.state_dict()
    del state["selection"]
    learner.load_state_dict(state)
    assert learner.selection == []


# --- numbers -------------------------------------------------------------------------------------


def test_counting_is_a_scale_of_one():
    by_number, by_name = after_first_task(1.0), after_first_task("counting")
    for learner in (by_number, by_name):
        learner.fit(LOADERS[1], lr=0.1)
    assert torch.equal(weights(by_number), weights(by_name))


def test_a_scale_may_change_between_two_calls_and_steps_stay_stable():
    learner = after_first_task(1.0)
    model = copy.deepcopy(learner.model)
    x = LOADERS[1][0][0]

    def gradients(scales, lr=50.0):
        learner.model.load_state_dict(model.state_dict())
        with learner.penalty() as penalty:
            for scale in scales:
                penalty.scale = scale
                learner.model.zero_grad()
                with torch.no_grad():
                    for number, p in enumerate(learner.model.parameters()):
                        p.copy_(list(model.parameters())[number] + 0.01)
                learner.model.train()
                learner.model(x)
                penalty().backward()
                penalty.precondition(lr)
        return torch.cat([p.grad.flatten() for p in learner.model.parameters()])

    # A step far above the explicit limit overshoots unless it was prepared for this scale.
    for risen in (gradients([1.0, 1000.0]), gradients([1000.0, 1.0, 1000.0])):
        assert float(50.0 * risen.norm()) < 10.0 * float(50.0 * gradients([1000.0]).norm())


# --- adaptive ------------------------------------------------------------------------------------

losses = st.lists(st.tuples(st.floats(0.0, 1e3), st.floats(0.0, 1e3)), min_size=1, max_size=200)


@given(losses, st.floats(1.0, 100.0), st.floats(0.0, 1e3))
def test_the_adaptive_scale_goes_to_the_larger_loss_within_its_bounds(seen, bound, rate):
    control = Adaptive(bound, rate).control([None], len(seen))
    assert control.scale == 1.0
    for loss, increase in seen:
        before = control.scale
        control.update(loss, increase)
        assert 1.0 / bound * 0.999 <= control.scale <= bound * 1.001
        if before * increase > loss:
            assert control.scale >= before
        elif before * increase < loss:
            assert control.scale <= before


def test_the_adaptive_scale_settles_where_weighted_losses_are_equal():
    control = Adaptive(bound=1e3, rate=20.0).control([None], steps=2000)
    for _ in range(2000):
        # What is held on to moves less under a stronger penalty: weighted, its loss is 7 / scale.
        control.update(loss=0.5, increase=7.0 / control.scale**2)
    assert control.scale == pytest.approx(14.0, rel=1e-3)


def test_the_adaptive_scale_of_a_run_is_what_its_report_gives():
    learner = after_first_task(Adaptive(bound=10.0, rate=3.0))
    learner.fit(LOADERS[1], epochs=3, lr=0.1)
    (seen,) = learner.selection
    log_scale, steps = 0.0, len(seen.scale)
    for scale, loss, increase in zip(seen.scale, seen.loss, seen.increase, strict=True):
        assert scale == pytest.approx(math.exp(log_scale))
        share = (scale * increase - loss) / (scale * increase + loss)
        log_scale += 3.0 / steps * math.log(10.0) * share
        log_scale = max(-math.log(10.0), min(math.log(10.0), log_scale))


# --- halving -------------------------------------------------------------------------------------


def test_halving_ends_at_the_first_scale_that_is_enough_and_is_that_run():
    rule = Halving(start=1e4, tolerance=0.1, tries=20)
    learner, plain = after_first_task(rule), after_first_task(rule)
    begun = copy.deepcopy(learner.model.state_dict())
    learner.fit(LOADERS[1], epochs=6, lr=0.1)
    (selection,) = learner.selection
    (zero, reference), *tries = selection.tries
    assert zero == 0.0
    scales = [scale for scale, _ in tries]
    assert scales == [1e4 / 2**number for number in range(len(tries))]
    assert 1 < len(tries) < 20
    reached = [accuracy for _, accuracy in tries]
    assert all(accuracy < reference - 0.1 * reference for accuracy in reached[:-1])
    assert reached[-1] >= reference - 0.1 * reference
    assert learner.evaluate([LOADERS[1]])[0] == reached[-1]

    plain.model.load_state_dict(begun)
    plain.scale = scales[-1]
    plain.fit(LOADERS[1], epochs=6, lr=0.1)
    assert torch.equal(weights(plain), weights(learner))
    assert selection.scale == plain.selection[-1].scale


def test_a_try_that_diverges_was_not_enough():
    rule = Halving(start=1e8, tolerance=10.0, tries=40)
    learner = after_first_task(rule, step="explicit")
    with pytest.warns(ek.StabilityWarning):
        learner.fit(LOADERS[1], epochs=6, lr=0.1)
    (selection,) = learner.selection
    _, *tries = selection.tries
    reached = [accuracy for _, accuracy in tries]
    assert reached.count(None) > 2
    assert reached[-1] is not None
    assert torch.isfinite(weights(learner)).all()
    assert Selection.from_dict(selection.as_dict()) == selection


def test_where_every_try_diverges_the_last_ones_error_is_raised():
    learner = after_first_task(Halving(start=1e8, tries=2), step="explicit")
    before = weights(learner)
    with (
        pytest.warns(ek.StabilityWarning),
        pytest.raises(NumericalError, match="diverged at step|finite loss"),
    ):
        learner.fit(LOADERS[1], epochs=6, lr=0.1)
    assert torch.equal(weights(learner), before)
    assert learner.selection == []


def test_halving_is_judged_on_validation_data_where_there_are_any():
    learner = after_first_task(Halving(start=1.0, tries=1))
    learner.fit(LOADERS[1], lr=0.1, validation=LOADERS[2])
    assert learner.selection[0].tries[-1][1] == learner.evaluate([LOADERS[2]])[0]
    with pytest.raises(OptionError, match="validation: expected none"):
        after_first_task(1.0).fit(LOADERS[1], validation=LOADERS[2])


def test_halving_without_anything_to_hold_is_plain_training():
    learner = learner_of("halving")
    learner.fit(LOADERS[0], lr=0.1)
    plain = learner_of(1.0)
    plain.fit(LOADERS[0], lr=0.1)
    assert torch.equal(weights(learner), weights(plain))
    assert learner.selection == []


@given(st.floats(-10.0, 10.0), st.floats(0.0, 1.0), st.floats(0.0, 10.0))
def test_tolerance_is_a_share_of_the_reference(reference, tolerance, missing):
    enough = Halving(tolerance=tolerance).is_enough(reference - missing, reference)
    assert enough == (reference - missing >= reference - tolerance * abs(reference))


# --- what is refused -----------------------------------------------------------------------------


def test_unless_told_it_chooses_itself_where_there_is_a_curvature():
    assert ek.ContinualLearner(mlp(4, 6, 3)).scale == "auto"
    assert ek.ContinualLearner(mlp(4, 6, 3), approximation=None, damping=0.1).scale == 1.0


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf, "largest", [1.0], Budget], ids=repr)
def test_no_other_scale_is_taken(scale):
    with pytest.raises(OptionError, match="scale: expected"):
        learner_of(scale)
    if not isinstance(scale, float):
        with pytest.raises(OptionError, match="'counting', 'adaptive', 'auto', 'halving'"):
            learner_of(scale)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Adaptive(bound=0.5),
        lambda: Adaptive(rate=-1.0),
        lambda: Budget(share=-1.0),
        lambda: Budget(share=0.0),
        lambda: Budget(bound=math.inf),
        lambda: Halving(tries=0),
        lambda: Halving(start=-1.0),
        lambda: Halving(start=0.0),
        lambda: Budget(start=0.0),
        lambda: Budget(settle=1.5),
        lambda: Fixed(math.nan),
    ],
)
def test_rules_refuse_options_that_cannot_be(make):
    with pytest.raises(OptionError):
        make()


def test_a_rule_is_its_own_and_names_are_those_of_rules():
    rule = Adaptive(bound=3.0)
    assert rule_of(rule) is rule
    assert rule_of(2) == Fixed(2)
    assert rule_of("halving") == Halving()
    assert Selection.from_dict(Selection("rule", 1).as_dict()) == Selection("rule", 1)


# --- budget --------------------------------------------------------------------------------------


@given(
    st.floats(1e-4, 1.0),
    st.integers(1, 30),
    st.floats(0.3, 2.0),
    st.floats(-2.0, 2.0),
)
def test_a_budget_is_reached_where_what_is_predicted_falls_with_the_scale(
    loss, tasks, power, distance
):
    rule = Budget(share=0.1, start=10.0, rate=60.0)
    control = rule.control([loss] * tasks, steps=3000)
    assert (control.scale, control.budget) == (10.0, pytest.approx(0.1 * loss))
    # At the right scale each of the tasks is predicted to lose just the budget.
    right = 10.0 * math.exp(distance)
    for _ in range(3000):
        increase = 0.1 * loss * tasks * (right / control.scale) ** power
        control.update(loss=1.0, increase=increase)
    assert control.scale == pytest.approx(right, rel=0.05)


def test_a_budget_lets_a_task_settle_and_allows_more_in_its_middle():
    rule = Budget(share=0.1, start=3.0, settle=0.5, rate=10.0)
    control = rule.control([0.05, 0.15], steps=100)
    for _ in range(49):
        control.update(1.0, 100.0)
        assert control.scale == 3.0
    # Half-way 1 + 2 / 4 times the budget is allowed.
    control.update(1.0, 1.5 * 0.02)
    assert control.scale == pytest.approx(3.0)
    control.update(1.0, 1e3)
    assert control.scale == pytest.approx(3.0 * math.exp(0.1))
    control.update(1.0, 1e-9)
    assert control.scale == pytest.approx(3.0)
    control.update(1.0, 0.0)
    assert control.scale == pytest.approx(3.0)


@given(losses, st.floats(1.0, 10.0))
def test_a_budget_stays_within_its_bounds(seen, bound):
    rule = Budget(start=1.0, bound=bound, rate=1e3, settle=0.0)
    control = rule.control([1.0, 0.0, 2.0], len(seen))
    for loss, increase in seen:
        control.update(loss, increase)
        assert 1.0 / bound * 0.999 <= control.scale <= bound * 1.001


def test_the_next_task_begins_with_the_scale_that_the_one_before_ended_with():
    learner = after_first_task(Budget(share=1e-4, start=2.0, settle=0.0))
    for loader in LOADERS[1:]:
        learner.fit(loader, epochs=4, lr=0.1)
        learner.consolidate(loader)
    first, second = learner.selection
    assert first.scale[0] == 2.0
    assert first.scale[-1] > 2.0
    assert second.scale[0] == first.scale[-1]
    again = after_first_task(first.scale[-1])
    again.load_state_dict(learner.state_dict())
    again.fit(LOADERS[1], lr=0.1)
    assert again.selection[-1].scale[0] == first.scale[-1]


def test_another_rule_does_not_begin_where_one_ended():
    learner = after_first_task(Budget(share=1e-4, start=2.0, settle=0.0))
    learner.fit(LOADERS[1], epochs=4, lr=0.1)
    learner.scale = Budget(share=1e-5, start=7.0)
    learner.fit(LOADERS[1], epochs=4, lr=0.1)
    assert learner.selection[-1].scale[0] == 7.0


@pytest.mark.parametrize("scale", [1.0, "auto"])
def test_the_loss_at_consolidation_is_the_curvatures_own(scale):
    learner = after_first_task(scale, statistics="running")
    assert learner.losses == [learner.curvatures[0].loss]
    model = learner.model.eval()
    x, y = map(torch.cat, zip(*LOADERS[0], strict=True))
    with torch.no_grad():
        expected = float(nn.functional.cross_entropy(model(x), y))
    assert learner.losses == [pytest.approx(expected, rel=1e-5)]


def test_one_pass_through_a_tasks_data_is_enough():
    learner = after_first_task("auto")
    learner.fit(LOADERS[1], lr=0.1)
    learner.consolidate(iter(LOADERS[1]))
    learner.fit(LOADERS[0], lr=0.1)
    assert learner.selection[-1].budget == pytest.approx(0.04 * sum(learner.losses) / 2)


def test_a_budget_is_a_share_of_the_losses_of_adopted_tasks():
    learner = after_first_task(1.0)
    curvature, anchor = learner.curvatures[0], learner.anchor
    for loss, expected in ((None, curvature.loss), (0.7, 0.7)):
        told = learner_of("auto")
        told.model.load_state_dict(learner.model.state_dict())
        told.adopt(curvature, anchor, loss)
        told.fit(LOADERS[1], lr=0.1)
        assert told.selection[0].budget == pytest.approx(0.04 * expected)
        again = learner_of("auto")
        again.load_state_dict(told.state_dict())
        assert again.losses == [expected]


def test_a_budget_of_losses_that_nobody_knows_is_refused():
    """States of older versions have none of tasks that were learnt at a number as scale."""
    state = after_first_task(1.0).state_dict()
    learner = learner_of("auto")
    learner.load_state_dict({**state, "losses": [None]})
    before = copy.deepcopy(learner.model.state_dict())
    with pytest.raises(OptionError, match="losses of all earlier tasks .*of 0 of 1: a state of"):
        learner.fit(LOADERS[1], lr=0.1)
    after = learner.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- halving: all or nothing ---------------------------------------------------------------------


class WithMaskAndMemory(nn.Sequential):
    """A mask of minus infinity in its state, a count outside it, and extra state."""

    def __init__(self):
        super().__init__(*net())
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.calls += 1.0
        return super().forward(x)

    def get_extra_state(self):
        return {"anything": [1]}

    def set_extra_state(self, state):
        assert state == {"anything": [1]}


def unusual_learner(scale, **options):
    learner = ek.ContinualLearner(WithMaskAndMemory(), scale=scale, **options)
    learner.fit(LOADERS[0], lr=0.1)
    learner.consolidate(LOADERS[0])
    return learner


def everything(learner):
    model = learner.model
    tensors = [t.clone() for t in (*model.parameters(), *model.buffers())]
    return tensors, copy.deepcopy(learner.selection), learner._so_far.example is None


@pytest.mark.parametrize("halfway", ["without penalty", "in a try"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("weights_option", ["kept", "first"])
def test_halving_that_fails_in_any_run_takes_all_of_them_back(halfway, failure, weights_option):
    learner = unusual_learner(Halving(start=100.0, tries=3), weights=weights_option)
    before = everything(learner)

    def stop(step, learner):
        if step == 3 and bool(learner.selection[0].tries) == (halfway == "in a try"):
            raise failure

    with pytest.raises(failure):
        learner.fit(LOADERS[1], lr=0.1, callback=stop)
    for old, new in zip(before[0], everything(learner)[0], strict=True):
        assert torch.equal(old, new)
    assert everything(learner)[1:] == before[1:]
    learner.fit(LOADERS[1], lr=0.1)
    assert len(learner.selection) == 1


def test_halving_that_fails_takes_a_new_output_layer_back():
    learner = after_first_task(Halving(tries=2), head="new", output_layer="3")

    def stop(step, learner):
        if learner.selection[0].tries:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner.fit(LOADERS[1], classes=3, callback=stop)
    learner.fit(LOADERS[1], classes=5)
    assert learner.model[3].out_features == 5


def test_every_try_begins_with_buffers_as_they_were():
    learner = unusual_learner(Halving(start=100.0, tolerance=0.0, tries=3))
    before = float(learner.model.calls)
    learner.fit(LOADERS[1], lr=0.1)
    assert len(learner.selection[0].tries) >= 2
    assert float(learner.model.calls) == before + len(LOADERS[1])


def test_extra_state_comes_back_with_a_learners_state():
    learner = unusual_learner(1.0)
    other = ek.ContinualLearner(WithMaskAndMemory())
    other.load_state_dict(learner.state_dict())
    assert torch.equal(other.model[0].weight, learner.model[0].weight)


@pytest.mark.parametrize("made", [lambda: iter(LOADERS[2]), list], ids=["iterator", "empty"])
def test_validation_data_that_do_not_serve_are_refused(made):
    learner = after_first_task(Halving(start=1.0, tries=2))
    before = weights(learner)
    with pytest.raises(EkfacError, match="loader: expected"):
        learner.fit(LOADERS[1], validation=made())
    assert torch.equal(weights(learner), before)
    assert learner.selection == []


def test_tries_are_judged_without_gradients():
    learner, seen = after_first_task(Halving(start=1.0, tries=1)), []

    def validation():
        for batch in LOADERS[2]:
            seen.append(torch.is_grad_enabled())
            yield batch

    learner.fit(LOADERS[1], validation=validation)
    assert seen
    assert not any(seen)


# --- rules and what they need --------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["adaptive", "auto", "halving", Halving(tries=1)], ids=str)
def test_a_rule_is_refused_where_there_is_no_curvature_for_its_scale(scale):
    with pytest.raises(OptionError, match="scale: expected a number with approximation=None"):
        learner_of(scale, approximation=None)
    learner = after_first_task(2.0, approximation=None)
    learner.scale = scale
    before = weights(learner)
    for call in (learner.fit, learner.consolidate):
        with pytest.raises(OptionError, match="scale: expected a number"):
            call(LOADERS[1])
    assert torch.equal(weights(learner), before)
    # Nothing is held on to at all: ordinary fine-tuning.
    learner_of(scale, approximation=None, damping=0.0).fit(LOADERS[0])


@pytest.mark.parametrize("loss", [math.nan, math.inf, "0.1", True], ids=repr)
def test_only_a_finite_number_is_adopted_as_loss(loss):
    learner = after_first_task("auto")
    other = ek.ContinualLearner(learner.model, approximation="xkfac", scale="auto")
    with pytest.raises(EkfacError, match="loss: expected a task's mean loss"):
        other.adopt(learner.curvatures[0], learner.anchor, loss)
    assert other.task == 0
    assert other.anchor is None


def test_negative_losses_move_the_adaptive_scale_by_no_more_than_its_rate():
    control = Adaptive(bound=10.0, rate=1.0).control([1.0], 100)
    control.update(-0.999, 1.0)
    assert 1.0 < control.scale <= 10.0 ** (1.0 / 100.0) * 1.000001


def test_a_budget_of_losses_below_zero_is_refused():
    with pytest.raises(OptionError, match="add up to at least 0"):
        Budget().control([0.5, -0.6], 10)
    control = Budget(start=2.0).control([0.0, 0.0], 1)
    control.update(1.0, 1.0)
    assert control.scale == 2.0
