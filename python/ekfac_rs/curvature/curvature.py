"""The curvature of a model: a block for each layer, and what it was taken of."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ekfac_rs._checks import require_count
from ekfac_rs._modes import without_autocast
from ekfac_rs._tensors import accumulation_dtype
from ekfac_rs.curvature import files
from ekfac_rs.curvature.block import Block, kept_strata, require_same_kind
from ekfac_rs.curvature.bounding import bounded
from ekfac_rs.curvature.columnwise import sum_of_terms
from ekfac_rs.curvature.diagonal import DiagonalBlock
from ekfac_rs.curvature.eigenbasis import EigenbasisSum
from ekfac_rs.curvature.kronecker import KroneckerSum
from ekfac_rs.curvature.settings import DIAGONAL, PassSettings
from ekfac_rs.curvature.thin import ThinKroneckerSum
from ekfac_rs.errors import (
    EkfacError,
    FileFormatError,
    IncompatibleError,
    OptionError,
    UnknownLayerError,
)
from ekfac_rs.layers import AffineLayer

# Fixed incommensurate phases: no change of weights short of a conspiracy keeps their projection.
_PHASE = 0.7390851

# Of a smaller norm, squares may have been lost in single precision.
_LEAST = 1e-12


class Signature(NamedTuple):
    """Two numbers that tell whether weights are still those a curvature was taken at."""

    norm: float
    projection: float

    @classmethod
    def of(
        cls, weight: Tensor, gain: Tensor | None = None, shift: Tensor | None = None
    ) -> "Signature":
        """Signature of ``[diag(gain) weight, shift]``, which is not made.

        The projection is the sum of all entries, row after row, times ``cos(i phase)``.

        Parameters
        ----------
        weight : Tensor of shape (D, K)
        gain, shift : Tensor of shape (D,), optional
        """
        (D, K), device = weight.shape, weight.device
        # Rounded sums of a row tell as much as exact ones do, in a fraction of the time.
        weight = weight.detach().to(accumulation_dtype(weight.dtype))
        width = K if shift is None else K + 1
        across = _PHASE * torch.arange(width, dtype=torch.float64, device=device)
        down = _PHASE * width * torch.arange(D, dtype=torch.float64, device=device)
        # cos(x + y) from waves along a row: as many cosines as rows and columns, not as entries.
        waves = (across[:K].cos(), across[:K].sin())
        with without_autocast(device):
            sums = [(weight @ wave.to(weight.dtype)).double() for wave in waves]
        squares = torch.linalg.vector_norm(weight, dim=1).double().square()
        projections = down.cos() * sums[0] - down.sin() * sums[1]
        if gain is not None:
            gain = gain.detach().double()
            squares, projections = gain.square() * squares, gain * projections
        if shift is not None:
            shift = shift.detach().double()
            squares = squares + shift.square()
            projections = projections + shift * (down + across[K]).cos()
        signature = cls(math.sqrt(float(squares.sum())), float(projections.sum()))
        told = math.isfinite(signature.projection) and _LEAST < signature.norm < math.inf
        if not told and weight.dtype != torch.float64:
            # Squares that single precision does not hold.
            return cls.of(weight.double(), gain, shift)
        return signature

    def agrees(self, other: "Signature", tolerance: float = 1e-4) -> bool:
        """Whether both belong to the same weights up to the rounding of merging them."""
        scale = tolerance * max(self.norm, other.norm)
        return abs(self.norm - other.norm) <= scale and (
            abs(self.projection - other.projection) <= scale
        )


@dataclass(frozen=True, eq=False, repr=False)
class Curvature(Mapping[str, Block]):
    """Curvature of a model's loss, the mean over examples: one block for each layer.

    A mapping from layer name to `KroneckerSum`, `ColumnwiseSum` (Embeddings), `DiagonalBlock`, or
    `EigenbasisSum` where eigenvalues were corrected. `compress_curvatures` makes a sum over tasks,
    which has a `ThinKroneckerSum` where a layer would have had too many terms.

    Attributes
    ----------
    blocks : dict of str to block
        In the model's order.
    settings : PassSettings
        What was computed: loss, approximation, coordinates, statistics, labels, precision,
        correction.
    examples, batches : int
        How many were seen.
    gradient_examples : dict of str to list of int
        For each layer and stratum, how many of the examples were in mini-batches where the
        stratum has degrees of freedom: the others say nothing about its gradients.
    loss : float
        Mean loss per example at the weights the curvature was taken at.
    batchnorms : dict of str to str or None
        Layer name to the name of the BatchNorm it feeds.
    signatures : dict of str to Signature
        Of the weights the curvature was taken at.
    uncovered : tuple of str
        Trainable parameters without a block: in raw coordinates those of BatchNorms.
    versions : dict of str to str
        Of ekfac_rs and torch.
    tasks : int
        1, or of how many tasks this is the sum. Examples and batches are those of all of them then;
        settings, loss, weights (``signatures``) and versions those of the last.
    max_terms : int or None
        What `compress_curvatures` bounded the blocks to; their terms are no longer those of strata.
    """

    blocks: dict[str, Block]
    settings: PassSettings
    examples: int
    gradient_examples: dict[str, list[int]]
    batches: int
    loss: float
    batchnorms: dict[str, str | None]
    signatures: dict[str, Signature]
    uncovered: tuple[str, ...]
    versions: dict[str, str]
    tasks: int = 1
    max_terms: int | None = None

    def __getitem__(self, name: str) -> Block:
        try:
            return self.blocks[name]
        except KeyError:
            raise UnknownLayerError(
                f"layer {name!r}: expected one of {', '.join(map(repr, self.blocks))}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __repr__(self) -> str:
        tasks = f"tasks={self.tasks}, " if self.tasks > 1 else ""
        return (
            f"Curvature({self.settings}, {tasks}examples={self.examples}, "
            f"batches={self.batches}, layers={list(self)})"
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the model's order."""
        return tuple(self.blocks)

    def trace(self) -> float:
        """Sum of the blocks' traces."""
        return sum(block.trace() for block in self.values())

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Curvature":
        """Return the curvature on another device or in another dtype."""
        return replace(self, blocks={n: block.to(device, dtype) for n, block in self.items()})

    def embedded(self, layer: str, outputs: int) -> "Curvature":
        """Return the curvature of a layer with more outputs, zero on those that are new.

        That of weights whose new rows are zero, as far as they were there: `ContinualLearner.grow`.

        Parameters
        ----------
        layer : str
            Its name.
        outputs : int
            At least as many as the layer's block has rows.

        Raises
        ------
        UnknownLayerError
            The layer has no block.
        OptionError
            Fewer outputs, or a layer with groups.
        """
        # The signature stays: rows of zeros at the end add nothing to it.
        return replace(self, blocks={**self.blocks, layer: self[layer].embedded(outputs)})

    def merge(self, other: "Curvature") -> "Curvature":
        """Union of two passes over disjoint mini-batches, exactly as one pass over both.

        With a correction, which is not additive, it is the mean of the two, with the terms of both.

        Parameters
        ----------
        other : Curvature
            Taken at the same weights with the same settings.

        Raises
        ------
        IncompatibleError
            Another setting, layer, shape or model, or a compressed curvature; the message names it.
        """
        self._require_same_pass(other)
        examples = self.examples + other.examples
        share = self.examples / examples
        mine, theirs = self.gradient_examples, other.gradient_examples

        def union(name: str) -> Block:
            if self.settings.correction is not None:
                return self[name] * share + other[name] * (1.0 - share)
            return self[name].mixed(other[name], share, mine[name], theirs[name])

        return replace(
            self,
            blocks={name: union(name) for name in self},
            examples=examples,
            gradient_examples={
                name: [a + b for a, b in zip(mine[name], theirs[name], strict=True)]
                for name in self
            },
            batches=self.batches + other.batches,
            loss=share * self.loss + (1.0 - share) * other.loss,
        )

    def _require_same_pass(self, other: "Curvature") -> None:
        for curvature in (self, other):
            if curvature.max_terms is not None:
                raise IncompatibleError(
                    f"expected passes of one task, got what compress_curvatures made: {curvature!r}"
                )
        for setting, (mine, theirs) in self.settings.differences(other.settings).items():
            raise IncompatibleError(f"{setting}: expected {mine!r} in both, got {theirs!r}")
        if self.batchnorms != other.batchnorms:
            raise IncompatibleError(
                f"batchnorms: expected {self.batchnorms!r} in both, got {other.batchnorms!r}"
            )
        for name, block in self.items():
            if block.shape != other[name].shape:
                raise IncompatibleError(
                    f"layer {name!r}: expected shape {block.shape}, got {other[name].shape}"
                )
            require_same_kind(block, other[name])
            if block.dtype != other[name].dtype:
                raise IncompatibleError(
                    f"layer {name!r}: expected dtype {block.dtype} in both, got {other[name].dtype}"
                )
            if not self.signatures[name].agrees(other.signatures[name]):
                raise IncompatibleError(
                    f"layer {name!r}: expected both passes at the same weights, got others"
                )

    def metadata(self) -> dict[str, Any]:
        """Everything but the blocks, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "blocks"}
        return values | {
            "settings": asdict(self.settings),
            "signatures": {name: list(s) for name, s in self.signatures.items()},
        }

    def save(self, path: str | os.PathLike[str], *, storage: str = "full") -> None:
        """Write to a safetensors file with JSON metadata; replaced only when complete.

        Parameters
        ----------
        path : str or os.PathLike
        storage : {"full", "triangle", "half"}
            "triangle" stores one triangle of each factor, without loss, in half the bytes;
            "half" its correlations in float16 beside an exact diagonal, in a quarter of those of
            float32 (each entry right to ``2**-11 sqrt(F_ii F_jj)``). `load` reads all three.
            Bases and eigenvalues are stored as they are.

        Raises
        ------
        FileNotFoundError
            The directory does not exist.
        OptionError
            Unknown storage.
        """
        files.write(path, self.tensors(), {"layers": self.layers, **self.metadata()}, storage)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> "Curvature":
        """Read what `save` wrote.

        Parameters
        ----------
        path : str or os.PathLike
        device : torch.device or str

        Raises
        ------
        FileFormatError
            The file is truncated, corrupted or not a curvature.
        FileNotFoundError
            There is no such file.
        """
        tensors, metadata = files.read(path, device)
        try:
            return cls.from_tensors(tensors, metadata)
        except (KeyError, ValueError, TypeError, EkfacError) as error:
            raise FileFormatError(
                f"{path}: expected a curvature written by save(), got: {error}"
            ) from error

    def tensors(self) -> dict[str, Tensor]:
        """All factors under flat keys, for `from_tensors`."""
        return {
            f"{index}.{key}": tensor.contiguous()
            for index, name in enumerate(self)
            for key, tensor in self[name].tensors().items()
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> "Curvature":
        """Rebuild from `tensors` and `metadata`.

        Raises
        ------
        KeyError, TypeError, ValueError, EkfacError
            They are not what these gave: something is missing, left over or of another type.
        """
        values = dict(metadata)
        _require_metadata(values)
        layers = values.pop("layers", None) or list(values["batchnorms"])
        values["settings"] = PassSettings(**values["settings"])
        values["signatures"] = {name: Signature(*s) for name, s in values["signatures"].items()}
        values["uncovered"] = tuple(values["uncovered"])
        blocks = {
            name: _block_of(
                _with_prefix(tensors, f"{index}."),
                values["settings"],
                None
                if values.get("max_terms") is not None
                else len(kept_strata(values["gradient_examples"][name])),
            )
            for index, name in enumerate(layers)
        }
        curvature = cls(blocks=blocks, **values)
        if left_over := tensors.keys() - curvature.tensors().keys():
            raise ValueError(f"tensors that belong to no block: {', '.join(sorted(left_over))}")
        return curvature


def compress_curvatures(curvatures: Curvature | Sequence[Curvature], max_terms: int) -> Curvature:
    """Sum of the curvatures of several tasks, within the cost of ``max_terms`` terms a layer.

    For `QuadraticPenalty` it stands for all of them. Memory and the time of a product do not grow
    with the number of tasks, when the sum so far and the next task's are compressed again and
    again: a layer's block takes no more of either than ``max_terms`` dense Kronecker products do.
    A layer whose terms are no more than that is summed exactly. Of others the largest directions
    of every term are kept (`ThinKroneckerSum`), and what is lost goes into one or two dense
    products: the block stays positive semi-definite, its partial traces those of the sum. Layers
    with groups, Embeddings and corrected eigenvalues keep so many terms, into which others are
    joined where that changes least; diagonals add up.

    Parameters
    ----------
    curvatures : Curvature or sequence of Curvature
        Of tasks, or sums of them from here; the last task last.
    max_terms : int
        At least 1, which keeps a single Kronecker product: too few for many tasks.

    Returns
    -------
    Curvature
        With ``tasks`` the number of all; signatures, settings and loss are the last one's.

    Raises
    ------
    OptionError
        No curvature, or ``max_terms`` is below 1.
    IncompatibleError
        Curvatures in different coordinates, of different kinds or over different layers.
    """
    require_count("max_terms", max_terms)
    curvatures = [curvatures] if isinstance(curvatures, Curvature) else list(curvatures)
    if not curvatures:
        raise OptionError("curvatures: expected at least one, got none")
    require_summable(curvatures, curvatures[0].settings.coordinates)
    last = curvatures[-1]
    for curvature in curvatures:
        if curvature.settings.kind != last.settings.kind:
            raise IncompatibleError(
                f"approximation: expected {last.settings.kind} in all curvatures, got "
                f"{curvature.settings.kind}"
            )

    def summed(name: str) -> Block:
        like = last[name]
        blocks = [curvature[name].to(like.device, like.dtype) for curvature in curvatures]
        if any(block.shape != like.shape for block in blocks):
            raise IncompatibleError(
                f"layer {name!r}: expected shape {like.shape} in all, got "
                f"{[block.shape for block in blocks]}"
            )
        return bounded(reduce(add, blocks), max_terms)

    return replace(
        last,
        blocks={name: summed(name) for name in last},
        examples=sum(curvature.examples for curvature in curvatures),
        batches=sum(curvature.batches for curvature in curvatures),
        gradient_examples={
            name: [
                sum(examples)
                for examples in zip(*(c.gradient_examples[name] for c in curvatures), strict=True)
            ]
            for name in last
        },
        tasks=sum(curvature.tasks for curvature in curvatures),
        max_terms=max_terms,
    )


def require_summable(curvatures: Sequence[Curvature], coordinates: str) -> None:
    """Raise `IncompatibleError` unless the sum of these is a sum of blocks, layer by layer."""
    first = curvatures[0]
    for curvature in curvatures:
        if curvature.settings.coordinates != coordinates:
            raise IncompatibleError(
                f"coordinates: expected {coordinates!r} in all curvatures, "
                f"got {curvature.settings.coordinates!r}"
            )
        if curvature.batchnorms != first.batchnorms:
            raise IncompatibleError(
                f"curvatures: expected the layers {first.layers} in all, got {curvature.layers}"
            )
        if _kinds_of(curvature) != _kinds_of(first):
            raise IncompatibleError(
                f"approximation: expected one kind of block in all curvatures, got "
                f"{first.settings.kind} and {curvature.settings.kind}"
            )


def _kinds_of(curvature: Curvature) -> set[type[Block]]:
    # Dense terms and thin ones add up.
    thin_or_dense = (KroneckerSum, ThinKroneckerSum)
    return {KroneckerSum if isinstance(b, thin_or_dense) else type(b) for b in curvature.values()}


def signature_of(layer: AffineLayer, coordinates: str) -> Signature:
    """Signature of a layer's weights; of the raw ones where there are no running statistics.

    Of half precision, too, it is that of the anchor, which is float32: nothing is rounded twice.
    """
    batchnorm = layer.batchnorm
    if coordinates == "merged" and batchnorm is not None and batchnorm.running_var is not None:
        mean, variance = layer.running_statistics()
        return Signature.of(layer.weight(), *layer.merged_map(mean.double(), variance.double()))
    return Signature.of(layer.weight(), shift=layer.bias())


def _require_metadata(values: Mapping[str, Any]) -> None:
    """Raise unless JSON's values are what `Curvature.metadata` gave, as far as types tell."""
    names = values["batchnorms"].keys() if isinstance(values["batchnorms"], Mapping) else ()
    for key in ("batchnorms", "signatures", "gradient_examples"):
        if not names or not isinstance(values[key], Mapping) or values[key].keys() != names:
            raise ValueError(f"{key}: expected a value for each layer, got {values[key]!r}")
    if values.get("layers") is not None and set(values["layers"]) != set(names):
        raise ValueError(f"layers: expected {', '.join(names)}, got {values['layers']!r}")
    # Files from before there were sums over tasks have neither of the last two.
    counts = {"examples": values["examples"], "batches": values["batches"]}
    counts["tasks"] = values.get("tasks", 1)
    counts["max_terms"] = 1 if values.get("max_terms") is None else values["max_terms"]
    for key, count in counts.items():
        require_count(key, count)
    if not isinstance(values["loss"], float | int):
        raise TypeError(f"loss: expected a number, got {values['loss']!r}")
    for examples in values["gradient_examples"].values():
        if not all(isinstance(count, int) for count in examples):
            raise TypeError(f"gradient_examples: expected numbers of examples, got {examples!r}")
    for key in ("uncovered", "layers"):
        if isinstance(values.get(key), str):
            raise TypeError(f"{key}: expected names, got {values[key]!r}")


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _block_of(tensors: Mapping[str, Tensor], settings: PassSettings, strata: int | None) -> Block:
    """Rebuild a block from what its `tensors` gave; ``strata`` is None where it was compressed."""
    if settings.approximation == DIAGONAL:
        return DiagonalBlock(tensors["diagonal"])
    if any(key.startswith(("thin.", "remainder.", "rest.")) for key in tensors):
        return ThinKroneckerSum.from_tensors(tensors)
    terms = strata
    if terms is None or settings.correction is not None:
        # Merged ones have the terms of both; how many compressed ones have, nothing else tells.
        terms = len({key.partition(".")[0] for key in tensors})
    if settings.correction == "eigenvalues":
        return EigenbasisSum.from_tensors(tensors, terms)
    A = "A.diagonal" if "0.A.diagonal" in tensors else "A"
    return sum_of_terms([(tensors[f"{k}.{A}"], tensors[f"{k}.G"]) for k in range(terms)])
