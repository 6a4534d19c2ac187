"""Files of all kinds: whole or not there, and refused whatever happened to them."""

import json
import random
import resource
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import ekfac_rs as ek
from ekfac_rs import _checkpoints, _files
from ekfac_rs.loading import Inputs
from headers import header_of, with_header
from processes import in_child


def learner() -> ek.ContinualLearner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    return ek.ContinualLearner(model, generator=torch.Generator().manual_seed(0))


def batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 8, 4, generator=generator)
    return [(inputs, inputs[:, :3].argmax(1)) for inputs in x]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the library writes: each file with the call that reads it."""
    folder = tmp_path_factory.mktemp("files")
    one = learner()
    one.fit(batches(), checkpoint=folder / "training", every=3)
    one.consolidate(batches())
    one.save(folder / "learner")
    one.curvatures[0].save(folder / "curvature")

    def resume(path):
        return ek.ContinualLearner.resume(path, learner().model, generator=torch.Generator())

    def go_on(path):
        return ek.estimate_curvature(learner().model, batches(), checkpoint=path)

    torch.manual_seed(0)
    go_on(folder / "passes")
    readers = {"training": resume, "learner": resume, "curvature": ek.Curvature.load}
    readers["passes"] = go_on
    return {name: ((folder / name).read_bytes(), read) for name, read in readers.items()}


KINDS = ["training", "learner", "curvature", "passes"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_changed_or_swapped_anywhere_is_refused(kind, files, tmp_path):
    content, read = files[kind]
    path = tmp_path / "damaged"
    path.write_bytes(content)
    read(path)
    chance = random.Random(0)
    # Most of what can be taken apart is in the header.
    header = len(content) - len(header_of(content)[1])
    places = [chance.randrange(header if k % 2 else len(content) - 1) for k in range(200)]
    for number, place in enumerate(places):
        damaged = bytearray(content)
        if number % 3 == 0:
            del damaged[place:]
        elif number % 3 == 1:
            damaged[place] ^= 1 << chance.randrange(8)
        else:
            other = next(
                k for k in range(place + 1, place + len(content)) if _differ(content, place, k)
            )
            other %= len(content)
            damaged[place], damaged[other] = damaged[other], damaged[place]
        if _says_the_same(damaged, content):
            continue
        path.write_bytes(damaged)
        with pytest.raises(ek.errors.FileFormatError, match="damaged"):
            read(path)


def _says_the_same(damaged, content):
    """Whether a space of the header only stands elsewhere between its words."""
    try:
        return len(damaged) == len(content) and header_of(damaged) == header_of(content)
    except ValueError:
        return False


def _differ(content, place, other):
    return content[other % len(content)] != content[place]


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_offsets_that_lie_are_refused(kind, files, tmp_path):
    content, read = files[kind]
    path, chance = tmp_path / "damaged", random.Random(1)
    for _ in range(60):
        header, body = header_of(content)
        entry = header[chance.choice([name for name in header if name != "__metadata__"])]
        size = chance.choice([-1, 0, 1, 2**31, 2**40, 2**63, 2**64, 10**30, 0.5, "8", None])
        change = chance.choice(["shape", "offsets", "dtype"])
        if change == "shape":
            entry["shape"] = [size] * chance.randrange(1, 4)
        elif change == "offsets":
            entry["data_offsets"][chance.randrange(2)] = size
        else:
            entry["dtype"] = chance.choice(["F64", "U8", "BF16", "C64", "F128", 3])
        if header == header_of(content)[0]:
            continue
        path.write_bytes(with_header(header, body))
        with pytest.raises(ek.errors.FileFormatError, match="damaged"):
            read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_a_newer_format_says_so(kind, files, tmp_path):
    content, read = files[kind]
    header, body = header_of(content)
    metadata = json.loads(header["__metadata__"]["ekfac_rs"])
    header["__metadata__"] = {"ekfac_rs": json.dumps({**metadata, "format": 99})}
    path = tmp_path / "newer"
    path.write_bytes(with_header(header, body))
    with pytest.raises(ek.errors.FileFormatError, match="format 99, which is for a newer ekfac_rs"):
        read(path)


@pytest.mark.parametrize("kind", ["training", "learner"])
def test_a_learners_file_of_the_format_before_is_read(kind, files, tmp_path):
    content, read = files[kind]
    header, body = header_of(content)
    metadata = json.loads(header["__metadata__"]["ekfac_rs"])
    assert metadata["format"] == 2
    # Nothing else was different.
    text = json.dumps({**metadata, "format": 1})
    path = tmp_path / "before"
    path.write_bytes(content)
    tensors = load_file(path)
    header["__metadata__"] = {"ekfac_rs": text, "sha256": _files.fingerprint(tensors, text)}
    path.write_bytes(with_header(header, body))
    assert read(path).task == (kind == "learner")


def test_one_kind_of_file_is_not_another(files, tmp_path):
    path = tmp_path / "other"
    for kind, (_, read) in files.items():
        for other, (content, _) in files.items():
            if kind != other and {kind, other} != {"training", "learner"}:
                path.write_bytes(content)
                with pytest.raises(ek.errors.FileFormatError, match="other"):
                    read(path)


def test_a_full_disk_leaves_the_file_that_was_there(files, tmp_path):
    path = tmp_path / "learner"
    one = learner()
    one.fit(batches())
    one.consolidate(batches())
    one.save(path)
    before = path.read_bytes()

    def work():
        # Of any file that is written from here on.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        for write in (
            lambda: one.save(path),
            lambda: one.curvatures[0].save(path),
            lambda: learner().fit(batches(), checkpoint=path, every=1),
            lambda: ek.estimate_curvature(one.model, batches(), checkpoint=path.with_name("new")),
        ):
            try:
                write()
            except OSError:
                continue
            raise AssertionError("it was written")

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        in_child(work)
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        learner().save(tmp_path / "nowhere" / "learner")
    with pytest.raises(FileNotFoundError, match="nothing"):
        ek.ContinualLearner.resume(tmp_path / "nothing", learner().model)


# --- nested states --------------------------------------------------------------------------------

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]).map(
        lambda dtype: torch.arange(6).reshape(2, 3).to(dtype)
    ),
    st.just(torch.zeros(0, 3)),
    st.just(torch.tensor(2.5)),
)
keys = st.one_of(st.integers(0, 9), st.text(max_size=3))
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.lists(inner, max_size=2).map(lambda args: Inputs(tuple(args), {"mask": None})),
    ),
    max_leaves=8,
)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Inputs):
        return isinstance(b, Inputs) and equal((a.args, a.kwargs), (b.args, b.kwargs))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=60, deadline=None)
@given(content=st.dictionaries(st.text(max_size=4), values, max_size=4))
def test_nested_states_come_back_as_they_were(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("nested") / "state"
    _checkpoints.write_checkpoint(path, content)
    assert equal(_checkpoints.read_checkpoint(path, "cpu", "a state"), content)


def test_tensors_that_share_memory_or_have_gaps_come_back(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    content = {"whole": whole, "part": whole[1:], "column": whole[:, 1], "turned": whole.T}
    _checkpoints.write_checkpoint(tmp_path / "state", content)
    assert equal(_checkpoints.read_checkpoint(tmp_path / "state", "cpu", "a state"), content)


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, len, 1j], ids=lambda value: type(value).__name__
)
def test_what_a_file_cannot_hold_is_refused_with_its_place(value, tmp_path):
    with pytest.raises(ek.errors.OptionError, match=r"checkpoint\['a'\]\[1\]: expected tensors"):
        _checkpoints.write_checkpoint(tmp_path / "state", {"a": [0, value]})
    assert list(tmp_path.iterdir()) == []
