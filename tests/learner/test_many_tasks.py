"""Many tasks at constant cost: what a learner keeps of a layer over all of them."""

import copy
import functools
import io
import math

import pytest
import torch
from torch import nn

import ekfac_rs as ek
from ekfac_rs.errors import IncompatibleError, OptionError
from nets import classification_loader, mlp
from oracle import relative_error

TASKS = [classification_loader(6, 3, examples=48, batch_size=16, seed=t) for t in range(7)]


def learner_of(max_terms, model=None, **options):
    generator = torch.Generator().manual_seed(0)
    model = mlp(6, 8, 5, 3) if model is None else model
    return ek.ContinualLearner(model, max_terms=max_terms, generator=generator, **options)


def learn(learner, loaders, lr=0.02):
    for loader in loaders:
        learner.fit(loader, lr=lr)
        learner.consolidate(loader)
    return learner


def numbers(learner):
    """How many numbers each layer's blocks hold."""
    return {
        name: sum(
            tensor.numel()
            for curvature in learner.curvatures
            for tensor in curvature[name].tensors().values()
        )
        for name in learner.curvatures[0]
    }


KINDS = {
    "xkfac-nested": {},
    "kfac-expand": {"approximation": "kfac-expand", "statistics": "running"},
    "diagonal": {"approximation": "diagonal"},
    "eigenvalues": {"correction": "eigenvalues"},
    "raw": {"coordinates": "raw", "approximation": "xkfac"},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_memory_does_not_grow_with_tasks(options):
    learner = learner_of(3, **options)
    held = []
    for loader in TASKS:
        learn(learner, [loader])
        held.append(numbers(learner))
        (curvature,) = learner.curvatures
        assert curvature.tasks == learner.task
        assert curvature.examples == 48 * learner.task
    for name, block in curvature.items():
        D, K = block.shape
        term = {ek.DiagonalBlock: D * K, ek.EigenbasisSum: D**2 + K**2 + D * K}
        allowed = 3 * term.get(type(block), D**2 + K**2)
        assert all(after[name] <= allowed for after in held)
    # It is what training is held by.
    with learner.penalty() as penalty, torch.no_grad():
        learner.model.eval()[0].weight += 0.1
        assert penalty().item() > 1e-4
        assert penalty.top_eigenvalue() > 0.0


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_with_room_for_all_it_learns_as_without_a_bound(options):
    bounded, free = (learn(learner_of(n, **options), TASKS[:3]) for n in (9, None))
    assert len(free.curvatures) == 3
    assert len(bounded.curvatures) == 1
    torch.testing.assert_close(bounded.model.state_dict(), free.model.state_dict())


def test_it_holds_old_tasks_nearly_as_all_terms_do():
    bounded, free = learner_of(4), learner_of(None)
    for loader in TASKS:
        learn(free, [loader])
        # At the same weights: only what is kept of the curvatures differs.
        bounded.model.load_state_dict(free.model.state_dict())
        bounded.adopt(free.curvatures[-1], free.anchor)
    for name, block in bounded.curvatures[0].items():
        whole = sum((c[name] for c in free.curvatures[1:]), free.curvatures[0][name])
        assert block.trace() == pytest.approx(whole.trace(), rel=1e-9)
        error = relative_error(block.dense(), whole.dense())
        assert 1e-6 < error < 0.3


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_saved_state_goes_on_as_the_original_would(options):
    learner = learn(learner_of(2, **options), TASKS[:3])
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    other = learner_of(2, **options)
    other.load_state_dict(torch.load(file))
    assert [c.tasks for c in other.curvatures] == [3]
    for each in (learner, other):
        each.generator.manual_seed(1)
        torch.manual_seed(1)
        learn(each, TASKS[3:5])
    torch.testing.assert_close(other.model.state_dict(), learner.model.state_dict())
    assert other.curvatures[0].trace() == pytest.approx(learner.curvatures[0].trace(), rel=1e-9)


def test_old_rows_are_held_as_before_when_the_output_layer_grows():
    learner = learn(learner_of(2), TASKS[:4])
    generator = torch.Generator().manual_seed(1)

    def value():
        with learner.penalty() as penalty:
            learner.model.eval()
            return penalty().item()

    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).double())
    before = value()
    learner.grow(5)
    assert learner.curvatures[0]["6"].shape == (5, 6)
    assert value() == pytest.approx(before, rel=1e-9)
    learn(learner, [classification_loader(6, 5, examples=48)])
    assert learner.curvatures[0].tasks == 5


def test_steps_are_stable_on_thin_terms():
    """Explicit steps at this rate diverge; the stable ones come back to the anchor."""
    learner = learn(learner_of(2), TASKS[:5])
    learner.model.eval()
    with learner.penalty() as penalty:
        lr = 100.0 * penalty.max_stable_lr()
        with torch.no_grad():
            for parameter in learner.model.parameters():
                parameter.add_(0.01)
        start = copy.deepcopy(learner.model.state_dict())
        values = {}
        for stable in (False, True):
            learner.model.load_state_dict(start)
            optimizer = torch.optim.SGD(learner.model.parameters(), lr=lr)
            values[stable] = []
            for _ in range(30):
                optimizer.zero_grad()
                total = penalty()
                values[stable].append(float(total.detach()))
                if total > 1e6:
                    break
                total.backward()
                if stable:
                    penalty.precondition(lr)
                optimizer.step()
    assert max(values[False]) > 1e3 * values[False][0]
    assert max(values[True]) < 3.0 * values[True][0]
    assert values[True][-1] < 0.2 * values[True][0]


def test_convolutions_with_groups_and_embeddings_are_bounded():
    generator = torch.Generator().manual_seed(0)
    image = nn.Sequential(
        *(nn.Conv2d(4, 4, 2, groups=2), nn.ReLU()),
        *(nn.Conv2d(4, 4, 2, groups=4), nn.Flatten(), nn.Linear(16, 3)),
    )
    text = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3))
    y = torch.randint(3, (24,), generator=generator)
    inputs = {
        image: torch.randn(24, 4, 4, 4, generator=generator),
        text: torch.randint(7, (24, 3), generator=generator),
    }
    for model, x in inputs.items():
        learner = learn(learner_of(2, model), [[(x, y)]] * 5)
        (curvature,) = learner.curvatures
        for name, block in curvature.items():
            assert name == list(curvature)[-1] or len(block.terms) <= 2
    assert isinstance(curvature["0"], ek.ColumnwiseSum)


# --- curvatures, without a learner ---------------------------------------------------------------


def curvatures(count, **options):
    model = mlp(6, 8, 5, 3)
    generator = torch.Generator().manual_seed(0)
    made = [
        ek.estimate_curvature(model, loader, generator=generator, **options)
        for loader in TASKS[:count]
    ]
    return model, made


def test_a_sum_stands_for_its_curvatures():
    model, made = curvatures(4)
    anchor = ek.merged_weights(model)
    terms = max(sum(len(c[name].terms) for c in made) for name in made[0])
    whole = ek.compress_curvatures(made, terms)
    assert whole.tasks == 4
    assert whole.examples == 4 * 48
    assert whole.batches == 4 * 3
    assert whole.loss == made[-1].loss
    assert "tasks=4" in repr(whole)
    few = ek.compress_curvatures([ek.compress_curvatures(made[:3], 2), made[3]], 2)
    assert few.trace() == pytest.approx(whole.trace(), rel=1e-9)
    model.eval()
    with torch.no_grad():
        model[0].weight += 0.1
    values = []
    for found in (made, [whole], [ek.compress_curvatures(made[:3], terms), made[3]]):
        with ek.QuadraticPenalty(model, found, anchor, scale=2.0) as penalty:
            values.append(penalty().item())
    assert values == pytest.approx([values[0]] * 3, rel=1e-10)


def test_a_sum_and_a_later_curvature_are_a_penalty_together():
    model, made = curvatures(5)
    anchor = ek.merged_weights(model)
    older = ek.compress_curvatures(made[:4], 2)
    model.eval()
    with torch.no_grad():
        model[0].weight += 0.1
    with ek.QuadraticPenalty(model, [older, made[4]], anchor) as penalty:
        both = penalty().item()
    separate = []
    for found in (older, made[4]):
        with ek.QuadraticPenalty(model, [found], anchor) as penalty:
            separate.append(penalty().item())
    assert both == pytest.approx(sum(separate), rel=1e-10)


@pytest.mark.parametrize("storage", ["full", "triangle", "half"])
@pytest.mark.parametrize("max_terms", [2, 20])
def test_sums_are_stored(max_terms, storage, tmp_path):
    _, made = curvatures(5)
    whole = ek.compress_curvatures(made, max_terms)
    whole.save(tmp_path / "f", storage=storage)
    loaded = ek.Curvature.load(tmp_path / "f")
    assert repr(loaded) == repr(whole)
    assert loaded.tasks == 5
    for name, block in whole.items():
        assert repr(loaded[name]) == repr(block)
        error = relative_error(loaded[name].dense(), block.dense())
        assert error < (1e-3 if storage == "half" else 1e-15)


@pytest.mark.parametrize("storage", ["full", "triangle", "half"])
def test_one_task_with_fewer_terms_than_strata_is_stored(storage, tmp_path):
    _, made = curvatures(1)
    one = ek.compress_curvatures(made, 1)
    assert one.tasks == 1
    assert one.trace() == pytest.approx(made[0].trace(), rel=1e-12)
    one.save(tmp_path / "f", storage=storage)
    loaded = ek.Curvature.load(tmp_path / "f")
    assert loaded.max_terms == 1
    for name, block in one.items():
        assert len(made[0][name].terms) == 2
        assert repr(loaded[name]) == repr(block)


@pytest.mark.parametrize("count", [1, 3])
def test_what_was_compressed_is_no_pass_to_merge(count):
    _, made = curvatures(count)
    whole = ek.compress_curvatures(made, 2)
    for pair in ((whole, made[0]), (made[0], whole)):
        with pytest.raises(
            IncompatibleError,
            match="expected passes of one task, got what compress_curvatures made",
        ):
            pair[0].merge(pair[1])


def test_what_cannot_be_summed_is_refused():
    _, made = curvatures(2)
    _, others = curvatures(1, approximation="diagonal")
    _, raw = curvatures(1, coordinates="raw")
    _, coarse = curvatures(1, approximation="kfac-expand")
    with pytest.raises(IncompatibleError, match="one kind of block"):
        ek.compress_curvatures([*made, *others], 2)
    with pytest.raises(IncompatibleError, match="coordinates: expected 'merged'"):
        ek.compress_curvatures([*made, *raw], 2)
    with pytest.raises(IncompatibleError, match="approximation: expected 'kfac-expand'"):
        ek.compress_curvatures([*made, *coarse], 2)
    wide = made[0].embedded("6", 4)
    with pytest.raises(IncompatibleError, match=r"layer '6': expected shape \(3, 6\) in all"):
        ek.compress_curvatures([wide, made[1]], 2)
    with pytest.raises(OptionError, match="at least one, got none"):
        ek.compress_curvatures([], 2)
    for max_terms in (0, 2.0, None):
        with pytest.raises(OptionError, match="max_terms: expected an integer of at least 1"):
            ek.compress_curvatures(made, max_terms)
    with pytest.raises(OptionError, match="max_terms"):
        learner_of(0)


def kept_state(learner):
    """Everything of a state, in a form that compares."""

    def flat(value):
        if isinstance(value, torch.Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {key: flat(part) for key, part in value.items()}
        return [flat(part) for part in value] if isinstance(value, list | tuple) else value

    return flat(learner.state_dict())


@functools.cache
def two_learners(head):
    """Learners of other tasks, and of other numbers of them."""
    return [
        learn(learner_of(2, scale="auto", head=head), tasks) for tasks in (TASKS[:2], TASKS[2:3])
    ]


@pytest.mark.parametrize("head", [None, "new"])
@pytest.mark.parametrize("value", [None, 7, "x", [1], {"a": 1}], ids=repr)
@pytest.mark.parametrize(
    "key", ["model", "task", "anchor", "norms", "heads", "losses", "selection", "curvatures"]
)
def test_a_state_with_a_part_of_another_kind_changes_nothing(key, value, head):
    learner, other = two_learners(head)
    state = copy.deepcopy(learner.state_dict())
    own = copy.deepcopy(other.state_dict())
    before = kept_state(other)
    if (key, value) == ("task", 7):
        value = 1  # fewer than there are curvatures of
    if (key, value) == ("losses", None):
        value = [0.1, math.nan]  # None is what a learner had that held on to nothing
    with pytest.raises(IncompatibleError, match="state: expected"):
        other.load_state_dict(state | {key: value})
    assert kept_state(other) == before
    other.load_state_dict(state)
    assert kept_state(other) == kept_state(learner)
    other.load_state_dict(own)
    assert kept_state(other) == before


def test_a_state_whose_anchor_is_of_other_shapes_or_weights_changes_nothing():
    learner = learn(learner_of(2), TASKS[:2])
    other = learn(learner_of(2), TASKS[2:3])
    before = kept_state(other)
    name = next(iter(learner.anchor))
    for change in (lambda w: w[:2], lambda w: 2.0 * w):
        state = copy.deepcopy(learner.state_dict())
        state["anchor"]["weights"][name] = change(state["anchor"]["weights"][name])
        with pytest.raises(IncompatibleError, match=f"state: expected an anchor .*{name}"):
            other.load_state_dict(state)
        assert kept_state(other) == before
