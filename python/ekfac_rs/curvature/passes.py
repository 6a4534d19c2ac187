"""Passes over a loader that accumulate curvature."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from tqdm import tqdm

from ekfac_rs import _core
from ekfac_rs._checks import require_count, require_finite
from ekfac_rs._tensors import moved
from ekfac_rs.batchnorm.merging import is_exported
from ekfac_rs.batchnorm.statistics import (
    as_found,
    device_of,
    frozen_batchnorms,
    use_batch_statistics,
)
from ekfac_rs.curvature.accumulators import Accumulator, accumulator
from ekfac_rs.curvature.curvature import Curvature, signature_of
from ekfac_rs.curvature.settings import PassSettings
from ekfac_rs.errors import (
    BatchNormError,
    EkfacError,
    EmptyLoaderError,
    LabelError,
    OptionError,
    ShapeError,
    UnsupportedLayerError,
    UnsupportedLossError,
)
from ekfac_rs.layers import AffineLayer, find_layers, uncovered_parameters
from ekfac_rs.layers.dataflow import AffineCall, AffineCalls, removed_afterwards
from ekfac_rs.likelihood import Likelihood, resolve


def estimate_curvature(
    model: nn.Module,
    loader: Iterable[Any],
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
    precision: str = "ieee",
    progress: bool = False,
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
    likelihood = resolve(loss)
    settings = PassSettings.of(
        likelihood,
        approximation=approximation,
        coordinates=coordinates,
        statistics=statistics,
        labels=labels,
        draws=draws,
        precision=precision,
        frozen=frozen_batchnorms(model) if statistics == "batch" else (),
    )
    if precision == "tf32" and device_of(model).type != "cuda":
        raise OptionError(
            f"precision: expected 'ieee' for a model on the {device_of(model).type}, got 'tf32'"
        )
    if max_examples is not None:
        require_count("max_examples", max_examples)
    for name, parameter in model.named_parameters():
        require_finite(f"parameter {name!r}", parameter.detach())

    with as_found(model), ExitStack() as cleanup:
        if generator is None:
            generator = torch.Generator(device_of(model))
            generator.manual_seed(int(torch.randint(2**62, ())))
        else:
            cleanup.enter_context(_rewound_on_failure(generator))
        model.eval()
        if statistics == "batch":
            cleanup.enter_context(removed_afterwards(use_batch_statistics(model, settings.frozen)))
        batches = _batches(loader, max_examples, device_of(model), statistics == "batch")
        first = next(batches, None)
        if first is None:
            raise EmptyLoaderError("loader: expected at least one batch of examples, got none")
        # Two examples show the data flow as well as a whole mini-batch does.
        example = first[0][:2]
        found = find_layers(model, coordinates=coordinates, layers=layers, example=example)
        _refuse_exported(found, settings)
        accumulators = {layer.name: accumulator(layer, settings) for layer in found}
        examples, count, total_loss = 0, 0, 0.0
        bar = tqdm(desc="curvature", unit=" examples", disable=not progress, leave=False)
        capture = _Capture(found, coordinates)
        with bar:
            for x, y in chain([first], batches):
                with capture.watching():
                    outputs, y = _forward(model, x, y, likelihood)
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
            settings=settings,
            examples=examples,
            gradient_examples={n: a.gradient_examples for n, a in accumulators.items()},
            batches=count,
            loss=total_loss / examples,
            batchnorms={layer.name: layer.batchnorm_name for layer in found},
            signatures={layer.name: signature_of(layer, coordinates) for layer in found},
            uncovered=() if layers else uncovered_parameters(model, found, coordinates),
            versions={"ekfac_rs": _core.build_info()["version"], "torch": str(torch.__version__)},
        )


Accumulators = Mapping[str, Accumulator]


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


def _forward(
    model: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        outputs = model(x)
    if not isinstance(outputs, Tensor):
        raise UnsupportedLossError(
            f"model: expected one output tensor, got {type(outputs).__name__}"
        )
    outputs, y = likelihood.arranged(outputs, y, len(x))
    likelihood.check_outputs(outputs)
    likelihood.validate(outputs, y)
    return outputs, y


def _require_examples(x: Tensor, examples: int) -> None:
    if x.shape[0] != examples:
        raise ShapeError(f"expected {examples} examples on axis 0, got shape {tuple(x.shape)}")


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
