"""Passes over a loader that accumulate curvature, and the `Curvature` they return."""

import errno
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from tqdm import tqdm

from ekfac_rs import _core
from ekfac_rs._tensors import (
    accumulation_dtype,
    borrow,
    is_finite,
    moved,
    require_choice,
    require_count,
    require_finite,
)
from ekfac_rs.batchnorm import as_found, device_of, is_merged, use_batch_statistics
from ekfac_rs.dataflow import AffineCall, AffineCalls, removed_afterwards
from ekfac_rs.errors import (
    BatchNormError,
    EkfacError,
    EmptyLoaderError,
    FileFormatError,
    IncompatibleError,
    LabelError,
    NonFiniteError,
    OptionError,
    ShapeError,
    UnknownLayerError,
    UnsupportedLayerError,
    UnsupportedLossError,
)
from ekfac_rs.kronecker import Block, DiagonalBlock, KroneckerSum
from ekfac_rs.layers import (
    COORDINATES,
    AffineLayer,
    Geometry,
    Units,
    find_layers,
    uncovered_parameters,
)
from ekfac_rs.likelihood import LABELS, Likelihood, resolve
from ekfac_rs.storage import STORAGES, pack, unpack

DIAGONAL = "diagonal"
APPROXIMATIONS = (*_core.strata(), DIAGONAL)
BATCHNORM_MODES = ("batch", "running")
PRECISIONS = ("ieee", "tf32")

_FORMAT = 1
_METADATA_KEY = "ekfac_rs"

# What two passes must share to be parts of one.
_PASS_SETTINGS = (
    "likelihood",
    "approximation",
    "coordinates",
    "batchnorm",
    "labels",
    "draws",
    "batchnorms",
)


class Signature(NamedTuple):
    """Two numbers that tell whether weights are still those a curvature was taken at."""

    norm: float
    projection: float

    @classmethod
    def of(cls, weight: Tensor) -> "Signature":
        """Signature of a weight matrix of shape (D, K)."""
        flat = weight.detach().double().reshape(-1)
        # Fixed incommensurate phases: no change of weights short of a conspiracy keeps the sum.
        phases = torch.arange(flat.numel(), dtype=flat.dtype, device=flat.device).mul_(0.7390851)
        return cls(float(flat.norm()), float(flat @ phases.cos_()))

    def agrees(self, other: "Signature", tolerance: float = 1e-4) -> bool:
        """Whether both belong to the same weights up to the rounding of merging them."""
        scale = tolerance * max(self.norm, other.norm)
        return abs(self.norm - other.norm) <= scale and (
            abs(self.projection - other.projection) <= scale
        )


@dataclass(frozen=True, eq=False, repr=False)
class Curvature(Mapping[str, Block]):
    """Curvature of a model's loss, the mean over examples: one block for each layer.

    A mapping from layer name to `KroneckerSum` (or `DiagonalBlock`).

    Attributes
    ----------
    blocks : dict of str to block
        In the model's order.
    likelihood : str
        The loss, with its reduction.
    approximation, coordinates, batchnorm, labels, draws
        As given to `estimate_curvature`.
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
    """

    blocks: dict[str, Block]
    likelihood: str
    approximation: str
    coordinates: str
    batchnorm: str
    labels: str
    draws: int
    examples: int
    gradient_examples: dict[str, list[int]]
    batches: int
    loss: float
    batchnorms: dict[str, str | None]
    signatures: dict[str, Signature]
    uncovered: tuple[str, ...]
    versions: dict[str, str]

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
        return (
            f"Curvature({self.approximation!r}, coordinates={self.coordinates!r}, "
            f"batchnorm={self.batchnorm!r}, examples={self.examples}, layers={list(self)})"
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

    def merge(self, other: "Curvature") -> "Curvature":
        """Union of two passes over disjoint mini-batches, exactly as one pass over both.

        Parameters
        ----------
        other : Curvature
            Taken at the same weights with the same settings.

        Raises
        ------
        IncompatibleError
            Another setting, layer, shape or model; the message names it.
        """
        self._require_same_pass(other)
        examples = self.examples + other.examples
        share = self.examples / examples
        mine, theirs = self.gradient_examples, other.gradient_examples
        return replace(
            self,
            blocks={
                name: _mix(self[name], other[name], share, mine[name], theirs[name])
                for name in self
            },
            examples=examples,
            gradient_examples={
                name: [a + b for a, b in zip(mine[name], theirs[name], strict=True)]
                for name in self
            },
            batches=self.batches + other.batches,
            loss=share * self.loss + (1.0 - share) * other.loss,
        )

    def _require_same_pass(self, other: "Curvature") -> None:
        for setting in _PASS_SETTINGS:
            mine, theirs = getattr(self, setting), getattr(other, setting)
            if mine != theirs:
                raise IncompatibleError(f"{setting}: expected {mine!r} in both, got {theirs!r}")
        for name, block in self.items():
            if block.shape != other[name].shape:
                raise IncompatibleError(
                    f"layer {name!r}: expected shape {block.shape}, got {other[name].shape}"
                )
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
        return values | {"signatures": {name: list(s) for name, s in self.signatures.items()}}

    def save(self, path: str | os.PathLike[str], *, storage: str = "full") -> None:
        """Write to a safetensors file with JSON metadata; replaced only when complete.

        Parameters
        ----------
        path : path-like
        storage : {"full", "triangle", "half"}
            "triangle" stores one triangle of each factor, without loss, in half the bytes;
            "half" its correlations in float16 beside an exact diagonal, in a quarter of those of
            float32 (each entry right to ``2**-11 sqrt(F_ii F_jj)``). `load` reads all three.

        Raises
        ------
        FileNotFoundError
            The directory does not exist.
        OptionError
            Unknown storage.
        """
        require_choice("storage", storage, STORAGES)
        metadata = {"format": _FORMAT, "layers": self.layers, **self.metadata()}
        target = Path(path)
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(target.parent))
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            tensors: dict[str, Tensor] = {}
            for key, tensor in self.tensors().items():
                symmetric = not key.endswith("diagonal")
                tensors |= pack(key, tensor, storage if symmetric else "full")
            save_file(tensors, partial, metadata={_METADATA_KEY: json.dumps(metadata)})
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> "Curvature":
        """Read what `save` wrote.

        Parameters
        ----------
        path : path-like
        device : torch.device or str

        Raises
        ------
        FileFormatError
            The file is truncated, corrupted or not a curvature.
        FileNotFoundError
            There is no such file.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = json.loads((file.metadata() or {})[_METADATA_KEY])
                tensors = unpack({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
            if metadata.pop("format") != _FORMAT:
                raise FileFormatError(f"expected format {_FORMAT}")
            return cls.from_tensors(tensors, metadata)
        except FileNotFoundError:
            raise
        except (SafetensorError, KeyError, ValueError, TypeError, EkfacError) as error:
            raise FileFormatError(
                f"{path}: expected a curvature written by save(), got: {error}"
            ) from error

    def tensors(self) -> dict[str, Tensor]:
        """All factors under flat keys, for `from_tensors`."""
        return {
            f"{index}.{key}": tensor.contiguous()
            for index, name in enumerate(self)
            for key, tensor in _block_tensors(self[name]).items()
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> "Curvature":
        """Rebuild from `tensors` and `metadata`."""
        values = dict(metadata)
        layers = values.pop("layers", None) or list(values["batchnorms"])
        values["signatures"] = {name: Signature(*s) for name, s in values["signatures"].items()}
        values["uncovered"] = tuple(values["uncovered"])
        blocks: dict[str, Block] = {}
        for index, name in enumerate(layers):
            own = _with_prefix(tensors, f"{index}.")
            if values["approximation"] == DIAGONAL:
                blocks[name] = DiagonalBlock(own["diagonal"])
            else:
                terms = len(_kept_strata(values["gradient_examples"][name]))
                blocks[name] = KroneckerSum([(own[f"{k}.A"], own[f"{k}.G"]) for k in range(terms)])
        return cls(blocks=blocks, **values)


def estimate_curvature(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss: str | Likelihood = "cross_entropy",
    approximation: str = "xkfac-nested",
    coordinates: str = "merged",
    batchnorm: str = "batch",
    labels: str = "mc",
    draws: int = 1,
    generator: torch.Generator | None = None,
    max_examples: int | None = None,
    layers: Collection[str] | None = None,
    precision: str = "ieee",
    progress: bool = False,
) -> Curvature:
    """Accumulate the curvature of the mean loss over a loader, one block for each layer.

    Nothing the caller owns changes: running statistics, random states, ``.grad``, hooks and
    train/eval flags are as they were, also after an error or an interrupt.

    Parameters
    ----------
    model : torch.nn.Module
        Runs in eval mode (no dropout), but for its BatchNorms where ``batchnorm="batch"``.
    loader : iterable of (x, y)
        Mini-batches with examples on axis 0; they are moved to the model's device. Factors are
        means over mini-batches, weighted by their examples.
    loss : {"cross_entropy", "mse", "bce"} or Likelihood
        The mean over examples of the per-example loss (see `ekfac_rs.likelihood`).
    approximation : {"xkfac-nested", "xkfac", "kfac-expand", "kfac-reduce", "diagonal"}
        Strata of the analysis of variance (method: section 2), or the plain diagonal. Where an
        example has one location, as for a Linear on ``[N, K]``, "xkfac-nested" is "xkfac".
        Before global average pooling in train mode "xkfac-nested" overestimates: its error was
        up to 9 times that of the better of expand and reduce, where "xkfac" stayed within 1.4
        times. With each block at its best scale nested fits best (benchmarks: convolutions).
    coordinates : {"merged", "raw"}
        "merged": the layer and the BatchNorm after it as one affine map; gradients are taken at
        the BatchNorm's output. A BatchNorm that no layer feeds is a map of its own, with a 2x2
        block for each channel. "raw": the layer alone; BatchNorm parameters then have no block
        and are listed in ``uncovered``.
    batchnorm : {"batch", "running"}
        Statistics that BatchNorms use: the mini-batch's (examples interact) or the running ones.
    labels : {"mc", "type2", "empirical", "exact"}
        "mc" draws labels from the model; "type2" sums over the columns of a square root of the
        output's GGN, one backward pass each; "exact" over every single example and column (small
        problems, tests); "empirical" takes the loader's labels, which is biased, the more so
        under BatchNorm.
    draws : int
        Label draws for "mc".
    generator : torch.Generator, optional
        For label draws; on the model's device. Default: one seeded from torch's global state,
        which is not advanced.
    max_examples : int, optional
        Stop after this many.
    layers : collection of str, optional
        Names of the wanted layers. Default: all, and every trainable parameter must have a block.
    precision : {"ieee", "tf32"}
        Of float32 factors on a GPU: "tf32" rounds inputs and gradients to a mantissa of ten bits
        (a relative error of about 5e-4 in each) for the speed of tensor cores.
    progress : bool
        Show a tqdm bar.

    Returns
    -------
    Curvature

    Raises
    ------
    OptionError
        An unknown option, draws below 1, an unknown layer name, or "tf32" on the CPU.
    CudaError, OutOfMemoryError
        The model is on a GPU and CUDA cannot be used there, or has no room for the factors.
    UnsupportedLayerError, UnsupportedLossError
        The model or the loss has a part without known curvature; the message names it.
    BatchNormError
        A mini-batch of one under "batch", a merged BatchNorm, or missing running statistics.
    EmptyLoaderError, LabelError, ShapeError, NonFiniteError
        The loader is empty; targets do not fit; NaN or infinity in weights, inputs or gradients.

    References
    ----------
    Lee, Hong, Joo, Kim, "Continual Learning with Extended Kronecker-factored Approximate
    Curvature", CVPR 2020. Martens & Grosse 2015; Eschenhagen et al. 2023 (expand and reduce).
    """
    require_choice("approximation", approximation, APPROXIMATIONS)
    require_choice("coordinates", coordinates, COORDINATES)
    require_choice("batchnorm", batchnorm, BATCHNORM_MODES)
    require_choice("labels", labels, LABELS)
    require_choice("precision", precision, PRECISIONS)
    require_count("draws", draws)
    if precision == "tf32" and device_of(model).type != "cuda":
        raise OptionError(
            f"precision: expected 'ieee' for a model on the {device_of(model).type}, got 'tf32'"
        )
    if max_examples is not None:
        require_count("max_examples", max_examples)
    likelihood = resolve(loss)
    for name, parameter in model.named_parameters():
        require_finite(f"parameter {name!r}", parameter.detach())

    with as_found(model), ExitStack() as cleanup:
        if generator is None:
            generator = torch.Generator(device_of(model))
            generator.manual_seed(int(torch.randint(2**62, ())))
        else:
            cleanup.enter_context(_rewound_on_failure(generator))
        model.eval()
        if batchnorm == "batch":
            cleanup.enter_context(removed_afterwards(use_batch_statistics(model)))
        batches = _batches(loader, max_examples, device_of(model), batchnorm == "batch")
        first = next(batches, None)
        if first is None:
            raise EmptyLoaderError("loader: expected at least one batch of examples, got none")
        # Two examples show the data flow as well as a whole mini-batch does.
        example = first[0][:2]
        found = find_layers(model, coordinates=coordinates, layers=layers, example=example)
        _refuse_merged(found, batchnorm)
        accumulators = {
            layer.name: _accumulator(layer, approximation, coordinates, precision)
            for layer in found
        }
        examples, count, total_loss = 0, 0, 0.0
        bar = tqdm(desc="curvature", unit=" examples", disable=not progress, leave=False)
        capture = _Capture(found, coordinates)
        with bar:
            for x, y in chain([first], batches):
                with capture.watching():
                    outputs = _forward(model, x, y, likelihood)
                capture.hand_over_inputs(accumulators, len(x))
                scores = likelihood.scores(
                    outputs,
                    y,
                    labels=labels,
                    draws=draws,
                    generator=generator,
                )
                for score, weight in scores:
                    capture.hand_over_gradients(accumulators, outputs, score, weight)
                capture.clear()
                examples, count = examples + len(x), count + 1
                total_loss += len(x) * float(likelihood.loss(outputs.detach(), y))
                bar.update(len(x))
        return Curvature(
            blocks={name: a.block() for name, a in accumulators.items()},
            likelihood=repr(likelihood),
            approximation=approximation,
            coordinates=coordinates,
            batchnorm=batchnorm,
            labels=labels,
            draws=draws,
            examples=examples,
            gradient_examples={n: a.gradient_examples for n, a in accumulators.items()},
            batches=count,
            loss=total_loss / examples,
            batchnorms={layer.name: layer.batchnorm_name for layer in found},
            signatures={layer.name: signature_of(layer, coordinates) for layer in found},
            uncovered=() if layers else uncovered_parameters(model, found, coordinates),
            versions={"ekfac_rs": _core.build_info()["version"], "torch": str(torch.__version__)},
        )


def signature_of(layer: AffineLayer, coordinates: str) -> Signature:
    """Signature of a layer's weights; of the raw ones where there are no running statistics."""
    has_statistics = layer.batchnorm is None or layer.batchnorm.running_var is not None
    return Signature.of(layer.weight_matrix(coordinates if has_statistics else "raw"))


# --- one pass ------------------------------------------------------------------------------------


class _Accumulator:
    """Sums of a layer's factors over mini-batches, lower triangles only."""

    def __init__(
        self, layer: AffineLayer, approximation: str, coordinates: str, precision: str
    ) -> None:
        weight = layer.module.weight
        like = torch.empty((), dtype=accumulation_dtype(weight.dtype), device=weight.device)
        terms = len(_core.strata()[approximation])
        self.approximation = approximation
        self.precision = precision
        self.append_one = layer.has_shift(coordinates)
        self.examples = 0
        # A stratum without degrees of freedom in a mini-batch (one example, say) has no gradient
        # factor there, and the mini-batch is left out of that factor's mean.
        self.gradient_examples = [0] * terms
        shape_A, shape_G = layer.factor_shapes(coordinates)
        self.A = [like.new_zeros(shape_A) for _ in range(terms)]
        self.G = [like.new_zeros(shape_G) for _ in range(terms)]

    def add_inputs(self, units: Units) -> None:
        a, geometry = units
        out = [borrow(A) for A in self.A]
        if geometry is None:
            degrees_of_freedom = _core.accumulate_gram(
                borrow(a), out, self.approximation, "input", self.append_one, 1.0, self.precision
            )
        else:
            degrees_of_freedom = _core.accumulate_patch_gram(
                borrow(a),
                out,
                self.approximation,
                *geometry,
                self.append_one,
                1.0,
                self.precision,
            )
        self.examples += len(a)
        for k, dof in enumerate(degrees_of_freedom):
            self.gradient_examples[k] += len(a) if dof else 0

    def add_gradients(self, g: Tensor, weight: float) -> None:
        out = [borrow(G) for G in self.G]
        _core.accumulate_gram(
            borrow(g), out, self.approximation, "gradient", False, weight, self.precision
        )

    def block(self) -> KroneckerSum:
        """Mean over examples; a stratum that never had a degree of freedom is no term."""
        terms = []
        for k in _kept_strata(self.gradient_examples):
            A, G = self.A[k].div_(self.examples), self.G[k].div_(self.gradient_examples[k])
            _core.symmetrize(borrow(A))
            _core.symmetrize(borrow(G))
            terms.append((A, G))
        return KroneckerSum(terms)


def _kept_strata(gradient_examples: list[int]) -> list[int]:
    return [k for k, examples in enumerate(gradient_examples) if examples]


class _DiagonalAccumulator:
    """Sum over examples of squared per-example gradients, ``sum_n (sum_t g_nt a_nt^T)**2``."""

    def __init__(self, layer: AffineLayer, coordinates: str) -> None:
        weight = layer.module.weight
        dtype = accumulation_dtype(weight.dtype)
        self.layer = layer
        self.append_one = layer.has_shift(coordinates)
        self.values = torch.zeros(layer.shape(coordinates), dtype=dtype, device=weight.device)
        self.units: Units | None = None
        self.gradient_examples = [0]

    def add_inputs(self, units: Units) -> None:
        self.units = Units(units.values.to(self.values.dtype), units.geometry)
        self.gradient_examples[0] += len(units.values)

    def add_gradients(self, g: Tensor, weight: float) -> None:
        assert self.units is not None
        g = g.to(self.values.dtype)
        values = self.values[:, :-1] if self.append_one else self.values
        self._add_squares(values, self.units, g, weight)
        if self.append_one:
            totals = g if g.dim() == 2 else g.sum(dim=1)
            self.values[:, -1].add_(totals.square().sum(dim=0), alpha=weight)

    def _add_squares(self, values: Tensor, units: Units, g: Tensor, weight: float) -> None:
        groups = self.layer.groups
        if units.geometry is None and g.dim() == 2 and groups == 1:
            values.addmm_(g.square().T, units.values.square(), alpha=weight)
            return
        # A slice of examples at a time bounds the memory their gradients take.
        share = max(1, _DIAGONAL_ELEMENTS // values.numel())
        for start in range(0, len(g), share):
            a, own = units.values[start : start + share], g[start : start + share]
            if units.geometry is None:
                per_example = _outer_by_group(a, own, groups)
            else:
                per_example = _conv_weight_gradients(a, own, units.geometry, groups)
            values.add_(per_example.square().sum(dim=0), alpha=weight)

    def block(self) -> DiagonalBlock:
        return DiagonalBlock(self.values / self.gradient_examples[0])


# Of per-example gradients held at a time: 256 MB in float32.
_DIAGONAL_ELEMENTS = 1 << 26


def _outer_by_group(a: Tensor, g: Tensor, groups: int) -> Tensor:
    """``sum_t g_nt a_nt^T`` of each example and group, shape (N, D, K)."""
    a, g = (x.reshape(len(x), -1, groups, x.shape[-1] // groups) for x in (a, g))
    return torch.einsum("ntgd,ntgk->ngdk", g, a).flatten(1, 2)


def _conv_weight_gradients(x: Tensor, g: Tensor, geometry: Geometry, groups: int) -> Tensor:
    """Gradient of a convolution's weights for each example, shape (N, D, K).

    One convolution of all examples at once: each is a group of its own.
    """
    N, C, D = len(x), x.shape[1], g.shape[-1]
    x = F.pad(x, [side for sides in reversed(geometry.padding) for side in sides])
    sizes = [
        (length - d * (k - 1) - 1) // s + 1
        for length, k, s, d in zip(x.shape[2:], *geometry[:3], strict=True)
    ]
    weight = x.new_zeros(()).expand(N * D, C // groups, *geometry.kernel)
    _, gradient, _ = torch.ops.aten.convolution_backward(
        g.transpose(1, 2).reshape(1, N * D, *sizes),
        x.reshape(1, N * C, *x.shape[2:]),
        weight,
        None,
        geometry.stride,
        [0] * len(sizes),
        geometry.dilation,
        False,
        [0] * len(sizes),
        N * groups,
        [False, True, False],
    )
    per_example: Tensor = gradient.reshape(N, D, -1)
    return per_example


def _accumulator(
    layer: AffineLayer, approximation: str, coordinates: str, precision: str
) -> _Accumulator | _DiagonalAccumulator:
    if approximation == DIAGONAL:
        return _DiagonalAccumulator(layer, coordinates)
    return _Accumulator(layer, approximation, coordinates, precision)


Accumulators = Mapping[str, _Accumulator | _DiagonalAccumulator]


class _Capture(AffineCalls):
    """Keeps each layer's call and the place where its gradient is wanted."""

    def __init__(self, layers: Collection[AffineLayer], coordinates: str) -> None:
        self._layer_of = {layer.module: layer for layer in layers}
        # Where gradients are wanted: the module whose output is that of the affine map.
        self._ends = {
            layer.batchnorm if coordinates == "merged" and layer.batchnorm else layer.module: layer
            for layer in layers
        }
        super().__init__([*self._layer_of, *(m for m in self._ends if m not in self._layer_of)])
        self.calls: dict[str, tuple[AffineCall, int]] = {}
        self.edges: dict[str, GradientEdge] = {}

    def clear(self) -> None:
        self.calls.clear()
        self.edges.clear()

    def on_call(self, call: AffineCall, result: Tensor) -> Tensor:
        layer = self._layer_of.get(call.module)
        if layer is not None:
            self._keep_input(layer, call)
        layer = self._ends.get(call.module)
        if layer is None:
            return result
        if call.module is layer.batchnorm:
            layer.check_batchnorm_input(call.input)
        if result.requires_grad:
            self.edges[layer.name] = get_gradient_edge(result)
            return result
        # Everything before is frozen: the graph starts here. A copy goes on, because what
        # follows may work in place, which a leaf does not allow.
        result.requires_grad_()
        self.edges[layer.name] = get_gradient_edge(result)
        return result.clone()

    def _keep_input(self, layer: AffineLayer, call: AffineCall) -> None:
        if layer.name in self.calls:
            raise UnsupportedLayerError(
                f"layer {layer.name!r}: expected one call in a forward pass, got more"
            )
        arguments = call.arguments | {"input": call.input.detach()}
        self.calls[layer.name] = replace(call, arguments=arguments), call.input._version

    def hand_over_inputs(self, accumulators: Accumulators, examples: int) -> None:
        for layer in self._layer_of.values():
            name = layer.name
            if name not in self.calls:
                raise UnsupportedLayerError(
                    f"layer {name!r}: expected one call in every forward pass, got none"
                )
            call, version = self.calls[name]
            if call.input._version != version:
                raise UnsupportedLayerError(
                    f"layer {name!r}: expected its input unchanged during the forward pass, "
                    "got one overwritten in place"
                )
            with naming(f"layer {name!r}: input"):
                _require_examples(call.input, examples)
                accumulators[name].add_inputs(layer.units(call))

    def hand_over_gradients(
        self, accumulators: Accumulators, outputs: Tensor, score: Tensor, weight: float
    ) -> None:
        layers = self._layer_of.values()
        gradients = torch.autograd.grad(
            outputs,
            [self.edges[layer.name] for layer in layers],
            grad_outputs=score,
            retain_graph=True,
            allow_unused=True,
        )
        for layer, g in zip(layers, gradients, strict=True):
            if g is None:
                raise UnsupportedLayerError(
                    f"layer {layer.name!r}: expected the loss to depend on its output, "
                    "got no gradient"
                )
            with naming(f"layer {layer.name!r}: gradient"):
                _require_examples(g, len(outputs))
                accumulators[layer.name].add_gradients(layer.gradients(g), weight)


class naming:  # noqa: N801  (reads as a verb: with naming(...))
    """Prefix the message of any of our errors with where it happened."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, EkfacError):
            raise type(error)(f"{self.place}: {error}") from error


@contextmanager
def _rewound_on_failure(generator: torch.Generator) -> Iterator[None]:
    before = generator.get_state()
    try:
        yield
    except BaseException:
        generator.set_state(before)
        raise


def _forward(model: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood) -> Tensor:
    with torch.enable_grad():
        outputs = model(x)
    if not isinstance(outputs, Tensor):
        raise UnsupportedLossError(
            f"model: expected one output tensor, got {type(outputs).__name__}"
        )
    if outputs.dim() == 0 or len(outputs) != len(x):
        raise ShapeError(
            f"model: expected outputs with {len(x)} examples on axis 0, got {tuple(outputs.shape)}"
        )
    if not is_finite(outputs):
        raise NonFiniteError("model: expected finite outputs, got NaN or infinity")
    likelihood.validate(outputs, y)
    return outputs


def _require_examples(x: Tensor, examples: int) -> None:
    if x.shape[0] != examples:
        raise ShapeError(f"expected {examples} examples on axis 0, got shape {tuple(x.shape)}")


def _refuse_merged(layers: Collection[AffineLayer], batchnorm: str) -> None:
    for layer in layers:
        if batchnorm == "batch" and is_merged(layer):
            raise BatchNormError(
                f"layer {layer.batchnorm_name!r}: expected a BatchNorm that normalises, got one "
                "merged into the weights: estimate before merge_batchnorm or after reparameterize, "
                "or use batchnorm='running'"
            )


def _batches(
    loader: Iterable[Any], max_examples: int | None, device: torch.device, at_least_two: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    left = max_examples
    for batch in loader:
        if not (isinstance(batch, tuple | list) and len(batch) >= 2):
            raise LabelError(f"loader: expected pairs (x, y), got {type(batch).__name__}")
        x, y = batch[0], batch[1]
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            raise LabelError(
                f"loader: expected tensors, got {type(x).__name__} and {type(y).__name__}"
            )
        if len(x) != len(y):
            raise LabelError(f"loader: expected as many targets as inputs, got {len(y)}, {len(x)}")
        if left is not None:
            # A single example left over could not pass a BatchNorm.
            if left == 0 or (left == 1 and at_least_two and len(x) > 1):
                return
            x, y = x[:left], y[:left]
            left -= len(x)
        if len(x):
            yield moved(x, device), moved(y, device)
        if left == 0:
            return


# --- merging and files ---------------------------------------------------------------------------


def _mix(
    mine: Block, theirs: Block, share: float, my_examples: list[int], their_examples: list[int]
) -> Block:
    """Blocks of the union, where the first pass saw ``share`` of the examples."""
    if isinstance(mine, DiagonalBlock) and isinstance(theirs, DiagonalBlock):
        return DiagonalBlock(torch.lerp(theirs.values, mine.values, share))
    if isinstance(mine, KroneckerSum) and isinstance(theirs, KroneckerSum):
        A, G = mine.terms[0]
        absent = torch.zeros_like(A), torch.zeros_like(G)
        my_terms = dict(zip(_kept_strata(my_examples), mine.terms, strict=True))
        their_terms = dict(zip(_kept_strata(their_examples), theirs.terms, strict=True))
        terms = []
        for k in sorted(my_terms.keys() | their_terms.keys()):
            (A, G), (B, H) = my_terms.get(k, absent), their_terms.get(k, absent)
            gradient_share = my_examples[k] / (my_examples[k] + their_examples[k])
            terms.append((torch.lerp(B, A, share), torch.lerp(H, G, gradient_share)))
        return KroneckerSum(terms)
    raise IncompatibleError(f"expected two blocks of one kind, got {mine!r} and {theirs!r}")


def _block_tensors(block: Block) -> dict[str, Tensor]:
    if isinstance(block, DiagonalBlock):
        return {"diagonal": block.values}
    return {
        f"{k}.{letter}": factor
        for k, term in enumerate(block.terms)
        for letter, factor in zip("AG", term, strict=True)
    }


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
