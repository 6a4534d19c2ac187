"""Passes over a loader that accumulate curvature."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from ekfac_rs._checkpoints import rewound_on_failure
from ekfac_rs._checks import require_count, require_finite
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
from ekfac_rs.curvature.block import Block, share_of
from ekfac_rs.curvature.columnwise import ColumnwiseSum
from ekfac_rs.curvature.corrections import Correcting, passes_of, step_of
from ekfac_rs.curvature.curvature import Curvature, Signature, signature_of
from ekfac_rs.curvature.eigenbasis import EigenbasisSum
from ekfac_rs.curvature.gradients import Gradients
from ekfac_rs.curvature.kronecker import KroneckerSum
from ekfac_rs.curvature.recovery import Recovery, call_of
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
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 1000,
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
    checkpoint : str or os.PathLike, optional
        File to write the passes' sums to, for the case that they are interrupted or the process is
        killed: the same call then goes on from there, and its curvature is the same, bit for bit,
        as that of a call without interruption or checkpoints. "The same" is: equal weights, the
        same arguments, and a loader that yields the same mini-batches again, which torch's do where
        their order is drawn from torch's random state or from their generator. Each file takes the
        place of the one before when it is whole. When the passes are over it holds the curvature,
        which the same call returns at once (all that it looks at of the loader then is its length
        and its first mini-batch); a call of other weights or arguments begins anew in its place.
        What is to be kept, `Curvature.save` keeps. Passes of another call that are not over are
        never overwritten. A file holds all sums: mind the time that takes. Not for several
        processes.
    every : int
        Mini-batches between two checkpoints; others are written when a pass is over.
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
        An unknown option, draws, correction_batches or every below 1, "tf32" or "bf16" on the CPU,
        an iterator as loader where a correction needs to go through it again, or a checkpoint of
        several processes.
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
    IncompatibleError
        The checkpoint is of passes that are not over and have other weights (the message names the
        layer) or arguments, or of other mini-batches. Nothing is changed then.
    FileFormatError
        It is truncated, corrupted, of a newer format or no such checkpoint.
    OSError
        It cannot be written; the one before stays.

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
    if checkpoint is not None and not ranks.alone:
        raise OptionError(
            f"checkpoint: expected none where {ranks.count} processes make one curvature, got "
            f"{os.fspath(checkpoint)!r}"
        )
    in_step = _in_step(model, settings, ranks)
    source = Loader(loader, device_of(model), input_fn=input_fn, target_fn=target_fn)
    source.require_passes(1 + passes_of(correction), f"correction={correction!r}")
    with (
        _conditions(model, settings),
        synchronised(in_step, ranks),
        _source_of_labels(model, generator, ranks) as drawn_from,
        ExitStack() as cleanup,
    ):
        generators = [drawn_from, *source.generators()]
        recovery = Recovery(
            checkpoint,
            every,
            lambda: call_of(
                model,
                settings,
                source,
                layers=None if layers is None else sorted(layers),
                max_examples=max_examples,
                correction_batches=correction_batches,
            ),
            generators,
            device_of(model),
        )
        if checkpoint is not None:
            cleanup.enter_context(rewound_on_failure(generators))
        recovery.prepare()
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

        return passes.run(
            batches,
            recovery,
            correction_batches,
            uncovered=() if layers else uncovered_parameters(model, found, coordinates),
        )


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


def _in_step(
    model: nn.Module, settings: PassSettings, ranks: Ranks
) -> Mapping[str, nn.SyncBatchNorm]:
    """Return the BatchNorms, by name, that take the mini-batches of all ranks for one."""
    if settings.statistics != "batch":
        return {}
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
        signatures = _signatures(self._layers, self._settings).values()
        own = [number for signature in signatures for number in signature]
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

    def run(
        self,
        batches: Callable[[], Iterator[Batch]],
        recovery: Recovery,
        correction_batches: int,
        *,
        uncovered: tuple[str, ...],
    ) -> Curvature:
        """Make the passes that are left to make."""
        curvature, begun = recovery.curvature, recovery.index
        if curvature is not None and recovery.is_over:
            recovery.go_on(batches(), lambda _: None)
            return curvature
        if curvature is None:
            sums = _Sums(
                *(self._layers, self._settings, device_of(self._model), uncovered),
                *(self._ranks, self.batch),
            )
            curvature = self._through(sums, batches(), recovery)
        for index in range(max(begun, 1), 1 + passes_of(self._settings.correction)):
            correction = self._correction(curvature, index)
            if not correction.accumulators:
                continue
            if index != begun:
                recovery.begin(index, correction.before, correction.state_dict)
            curvature = self._through(correction, islice(batches(), correction_batches), recovery)
        recovery.end(curvature)
        return curvature

    def _correction(self, curvature: Curvature, index: int) -> "_Correction":
        independent = not any(map(_uses_batch_statistics, self._model.modules()))
        return _Correction(self._layers, curvature, index, independent, self._ranks)

    def _through(
        self, this: "_Sums | _Correction", batches: Iterator[Batch], recovery: Recovery
    ) -> Curvature:
        """Make one pass, or what is left of it."""
        recovery.go_on(batches, this.load_state_dict)
        for batch in recovery.watched(batches, this.state_dict):
            this.begin_batch(batch)
            this.end_batch(batch, self._take(batch, this.accumulators))
        return this.curvature()

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


def _signatures(layers: Iterable[AffineLayer], settings: PassSettings) -> dict[str, Signature]:
    return {layer.name: signature_of(layer, settings.coordinates) for layer in layers}


class _Sums:
    """What the pass that makes a curvature sums up, on this rank until its end.

    Parameters
    ----------
    layers, settings, device, uncovered
        Of the curvature.
    ranks : Ranks
        Summed over at the end.
    together : GlobalBatch, optional
        Where a mini-batch is that of all ranks together.
    """

    def __init__(
        self,
        layers: Collection[AffineLayer],
        settings: PassSettings,
        device: torch.device,
        uncovered: tuple[str, ...],
        ranks: Ranks,
        together: GlobalBatch | None,
    ) -> None:
        self._layers, self._settings, self._uncovered = layers, settings, uncovered
        self._ranks, self._together = ranks, together
        self._notes = Notes(list(layers))
        self.accumulators = {
            layer.name: accumulator(layer, settings, self._notes, together) for layer in layers
        }
        self._examples, self._batches = 0, 0
        # Stays where it is made: nobody waits for a GPU's to be told.
        self._loss = torch.zeros((), dtype=torch.float64, device=device)

    def begin_batch(self, batch: Batch) -> None:
        self._notes.begin_batch()
        if self._together is not None:
            self._together.begin(batch.examples)

    def end_batch(self, batch: Batch, loss: Tensor) -> None:
        if self._together is not None:
            self._together.end(self.accumulators.values())
        self._loss = self._loss + batch.examples * loss.double()
        self._examples, self._batches = self._examples + batch.examples, self._batches + 1

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, of which all are finite: waits for a GPU."""
        self._notes.require_none()
        return {
            "accumulators": {name: a.state_dict() for name, a in self.accumulators.items()},
            "examples": self._examples,
            "batches": self._batches,
            "loss": self._loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name, a in self.accumulators.items():
            a.load_state_dict(state["accumulators"][name])
        self._examples, self._batches = state["examples"], state["batches"]
        self._loss = state["loss"].to(self._loss)
        self._notes.go_on_after(self._batches)

    def curvature(self) -> Curvature:
        """Mean over all examples of all ranks; the sums it is made of go."""
        self._notes.require_none()
        loss = self._sum_over_ranks()
        counts = {name: a.gradient_examples for name, a in self.accumulators.items()}
        return Curvature(
            # Layer by layer, so that sums and means are not all there at once.
            blocks={name: self.accumulators.pop(name).block() for name in counts},
            settings=self._settings,
            examples=self._examples,
            gradient_examples=counts,
            batches=self._batches,
            loss=loss / self._examples,
            batchnorms={layer.name: layer.batchnorm_name for layer in self._layers},
            signatures=_signatures(self._layers, self._settings),
            uncovered=self._uncovered,
            versions={"ekfac_rs": _core.build_info()["version"], "torch": str(torch.__version__)},
        )

    def _sum_over_ranks(self) -> float:
        """Sum factors and counts over ranks; return the sum of losses, too."""
        if self._ranks.alone:
            return float(self._loss)
        accumulators = self.accumulators.values()
        for accumulated in accumulators:
            accumulated.reduce(self._ranks)
        counts = [count for a in accumulators for count in a.counts]
        own = [float(self._loss), self._examples, self._batches]
        loss, *totals = self._ranks.totals([*own, *counts], "counts")
        self._examples, self._batches, *rest = map(round, totals)
        left = iter(rest)
        for accumulated in accumulators:
            accumulated.counts = [next(left) for _ in accumulated.counts]
        if self._together is not None:
            self._batches //= self._ranks.count
        return loss


class _Correction:
    """What one pass of a correction sums up, and what it began with (``before``)."""

    def __init__(
        self,
        layers: Collection[AffineLayer],
        curvature: Curvature,
        index: int,
        independent: bool,
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        settings = curvature.settings
        assert settings.correction is not None
        begun = dict(curvature)
        if settings.correction == "eigenvalues":
            begun |= _in_eigenbases(curvature, ranks)
        steps = {
            layer: step
            for layer in layers
            if (step := step_of(settings.correction, begun[layer.name], index - 1))
        }
        better = {layer.name: step.block for layer, step in steps.items()}
        self.before = replace(curvature, blocks=curvature.blocks | better)
        self.accumulators = {
            layer.name: Correcting(layer, settings, step, independent)
            for layer, step in steps.items()
        }

    def begin_batch(self, batch: Batch) -> None:
        """Nothing is to be done."""

    def end_batch(self, batch: Batch, loss: Tensor) -> None:
        """Nothing is kept of them."""

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, of which all are finite: waits for a GPU."""
        states = {name: a.state_dict() for name, a in self.accumulators.items()}
        for name, state in states.items():
            for total in state["mean"]["sums"]:
                require_finite(f"layer {name!r}: gradient", total)
        return states

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name, a in self.accumulators.items():
            a.load_state_dict(state[name])

    def curvature(self) -> Curvature:
        """Return the corrected curvature; the sums it is made of go."""
        for accumulated in self.accumulators.values():
            accumulated.reduce(self._ranks)
        # Layer by layer, as above.
        blocks = {
            name: self.accumulators.pop(name).block() if name in self.accumulators else block
            for name, block in self.before.items()
        }
        return replace(self.before, blocks=blocks)


def _in_eigenbases(curvature: Curvature, ranks: Ranks) -> dict[str, Block]:
    """Return what is near in the blocks' eigenbases, each made by one rank, for all of them."""
    blocks = {
        name: block
        for name, block in curvature.items()
        if isinstance(block, KroneckerSum | ColumnwiseSum)
    }
    made = ranks.shared_out(
        {name: share_of(block) for name, block in blocks.items()},
        lambda name: EigenbasisSum.near(blocks[name]).tensors(),
        "eigenbases",
    )
    return {name: EigenbasisSum.from_tensors(tensors, 1) for name, tensors in made.items()}


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
