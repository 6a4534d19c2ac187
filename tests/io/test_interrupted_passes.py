"""Curvature passes that are interrupted end as they would have without: bit for bit."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ekfac_rs as ek
from ekfac_rs.errors import FileFormatError, IncompatibleError, NonFiniteError, OptionError

SEED = 5


class Stop(Exception):
    pass


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        # Wide enough for rows of the mean's factor to be kept for a while.
        first = [nn.Linear(6, 40), nn.BatchNorm1d(40), nn.ReLU()]
        return nn.Sequential(*first, nn.Linear(40, 3))


class Interrupted:
    """A shuffled loader that stops before a mini-batch, counted over all passes."""

    def __init__(self, stop=None, generator=None, size=9):
        own = torch.Generator().manual_seed(0)
        x = torch.randn(60, 6, generator=own)
        dataset = TensorDataset(x, x[:, :3].argmax(1))
        self.inner = DataLoader(dataset, batch_size=size, shuffle=True, generator=generator)
        self.generator, self.stop, self.read = generator, stop, 0

    def __len__(self):
        return len(self.inner)

    def __iter__(self):
        for batch in self.inner:
            self.read += 1
            if self.read == self.stop:
                raise Stop
            yield batch


def passes(loader, *, seed=SEED, model=None, **options):
    torch.manual_seed(seed)
    options = {"correction_batches": 4, **options}
    return ek.estimate_curvature(model or net(), loader, **options)


def require_same(found, expected):
    assert found.metadata() == expected.metadata()
    theirs = expected.tensors()
    assert list(found.tensors()) == list(theirs)
    for name, tensor in found.tensors().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture
def interrupted(tmp_path):
    """Of a pass that is not over."""
    with pytest.raises(Stop):
        passes(Interrupted(6), checkpoint=tmp_path / "file", every=2)
    return tmp_path / "file"


# A pass has 7 mini-batches, one of a correction 4: amid the first, between two, at the beginning
# and amid a correction's.
STOPS = {None: (4, 7), "scale": (8, 11), "eigenvalues": (5, 8, 9, 11), "nearest": (8, 9, 13, 18)}


@pytest.mark.parametrize("correction", STOPS)
@pytest.mark.parametrize("approximation", ["xkfac-nested", "diagonal"])
def test_they_end_as_they_would_have_wherever_they_are_interrupted(
    approximation, correction, tmp_path
):
    options = {"approximation": approximation, "correction": correction}
    expected = passes(Interrupted(), **options)
    options |= {"checkpoint": tmp_path / "file", "every": 2}
    # Of a diagonal the nearest is there after one pass.
    for stop in STOPS[correction if approximation != "diagonal" else correction and "scale"]:
        with pytest.raises(Stop):
            passes(Interrupted(stop), **options)
        require_same(passes(Interrupted(), seed=99, **options), expected)
        (tmp_path / "file").unlink()


def test_one_that_is_interrupted_time_and_again_comes_to_its_end(tmp_path):
    options = {"correction": "nearest", "checkpoint": tmp_path / "file", "every": 1}
    expected, interruptions = passes(Interrupted(), correction="nearest"), 0
    while True:
        try:
            # Two mini-batches further each time, after those that are passed over.
            curvature = passes(Interrupted(2 + interruptions % 7), seed=SEED, **options)
            break
        except Stop:
            interruptions += 1
    assert interruptions > 4
    require_same(curvature, expected)


def test_generators_go_on_with_it_and_end_as_they_would_have(tmp_path):
    def run(stop, labels, order, **options):
        model = net()
        loader = Interrupted(stop, order)
        return passes(loader, model=model, generator=labels, correction="scale", **options)

    def made():
        return [torch.Generator().manual_seed(seed) for seed in (2, 3)]

    there = made()
    expected = run(None, *there)
    options = {"checkpoint": tmp_path / "file", "every": 3}
    before = made()
    with pytest.raises(Stop):
        run(9, *before, **options)
    for one, fresh in zip(before, made(), strict=True):
        assert torch.equal(one.get_state(), fresh.get_state())
    others = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    require_same(run(None, *others, **options), expected)
    for one, other in zip(there, others, strict=True):
        assert torch.equal(one.get_state(), other.get_state())


def test_passes_that_are_over_are_not_made_again(tmp_path):
    options = {"correction": "eigenvalues", "checkpoint": tmp_path / "file"}
    first, second = Interrupted(), Interrupted()
    expected = passes(first, **options)
    require_same(passes(second, seed=99, **options), expected)
    assert first.read == 7 + 4
    assert second.read == 1


def test_another_call_takes_the_place_of_passes_that_are_over_and_of_no_others(interrupted):
    passes(Interrupted(), checkpoint=interrupted)
    other = net()
    with torch.no_grad():
        other[0].weight.mul_(1.5)
    expected = passes(Interrupted(), model=copy.deepcopy(other))
    require_same(passes(Interrupted(), model=other, checkpoint=interrupted), expected)
    # Another loader is refused all the same.
    with pytest.raises(IncompatibleError, match="mini-batch 1 "):
        passes(list(reversed(list(Interrupted()))), model=other, checkpoint=interrupted)


def unchanged(call, path, error, match):
    """Make a call that is refused; require that it changes nothing."""
    before = path.read_bytes()
    with pytest.raises(error, match=match):
        call()
    assert path.read_bytes() == before
    # As `passes` has seeded it.
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(SEED).get_state())
    require_same(passes(Interrupted(), checkpoint=path), passes(Interrupted()))


@pytest.mark.parametrize("name", ["0.weight", "3.bias", "1.running_mean"])
def test_a_model_that_has_changed_since_is_refused_with_the_layer(name, interrupted):
    model = net()
    layer, _, tensor = name.rpartition(".")
    with torch.no_grad():
        value = getattr(model.get_submodule(layer), tensor)
        # By one rounding of one number.
        value.view(-1)[0] = torch.nextafter(value.view(-1)[0], torch.tensor(9.0))
    unchanged(
        lambda: passes(Interrupted(), model=model, checkpoint=interrupted),
        interrupted,
        IncompatibleError,
        f"layer '{layer}': expected the {tensor} of the pass",
    )


@pytest.mark.parametrize(
    "options",
    [
        {"approximation": "xkfac"},
        {"labels": "type2"},
        {"max_examples": 50},
        {"layers": ["0", "3"]},
        {"correction_batches": 3},
        {"correction": "scale"},
        {"loss": "mse"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_arguments_are_refused_by_name(options, interrupted):
    (name,) = options
    name = {"loss": "likelihood"}.get(name, name)
    with pytest.raises(IncompatibleError, match=f"^{name}: expected .*that was interrupted"):
        passes(Interrupted(), checkpoint=interrupted, **options)


@pytest.mark.parametrize("change", ["other order", "other inputs", "fewer"])
def test_a_loader_that_yields_other_mini_batches_is_refused_and_changes_nothing(
    change, interrupted
):
    torch.manual_seed(SEED)
    batches = list(Interrupted())
    changed = {
        "other order": batches[::-1],
        "other inputs": [(x + 1e-6, y) for x, y in batches],
        "fewer": batches[:3],
    }[change]

    # As many by their length as there were.
    class Other(list):
        def __iter__(self):
            return iter(changed)

    generator = torch.Generator().manual_seed(1)
    with pytest.raises(IncompatibleError, match="generator: expected 1"):
        passes(Interrupted(generator=generator), checkpoint=interrupted)
    unchanged(
        lambda: passes(Other(batches), checkpoint=interrupted),
        interrupted,
        IncompatibleError,
        "expected the loader to yield mini-batch 4",
    )


def test_what_is_not_finite_is_never_written(tmp_path):
    x, y = torch.randn(3, 8, 6), torch.randint(3, (3, 8))
    options = {"approximation": "diagonal", "checkpoint": tmp_path / "file", "every": 1}

    class Overflowing(ek.likelihood.CrossEntropy):
        def scores(self, *args, **kwargs):
            for score, weight in super().scores(*args, **kwargs):
                yield score * 1e30, weight

    with pytest.raises(NonFiniteError, match="layer '0': gradient"):
        passes(list(zip(x, y, strict=True)), loss=Overflowing(), **options)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path):
    loader = Interrupted()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        passes(loader, checkpoint=tmp_path / "nowhere" / "file")
    with pytest.raises(OptionError, match="every: expected"):
        passes(loader, checkpoint=tmp_path / "file", every=0)
    ek.ContinualLearner(net()).save(tmp_path / "learner")
    with pytest.raises(FileFormatError, match="a checkpoint of estimate_curvature"):
        passes(loader, checkpoint=tmp_path / "learner")
    assert loader.read == 0
