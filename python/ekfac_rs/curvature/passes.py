"""Passes over a loader that accumulate curvature."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ekfac_rs import _core
from ekfac_rs._checks import require_count
from ekfac_rs._modes import bare_model, own_modes, without_autocast
from ekfac_rs._ranks import Ranks, on_all_ranks
from ekfac_rs.batchnorm.merging import is_exported
from ekfac_rs.batchnorm.statistics import (
    as_found,
    device_of,
    frozen_batchnorms,
    synchronised,
    synchronised_batchnorms,
    use_batch_statistics,
)
from ekfac_rs.curvature.accumulators import Accumulator, GlobalBatch, Notes, accumulator
from ekfac_rs.curvature.block import Block
from ekfac_rs.curvature.corrections import Correcting, passes_of, step_of
from ekfac_rs.curvature.curvature import Curvature, Signature, signature_of
from ekfac_rs.curvature.gradients import Gradients
from ekfac_rs.curvature.settings import AUTO, PassSettings
from ekfac_rs.errors import (
    BatchNormError,
    DistributedError,
    EkfacError,
    OptionError,
    ShapeError,
    UnsupportedLayerError,
)
from ekfac_rs.layers import (
    AffineLayer,
    find_layers,
    require_finite_parameters,
    uncovered_parameters,
)
from ekfac_rs.layers.base import AffineCall
from ekfac_rs.layers.dataflow import AffineCalls, removed_afterwards
from ekfac_rs.likelihood import Likelihood, resolve
from ekfac_rs.loading import Batch, Loader, Source, outputs_of


@on_all_ranks
def estimate_curvature(
    model: nn.Module,
    loader: Source,
    *,
    loss: str | Likelihood = "cross_entropy",
    approximation: str = "xkfac-nested",
    coordinates: str = "merged",
    statistics: str = "batch",
    labels: str = "mc",
    draws: int = 1,
    generator: torch.Generator | None = None,
    max_examples: int | None = None,
    layers: Collection[str] | None = None,
    input_fn: Callable[[Any], Any] | None = None,
    target_fn: Callable[[Any], Tensor] | None = None,
    output_fn: Callable[[Any], Tensor] | None = None,
    precision: str = "auto",
    correction: str | None = None,
    correction_batches: int = 64,
    progress: bool = False,
    process_group: "dist.ProcessGroup | None" = None,
) -> Curvature:
    """Accumulate the curvature of the mean loss over a loader, one block for each layer.

    Nothing the caller owns changes: running statistics, random states, ``.grad``, hooks and
    train/eval flags are as they were, also after an error or an interrupt.

    Parameters
    ----------
    model : torch.nn.Module
        Runs in eval mode (no dropout), but for its BatchNorms where ``statistics="batch"``. Those
        that are in eval mode within a model in train mode are frozen: they, and their layers, use
        running statistics whatever the others do (``settings.frozen`` lists them). In a model in
        eval mode as a whole, those without a trainable parameter are.
    loader : iterable of (x, y), or a function that returns one
        Mini-batches with examples on axis 0; they are moved to the model's device. x may be a
        tuple or a mapping of the model's arguments; a mapping as mini-batch holds the model's
        keyword arguments, and the targets under "labels". Factors are means over mini-batches,
        weighted by their examples. Outputs and inputs of layers that are matrices may have
        examples and locations on one axis, ``[N * T, C]``, those of an example one after another.
    loss : Likelihood or {"cross_entropy", "mse", "bce"}
        The mean over examples of the per-example loss (see `ekfac_rs.likelihood`).
    approximation : {"xkfac-nested", "xkfac", "kfac-expand", "kfac-reduce", "diagonal"}
        Strata of the analysis of variance (method: strata), or the plain diagonal. Where an
        example has one location, as for a Linear on ``[N, K]``, "xkfac-nested" is "xkfac".
        Before global average pooling in train mode "xkfac-nested" overestimates: its error was
        up to 9 times that of the better of expand and reduce, where "xkfac" stayed within 1.4
        times. With each block at its best scale nested fits best (benchmarks: convolutions); a
        ``correction`` of eigenvalues or factors mends it.
    coordinates : {"merged", "raw"}
        "merged": the layer and the BatchNorm after it as one affine map; gradients are taken at
        the BatchNorm's output. A BatchNorm that no layer feeds is a map of its own, with a 2x2
        block for each channel. "raw": the layer alone; BatchNorm parameters then have no block
        and are listed in ``uncovered``.
    statistics : {"batch", "running"}
        Those that BatchNorms use: the mini-batch's (examples interact) or the running ones.
    labels : {"mc", "type2", "empirical", "exact"}
        "mc" draws labels from the model; "type2" sums over the columns of a square root of the
        output's GGN, one backward pass each; "exact" over every single example and column (small
        problems, tests); "empirical" takes the loader's labels, which is biased, the more so
        under BatchNorm.
    draws : int
        Label draws for "mc".
    generator : torch.Generator, optional
        For label draws; on the model's device. Default: one seeded from torch's global state,
        which is not advanced, and from the rank, where there are several. One that is given on
        several ranks needs another seed on each of them.
    max_examples : int, optional
        Stop after this many; with several ranks, of each.
    layers : collection of str, optional
        Names of the wanted layers. Default: all, and every trainable parameter must have a block.
    input_fn, target_fn : callable, optional
        For other mini-batches: from a mini-batch to what the model is called with (a tuple of
        arguments, a mapping of keyword arguments, or its only argument), and to the targets.
    output_fn : callable, optional
        From what the model returns to the outputs that the loss is taken of, where it is no
        single tensor, as in ``lambda outputs: outputs.logits``.
    precision : {"auto", "ieee", "tf32", "bf16"}
        To what inputs and gradients in float32 are rounded on a GPU, for the speed of tensor cores:
        not at all, to a mantissa of ten bits, or of seven (a relative error of up to 5e-4 or 4e-3
        in each). "auto" does as torch does: what it rounds the layer's own products or convolutions
        to. Sums are in float32. Half-precision ones are multiplied as they are. On the CPU nothing
        is rounded.
    correction : {None, "scale", "eigenvalues", "nearest"}
        Brings the blocks nearer to the exact ones (method: corrections), by the gradients of
        ``correction_batches`` mini-batches under labels drawn anew in every pass. The loader is
        gone through from its beginning once more, for "nearest" four times. What few samples
        leave uncertain stays near the plain block.
        "scale" multiplies a block by its best scalar, the one of least Frobenius error. Little is
        left of a block whose form is wrong: its trace may be far below the exact one.
        "eigenvalues" takes the eigenvalues in the eigenbasis of the summed factors anew (an
        `EigenbasisSum`; a diagonal for "diagonal"): right traces.
        "nearest" moves the factors towards the nearest sum of as many positive semi-definite
        Kronecker products (for "diagonal" that is the diagonal): the least error. They no longer
        are moments of inputs and gradients.
    correction_batches : int
        Mini-batches in each pass of a correction, at most all. 64 bring errors within a few per
        cent of what 256 do. Under batch statistics a mini-batch and label draw is one sample;
        where examples do not depend on each other it is four, made of its parts.
    progress : bool
        Show a tqdm bar.
    process_group : torch.distributed.ProcessGroup, optional
        Processes, each with a loader over its own share of the data and with the same model, that
        make one curvature: all return the same. Default: that of the model's
        DistributedDataParallel, or else this process alone. A mini-batch is a process's own, and
        they may have different numbers of them. But with `torch.nn.SyncBatchNorm`, under batch
        statistics, it is that of all processes together, which then need equally many. Labels
        "exact" and a correction are not for that case.

    Returns
    -------
    Curvature

    Raises
    ------
    OptionError
        An unknown option, draws or correction_batches below 1, "tf32" or "bf16" on the CPU, or an
        iterator as loader where a correction needs to go through it again.
    UnknownLayerError
        ``layers`` names what is no layer of the model.
    CudaError, OutOfMemoryError
        The model is on a GPU and CUDA cannot be used there, or has no room for the factors.
    UnsupportedLayerError, UnsupportedLossError
        The model or the loss has a part without known curvature; the message names it.
    BatchNormError
        A mini-batch of one under "batch", an exported BatchNorm, or missing running statistics;
        a SyncBatchNorm over other processes than these, or beside a BatchNorm of another kind.
    DistributedError
        Another process failed, is gone, has other weights or settings, or, with SyncBatchNorm,
        fewer or more mini-batches.
    EmptyLoaderError, LabelError, ShapeError, DtypeError, NonFiniteError
        The loader is empty; a mini-batch or its targets do not fit; a layer cannot work with the
        inputs' dtype; NaN or infinity in weights, inputs, targets or gradients.

    References
    ----------
    Lee, Hong, Joo, Kim, "Continual Learning with Extended Kronecker-factored Approximate
    Curvature", CVPR 2020. Martens & Grosse 2015; Eschenhagen et al. 2023 (expand and reduce).
    """
    ranks = Ranks.of(model, process_group)
    likelihood, model = resolve(loss), bare_model(model)
    settings = PassSettings.of(
        likelihood,
        approximation=approximation,
        coordinates=coordinates,
        statistics=statistics,
        labels=labels,
        draws=draws,
        precision=precision,
        correction=correction,
        frozen=frozen_batchnorms(model) if statistics == "batch" else (),
    )
    _require_possible(model, settings, max_examples, correction_batches)
    in_step = _in_step(model, settings, ranks)
    source = Loader(loader, device_of(model), input_fn=input_fn, target_fn=target_fn)
    source.require_passes(1 + passes_of(correction), f"correction={correction!r}")
    with (
        _conditions(model, settings),
        synchronised(in_step, ranks),
        _source_of_labels(model, generator, ranks) as drawn_from,
    ):
        found = find_layers(model, coordinates=coordinates, layers=layers, example=source.example())
        _refuse_exported(found, settings)
        settings = _with_precision_of(found, settings)
        ranks.require_same("settings", f"{settings}, layers {[layer.name for layer in found]}")
        passes = _Passes(model, found, likelihood, settings, drawn_from, output_fn, ranks)
        passes.require_same_weights()
        if in_step and not ranks.alone:
            passes.batch = GlobalBatch(ranks)

        def batches() -> Iterator[Batch]:
            read = source.batches(max_examples, at_least_two=statistics == "batch")
            with tqdm(desc="curvature", unit=" examples", disable=not progress, leave=False) as bar:
                for batch in read:
                    yield batch
                    bar.update(batch.examples)

        curvature = passes.curvature(
            batches(), uncovered=() if layers else uncovered_parameters(model, found, coordinates)
        )
        for index in range(passes_of(correction)):
            blocks = passes.corrected(
                curvature.blocks, islice(batches(), correction_batches), index
            )
            curvature = replace(curvature, blocks=blocks)
        return curvature


def _require_possible(
    model: nn.Module, settings: PassSettings, max_examples: int | None, correction_batches: int
) -> None:
    """Refuse what can be refused before anything is run."""
    device = device_of(model).type
    if settings.precision not in (AUTO, "ieee") and device != "cuda":
        raise OptionError(
            f"precision: expected 'auto' or 'ieee' for a model on the {device}, got "
            f"{settings.precision!r}"
        )
    if max_examples is not None:
        require_count("max_examples", max_examples)
    require_count("correction_batches", correction_batches)
    require_finite_parameters(model)


def _in_step(model: nn.Module, settings: PassSettings, ranks: Ranks) -> Sequence[nn.SyncBatchNorm]:
    """Return the BatchNorms that take the mini-batches of all ranks for one."""
    if settings.statistics != "batch":
        return []
    found = synchronised_batchnorms(model, settings.frozen, ranks)
    for option, supported in (
        ("correction", settings.correction is None),
        ("labels", settings.labels != "exact"),
    ):
        if found and not supported and not ranks.alone:
            raise OptionError(
                f"{option}: expected another one with SyncBatchNorm over several processes, got "
                f"{getattr(settings, option)!r}"
            )
    return found


def _with_precision_of(layers: Collection[AffineLayer], settings: PassSettings) -> PassSettings:
    """Say what "auto" comes to, where that is the same for all layers."""
    if settings.precision != AUTO:
        return settings
    on_gpu = [layer for layer in layers if layer.like.is_cuda]
    chosen = {layer.torch_precision() for layer in on_gpu} or {"ieee"}
    return replace(settings, precision=chosen.pop()) if len(chosen) == 1 else settings


@contextmanager
def _conditions(model: nn.Module, settings: PassSettings) -> Iterator[None]:
    """Put the model and torch in the modes of a pass, and back as they were found."""
    with own_modes(), as_found(model), ExitStack() as cleanup:
        model.eval()
        if settings.statistics == "batch":
            checks = use_batch_statistics(model, settings.frozen)
            cleanup.enter_context(removed_afterwards(checks))
        yield


@contextmanager
def _source_of_labels(
    model: nn.Module, generator: torch.Generator | None, ranks: Ranks
) -> Iterator[torch.Generator]:
    """Lend the caller's generator, rewound if anything fails, or one seeded from torch's state."""
    if generator is None:
        generator = torch.Generator(device_of(model))
        # Ranks may all have been given one seed.
        generator.manual_seed(int(torch.randint(2**62, (), device="cpu")) + ranks.number)
    before = generator.get_state()
    try:
        yield generator
    except BaseException:
        generator.set_state(before)
        raise


Accumulators = Mapping[str, Accumulator] | Mapping[str, Correcting]


class _Passes:
    """Passes over a loader's mini-batches: one makes a curvature, others correct it."""

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[AffineLayer],
        likelihood: Likelihood,
        settings: PassSettings,
        generator: torch.Generator,
        output_fn: Callable[[Any], Tensor] | None,
        ranks: Ranks,
    ) -> None:
        self._model = model
        self._layers = layers
        self._likelihood = likelihood
        self._settings = settings
        self._generator = generator
        self._output_fn = output_fn
        self._ranks = ranks
        # Where a mini-batch is that of all ranks together.
        self.batch: GlobalBatch | None = None
        self._capture = _Capture(layers, settings.coordinates)

    def require_same_weights(self) -> None:
        """Raise `DistributedError` unless all ranks have the same weights and statistics."""
        own = [number for signature in self._signatures().values() for number in signature]
        first, *others = self._ranks.gathered(self._ranks.tensor(own), "signatures")
        for rank, theirs in enumerate(others, start=1):
            pairs = zip(first.view(-1, 2).tolist(), theirs.view(-1, 2).tolist(), strict=True)
            for layer, (ours, other) in zip(self._layers, pairs, strict=True):
                if not Signature(*ours).agrees(Signature(*other)):
                    raise DistributedError(
                        f"layer {layer.name!r}: expected the same weights and running statistics "
                        f"on all ranks, got others on rank {rank} than on rank 0 "
                        "(ekfac_rs.distributed.broadcast_buffers makes statistics the same)"
                    )

    def _signatures(self) -> dict[str, Signature]:
        return {
            layer.name: signature_of(layer, self._settings.coordinates) for layer in self._layers
        }

    def _summed(self, accumulators: Mapping[str, Accumulator], own: Sequence[float]) -> list[float]:
        """Sum factors and counts over ranks; return the sums of these numbers, too."""
        if self._ranks.alone:
            return list(own)
        for accumulated in accumulators.values():
            accumulated.reduce(self._ranks)
        counts = [count for a in accumulators.values() for count in a.counts]
        totals = self._ranks.totals([*own, *counts], "counts")
        left = iter(totals[len(own) :])
        for accumulated in accumulators.values():
            accumulated.counts = [round(next(left)) for _ in accumulated.counts]
        return totals[: len(own)]

    def curvature(self, batches: Iterable[Batch], *, uncovered: tuple[str, ...]) -> Curvature:
        """Mean over all examples; the sums it is made of go."""
        notes = Notes(list(self._layers))
        accumulators = {
            layer.name: accumulator(layer, self._settings, notes, self.batch)
            for layer in self._layers
        }
        examples, mini_batches = 0, 0
        # Stays where it is made: nobody waits for a GPU's to be told.
        loss = torch.zeros((), dtype=torch.float64, device=device_of(self._model))
        for batch in batches:
            notes.begin_batch()
            if self.batch is not None:
                self.batch.begin(batch.examples)
            loss = loss + batch.examples * self._take(batch, accumulators).double()
            if self.batch is not None:
                self.batch.end(accumulators.values())
            examples, mini_batches = examples + batch.examples, mini_batches + 1
        notes.require_none()
        totals = self._summed(accumulators, [examples, float(loss), mini_batches])
        examples, mini_batches = round(totals[0]), round(totals[2])
        if self.batch is not None:
            mini_batches //= self._ranks.count
        counts = {name: a.gradient_examples for name, a in accumulators.items()}
        return Curvature(
            # Layer by layer, so that sums and means are not all there at once.
            blocks={name: accumulators.pop(name).block() for name in counts},
            settings=self._settings,
            examples=examples,
            gradient_examples=counts,
            batches=mini_batches,
            loss=totals[1] / examples,
            batchnorms={layer.name: layer.batchnorm_name for layer in self._layers},
            signatures=self._signatures(),
            uncovered=uncovered,
            versions={"ekfac_rs": _core.build_info()["version"], "torch": str(torch.__version__)},
        )

    def corrected(
        self, blocks: Mapping[str, Block], batches: Iterable[Batch], index: int
    ) -> dict[str, Block]:
        """Return the blocks after the correction's pass of this number."""
        assert self._settings.correction is not None
        independent = not any(map(_uses_batch_statistics, self._model.modules()))
        correcting = {
            layer.name: Correcting(layer, self._settings, step, independent)
            for layer in self._layers
            if (step := step_of(self._settings.correction, blocks[layer.name], index))
        }
        if not correcting:
            return dict(blocks)
        for batch in batches:
            self._take(batch, correcting)
        for accumulated in correcting.values():
            accumulated.reduce(self._ranks)
        # Layer by layer, as above.
        return {
            name: correcting.pop(name).block() if name in correcting else block
            for name, block in blocks.items()
        }

    def _take(self, batch: Batch, accumulators: Accumulators) -> Tensor:
        """Hand a mini-batch over: forward, then backward for every score; returns its loss."""
        try:
            with self._capture.watching():
                outputs = outputs_of(self._model, batch.inputs, self._output_fn)
            with without_autocast(outputs.device):
                return self._accumulate(batch, outputs, accumulators)
        finally:
            self._capture.clear()

    def _accumulate(self, batch: Batch, outputs: Tensor, accumulators: Accumulators) -> Tensor:
        rows = _Rows(batch.examples, len(outputs) if outputs.dim() else 0)
        outputs, targets = self._likelihood.arranged(outputs, batch.targets, batch.examples)
        self._likelihood.validate(outputs, targets)
        self._likelihood.check_outputs(outputs, targets)
        self._capture.hand_over_inputs(accumulators, rows)
        scores = self._likelihood.scores(
            outputs,
            targets,
            labels=self._settings.labels,
            draws=self._settings.draws,
            generator=self._generator,
        )
        for (score, weight), last in _with_last(scores):
            self._capture.hand_over_gradients(accumulators, rows, outputs, score, weight, last=last)
        return self._likelihood.loss(outputs.detach(), targets)


_Item = TypeVar("_Item")


def _with_last(items: Iterable[_Item]) -> Iterator[tuple[_Item, bool]]:
    """Tell of each of at least one item whether it is the last."""
    iterator = iter(items)
    item = next(iterator)
    for following in iterator:
        yield item, False
        item = following
    yield item, True


def _uses_batch_statistics(module: nn.Module) -> bool:
    """Whether a module lets examples of a mini-batch depend on each other."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


class _Rows(NamedTuple):
    """How many examples a mini-batch has, and how many rows the model's outputs.

    They differ where examples and locations share an axis.
    """

    examples: int
    of_outputs: int

    def require(self, x: Tensor) -> None:
        """Raise `ShapeError` unless axis 0 is that of examples, or the one that outputs have."""
        if len(x) != self.examples and not self._shared(x):
            raise ShapeError(
                f"expected {self.examples} examples on axis 0, got shape {tuple(x.shape)}"
            )

    def by_example(self, units: Tensor) -> Tensor:
        """Units ``[N, T, K]`` of those whose N and T share an axis; others as they are."""
        if not self._shared(units):
            return units
        return units.reshape(self.examples, -1, units.shape[-1])

    def _shared(self, x: Tensor) -> bool:
        return self.of_outputs != self.examples and x.dim() <= 2 and len(x) == self.of_outputs


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
        self.gradients = Gradients()
        self.problem: str | None = None

    def clear(self) -> None:
        self.calls.clear()
        self.gradients.clear()

    def on_problem(self, module: nn.Module, problem: str) -> None:
        layer = self._layer_of.get(module) or self._ends[module]
        name = layer.name if module is layer.module else layer.batchnorm_name
        # Raised after the pass: torch takes a TypeError in an operator for its own.
        self.problem = self.problem or f"layer {name!r}: {problem}"

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
            self.gradients.watch(layer.name, result)
            return result
        # Everything before is frozen: the graph starts here. A copy goes on, because what
        # follows may work in place, which a leaf does not allow.
        result.requires_grad_()
        self.gradients.watch(layer.name, result)
        return result.clone()

    def _keep_input(self, layer: AffineLayer, call: AffineCall) -> None:
        if layer.name in self.calls:
            raise UnsupportedLayerError(
                f"layer {layer.name!r}: expected one call in a forward pass, got more"
            )
        arguments = call.arguments | {"input": call.input.detach()}
        self.calls[layer.name] = replace(call, arguments=arguments), call.input._version

    def hand_over_inputs(self, accumulators: Accumulators, rows: _Rows) -> None:
        if self.problem is not None:
            raise UnsupportedLayerError(self.problem)
        for layer in self._layer_of.values():
            name = layer.name
            if name not in self.calls:
                raise UnsupportedLayerError(
                    f"layer {name!r}: expected one call in every forward pass, got none"
                )
            call, version = self.calls.pop(name)
            if call.input._version != version:
                raise UnsupportedLayerError(
                    f"layer {name!r}: expected its input unchanged during the forward pass, "
                    "got one overwritten in place"
                )
            with naming(f"layer {name!r}: input"):
                rows.require(call.input)
                units = layer.units(call)
                units = replace(units, values=rows.by_example(units.values))
                accumulators[name].add_inputs(units)

    def hand_over_gradients(
        self,
        accumulators: Accumulators,
        rows: _Rows,
        outputs: Tensor,
        score: Tensor,
        weight: float,
        *,
        last: bool,
    ) -> None:
        layers = {layer.name: layer for layer in self._layer_of.values()}

        def take(name: str, g: Tensor) -> None:
            with naming(f"layer {name!r}: gradient"):
                rows.require(g)
                g = rows.by_example(layers[name].gradients(g))
                accumulators[name].add_gradients(g, weight)
                if last:
                    accumulators[name].end_batch()

        reached = self.gradients.hand_over(outputs, score, take, keep_graph=not last)
        for name in layers:
            if name not in reached:
                raise UnsupportedLayerError(
                    f"layer {name!r}: expected the loss to depend on its output, got no gradient"
                )


class naming:  # noqa: N801  (reads as a verb: with naming(...))
    """Prefix the message of any of our errors with where it happened."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, EkfacError):
            raise type(error)(f"{self.place}: {error}") from error


def _refuse_exported(layers: Collection[AffineLayer], settings: PassSettings) -> None:
    if settings.statistics != "batch":
        return
    for layer in layers:
        if layer.batchnorm_name not in settings.frozen and is_exported(layer):
            raise BatchNormError(
                f"layer {layer.batchnorm_name!r}: expected a BatchNorm that normalises, got one "
                "exported by merge_batchnorm: estimate before that or after reparameterize, or "
                "use statistics='running'"
            )
