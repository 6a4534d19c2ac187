"""Saving, loading and merging curvatures."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ekfac_rs as ek
from cases import APPROXIMATIONS, EMBEDDINGS, NETWORKS, estimate
from headers import header_of, with_header, without_checksum

DIFFERENCES = {
    "approximation": {"approximation": "kfac-expand"},
    "diagonal": {"approximation": "diagonal"},
    "coordinates": {"coordinates": "merged"},
    "statistics": {"statistics": "running"},
    "labels": {"labels": "empirical"},
    "correction": {"correction": "scale"},
    "layers": {"layers": ["0", "6"]},
}


def curvature(sizes=(5, 3), seed=1, model=None, loss="cross_entropy", **options) -> ek.Curvature:
    network = NETWORKS["mlp-bn"]
    return estimate(model or network.make(), network.batches(loss, sizes, seed), loss, **options)


def factors(block) -> list[torch.Tensor]:
    if isinstance(block, ek.DiagonalBlock):
        return [block.values]
    return [factor for term in block.terms for factor in term if factor is not None]


ATTRIBUTES = (
    "settings",
    "examples",
    "batches",
    "loss",
    "layers",
    "uncovered",
    "batchnorms",
    "versions",
)


def identical(first: ek.Curvature, second: ek.Curvature) -> bool:
    return all(getattr(first, name) == getattr(second, name) for name in ATTRIBUTES) and all(
        torch.equal(a, b) and a.dtype == b.dtype
        for layer in first
        for a, b in zip(factors(first[layer]), factors(second[layer]), strict=True)
    )


# --- files --------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinates", ["raw", "merged"])
@pytest.mark.parametrize("approximation", [*APPROXIMATIONS, "diagonal"])
def test_a_round_trip_keeps_every_bit_and_the_metadata(approximation, coordinates, tmp_path):
    original = curvature(approximation=approximation, coordinates=coordinates)
    original.save(tmp_path / "curvature.safetensors")
    loaded = ek.Curvature.load(tmp_path / "curvature.safetensors")
    assert identical(loaded, original)
    assert loaded.examples == 8
    assert loaded.batches == 2


def test_a_round_trip_in_single_precision(tmp_path):
    original = curvature().to(dtype=torch.float32)
    original.save(tmp_path / "f")
    loaded = ek.Curvature.load(tmp_path / "f")
    assert loaded["0"].dtype == torch.float32
    assert identical(loaded, original)


@pytest.mark.parametrize("approximation", [*APPROXIMATIONS, "diagonal"])
def test_triangles_lose_nothing(approximation, tmp_path):
    original = curvature(approximation=approximation)
    original.save(tmp_path / "f", storage="triangle")
    assert identical(ek.Curvature.load(tmp_path / "f"), original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_storage_keeps_diagonals_and_rounds_correlations(dtype, tmp_path):
    original = curvature().to(dtype=dtype)
    original.save(tmp_path / "f", storage="half")
    loaded = ek.Curvature.load(tmp_path / "f")
    rounded = False
    for layer in original:
        for a, b in zip(factors(original[layer]), factors(loaded[layer]), strict=True):
            assert b.dtype == dtype
            root = a.diagonal().sqrt()
            assert torch.equal(b.diagonal(), a.diagonal())
            assert torch.equal(b, b.T)
            assert ((a - b).abs() <= 2**-11 * 1.01 * root[:, None] * root).all()
            rounded |= not torch.equal(a, b)
    assert rounded


def test_storages_take_what_they_promise(tmp_path):
    A = torch.randn(300, 600)
    block = ek.KroneckerSum([(A @ A.T, A[:200] @ A[:200].T)])
    narrow = curvature()
    settings = replace(narrow.settings, approximation="kfac-expand")
    wide = replace(narrow, settings=settings, blocks={"0": block})
    sizes = {}
    for storage in ("full", "triangle", "half"):
        wide.save(tmp_path / storage, storage=storage)
        sizes[storage] = (tmp_path / storage).stat().st_size
    assert sizes["triangle"] < 0.52 * sizes["full"]
    assert sizes["half"] < 0.28 * sizes["full"]


@pytest.mark.parametrize("storage", ["triangle", "half"])
def test_truncated_compact_files_are_refused(storage, tmp_path):
    path = tmp_path / "f"
    curvature().save(path, storage=storage)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ek.errors.FileFormatError):
        ek.Curvature.load(path)


@pytest.mark.parametrize("storage", ["full", "triangle", "half"])
@pytest.mark.parametrize("correction", ["scale", "eigenvalues", "nearest"])
@pytest.mark.parametrize("approximation", ["xkfac", "diagonal"])
@pytest.mark.parametrize("network", ["mlp-bn", "sequence with padding"])
def test_corrected_curvatures_are_stored(network, approximation, correction, storage, tmp_path):
    network = (NETWORKS | EMBEDDINGS)[network]
    model, batches = network.make(), network.batches("cross_entropy", (5, 3))
    options = {"approximation": approximation, "correction": correction}
    original = estimate(model, batches, "cross_entropy", **options)
    # With the terms of both.
    for curvature in (original, original.merge(original)):
        curvature.save(tmp_path / "f", storage=storage)
        loaded = ek.Curvature.load(tmp_path / "f")
        assert loaded.settings.correction == correction
        assert repr(loaded) == repr(curvature)
        lossless = storage != "half" or correction == "eigenvalues" or approximation == "diagonal"
        if lossless:
            assert identical(loaded, curvature)
        for layer, block in curvature.items():
            assert type(loaded[layer]) is type(block)
            assert len(factors(loaded[layer])) == len(factors(block))


@pytest.mark.parametrize("lost", ["0.1.U", "0.1.Q", "0.1.values"])
def test_corrected_eigenvalues_without_a_part_are_refused(lost):
    found = curvature(correction="eigenvalues")
    twice = found.merge(found)
    tensors = twice.tensors()
    del tensors[lost]
    with pytest.raises(KeyError, match=lost.removeprefix("0.")):
        ek.Curvature.from_tensors(tensors, {"layers": twice.layers, **twice.metadata()})


def test_files_from_before_corrections_are_read():
    found = curvature()
    metadata = found.metadata()
    del metadata["settings"]["correction"]
    loaded = ek.Curvature.from_tensors(found.tensors(), {"layers": found.layers, **metadata})
    assert loaded.settings.correction is None
    assert identical(loaded, found)


@pytest.mark.parametrize("correction", ["scale", "eigenvalues", "nearest"])
@pytest.mark.parametrize("approximation", ["xkfac", "diagonal"])
def test_merging_corrected_curvatures_is_their_mean(approximation, correction):
    options = {"approximation": approximation, "correction": correction}
    first, second = curvature((5,), 1, **options), curvature((10, 5), 2, **options)
    both = first.merge(second)
    assert both.examples == 20
    for layer, block in both.items():
        mean = 0.25 * first[layer].dense() + 0.75 * second[layer].dense()
        torch.testing.assert_close(block.dense(), mean)


def test_unknown_storage_is_refused(tmp_path):
    with pytest.raises(ek.errors.OptionError, match="storage"):
        curvature().save(tmp_path / "f", storage="double")


def test_paths_may_be_strings_and_files_are_replaced(tmp_path):
    path = str(tmp_path / "curvature")
    curvature(seed=1).save(path)
    other = curvature(seed=2)
    other.save(path)
    assert identical(ek.Curvature.load(path), other)
    assert [entry.name for entry in tmp_path.iterdir()] == ["curvature"]


def test_the_file_is_plain_safetensors_with_json_metadata(tmp_path):
    from safetensors import safe_open

    original = curvature()
    original.save(tmp_path / "f")
    with safe_open(tmp_path / "f", framework="pt") as file:
        metadata = file.metadata()
        names = list(file.keys())
    text = json.dumps({key: _json(value) for key, value in metadata.items()})
    for word in ("xkfac", "raw", "batch", "exact", *original.layers):
        assert word in text
    assert len(names) == sum(len(factors(block)) for block in original.values())


def _json(value: str) -> object:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def test_the_loaded_curvature_merges_with_one_in_memory(tmp_path):
    first, second = curvature(seed=1), curvature(seed=2)
    first.save(tmp_path / "f")
    assert identical(ek.Curvature.load(tmp_path / "f").merge(second), first.merge(second))


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        ek.Curvature.load(tmp_path / "nothing")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "curvature"
    curvature().save(path)
    return path.read_bytes()


def _header(content: bytes) -> tuple[dict, bytes]:
    header, body = header_of(content)
    return without_checksum(header), body


def _without_metadata(content: bytes) -> bytes:
    header, body = _header(content)
    del header["__metadata__"]
    return with_header(header, body)


def _without_one_tensor(content: bytes) -> bytes:
    header, body = _header(content)
    last = max(
        (name for name in header if name != "__metadata__"),
        key=lambda name: header[name]["data_offsets"][1],
    )
    start, _ = header.pop(last)["data_offsets"]
    return with_header(header, body[:start])


def _with_other_metadata(content: bytes) -> bytes:
    header, body = _header(content)
    header["__metadata__"] = {"format": "pt"}
    return with_header(header, body)


def _with_broken_json(content: bytes) -> bytes:
    header, body = _header(content)
    header["__metadata__"] = {key: value[:-5] for key, value in header["__metadata__"].items()}
    return with_header(header, body)


def _with_nan(content: bytes) -> bytes:
    header, body = _header(content)
    return with_header(header, body[:-8] + struct.pack("<d", float("nan")))


DAMAGES = {
    "empty": lambda content: b"",
    "cut in the length": lambda content: content[:5],
    "cut in the header": lambda content: content[:100],
    "cut in the data": lambda content: content[:-1],
    "cut in half": lambda content: content[: len(content) // 2],
    "something appended": lambda content: content + b"more",
    "length too large": lambda content: struct.pack("<Q", 2**60) + content[8:],
    "header not JSON": lambda content: content[:8] + b"x" * 20 + content[28:],
    "another file format": lambda content: b"PK\x03\x04" + content,
    "no metadata": _without_metadata,
    "other metadata": _with_other_metadata,
    "broken metadata": _with_broken_json,
    "a tensor is missing": _without_one_tensor,
    "not a number": _with_nan,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_by_its_name(damage, saved, tmp_path):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(saved))
    with pytest.raises(ek.errors.FileFormatError, match="damaged"):
        ek.Curvature.load(path)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("value", [None, "x", -1, 0, 3.5, [], {}], ids=repr)
@pytest.mark.parametrize(
    "key",
    ["batchnorms", "signatures", "gradient_examples", "examples", "batches", "tasks", "max_terms"],
)
def test_metadata_of_another_type_are_refused_and_not_left_for_later(
    key, value, compressed, saved, tmp_path
):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(saved)
    if compressed:
        one = ek.Curvature.load(path)
        ek.compress_curvatures([one, one], 1).save(path)
    header, body = _header(path.read_bytes())
    metadata = json.loads(header["__metadata__"]["ekfac_rs"])
    metadata[key] = value
    header["__metadata__"]["ekfac_rs"] = json.dumps(metadata)
    path.write_bytes(with_header(header, body))
    if (key, value, compressed) == ("max_terms", None, False):
        ek.Curvature.load(path)
        return
    with pytest.raises(ek.errors.FileFormatError, match="damaged"):
        ek.Curvature.load(path)


def test_terms_that_belong_to_no_block_are_refused():
    one = curvature(approximation="kfac-expand")
    tensors = one.tensors()
    more = tensors | {"0.9.A": tensors["0.0.A"]}
    with pytest.raises(ValueError, match="belong to no block: 0.9.A"):
        ek.Curvature.from_tensors(more, one.metadata())
    # Two terms of two tasks, which the metadata call a single pass's one.
    two = ek.compress_curvatures([one, one], 2)
    with pytest.raises(ValueError, match="belong to no block: 0.1.A, 0.1.G"):
        ek.Curvature.from_tensors(two.tensors(), two.metadata() | {"max_terms": None})


def test_a_flipped_header_byte_never_gives_a_wrong_curvature(saved, tmp_path):
    """Whatever is read after damage in the header is either refused or one and the same."""
    path = tmp_path / "flipped"
    path.write_bytes(saved)
    original = ek.Curvature.load(path)
    (length,) = struct.unpack("<Q", saved[:8])
    for location in range(0, 8 + length, 37):
        damaged = bytearray(saved)
        damaged[location] ^= 1
        path.write_bytes(damaged)
        try:
            found = ek.Curvature.load(path)
        except ek.errors.FileFormatError:
            continue
        # The metadata's own text may change its meaning; the factors may not.
        assert set(found) != set(original) or all(
            torch.equal(a, b)
            for layer in found
            for a, b in zip(factors(found[layer]), factors(original[layer]), strict=False)
        )


def test_a_directory_that_does_not_exist_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        curvature().save(tmp_path / "nowhere" / "curvature")
    assert list(Path(tmp_path).iterdir()) == []


# --- merging ------------------------------------------------------------------------------


def test_merging_weights_by_examples_and_keeps_the_operands():
    first, second = curvature((6,), 1), curvature((2,), 2)
    before = [factor.clone() for block in first.values() for factor in factors(block)]
    merged = first.merge(second)
    for layer in merged:
        for found, a, b in zip(
            *map(factors, (merged[layer], first[layer], second[layer])), strict=True
        ):
            assert torch.allclose(found, 0.75 * a + 0.25 * b, rtol=1e-13, atol=0)
    after = [factor for block in first.values() for factor in factors(block)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert merged.loss == pytest.approx(0.75 * first.loss + 0.25 * second.loss, rel=1e-13)


def test_merging_is_associative():
    parts = [curvature((size,), seed) for seed, size in enumerate((5, 2, 4))]
    left = parts[0].merge(parts[1]).merge(parts[2])
    right = parts[0].merge(parts[1].merge(parts[2]))
    for layer in left:
        for a, b in zip(factors(left[layer]), factors(right[layer]), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)


def test_merging_diagonals():
    first, second = (curvature((4,), seed, approximation="diagonal") for seed in (1, 2))
    merged = first.merge(second)
    for layer in merged:
        expected = (first[layer].values + second[layer].values) / 2
        assert torch.allclose(merged[layer].values, expected, rtol=1e-13)


@pytest.mark.parametrize("options", DIFFERENCES.values(), ids=DIFFERENCES)
def test_merging_passes_of_different_settings_is_refused(options):
    with pytest.raises(ek.errors.IncompatibleError):
        curvature().merge(curvature(**options))


def test_merging_passes_at_other_weights_is_refused():
    with pytest.raises(ek.errors.IncompatibleError):
        curvature().merge(curvature(model=NETWORKS["mlp-bn"].make(seed=5)))


def test_merging_passes_of_other_losses_is_refused():
    with pytest.raises(ek.errors.IncompatibleError):
        curvature().merge(curvature(loss="mse"))


def test_merging_passes_of_other_precision_is_refused():
    first = curvature()
    with pytest.raises(ek.errors.IncompatibleError):
        first.merge(first.to(dtype=torch.float32))
