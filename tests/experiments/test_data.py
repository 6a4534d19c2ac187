"""IDX files, MNIST and its embedded subset, loaders in memory, permuted tasks."""

import gzip
import struct
import sys
from importlib import resources
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from ekfac_rs.errors import FileFormatError, OptionError, ShapeError
from ekfac_rs.experiments.data import (
    TensorLoader,
    find_mnist,
    image_features,
    load_mnist,
    load_mnist_subset,
    read_idx,
    task_permutation,
)

TYPE_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx_bytes(array):
    code = TYPE_CODES[array.dtype.str[1:]]
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist(folder, images=6, suffix=""):
    """Four small files under MNIST's names."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name in NAMES:
        shape = (images, 28, 28) if "images" in name else (images,)
        limit = 256 if "images" in name else 10
        content = idx_bytes(generator.integers(0, limit, shape).astype(np.uint8))
        (folder / (name + suffix)).write_bytes(gzip.compress(content) if suffix else content)


# IDX


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    element_type=st.sampled_from(sorted(TYPE_CODES)),
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    compressed=st.booleans(),
)
def test_idx_files_come_back_as_written(tmp_path, element_type, shape, compressed):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(element_type)
    content = idx_bytes(array)
    path = tmp_path / "array"
    path.write_bytes(gzip.compress(content) if compressed else content)
    result = read_idx(path)
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array)
    assert result.flags.writeable


INTACT = idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 4))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "truncated"),
        (INTACT[:3], "truncated"),
        (INTACT[:9], "truncated within the 2 sizes"),
        (INTACT[:-1], "truncated, shape"),
        (INTACT + b"\0", "too long"),
        (b"\1" + INTACT[1:], "magic number is 0x01000802"),
        (b"\0\0\x0a" + INTACT[3:], "magic number"),
        (b"\0\0\x08\0", "magic number"),
        (struct.pack(">HBB4I", 0, 8, 4, *[2**32 - 1] * 4), "truncated, shape"),
        (gzip.compress(INTACT)[:-9], "gzip"),
        (gzip.compress(INTACT)[:-8] + b"\0" * 8, "gzip"),
        (gzip.compress(INTACT[:-1]), "truncated, shape"),
    ],
    ids=[
        *("empty", "no header", "no sizes", "short", "long", "first bytes", "type", "no sizes"),
        *("huge", "short gzip", "wrong checksum", "short in gzip"),
    ],
)
def test_a_damaged_idx_file_is_refused_by_name(tmp_path, content, problem):
    path = tmp_path / "digits"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=problem) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


# MNIST


@pytest.mark.parametrize("subfolder", [".", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_is_found_in_a_folder_and_its_usual_subfolders(tmp_path, subfolder, suffix):
    write_mnist(tmp_path / subfolder, suffix=suffix)
    assert load_mnist(tmp_path).train_images.shape == (6, 28, 28)


def test_the_folder_can_come_from_the_environment_and_an_argument_wins(tmp_path, monkeypatch):
    write_mnist(tmp_path / "a", images=4)
    write_mnist(tmp_path / "b", images=5)
    monkeypatch.setenv("EKFAC_DATA", str(tmp_path / "a"))
    assert len(load_mnist().test_labels) == 4
    assert len(load_mnist(tmp_path / "b").test_labels) == 5


def test_a_folder_that_lacks_one_file_is_refused_with_what_is_expected(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    (tmp_path / NAMES[3]).unlink()
    assert find_mnist(tmp_path) is None
    with pytest.raises(OptionError, match=f"data_dir: .*{NAMES[3]}"):
        load_mnist(tmp_path)
    monkeypatch.setenv("EKFAC_DATA", str(tmp_path))
    with pytest.raises(OptionError, match="EKFAC_DATA: no MNIST"):
        load_mnist()


def test_without_data_and_torchvision_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("EKFAC_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(OptionError, match=r"torchvision.*--data-dir or EKFAC_DATA"):
        load_mnist()


def test_an_earlier_download_is_found_again(tmp_path, monkeypatch):
    monkeypatch.delenv("EKFAC_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    write_mnist(tmp_path / "ekfac_rs" / "MNIST" / "raw")
    assert len(load_mnist().train_labels) == 6


@pytest.mark.parametrize(
    ("name", "array", "problem"),
    [
        (NAMES[0], np.zeros((6, 28, 27), np.uint8), r"train: images .* \[6, 28, 27\]"),
        (NAMES[0], np.zeros((6, 28, 28), np.float32), "train: images .* float32"),
        (NAMES[1], np.zeros(5, np.uint8), r"train: labels .* \[6\], got uint8 \[5\]"),
        (NAMES[3], np.full(6, 10, np.uint8), "test: labels must be digits"),
    ],
    ids=["shape", "element type", "number of labels", "label"],
)
def test_idx_files_that_are_not_mnist_are_refused(tmp_path, name, array, problem):
    write_mnist(tmp_path)
    (tmp_path / name).write_bytes(idx_bytes(array))
    with pytest.raises(FileFormatError, match=problem):
        load_mnist(tmp_path)


def test_the_whole_of_mnist_is_read(mnist_folder):
    mnist = load_mnist(mnist_folder)
    assert mnist.train_images.shape == (60_000, 28, 28)
    assert mnist.test_images.shape == (10_000, 28, 28)
    # Known sums: the mean pixel of the training set is 0.1307 of 255.
    assert mnist.train_images.mean() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9]


# The embedded subset


def subset_file():
    return Path(str(resources.files("ekfac_rs.experiments.data") / "mnist_subset.npz"))


def test_the_subset_keeps_every_digits_share():
    subset = load_mnist_subset()
    assert subset.train_images.shape == (10_000, 28, 28)
    assert subset.test_images.shape == (2_000, 28, 28)
    # Class sizes of MNIST itself.
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.all(np.abs(np.bincount(subset.train_labels) - np.array(train) / 6) < 1)
    assert np.all(np.abs(np.bincount(subset.test_labels) - np.array(test) / 5) < 1)


def test_the_subset_is_part_of_mnist(mnist_folder):
    subset, whole = load_mnist_subset(), load_mnist(mnist_folder)
    with np.load(subset_file()) as arrays:
        train_rows, test_rows = arrays["train_rows"], arrays["test_rows"]
    assert len(np.unique(train_rows)) == 10_000
    assert len(np.unique(test_rows)) == 2_000
    np.testing.assert_array_equal(subset.train_images, whole.train_images[train_rows])
    np.testing.assert_array_equal(subset.train_labels, whole.train_labels[train_rows])
    np.testing.assert_array_equal(subset.test_images, whole.test_images[test_rows])
    np.testing.assert_array_equal(subset.test_labels, whole.test_labels[test_rows])


def test_the_subset_is_small_and_states_source_and_licence():
    assert subset_file().stat().st_size <= 2_500_000
    with np.load(subset_file()) as arrays:
        provenance = str(arrays["provenance"])
    readme = (subset_file().parent / "README.md").read_text(encoding="utf-8")
    for text in (provenance, readme):
        for part in ("LeCun", "Cortes", "Burges", "CC BY-SA 3.0", "make_mnist_subset.py", "2004"):
            assert part in text


# Loaders and tasks


@given(
    count=st.integers(0, 30),
    batch_size=st.integers(1, 12),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_an_epoch_yields_each_example_once_with_its_label(count, batch_size, shuffle, drop_last):
    x = torch.arange(count, dtype=torch.float32).unsqueeze(1)
    loader = TensorLoader(x, torch.arange(count), batch_size, shuffle, drop_last=drop_last)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(inputs) == batch_size for inputs, _ in batches[:-1])
        seen = torch.cat([y for _, y in batches]) if batches else torch.empty(0, dtype=torch.long)
        assert all(torch.equal(inputs[:, 0].long(), y) for inputs, y in batches)
        assert len(seen.unique()) == len(seen)
        kept = count - count % batch_size if drop_last else count
        assert len(seen) == kept
        if not shuffle:
            assert torch.equal(seen, torch.arange(kept))


def orders(seed, epochs=2):
    loader = TensorLoader(
        torch.arange(50), torch.arange(50), 50, True, torch.Generator().manual_seed(seed)
    )
    return [next(iter(loader))[1].tolist() for _ in range(epochs)]


def test_the_order_depends_on_the_generator_alone_and_changes_every_epoch():
    first = orders(0)
    torch.manual_seed(123)
    assert orders(0) == first
    assert first[0] != first[1]
    assert orders(1) != first


def test_a_loader_of_unequal_tensors_or_empty_batches_is_refused():
    with pytest.raises(ShapeError, match=r"x, y: .* \[3\] and \[4\]"):
        TensorLoader(torch.zeros(3), torch.zeros(4), 2)
    with pytest.raises(ShapeError, match="x, y"):
        TensorLoader(torch.zeros(()), torch.zeros(()), 2)
    with pytest.raises(OptionError, match=r"batch_size: .* got 0"):
        TensorLoader(torch.zeros(3), torch.zeros(3), 0)


def test_features_are_standardised_pixels():
    features = image_features(load_mnist_subset().train_images)
    assert features.shape == (10_000, 784)
    assert features.dtype == torch.float32
    assert abs(features.mean().item()) < 0.01
    assert abs(features.std().item() - 1) < 0.01


def test_each_task_has_its_own_fixed_permutation():
    tasks = [task_permutation(784, task, seed=3) for task in range(4)]
    assert torch.equal(tasks[0], torch.arange(784))
    for i, permutation in enumerate(tasks):
        assert torch.equal(permutation.sort().values, torch.arange(784))
        assert torch.equal(permutation, task_permutation(784, i, seed=3))
    distinct = {tuple(permutation.tolist()) for permutation in tasks}
    assert len(distinct) == 4
    assert not torch.equal(tasks[1], task_permutation(784, 1, seed=4))
