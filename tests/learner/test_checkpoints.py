"""Training that is interrupted ends as it would have without: bit for bit."""

import contextlib
import importlib
import multiprocessing
import os
import random
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ekfac_rs as ek
from ekfac_rs.errors import IncompatibleError, OptionError
from ekfac_rs.learning.own import OwnCurvature
from ekfac_rs.loading import Batch, Inputs
from processes import forks_allowed


class Stop(Exception):
    pass


def net(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    first = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*first, nn.Linear(8, outputs))


def data(task: int, generator: torch.Generator | None = None, workers: int = 0) -> DataLoader:
    own = torch.Generator().manual_seed(task)
    x = torch.randn(60, 6, generator=own)
    y = (x @ torch.randn(6, 3, generator=own)).argmax(1)
    dataset = TensorDataset(x, y)
    return DataLoader(dataset, batch_size=9, shuffle=True, generator=generator, num_workers=workers)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def one_cycle(optimizer, steps):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)


# Options of a learner, and arguments of fit.
CASES = {
    "as they come": ({}, {"epochs": 3}),
    "scale that moves": ({"scale": "auto"}, {"epochs": 3}),
    "adaptive": ({"scale": "adaptive", "weights": "first"}, {"epochs": 3}),
    "own steps, BatchNorm frozen": ({"own": True, "freeze_bn_after": 0.4}, {"epochs": 3}),
    "frozen throughout": ({"freeze_bn_after": 0.0, "scale": 10.0}, {"epochs": 3}),
    "so many steps": ({"damping": 0.1, "max_terms": 1}, {"steps": 17}),
    "explicit": ({"step": "explicit", "scale": 0.1}, {"epochs": 3}),
    "AdamW on one cycle": (
        {"optimizer": torch.optim.AdamW, "scheduler": one_cycle},
        {"epochs": 3, "lr": 0.01},
    ),
    "L2": ({"approximation": None, "damping": 0.1}, {"epochs": 3}),
    "fine-tuning": ({"approximation": None}, {"epochs": 3}),
    "heads": ({"head": "new", "output_layer": "4"}, {"epochs": 3, "classes": 3}),
}


def all_of(learner: ek.ContinualLearner) -> dict[str, object]:
    """Everything that two learners should have in common."""
    return {
        **{name: tensor.clone() for name, tensor in learner.model.state_dict().items()},
        **{f"{k} {n}": t for k, c in enumerate(learner.curvatures) for n, t in c.tensors().items()},
        **{f"anchor {name}": weight for name, weight in (learner.anchor or {}).items()},
        "selection": [selection.as_dict() for selection in learner.selection],
        "losses": learner.losses,
        "random": (torch.rand(1), random.random(), np.random.rand()),  # noqa: NPY002
    }


def require_same(found: dict[str, object], expected: dict[str, object]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        same = torch.equal if isinstance(value, torch.Tensor) else (lambda a, b: a == b)
        assert same(found[name], value), name


def two_tasks(options, arguments, path, stop=None, *, task=1, every=4, make=net):
    """Learn two tasks, where training of one is interrupted after a step and goes on elsewhere."""
    seed_all(0)
    learner, histories = ek.ContinualLearner(make(), **options), []

    def interrupt(step, _):
        if step == stop and learner.task == task:
            raise Stop

    while learner.task < 2:
        fit = partial(learner.fit, **arguments, checkpoint=path, every=every)
        if learner.task == 0:
            fit.keywords.pop("classes", None)
        loader = data(learner.task)
        try:
            histories.append(fit(loader, callback=interrupt))
        except Stop:
            seed_all(99)
            learner, stop = ek.ContinualLearner.resume(path, make(), **options), None
            continue
        learner.consolidate(loader)
    return all_of(learner), histories


@pytest.mark.parametrize("case", CASES)
def test_it_ends_as_it_would_have_without_the_interruption(case, tmp_path):
    options, arguments = CASES[case]
    expected, histories = two_tasks(options, arguments, tmp_path / "one")
    # Everywhere in one case; in the others within an epoch of a task that has earlier ones.
    stops = ((14, 1), (5, 1), (8, 1), (15, 1), (6, 0))
    for stop, task in stops if case == "as they come" else stops[:1]:
        found, again = two_tasks(options, arguments, tmp_path / "other", stop, task=task)
        require_same(found, expected)
        assert again == histories


def test_a_loader_with_a_generator_of_its_own_goes_on(tmp_path):
    def run(stop=None):
        generator = torch.Generator().manual_seed(3)
        seed_all(0)
        learner = ek.ContinualLearner(net(), generator=torch.Generator().manual_seed(4))

        def interrupt(step, _):
            if step == stop:
                raise Stop

        fit = {"epochs": 3, "checkpoint": tmp_path / "file", "every": 4}
        try:
            learner.fit(data(0, generator), **fit, callback=interrupt)
        except Stop:
            generator = torch.Generator().manual_seed(77)
            options = {"generator": torch.Generator()}
            learner = ek.ContinualLearner.resume(tmp_path / "file", net(), **options)
            learner.fit(data(0, generator), **fit)
        learner.consolidate(data(0, generator))
        return all_of(learner)

    expected = run()
    require_same(run(10), expected)


@pytest.mark.parametrize("stop", [5, 9])
def test_a_loader_with_processes_of_its_own_goes_on(stop, tmp_path):
    """Those draw the order as soon as a pass begins."""

    def run(stop):
        seed_all(0)
        learner = ek.ContinualLearner(net())

        def interrupt(step, _):
            if step == stop:
                raise Stop

        fit = {"epochs": 2, "checkpoint": tmp_path / "file", "every": 4}
        try:
            learner.fit(data(0, workers=2), **fit, callback=interrupt)
        except Stop:
            seed_all(99)
            learner = ek.ContinualLearner.resume(tmp_path / "file", net())
            learner.fit(data(0, workers=2), **fit)
        return all_of(learner)

    with forks_allowed():
        require_same(run(stop), run(None))


def test_training_that_was_over_is_not_made_again(tmp_path):
    learner = ek.ContinualLearner(net())
    history = learner.fit(data(0), epochs=2, checkpoint=tmp_path / "file")
    again = ek.ContinualLearner.resume(tmp_path / "file", net())
    assert again.fit(data(0), epochs=2) == history
    for name, value in learner.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


@pytest.mark.parametrize("amid", [False, True], ids=["after a task", "before consolidation"])
def test_a_saved_learner_goes_on_with_all_that_it_draws(amid, tmp_path):
    def made():
        return {"scale": "auto", "generator": torch.Generator().manual_seed(6)}

    def go_on(learner):
        if learner.task == 1:
            learner.fit(data(1), epochs=2, checkpoint=tmp_path / "file")
            learner.consolidate(data(1))
        return all_of(learner)

    seed_all(0)
    learner = ek.ContinualLearner(net(), **made())
    learner.fit(data(0))
    learner.consolidate(data(0))
    learner.save(tmp_path / "file")
    if amid:
        learner.fit(data(1), epochs=2, checkpoint=tmp_path / "file")
        (tmp_path / "file").rename(tmp_path / "kept")
        learner.consolidate(data(1))
    else:
        (tmp_path / "file").rename(tmp_path / "kept")
    expected = go_on(learner)
    seed_all(99)
    require_same(go_on(ek.ContinualLearner.resume(tmp_path / "kept", net(), **made())), expected)


def test_a_generator_that_is_not_given_again_is_missed(tmp_path):
    learner = ek.ContinualLearner(net(), generator=torch.Generator())
    learner.save(tmp_path / "file")
    with pytest.raises(IncompatibleError, match="generator: expected 1"):
        ek.ContinualLearner.resume(tmp_path / "file", net())


class Remembering(ek.scales.Control):
    """Takes the mean of the last losses as scale: what it knows is a list."""

    def __init__(self):
        super().__init__(1.0)
        self.losses = []

    def update(self, loss, increase):
        self.losses = [*self.losses[-5:], loss]
        self.scale = sum(self.losses) / len(self.losses)


class RememberingRule(ek.scales.ScaleRule):
    def first_scale(self):
        return 1.0

    def control(self, losses, steps, before=None):
        return Remembering()

    def __repr__(self):
        return "remembering"


def test_a_rule_of_ones_own_goes_on_with_all_that_it_knows(tmp_path):
    case = {"scale": RememberingRule()}, {"epochs": 3}
    expected, _ = two_tasks(*case, tmp_path / "one")
    found, _ = two_tasks(*case, tmp_path / "other", 9)
    require_same(found, expected)


def test_models_that_a_callable_gives_go_on(tmp_path):
    def run(stop):
        seed_all(0)
        first = net()

        def make(task):
            return nn.Sequential(*first[:4], nn.Linear(8, 3))

        return two_tasks(
            {"head": make, "layers": ["0"]},
            {"epochs": 3},
            tmp_path / "file",
            stop,
            make=lambda: first,
        )[0]

    require_same(run(9), run(None))


# --- scales that are tried ------------------------------------------------------------------------

# Only the reference itself would be enough: three tries of 14 steps, after the one without penalty.
TRIED = ek.scales.Halving(start=100.0, tolerance=0.0, tries=3)


class Stopping:
    """A loader that may stop before a mini-batch."""

    def __init__(self, loader, is_time):
        self.loader, self.is_time, self.generator = loader, is_time, loader.generator

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            if self.is_time():
                raise Stop
            yield batch


def by_halving(path, stop=None, broken=None):
    """Learn a second task by halving, stopped at (tries before, step), and going on elsewhere.

    At ``broken`` weights become infinite.
    """
    seed_all(0)
    learner, at = ek.ContinualLearner(net(), scale=TRIED), None
    learner.fit(data(0))
    learner.consolidate(data(0))

    def note(step, learner):
        nonlocal at
        at = len(learner.selection[-1].tries), step
        if at == broken:
            with torch.no_grad():
                learner.model[0].weight.fill_(torch.inf)

    def fit(seed, stop=None):
        loaders = [data(task, torch.Generator().manual_seed(seed)) for task in (1, 2)]
        loader = Stopping(loaders[0], lambda: stop is not None and at == stop)
        arguments = {"epochs": 2, "checkpoint": path, "every": 3, "callback": note}
        return learner.fit(loader, validation=loaders[1], **arguments)

    if stop is None:
        history = fit(1)
    else:
        before = {name: x.clone() for name, x in learner.model.state_dict().items()}
        with pytest.raises(Stop):
            fit(1, stop)
        # All is taken back, but for what is in the file.
        require_same(learner.model.state_dict(), before)
        assert learner.selection == []
        seed_all(99)
        learner = ek.ContinualLearner.resume(path, net(), scale=TRIED)
        history = fit(8)
    learner.consolidate(data(1))
    return {**all_of(learner), "history": history}


def test_tries_go_on_where_they_were(tmp_path):
    expected = by_halving(tmp_path / "one")
    assert len(expected["selection"][0]["tries"]) == 4
    # Between two passes without penalty; at the beginning of a try and amid the last.
    for stop in ((0, 7), (1, 1), (3, 10)):
        require_same(by_halving(tmp_path / "other", stop), expected)


@pytest.mark.parametrize("step", [6, 14])
def test_a_try_that_diverges_at_the_step_after_or_at_its_last_has_failed(step, tmp_path):
    expected = by_halving(tmp_path / "one", broken=(1, step))
    (selection,) = expected["selection"]
    _, (_, failed), *others = selection["tries"]
    assert failed is None
    assert others
    stop = (1, 6) if step == 6 else (2, 1)
    require_same(by_halving(tmp_path / "other", stop, broken=(1, step)), expected)


def test_a_last_try_that_ends_in_infinite_weights_is_an_error_and_taken_back(tmp_path):
    with pytest.raises(ek.errors.NumericalError, match="the last try diverged"):
        by_halving(tmp_path / "one", broken=(3, 14))


def test_tries_that_are_refused_stay_as_they_were_and_once_begun_are_taken_back(tmp_path):
    learner = ek.ContinualLearner(net(), scale=TRIED)
    learner.fit(data(0))
    learner.consolidate(data(0))
    begun = {name: x.clone() for name, x in learner.model.state_dict().items()}
    loader, seen = data(1), []

    def interrupt(step, _):
        seen.append(step)
        if len(seen) == 20:
            raise Stop

    fit = {"checkpoint": tmp_path / "file", "every": 4, "epochs": 2}
    with pytest.raises(Stop):
        learner.fit(loader, callback=interrupt, **fit)
    learner = ek.ContinualLearner.resume(tmp_path / "file", net(), scale=TRIED)
    before = {name: x.clone() for name, x in learner.model.state_dict().items()}
    with pytest.raises(OptionError, match="expected to go on with the training"):
        learner.fit(loader, epochs=1)
    with pytest.raises(IncompatibleError, match="expected the loader to yield"):
        learner.fit(list(loader), epochs=2)
    learner.scale = 3.0
    with pytest.raises(OptionError, match="scale: expected the rule"):
        learner.fit(loader, epochs=2)
    learner.scale = TRIED
    require_same(learner.model.state_dict(), before)
    assert len(learner.selection) == 1
    seen[:] = range(18)
    with pytest.raises(Stop):
        learner.fit(loader, epochs=2, callback=interrupt)
    require_same(learner.model.state_dict(), begun)
    assert learner.selection == []


# --- consolidation --------------------------------------------------------------------------------


def test_consolidation_goes_on_where_it_was(tmp_path):
    options = {"correction": "eigenvalues", "correction_batches": 4, "freeze_bn_after": 0.5}

    def run(stops=()):
        seed_all(0)
        learner, read = ek.ContinualLearner(net(), **options), 0
        stops = list(stops)

        def is_time():
            nonlocal read
            read += 1
            return bool(stops) and read == stops[0]

        while learner.task < 2:
            loader = Stopping(data(learner.task, torch.Generator().manual_seed(3)), is_time)
            learner.fit(loader.loader, checkpoint=tmp_path / "file", every=4)
            try:
                learner.consolidate(loader, checkpoint=tmp_path / "curvature", every=2)
            except Stop:
                stops, read = stops[1:], 0
                seed_all(99)
                learner = ek.ContinualLearner.resume(tmp_path / "file", net(), **options)
                continue
            learner.save(tmp_path / "file")
        return all_of(learner)

    expected = run()
    # In the first task's pass and correction, and in what a frozen BatchNorm adds to the second's.
    require_same(run([5, 10]), expected)
    require_same(run([24]), expected)


# --- killed ---------------------------------------------------------------------------------------

# EKFAC_KILLS=50 takes some minutes.
KILLS = int(os.environ.get("EKFAC_KILLS", "4"))
# Seconds for one that is not killed, on a machine with much else to do.
PATIENCE = 600


def _learn(path, result) -> None:
    """Learn three tasks, going on from the file if there is one."""
    _learn_with(path, result, tasks=3, epochs=4, scale=3.0)


def _learn_by_halving(path, result) -> None:
    """Learn two tasks, the second in tries, and go on amid consolidation, too."""
    corrected = {"correction": "scale", "correction_batches": 5}
    _learn_with(path, result, tasks=2, epochs=2, scale=TRIED, **corrected)


def _learn_with(path, result, tasks, epochs, **options) -> None:
    options |= {"generator": torch.Generator().manual_seed(2)}
    torch.manual_seed(0)
    if path.exists():
        learner = ek.ContinualLearner.resume(path, net(), **options)
    else:
        learner = ek.ContinualLearner(net(), **options)
    passes = path.with_suffix(".passes")
    while learner.task < tasks:
        loader = data(learner.task, torch.Generator().manual_seed(learner.task))
        learner.fit(loader, epochs=epochs, checkpoint=path, every=3)
        learner.consolidate(DataLoader(loader.dataset, batch_size=5), checkpoint=passes, every=1)
        learner.save(path)
    state = learner.state_dict()
    tensors = {f"{k} {n}": t for k, (c, _) in enumerate(state["curvatures"]) for n, t in c.items()}
    _hand_over({**state["model"], **tensors}, result)


def _accumulate(path, result) -> None:
    """Take a curvature with a correction of four passes, going on from the file."""
    loader = DataLoader(data(0).dataset, batch_size=4, shuffle=True)
    model = net()
    torch.manual_seed(0)
    options = {"correction": "nearest", "checkpoint": path, "every": 1}
    _hand_over(ek.estimate_curvature(model, loader, **options).tensors(), result)


def _hand_over(tensors, result) -> None:
    torch.save(tensors, result.with_suffix(".new"))
    result.with_suffix(".new").rename(result)


def killed_at(seconds, work, path, result):
    """Work in a child that is killed after a while; return whether it was."""
    with forks_allowed():
        child = multiprocessing.get_context("fork").Process(target=work, args=(path, result))
        child.start()
    child.join(seconds)
    killed = child.is_alive()
    if killed:
        child.kill()
    child.join()
    assert killed or child.exitcode == 0
    return killed


@pytest.mark.parametrize(
    "work",
    [_learn, pytest.param(_learn_by_halving, marks=pytest.mark.thorough), _accumulate],
)
def test_killed_at_any_moment_it_ends_in_the_same_weights(work, tmp_path):
    # What torch imports with the first optimiser takes longer than all the work: children would be
    # killed in that.
    importlib.import_module("torch._dynamo")
    begun = time.perf_counter()
    assert not killed_at(PATIENCE, work, tmp_path / "whole", tmp_path / "expected")
    whole = time.perf_counter() - begun
    expected = torch.load(tmp_path / "expected")
    chance, kills = random.Random(0), 0
    path, result = tmp_path / "file", tmp_path / "result"
    # Many more than are needed where the machine is slower at times than at others.
    for _ in range(10 * KILLS):
        killed = killed_at(chance.uniform(0.0, 0.5) * whole, work, path, result)
        # Of those that something goes on after.
        kills += killed and path.exists()
        if result.exists():
            require_same(torch.load(result), expected)
            result.unlink()
            path.unlink()
        if kills == KILLS:
            break
    assert kills == KILLS
    assert not killed_at(PATIENCE, work, path, result)
    require_same(torch.load(result), expected)
    assert not [x for x in tmp_path.iterdir() if x.suffix == ".partial"]


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def interrupted(tmp_path):
    learner = ek.ContinualLearner(net())
    learner.fit(data(0))
    learner.consolidate(data(0))

    def interrupt(step, _):
        if step == 6:
            raise Stop

    torch.manual_seed(0)
    with contextlib.suppress(Stop):
        learner.fit(data(1), epochs=2, checkpoint=tmp_path / "file", every=5, callback=interrupt)
    return tmp_path / "file"


@pytest.mark.parametrize(
    "options", [{"scale": 2.0}, {"damping": 0.1}, {"loss": "mse"}, {"freeze_bn_after": 0.5}]
)
def test_other_options_than_those_of_the_training_are_named(options, interrupted):
    (name,) = options
    with pytest.raises(IncompatibleError, match=f"which had {name}="):
        ek.ContinualLearner.resume(interrupted, net(), **options)


@pytest.mark.parametrize("arguments", [{"epochs": 3}, {"epochs": 2, "lr": 0.1}, {"steps": 14}])
def test_other_arguments_than_those_of_the_call_are_named_and_change_nothing(
    arguments, interrupted
):
    learner = ek.ContinualLearner.resume(interrupted, net())
    before = {name: x.clone() for name, x in learner.model.state_dict().items()}
    with pytest.raises(OptionError, match="expected to go on with the training"):
        learner.fit(data(1), **arguments)
    require_same(learner.model.state_dict(), before)
    learner.fit(data(1), epochs=2)


@pytest.mark.parametrize(
    "options", [{"optimizer": torch.optim.AdamW}, {"scheduler": None}], ids=str
)
def test_another_kind_of_optimiser_or_schedule_is_named(options, interrupted):
    learner = ek.ContinualLearner.resume(interrupted, net(), **options)
    with pytest.raises(IncompatibleError, match="optimizer, scheduler: expected .* SGD and Lambda"):
        learner.fit(data(1), epochs=2)


@pytest.mark.parametrize("change", ["other order", "fewer"])
def test_a_loader_that_yields_other_mini_batches_is_refused_and_changes_nothing(
    change, interrupted
):
    learner = ek.ContinualLearner.resume(interrupted, net())
    before = {name: x.clone() for name, x in learner.model.state_dict().items()}
    batches = list(data(1))

    # As many by their length as there were.
    class Other(list):
        def __iter__(self):
            return iter(batches[::-1] if change == "other order" else batches[:3])

    with pytest.raises(IncompatibleError, match="expected the loader to yield mini-batch 5"):
        learner.fit(Other(batches), epochs=2)
    require_same(learner.model.state_dict(), before)
    learner.fit(data(1), epochs=2)  # with the right one it goes on


def test_another_network_is_refused(interrupted):
    with pytest.raises(IncompatibleError):
        ek.ContinualLearner.resume(interrupted, net(outputs=4))


def test_a_checkpoint_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ek.ContinualLearner(net()).fit(data(0), checkpoint=tmp_path / "nowhere" / "file")
    with pytest.raises(OptionError, match="every: expected"):
        ek.ContinualLearner(net()).fit(data(0), checkpoint=tmp_path / "file", every=0)


@pytest.mark.parametrize("written", ["now", "before"])
def test_the_mini_batches_of_an_own_curvature_are_read_from_files_of_now_and_before(written):
    x, y = torch.randn(2, 4), torch.zeros(2)
    inputs = Inputs((x,), {"mask": y})
    own = OwnCurvature(lambda batches, generator: batches, lambda batch: batch)
    own.at(Batch(inputs, y, 2), frozen=False)
    state = own.state_dict()
    if written == "before":
        state["batches"] = [(inputs, y)]
    other = OwnCurvature(lambda batches, generator: batches, lambda batch: batch)
    other.load_state_dict(state)
    assert other.at(Batch(inputs, y, 2), frozen=False) == ((inputs, y), (inputs, y))
