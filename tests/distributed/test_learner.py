"""Processes that learn together: one model, one penalty, one choice of its scale."""

import copy
import shutil

import pytest
import torch
import torch._dynamo  # of a DistributedDataParallel: every process would load it
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import ekfac_rs as ek
from ekfac_rs._ranks import Ranks
from ekfac_rs.batchnorm.statistics import synchronised
from nets import classification_loader, mlp
from team import Failure, team_of


@pytest.fixture(scope="module")
def team():
    with team_of(2) as pair:
        yield pair


def task(seed, rank=None):
    """Mini-batches of a task: of all processes, or a process's half of each."""
    batches = classification_loader(4, 3, examples=48, batch_size=16, seed=seed)
    return batches if rank is None else [(x[rank::2], y[rank::2]) for x, y in batches]


def outcome(learner, history=None):
    curvatures = [curvature.tensors() for curvature in learner.curvatures]
    return {
        "model": learner.model.state_dict(),
        "anchor": dict(learner.anchor),
        "curvatures": curvatures,
        "losses": learner.losses,
        "selection": [selection.as_dict() for selection in learner.selection],
        "history": history,
    }


def learnt(model, tasks, process_group=None, epochs=2, **options):
    torch.manual_seed(0)
    learner = ek.ContinualLearner(model, process_group=process_group, **options)
    for loader in tasks:
        history = learner.fit(loader, epochs=epochs, lr=0.2)
        learner.consolidate(loader)
    accuracies = learner.evaluate(tasks)
    return outcome(learner, [history, accuracies])


# --- the same in the end -------------------------------------------------------------------------

LEARNERS = {
    "auto": {"scale": "auto", "freeze_bn_after": 0.5, "weights": "first"},
    "adaptive": {"scale": "adaptive", "own": True, "correction": "eigenvalues"},
    # Long enough for a second look, with BatchNorms on and frozen.
    "own": {"own": True, "epochs": 10, "freeze_bn_after": 0.6, "damping": 0.01},
    "halving": {"scale": ek.scales.Halving(start=8.0, tolerance=0.0, tries=2), "step": "explicit"},
    "heads": {"head": "new", "max_terms": 1, "approximation": "kfac-expand"},
}


def learning(rank, name):
    # What differs between processes is the first one's when a task begins.
    model = mlp(4, 6, 5, 3, seed=rank)
    tasks = [task(0, rank), task(1, rank)]
    options = LEARNERS[name]
    if name == "heads":
        return learnt(DistributedDataParallel(model), tasks, **options)
    return learnt(model, tasks, dist.group.WORLD, **options)


@pytest.mark.parametrize("name", LEARNERS)
def test_processes_end_with_the_same_bits(team, name):
    first, second = team.results(learning, name)
    same(first, second)


def same(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            same(first[key], second[key])
    elif isinstance(first, list):
        for one, other in zip(first, second, strict=True):
            same(one, other)
    else:
        assert first == second or (first != first and second != second)


class Stopped(Exception):
    pass


def stopped_or_not(rank, folder, stops, falls_behind=-1):
    """Training of the second task; stopped in its sixth step, it goes on from a checkpoint.

    With each one steps begin to look anew, so all have as many. One rank may find an older one.
    """
    options = {"process_group": dist.group.WORLD, **LEARNERS["auto"]}
    learner = ek.ContinualLearner(mlp(4, 6, 5, 3), **options)
    torch.manual_seed(0)
    learner.fit(task(0, rank), lr=0.2)
    learner.consolidate(task(0, rank))
    path, older = f"{folder}/{rank}", f"{folder}/older{rank}"
    training = {"epochs": 2, "lr": 0.2, "checkpoint": path, "every": 2}

    def watch(step, _):
        if step == 4:
            shutil.copy(path, older)
        if step == 6 and stops:
            raise Stopped

    try:
        learner.fit(task(1, rank), callback=watch, **training)
    except Stopped:
        found = older if rank == falls_behind else path
        learner = ek.ContinualLearner.resume(found, mlp(4, 6, 5, 3), **options)
        learner.fit(task(1, rank), **training)
    return outcome(learner)


def test_training_of_several_processes_goes_on(team, tmp_path):
    whole, _ = team.results(stopped_or_not, str(tmp_path), False)
    for again in team.results(stopped_or_not, str(tmp_path), True):
        same(again, whole)


def test_processes_that_go_on_from_different_steps_say_so(team, tmp_path):
    for failure in team.run(stopped_or_not, str(tmp_path), True, 1):
        assert failure.kind == "DistributedError"
        assert "fit: expected the same on all ranks" in failure.message
        # A rank tells of the place where one stands: itself, or the one it heard of first.
        assert failure.message.endswith(("after 2 steps", "after 4 steps"))


# --- and what one process would have learnt ------------------------------------------------------

# No BatchNorm, no label drawn: halves of a mini-batch are then as good as the whole.
ALONE = {"approximation": "kfac-expand", "labels": "empirical", "scale": "auto"}


def without_batchnorm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def halves(rank):
    return learnt(without_batchnorm(), [task(0, rank), task(1, rank)], dist.group.WORLD, **ALONE)


def test_processes_learn_what_one_learns_of_the_mini_batches_together(team):
    first, _ = team.results(halves)
    alone = learnt(without_batchnorm(), [task(0), task(1)], **ALONE)
    for part in ("model", "anchor"):
        torch.testing.assert_close(first[part], alone[part], rtol=1e-8, atol=1e-10)
    for mine, theirs in zip(first["curvatures"], alone["curvatures"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-8)
    mine, theirs = first["selection"][0], alone["selection"][0]
    assert len(mine["scale"]) > 1
    for numbers in ("scale", "loss", "increase"):
        assert mine[numbers] == pytest.approx(theirs[numbers], rel=1e-7)
    (history, accuracies), (theirs, wanted) = first["history"], alone["history"]
    assert accuracies == pytest.approx(wanted)
    assert [pytest.approx(epoch, rel=1e-8) for epoch in theirs] == history


# --- the penalty is counted once -----------------------------------------------------------------


def penalised(model):
    """A model away from its anchor, and what holds it."""
    curvature = ek.estimate_curvature(model, task(0), labels="empirical")
    anchor = ek.merged_weights(model)
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    return curvature, anchor


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def wrapped(rank):
    model = mlp(4, 6, 5, 3).train()
    curvature, anchor = penalised(model)
    wrapper = DistributedDataParallel(model)
    penalty = ek.QuadraticPenalty(wrapper, curvature, anchor, damping=0.1, scale=50.0)
    x, y = task(1, rank)[0]
    (F.cross_entropy(wrapper(x), y) + penalty()).backward()
    raw = copy.deepcopy(gradients(model))
    penalty.precondition(1.0)
    return raw, gradients(model)


def test_a_wrapped_models_penalty_is_the_mean_of_the_processes_own(team):
    (first, stable), (second, stable_too) = team.results(wrapped)
    same(first, second)
    same(stable, stable_too)
    assert any(not torch.equal(first[name], stable[name]) for name in first)
    model = mlp(4, 6, 5, 3).train()
    curvature, anchor = penalised(model)
    penalty = ek.QuadraticPenalty(model, curvature, anchor, damping=0.1, scale=50.0)
    for rank in range(2):
        x, y = task(1, rank)[0]
        ((F.cross_entropy(model(x), y) + penalty()) / 2).backward()
    torch.testing.assert_close(first, gradients(model), rtol=1e-10, atol=1e-12)


def synchronised_of(model):
    return {n: m for n, m in model.named_children() if isinstance(m, nn.SyncBatchNorm)}


def over_all(rank):
    model = mlp(4, 6, 5, 3).train()
    curvature, anchor = penalised(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ranks = Ranks(dist.group.WORLD)
    penalty = ek.QuadraticPenalty(
        model, curvature, anchor, scale=50.0, process_group=dist.group.WORLD
    )
    batchnorms = synchronised_of(model)
    for batchnorm in batchnorms.values():
        batchnorm.track_running_stats = False
    x, y = task(1)[0]
    x, y = (x[:11], y[:11]) if rank == 0 else (x[11:], y[11:])
    # Torch's own forward is for GPUs.
    with synchronised(batchnorms, ranks):
        loss = F.cross_entropy(model(x), y, reduction="sum") * (2 / 16)
        value = penalty()
        (loss + value).backward()
    ranks.average_gradients(model.parameters())
    return value.detach(), gradients(model)


def test_under_synchronised_batchnorms_it_is_that_of_the_global_mini_batch(team):
    (value, first), (other, second) = team.results(over_all)
    same(first, second)
    assert value == other
    model = mlp(4, 6, 5, 3).train()
    curvature, anchor = penalised(model)
    penalty = ek.QuadraticPenalty(model, curvature, anchor, scale=50.0)
    x, y = task(1)[0]
    loss, alone = F.cross_entropy(model(x), y), penalty()
    (loss + alone).backward()
    torch.testing.assert_close(value, alone.detach(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(first, gradients(model), rtol=1e-9, atol=1e-12)


def synchronised_without_group(rank):
    model = mlp(4, 6, 5, 3).train()
    curvature, anchor = penalised(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    penalty = ek.QuadraticPenalty(model, curvature, anchor)
    with synchronised(synchronised_of(model), Ranks(dist.group.WORLD)):
        model(task(1, rank)[0][0])
    penalty()


def test_a_parts_statistics_are_never_taken_for_those_of_the_whole(team):
    for failure in team.run(synchronised_without_group):
        assert failure.kind == "BatchNormError"
        assert "process_group=" in failure.message


def curvature_of_wrapped(rank):
    model = DistributedDataParallel(mlp(4, 6, 5, 3))
    reduced = []
    model.register_comm_hook(reduced, _note)
    return ek.estimate_curvature(model, task(0, rank), labels="empirical"), len(reduced)


def _note(reduced, bucket):
    reduced.append(bucket)
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_a_wrapped_model_brings_its_group_and_its_hooks_see_nothing(team):
    (first, exchanged), (second, _) = team.results(curvature_of_wrapped)
    same(first.tensors(), second.tensors())
    assert exchanged == 0
    alone = ek.estimate_curvature(mlp(4, 6, 5, 3), [*task(0, 0), *task(0, 1)], labels="empirical")
    torch.testing.assert_close(first.tensors(), alone.tensors(), rtol=1e-10, atol=1e-12)


# --- failing together ----------------------------------------------------------------------------


def failing(rank, change):
    model = mlp(4, 6, 5, 3)
    learner = ek.ContinualLearner(model, process_group=dist.group.WORLD)
    loader = task(0, rank)
    before = copy.deepcopy(model.state_dict())
    if (change, rank) == ("fewer steps", 1):
        loader = loader[:2]
    elif (change, rank) == ("no data", 1):
        loader = []
    elif (change, rank) == ("not finite", 1):
        loader[1] = (loader[1][0] * torch.nan, loader[1][1])
    elif (change, rank) == ("a loader's own", 1):
        loader = _broken(loader)
    try:
        learner.fit(loader, steps=3 if change == "a loader's own" else None)
    finally:
        if change in {"fewer steps", "no data"}:
            same(before, model.state_dict())


class _Broken(Exception):
    pass


def _broken(loader):
    yield from loader[:2]
    raise _Broken("no more")


@pytest.mark.parametrize(
    ("change", "others", "own"),
    [
        ("fewer steps", "DistributedError", "DistributedError"),
        ("no data", "DistributedError", "EmptyLoaderError"),
        ("not finite", "NumericalError", "NumericalError"),
        ("a loader's own", "DistributedError", "_Broken"),
    ],
)
def test_training_fails_on_all_processes(team, change, others, own):
    first, second = team.run(failing, change)
    assert isinstance(first, Failure)
    assert isinstance(second, Failure)
    assert (first.kind, second.kind) == (others, own)
