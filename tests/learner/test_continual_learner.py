"""A stream of tasks through ContinualLearner."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import ekfac_rs as ek
from ekfac_rs.errors import EmptyLoaderError, NumericalError
from ekfac_rs.learning import training, watching
from nets import classification_loader, mlp, random_batchnorms


def shifted_tasks(tasks=3, examples=192, inputs=8, classes=3, batch_size=32):
    """Overlapping clusters, inputs permuted for each task: a small permuted MNIST.

    They overlap because a loss that training takes to zero has no curvature left to remember.
    """
    generator = torch.Generator().manual_seed(5)
    centres = 0.8 * torch.randn(classes, inputs, generator=generator)
    loaders = []
    for _ in range(tasks):
        order = torch.randperm(inputs, generator=generator)
        y = torch.randint(classes, (examples,), generator=generator)
        x = (centres[y] + torch.randn(examples, inputs, generator=generator))[:, order]
        loaders.append(list(zip(x.split(batch_size), y.split(batch_size), strict=True)))
    return loaders


def learn(loaders, model=None, epochs=8, lr=0.05, **options):
    model = mlp(8, 24, 24, 3, dtype=torch.float32) if model is None else model
    learner = ek.ContinualLearner(model, generator=torch.Generator().manual_seed(0), **options)
    for loader in loaders:
        learner.fit(loader, epochs=epochs, lr=lr)
        learner.consolidate(loader)
    return learner


@pytest.mark.parametrize(
    "options",
    [
        {"approximation": "xkfac"},
        {"approximation": "kfac-expand", "statistics": "running"},
        {"approximation": "xkfac", "freeze_bn_after": 0.3},
        {"approximation": "kfac-expand", "statistics": "running", "freeze_bn_after": 0.0},
        {"approximation": "xkfac", "correction": "scale"},
        {"approximation": "xkfac", "correction": "eigenvalues"},
        {"approximation": "xkfac", "correction": "nearest"},
    ],
    ids=[
        *("xkfac", "kfac eval", "xkfac scheduled", "kfac frozen"),
        *("scale", "eigenvalues", "nearest"),
    ],
)
def test_curvature_keeps_earlier_tasks_that_fine_tuning_forgets(options):
    loaders = shifted_tasks()
    plain = learn(loaders, approximation=None)
    kept = learn(loaders, scale=1.0, damping=0.01, **options)
    accuracy_plain, accuracy_kept = plain.evaluate(loaders), kept.evaluate(loaders)
    assert accuracy_kept[0] > accuracy_plain[0] + 0.04
    assert sum(accuracy_kept[:2]) > sum(accuracy_plain[:2]) + 0.15


def test_fit_reports_epochs_and_calls_back_every_step():
    loaders = shifted_tasks(tasks=2)
    learner = learn(loaders[:1], damping=0.1)
    steps = []
    history = learner.fit(loaders[1], epochs=2, callback=lambda step, _: steps.append(step))
    assert steps == list(range(1, 2 * len(loaders[1]) + 1))
    assert [set(epoch) for epoch in history] == [{"loss", "penalty", "accuracy"}] * 2
    assert history[-1]["penalty"] > 0.0
    assert history[-1]["loss"] < history[0]["loss"]


def test_consolidation_keeps_the_function_and_sets_the_anchor():
    loaders = shifted_tasks(tasks=1)
    learner = ek.ContinualLearner(mlp(8, 12, 3, dtype=torch.float32))
    learner.fit(loaders[0], epochs=2)
    x = loaders[0][0][0]
    before = copy.deepcopy(learner.model).eval()(x)
    learner.consolidate(loaders[0])
    torch.testing.assert_close(learner.model.eval()(x), before, rtol=0, atol=0)
    torch.testing.assert_close(dict(ek.merged_weights(learner.model)), dict(learner.anchor))
    assert learner.task == 1
    assert learner.curvatures[0].examples == 192


def test_a_frozen_batchnorm_keeps_its_statistics_and_its_scale_and_nothing_is_folded():
    loaders = shifted_tasks(tasks=2)
    learner = learn(loaders[:1], freeze_bn_after=0.0, statistics="running")
    before = copy.deepcopy(learner.model.state_dict())
    learner.fit(loaders[1], epochs=2)
    after = learner.model.state_dict()
    same = {key for key in after if torch.equal(before[key], after[key])}
    parts = ("weight", "running_mean", "running_var", "num_batches_tracked")
    kept = {f"{name}.{part}" for name in (1, 4) for part in parts}
    # The bias before a BatchNorm doubles its shift.
    assert same == kept | {"0.bias", "3.bias"}


def test_fit_leaves_no_hooks_gradients_or_changed_flags():
    loaders = shifted_tasks(tasks=2)
    learner = learn(loaders[:1])
    learner.model.eval()
    learner.fit(loaders[1])
    assert not learner.model.training
    for module in learner.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.grad is None for p in learner.model.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"approximation": None}, {"coordinates": "raw"}, {"correction": "eigenvalues"}]
)
def test_a_saved_state_goes_on_as_the_original_would(options):
    loaders = shifted_tasks(tasks=3)
    learner = learn(loaders[:2], damping=0.01, **options)
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    other = ek.ContinualLearner(mlp(8, 24, 24, 3, dtype=torch.float32), damping=0.01, **options)
    other.load_state_dict(torch.load(file))
    learner.fit(loaders[2])
    other.fit(loaders[2])
    torch.testing.assert_close(other.model.state_dict(), learner.model.state_dict())


def test_a_state_of_another_approximation_is_refused():
    loaders = shifted_tasks(tasks=1)
    state = learn(loaders, epochs=1).state_dict()
    other = ek.ContinualLearner(mlp(8, 24, 24, 3, dtype=torch.float32), approximation="kfac-expand")
    with pytest.raises(ek.errors.IncompatibleError, match="kfac-expand"):
        other.load_state_dict(state)
    with pytest.raises(ek.errors.IncompatibleError, match="anchor"):
        other.load_state_dict({"model": {}})
    assert other.task == 0


@pytest.mark.parametrize("correction", [None, "scale", "nearest"])
def test_a_state_of_another_correction_is_refused(correction):
    loaders = shifted_tasks(1)
    state = learn(loaders, epochs=1, correction="eigenvalues").state_dict()
    other = ek.ContinualLearner(mlp(8, 24, 24, 3, dtype=torch.float32), correction=correction)
    with pytest.raises(ek.errors.IncompatibleError, match="correction='eigenvalues'"):
        other.load_state_dict(state)


def test_corrections_are_checked_and_need_a_loader_that_can_be_gone_through_again():
    model = mlp(8, 24, 24, 3, dtype=torch.float32)
    with pytest.raises(ek.errors.OptionError, match="correction: expected one of"):
        ek.ContinualLearner(model, correction="best")
    with pytest.raises(ek.errors.OptionError, match="correction_batches: expected an integer"):
        ek.ContinualLearner(model, correction="scale", correction_batches=0)
    (loader,) = shifted_tasks(1)
    learner = ek.ContinualLearner(model, correction="scale")
    with pytest.raises(ek.errors.OptionError, match="2 times for correction='scale'"):
        learner.consolidate(iter(loader))
    assert learner.task == 0
    learner.consolidate(loader)
    assert learner.curvatures[0].settings.correction == "scale"


def test_a_correction_is_made_of_so_many_mini_batches():
    model = mlp(8, 24, 3, dtype=torch.float32)
    (loader,) = shifted_tasks(1)
    options = {"approximation": "xkfac", "correction": "scale", "correction_batches": 1}
    learner = ek.ContinualLearner(model, generator=torch.Generator().manual_seed(3), **options)
    learner.consolidate(loader)
    by_hand = ek.estimate_curvature(
        model, loader, generator=torch.Generator().manual_seed(3), **options
    )
    for name, block in learner.curvatures[0].items():
        assert torch.equal(block.dense(), by_hand[name].dense())


def test_curvatures_of_different_corrections_do_not_add_up():
    model = mlp(8, 24, 3, dtype=torch.float32)
    (loader,) = shifted_tasks(1)
    curvatures = [
        ek.estimate_curvature(model, loader, correction=correction)
        for correction in ("eigenvalues", "nearest")
    ]
    with pytest.raises(ek.errors.IncompatibleError, match="'nearest' corrected"):
        ek.QuadraticPenalty(model, curvatures, ek.merged_weights(model))


def test_evaluation_of_a_regression_is_minus_the_loss():
    x = torch.randn(12, 8)
    model = mlp(8, 6, 2, dtype=torch.float32).eval()
    target = model(x).detach() + 2.0
    learner = ek.ContinualLearner(model, loss="mse")
    assert learner.evaluate([[(x, target)]])[0] == pytest.approx(-4.0, rel=1e-5)


def test_a_diverging_run_is_a_named_error():
    loaders = shifted_tasks(tasks=1)
    learner = ek.ContinualLearner(mlp(8, 12, 3, dtype=torch.float32))
    with torch.no_grad():
        learner.model[0].weight.fill_(math.inf)
    with pytest.raises(ek.errors.NumericalError, match="finite loss"):
        learner.fit(loaders[0])


def test_an_unstable_learning_rate_warns():
    loaders = shifted_tasks(tasks=2)
    learner = learn(loaders[:1], scale=1e6, step="explicit")
    with pytest.warns(ek.StabilityWarning):
        learner.fit(loaders[1], lr=1e-4, epochs=1)


# --- what the learner does to the model -----------------------------------------------------------


def plain_sgd(model, loaders, epochs, lr):
    """Ordinary fine-tuning, written out."""
    model.train()
    for loader in loaders:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        steps = epochs * len(loader)
        for step in range(steps):
            x, y = loader[step % len(loader)]
            optimizer.param_groups[0]["lr"] = 0.5 * lr * (1.0 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


def test_without_curvature_and_damping_it_is_ordinary_fine_tuning_bit_for_bit():
    loaders = shifted_tasks(tasks=3)
    model = mlp(8, 24, 24, 3, dtype=torch.float32)
    expected = copy.deepcopy(model)
    plain_sgd(expected, loaders, epochs=2, lr=0.05)
    learner = learn(loaders, model, epochs=2, approximation=None)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert learner.anchor is None
    assert learner.task == 3


def test_fine_tuning_takes_models_that_a_penalty_could_not():
    model = nn.Sequential(nn.Linear(8, 6), nn.PReLU(), nn.Linear(6, 3))
    learn(shifted_tasks(tasks=2), model, epochs=1, approximation=None)
    with pytest.raises(ek.errors.UnsupportedLayerError, match="PReLU"):
        learn(shifted_tasks(tasks=1), model, epochs=1)


@pytest.mark.parametrize(
    "options",
    [{}, {"approximation": None, "damping": 0.1}, {"statistics": "running"}, {"weights": "merged"}],
)
def test_consolidating_changes_no_tensor_of_the_model(options):
    (loader,) = shifted_tasks(tasks=1)
    learner = ek.ContinualLearner(mlp(8, 12, 3, dtype=torch.float32), **options)
    learner.fit(loader, epochs=1)
    before = copy.deepcopy(learner.model.state_dict())
    learner.consolidate(loader)
    torch.testing.assert_close(learner.model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(dict(ek.merged_weights(learner.model)), dict(learner.anchor))


def test_statistics_that_fell_behind_frozen_are_brought_up_before_a_train_mode_curvature():
    first, second = shifted_tasks(tasks=2)
    learner = learn([first], damping=0.01, freeze_bn_after=0.2)
    learner.fit(second, epochs=4, lr=0.1)
    x = torch.cat([x for x, _ in second])
    before = copy.deepcopy(learner.model).eval()(x)
    stale = learner.model[1].running_mean.clone()
    learner.consolidate(second)
    after = copy.deepcopy(learner.model).eval()(x)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    # On the task as one mini-batch, train mode now computes that same function.
    torch.testing.assert_close(learner.model.train()(x), before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(stale, learner.model[1].running_mean, rtol=1e-2)


def test_the_weights_keep_their_scale_unless_the_papers_form_is_asked_for():
    loaders = shifted_tasks(tasks=2)
    changes = {}
    for weights in ("kept", "merged"):
        learner = learn(loaders[:1], damping=0.01, weights=weights)
        before = [m.weight.detach().clone() for m in learner.model if isinstance(m, nn.Linear)]
        learner.fit(loaders[1], epochs=1, lr=1e-9)
        after = [m.weight.detach() for m in learner.model if isinstance(m, nn.Linear)]
        changes[weights] = float((after[0] - before[0]).norm() / before[0].norm())
    assert changes["kept"] < 1e-6
    assert changes["merged"] > 0.1


def test_a_task_consolidated_elsewhere_is_adopted():
    loaders = shifted_tasks(tasks=2)
    learner = learn(loaders[:1], damping=0.01)
    other = ek.ContinualLearner(copy.deepcopy(learner.model), damping=0.01)
    other.adopt(learner.curvatures[0], learner.anchor)
    learner.fit(loaders[1])
    other.fit(loaders[1])
    torch.testing.assert_close(other.model.state_dict(), learner.model.state_dict(), rtol=0, atol=0)


def test_a_task_that_does_not_fit_is_not_adopted():
    (loader,) = shifted_tasks(tasks=1)
    learner = learn([loader], epochs=1)
    curvature, anchor = learner.curvatures[0], learner.anchor
    moved = copy.deepcopy(learner.model)
    with torch.no_grad():
        moved[0].weight.mul_(2.0)
    cases = {
        ek.errors.ModelChangedError: (
            ek.ContinualLearner(moved),
            curvature,
            ek.merged_weights(moved),
        ),
        ek.errors.IncompatibleError: (
            ek.ContinualLearner(learner.model, approximation="xkfac"),
            curvature,
            anchor,
        ),
        ek.errors.UnknownLayerError: (ek.ContinualLearner(learner.model), curvature, ek.Anchor()),
    }
    for error, (other, *task) in cases.items():
        with pytest.raises(error):
            other.adopt(*task)
        assert other.task == 0
        assert other.curvatures == []
        assert other.anchor is None
    with pytest.raises(ek.errors.IncompatibleError, match="got none"):
        ek.ContinualLearner(learner.model).adopt(None, anchor)


# --- an example of the task shows what each BatchNorm is over ------------------------------------


def locations_model(affine):
    """A BatchNorm over locations that is as wide as the Linear before it, then one over outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 3),
        nn.BatchNorm1d(3, affine=affine),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(9, 5),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    return random_batchnorms(model, torch.Generator().manual_seed(0))


def locations_tasks(tasks=2):
    generator = torch.Generator().manual_seed(1)
    return [
        [
            (
                torch.randn(16, 3, 4, generator=generator),
                torch.randint(3, (16,), generator=generator),
            )
            for _ in range(4)
        ]
        for _ in range(tasks)
    ]


@torch.no_grad()
def outputs(learner, x):
    return copy.deepcopy(learner.model).eval()(x)


def change_by_consolidation(learner, loader, x):
    """Relative change of the function that consolidating makes."""
    before = outputs(learner, x)
    learner.consolidate(loader)
    return float((outputs(learner, x) - before).norm() / before.norm())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"freeze_bn_after": 0.5}, {"freeze_bn_after": 0.0, "statistics": "running"}],
    ids=["throughout", "frozen halfway", "frozen"],
)
def test_consolidation_keeps_the_function_with_a_batchnorm_over_locations(affine, options):
    loaders = locations_tasks()
    learner = ek.ContinualLearner(locations_model(affine), damping=0.01, **options)
    for loader in loaders:
        learner.fit(loader, epochs=2)
        assert change_by_consolidation(learner, loader, loader[0][0]) < 1e-5
        curvature = learner.curvatures[-1]
        assert learner.anchor.batchnorms == curvature.batchnorms
        assert curvature.batchnorms["0"] is None
        assert curvature.batchnorms["4"] == "5"


@pytest.mark.parametrize("approximation", ["xkfac", None])
@pytest.mark.parametrize("once", [False, True], ids=["list", "iterator"])
def test_a_task_that_was_not_fitted_shows_its_own_example(approximation, once):
    (loader,) = locations_tasks(tasks=1)
    model = locations_model(affine=True)
    learner = ek.ContinualLearner(model, approximation=approximation, damping=0.1)
    given = iter(loader) if once else loader
    assert change_by_consolidation(learner, given, loader[0][0]) < 1e-5
    assert learner.anchor.batchnorms == {"0": None, "1": "1", "4": "5", "7": None}
    assert [c.examples for c in learner.curvatures] == ([64] if approximation else [])


def test_consolidating_an_unseen_task_without_batches_is_refused():
    learner = ek.ContinualLearner(locations_model(affine=True), approximation=None, damping=0.1)
    with pytest.raises(EmptyLoaderError, match="at least one batch"):
        learner.consolidate([])
    assert learner.task == 0


class Counted(list):
    """A loader that counts how often it was gone through, or begun."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_looking_at_an_example_takes_no_pass_of_the_loader():
    first, second = (Counted(loader) for loader in locations_tasks())
    learner = ek.ContinualLearner(locations_model(affine=True), damping=0.01)
    learner.fit(first, epochs=2)
    assert first.passes == 2
    learner.consolidate(first)
    assert first.passes == 3
    learner.fit(second, epochs=2)
    assert second.passes == 3  # one for the statistics of the BatchNorms put back


def test_without_batchnorm_a_later_task_takes_no_pass_more():
    loader = Counted(shifted_tasks(tasks=1)[0])
    learner = ek.ContinualLearner(nn.Sequential(nn.Linear(8, 3)), damping=0.01)
    for _ in range(2):
        loader.passes = 0
        learner.fit(loader, epochs=2)
        assert loader.passes == 2
        learner.consolidate(loader)


# --- a loss that is not finite: found at once, or on a GPU one step later ------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_deferred_check_reads_a_step_during_the_next_and_names_it(bad):
    check = watching.FiniteCheck(deferred=True)
    check.add(1, torch.tensor(0.5))
    check.add(2, torch.tensor(bad))
    with pytest.raises(NumericalError, match=f"got {bad} at step 2; the weights have moved on"):
        check.add(3, torch.tensor(0.5))
    check.finish()


def test_the_last_deferred_step_is_checked_on_finishing():
    check = watching.FiniteCheck(deferred=True)
    check.finish()
    check.add(1, torch.tensor(math.nan))
    with pytest.raises(NumericalError, match="at step 1; the weights"):
        check.finish()
    check.finish()


def test_an_immediate_check_reads_the_step_itself():
    check = watching.FiniteCheck(deferred=False)
    check.add(1, torch.tensor(0.5))
    with pytest.raises(NumericalError, match="got nan at step 2$"):
        check.add(2, torch.tensor(math.nan))


class OnAGpu:
    """What the check uses of a tensor on a GPU, its stream and its event; notes what is done."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, value):
        self.value, self.done = value, []

    def to(self, device, non_blocking):
        self.done.append(f"copy to {device}{' without waiting' if non_blocking else ''}")
        return self

    def record_event(self):
        self.done.append("record")
        return self

    def synchronize(self):
        self.done.append("wait")

    def __float__(self):
        self.done.append("read")
        return self.value


def test_a_total_on_a_gpu_is_copied_at_once_and_read_after_its_own_event(monkeypatch):
    first, second = OnAGpu(0.5), OnAGpu(0.5)
    streams = iter([first, second])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: next(streams))
    check = watching.FiniteCheck(deferred=True)
    check.add(1, first)
    assert first.done == ["copy to cpu without waiting", "record"]
    check.add(2, second)
    assert first.done[2:] == ["wait", "read"]
    assert second.done == ["copy to cpu without waiting", "record"]


@pytest.fixture
def deferred(monkeypatch):
    """Check every fit as on a GPU."""
    immediate = watching.FiniteCheck
    monkeypatch.setattr(training, "FiniteCheck", lambda deferred: immediate(deferred=True))


def fit_on_a_bad_step(step, steps):
    """Fit on batches of which one is infinite; returns the learner, the steps made, the error."""
    loader = shifted_tasks(tasks=1, examples=32 * steps)[0]
    x, y = loader[step - 1]
    loader[step - 1] = x * math.inf, y
    learner = ek.ContinualLearner(nn.Sequential(nn.Linear(8, 3)))
    made = []
    with pytest.raises(NumericalError) as caught:
        learner.fit(loader, callback=lambda step, _: made.append(step))
    return learner, made, str(caught.value)


def test_on_a_cpu_fit_stops_before_the_step_that_diverged():
    learner, made, message = fit_on_a_bad_step(2, steps=4)
    assert message == "fit: expected a finite loss, got nan at step 2"
    assert made == [1]
    assert all(p.isfinite().all() for p in learner.model.parameters())


@pytest.mark.parametrize("step", [2, 4], ids=["midway", "last of the epoch"])
def test_deferred_fit_stops_one_step_after_the_one_that_diverged(deferred, step):
    learner, made, message = fit_on_a_bad_step(step, steps=4)
    assert message == (
        f"fit: expected a finite loss, got nan at step {step}; "
        "the weights have moved on by one step"
    )
    assert made == list(range(1, step + 1))
    assert not learner.model[0].weight.isfinite().all()


def test_deferring_the_check_changes_no_value(request):
    def history():
        torch.manual_seed(0)
        loaders = shifted_tasks(tasks=2)
        learner = learn(loaders[:1], damping=0.1)
        return learner.fit(loaders[1], epochs=2)

    immediate = history()
    request.getfixturevalue("deferred")
    assert history() == immediate


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_an_epoch_reports_means_over_its_examples(loss):
    (loader,) = shifted_tasks(tasks=1, examples=72)  # the last mini-batch is smaller
    if loss == "mse":
        loader = [(x, nn.functional.one_hot(y, 3).float()) for x, y in loader]
    functions = {"cross_entropy": nn.functional.cross_entropy, "mse": nn.functional.mse_loss}
    model = nn.Sequential(nn.Linear(8, 3))
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    with torch.no_grad():
        expected = float(functions[loss](model(x), y))
        accuracy = math.nan if loss == "mse" else float((model(x).argmax(1) == y).double().mean())
    (epoch,) = ek.ContinualLearner(model, loss=loss).fit(loader, lr=0.0)
    assert {type(value) for value in epoch.values()} == {float}
    assert epoch["loss"] == pytest.approx(expected, rel=1e-6)
    assert epoch["accuracy"] == pytest.approx(accuracy, rel=1e-12, nan_ok=True)
    assert epoch["penalty"] == 0.0


@pytest.mark.parametrize("weights", ["kept", "first", "merged"])
@pytest.mark.parametrize("failing", ["scheduler", "scale", "first mini-batch"])
def test_a_call_that_fails_before_its_first_step_changes_no_tensor(weights, failing):
    learner = ek.ContinualLearner(mlp(6, 8, 3, dtype=torch.float32), weights=weights)
    first, second = (
        classification_loader(6, 3, examples=64, seed=seed, dtype=torch.float32) for seed in (0, 1)
    )
    learner.fit(first, epochs=5, lr=0.1)
    learner.consolidate(first)
    before = copy.deepcopy(learner.model.state_dict())

    def fail(*anything):
        raise ZeroDivisionError

    if failing == "scheduler":
        learner.scheduler = fail
    elif failing == "scale":
        learner.scale, learner.losses = "auto", [None]
    else:
        learner.target_fn = lambda batch: batch[1] + 3
    with pytest.raises((ZeroDivisionError, ek.EkfacError)):
        learner.fit(second, lr=0.1)
    for name, tensor in learner.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("without", [{"losses": []}, {}], ids=["empty", "missing"])
def test_a_state_of_a_learner_that_held_on_to_nothing_is_read(without):
    loader = classification_loader(6, 3, examples=32, dtype=torch.float32)
    learner = ek.ContinualLearner(mlp(6, 8, 3, dtype=torch.float32), approximation=None)
    learner.consolidate(loader)
    assert learner.losses == [None]
    state = learner.state_dict()
    del state["losses"]
    other = ek.ContinualLearner(mlp(6, 8, 3, dtype=torch.float32), approximation=None)
    other.load_state_dict(state | without)
    assert (other.task, other.losses) == (1, [None])


# --- what is told ---------------------------------------------------------------------------------


class Writer:
    def __init__(self):
        self.told = {}

    def add_scalar(self, tag, value, step):
        assert isinstance(value, float)
        self.told.setdefault(tag, []).append((step, value))


def test_every_steps_numbers_are_told():
    torch.manual_seed(0)
    x = torch.randn(4, 8, 5)
    batches = [(inputs, inputs[:, :3].argmax(1)) for inputs in x]
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    learner, writer = ek.ContinualLearner(model, scale="auto", damping=0.1), Writer()
    history = learner.fit(batches, epochs=2, log=writer)
    learner.consolidate(batches)
    assert list(writer.told) == ["task0/loss"]
    steps, losses = zip(*writer.told["task0/loss"], strict=True)
    assert steps == tuple(range(1, 9))
    assert sum(losses[4:]) / 4 == pytest.approx(history[1]["loss"])
    history = learner.fit(batches, epochs=1, log=writer)
    (selection,) = learner.selection
    told = {tag: [value for _, value in values] for tag, values in writer.told.items()}
    assert told["task1/scale"] == selection.scale
    assert told["task1/predicted increase"] == selection.increase
    assert sum(told["task1/penalty"]) / 4 == pytest.approx(history[0]["penalty"])


def test_a_log_that_takes_no_scalars_is_refused():
    learner = ek.ContinualLearner(nn.Linear(5, 3))
    with pytest.raises(ek.errors.OptionError, match="log: expected an object with add_scalar"):
        learner.fit([], log=print)
