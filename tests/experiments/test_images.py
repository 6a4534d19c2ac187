"""Folders and archives of images, resizing, splits, loaders and their augmentation."""

import tarfile

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image

from ekfac_rs.errors import FileFormatError, OptionError
from ekfac_rs.experiments.data import ImageLoader, ImageSet, ImageTree, find_data
from ekfac_rs.experiments.data.images import stratified_rows

SPLITS = {"train/b": 3, "train/a": 2, "val/a": 1, "val/b": 1, "test/a": 1, "test/b": 2}


def archive(folder, path, around=None, mode="w"):
    """Pack a folder, as it is or within another one."""
    with tarfile.open(path, mode) as tar:
        for item in sorted(folder.iterdir()):
            tar.add(item, f"{around}/{item.name}" if around else item.name)
    return path


def one_image(tmp_path, pixels):
    """A tree of a single image."""
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    return ImageTree(tmp_path)


def image_set(count, size=8, classes=2):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 3, size, size)).astype(np.uint8)
    labels = np.arange(count) % classes
    return ImageSet(images, labels, tuple("abcdefgh"[:classes]))


# Reading


def test_splits_and_classes_are_found_in_a_directory(tmp_path, write_images):
    tree = ImageTree(write_images(tmp_path, SPLITS))
    assert tree.splits == ("train", "validation", "test")
    train = tree.read("train", 16)
    assert train.classes == ("a", "b")
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
    assert train.images.shape == (5, 3, 16, 16)
    assert len(tree.read("validation", 16)) == 2
    assert train.images[0].mean() < train.images[-1].mean()


@pytest.mark.parametrize("around", [None, "dataset", "./dataset"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_reads_as_its_folder_does(tmp_path, write_images, around, mode):
    folder = write_images(tmp_path / "folder", SPLITS)
    packed = ImageTree(archive(folder, tmp_path / "images.tar", around, mode))
    assert packed.splits == ImageTree(folder).splits
    for split in packed.splits:
        assert packed.read(split, 8).digest() == ImageTree(folder).read(split, 8).digest()


def test_an_archive_of_a_single_split_keeps_it(tmp_path, write_images):
    folder = write_images(tmp_path / "folder", {"train/a": 1, "train/b": 1})
    tree = ImageTree(archive(folder, tmp_path / "images.tar"))
    assert tree.splits == ("train",)
    assert tree.read("train", 16).classes == ("a", "b")


def test_classes_may_lie_at_the_top(tmp_path, write_images):
    tree = ImageTree(write_images(tmp_path, {"cat": 2, "dog": 1}))
    assert tree.splits == ()
    assert tree.read(None, 16).classes == ("cat", "dog")


def test_the_first_folder_is_the_class_and_other_files_are_ignored(tmp_path, write_images):
    write_images(tmp_path, {"train/a/x": 1, "train/a/y": 1, "train/b": 1, "extra/c": 1})
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "a" / "._0.png").write_bytes(b"no image")
    (tmp_path / "train" / "0.png").write_bytes(b"of no class")
    train = ImageTree(tmp_path).read("train", 16)
    assert train.classes == ("a", "b")
    assert train.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_any_colours_become_red_green_blue(tmp_path, mode):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8), (51, 51, 51)).convert(mode).save(tmp_path / "a" / "0.png")
    assert np.all(np.abs(ImageTree(tmp_path).read(None, 8).images.astype(int) - 51) <= 1)


# Resizing


def test_an_image_of_the_wanted_size_is_left_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    read = one_image(tmp_path, pixels).read(None, 8).images[0]
    np.testing.assert_array_equal(read, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("upright", [False, True])
def test_the_central_square_of_a_long_image_is_kept(tmp_path, upright):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200
    pixels = pixels.transpose(1, 0, 2).copy() if upright else pixels
    read = one_image(tmp_path, pixels).read(None, 10).images[0]
    assert np.all(read[:, 2:8, 2:8] == 200)
    assert read.mean() > 190


def test_a_crop_keeps_the_middle_of_the_shorter_side(tmp_path):
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[10:30, 10:30] = 200
    tree = one_image(tmp_path, pixels)
    assert np.all(tree.read(None, 8, crop=0.4).images == 200)
    assert tree.read(None, 8, crop=1.0).images.mean() == pytest.approx(50, rel=0.1)


@given(width=st.integers(1, 50), height=st.integers(1, 50), size=st.integers(1, 40))
def test_any_image_gets_the_wanted_size(tmp_path_factory, width, height, size):
    folder = tmp_path_factory.mktemp("images")
    tree = one_image(folder, np.full((height, width, 3), 7, np.uint8))
    for crop in (1.0, 0.875):
        assert np.all(tree.read(None, size, crop=crop).images == 7)


# A part of the images


def test_fewer_images_are_chosen_from_every_class_and_always_the_same(tmp_path, write_images):
    tree = ImageTree(write_images(tmp_path, {"a": 6, "b": 12}))
    some = tree.read(None, 16, max_images=6)
    assert np.bincount(some.labels).tolist() == [2, 4]
    assert some.digest() == tree.read(None, 16, max_images=6).digest()
    assert some.digest() != tree.read(None, 16, max_images=6, seed=1).digest()
    assert some.classes == ("a", "b")
    assert tree.read(None, 16, max_images=100).digest() == tree.read(None, 16).digest()


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    share=st.floats(0, 1),
    data=st.data(),
)
def test_rows_are_chosen_in_proportion(labels, share, data):
    labels = np.array(labels)
    count = round(share * len(labels))
    rows = stratified_rows(labels, count, seed=data.draw(st.integers(0, 3)))
    assert len(set(rows.tolist())) == len(rows) == count
    exact = np.bincount(labels) * count / len(labels)
    chosen = np.bincount(labels[rows], minlength=len(exact))
    assert np.all(np.abs(chosen - exact) <= 1.5)


def test_held_out_images_are_a_share_of_every_class_and_nowhere_else():
    images = image_set(40, classes=4)
    rest, held_out = images.split(0.1, seed=0)
    assert (len(rest), len(held_out)) == (36, 4)
    assert np.bincount(held_out.labels).tolist() == [1, 1, 1, 1]
    both = {image.tobytes() for image in np.concatenate([rest.images, held_out.images])}
    assert both == {image.tobytes() for image in images.images}
    assert images.split(0.1, seed=0)[1].digest() == held_out.digest()


def test_the_digest_depends_on_images_labels_and_classes():
    images = image_set(4)
    others = [
        ImageSet(images.images[::-1], images.labels, images.classes),
        ImageSet(images.images, images.labels[::-1], images.classes),
        ImageSet(images.images, images.labels, ("a", "c")),
    ]
    assert len({images.digest(), *(other.digest() for other in others)}) == 4
    assert image_set(4).digest() == images.digest()


# What is wrong


def test_what_is_no_tree_of_images_is_refused_by_name(tmp_path):
    with pytest.raises(OptionError, match=r"missing: expected a directory or a tar"):
        ImageTree(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="empty: no images in folders by class"):
        ImageTree(tmp_path / "empty")
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(FileFormatError, match="text: not a tar archive"):
        ImageTree(tmp_path / "text")


def test_a_missing_split_is_refused_with_those_there(tmp_path, write_images):
    tree = ImageTree(write_images(tmp_path, {"train/a": 1, "test/a": 1}))
    with pytest.raises(OptionError, match="expected a split 'validation', got train, test"):
        tree.read("validation", 8)


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_image_is_refused_by_name(tmp_path, write_images, packed):
    folder = write_images(tmp_path / "folder", {"a": 2}, suffix=".jpg")
    path = folder / "a" / "001.jpg"
    path.write_bytes(path.read_bytes()[:200])
    tree = ImageTree(archive(folder, tmp_path / "images.tar") if packed else folder)
    with pytest.raises(FileFormatError, match=r"a/001\.jpg: damaged image"):
        tree.read(None, 8)


def test_a_truncated_archive_is_refused(tmp_path, write_images):
    folder = write_images(tmp_path / "folder", {"a": 20})
    path = archive(folder, tmp_path / "images.tar")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(FileFormatError, match=r"images\.tar: "):
        ImageTree(path).read(None, 8)


# Loaders


MEAN, STD = (0.5, 0.25, 0.0), (0.5, 1.0, 2.0)


def test_inputs_are_standardised_by_colour():
    images = image_set(5)
    ((x, y),) = ImageLoader(images, MEAN, STD, 5)
    expected = (images.images / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-6)
    assert x.dtype == torch.float32
    assert y.tolist() == images.labels.tolist()


def test_a_single_last_example_is_left_out_unless_it_is_alone():
    assert [len(x) for x, _ in ImageLoader(image_set(9), MEAN, STD, 4)] == [4, 4]
    assert [len(x) for x, _ in ImageLoader(image_set(10), MEAN, STD, 4)] == [4, 4, 2]
    assert [len(x) for x, _ in ImageLoader(image_set(1), MEAN, STD, 4)] == [1]


def epochs(seed, images=None):
    images = image_set(30) if images is None else images
    generator = torch.Generator().manual_seed(seed)
    loader = ImageLoader(images, MEAN, STD, 30, shuffle=True, augment=True, generator=generator)
    return [next(iter(loader))[0] for _ in range(2)]


def test_augmentation_depends_on_the_generator_alone_and_changes_every_epoch():
    first = epochs(0)
    torch.manual_seed(123)
    again = epochs(0)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], epochs(1)[0])


def test_augmented_images_are_shifted_and_mirrored_and_nothing_else():
    size, reach = 16, 2
    original = image_set(1, size=size)
    many = ImageSet(np.repeat(original.images, 400, 0), np.zeros(400, np.int64), ("a",))
    generator = torch.Generator().manual_seed(0)
    loader = ImageLoader(many, (0,) * 3, (1 / 255,) * 3, 400, augment=True, generator=generator)
    ((x, _),) = loader
    padded = np.pad(original.images[0], ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    allowed = {
        candidate[:, i : i + size, j : j + size].tobytes()
        for candidate in (padded, padded[:, :, ::-1])
        for i in range(2 * reach + 1)
        for j in range(2 * reach + 1)
    }
    seen = {image.tobytes() for image in x.round().to(torch.uint8).numpy()}
    assert seen == allowed


# Where data lie


def test_data_are_found_where_the_argument_the_environment_or_the_neighbour_says(
    tmp_path, monkeypatch
):
    for name in ("argument", "environment", "work", "shared/data"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(name)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("EKFAC_DATA", raising=False)
    assert find_data("file").read_text() == "shared/data"
    monkeypatch.setenv("EKFAC_DATA", str(tmp_path / "environment"))
    assert find_data("file").read_text() == "environment"
    assert find_data("file", tmp_path / "argument").read_text() == "argument"
    with pytest.raises(OptionError, match=r"no other in .*environment.*--data-dir or EKFAC_DATA"):
        find_data("other")


@pytest.mark.parametrize(
    ("name", "counts", "classes"),
    [
        ("clothing160.tar", {"train": 3068, "validation": 341, "test": 372}, 10),
        ("imagenet_sample160.tar", {None: 1000}, 1000),
        ("cifar10_jpeg.tar", {"test": 5000}, 10),
    ],
)
def test_the_presets_images_are_read(data_file, name, counts, classes):
    tree = ImageTree(data_file(name))
    for split, count in counts.items():
        images = tree.read(split, 32)
        assert len(images) == count
        assert len(images.classes) == classes
        assert len(np.unique(images.labels)) == classes
        assert 50 < images.images.mean() < 220
