"""The affine layers of a model, their weights as matrices, and the BatchNorm each one feeds."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ekfac_rs._tensors import require_choice
from ekfac_rs.dataflow import AffineCall, Arguments, DataFlow, observe, trace
from ekfac_rs.errors import (
    BatchNormError,
    ModelChangedError,
    OptionError,
    ShapeError,
    UnsupportedLayerError,
)

COORDINATES = ("merged", "raw")

M = TypeVar("M", bound=nn.Module)


class Geometry(NamedTuple):
    """How a convolution's patches lie in its input; one entry for each spatial dimension.

    ``padding`` holds the zeros before and after: other padding modes reach a convolution padded.
    """

    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    padding: list[tuple[int, int]]


class Units(NamedTuple):
    """A layer's inputs in one mini-batch, without the appended one.

    ``values`` are the units themselves, ``[N, K]`` or ``[N, T, K]``, or with a geometry the
    ``[N, C, ...]`` whose patches they are.
    """

    values: Tensor
    geometry: Geometry | None = None


@dataclass(frozen=True)
class AffineLayer:
    """An affine map ``h = W a + b`` inside a model, and the BatchNorm that consumes its output.

    ``W`` is a matrix of shape (D, K). With groups it is block diagonal: consecutive blocks of
    D / groups rows, each with inputs of its own, and K counts the inputs of one block.

    Attributes
    ----------
    name : str
        Name in ``model.named_modules()``.
    module : torch.nn.Module
    batchnorm_name : str or None
        Name of the BatchNorm the layer feeds directly and exclusively; its own for a BatchNorm
        that no other layer feeds.
    batchnorm : torch.nn.Module or None
    """

    name: str
    module: Any
    batchnorm_name: str | None = None
    batchnorm: Any = None

    # --- what each kind of layer tells ---

    @property
    def groups(self) -> int:
        """Number of diagonal blocks."""
        return 1

    @property
    def absorbs_scale(self) -> bool:
        """Whether the layer has weights that take up a BatchNorm's scale."""
        return True

    def weight(self) -> Tensor:
        """``W`` of shape (D, K), without bias column, differentiable."""
        weight: Tensor = self.module.weight
        return weight.flatten(1)

    def bias(self) -> Tensor | None:
        """``b`` of shape (D,), or None."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias

    def units(self, call: AffineCall) -> Units:
        """Return the inputs of the affine map, from the call of its function."""
        raise NotImplementedError

    def gradients(self, g: Tensor) -> Tensor:
        """Gradients at the output as units, ``[N, D]`` or ``[N, T, D]``."""
        return _channels_last(g)

    # --- weights in coordinates ---

    def shape(self, coordinates: str) -> tuple[int, int]:
        """Shape ``(D, K)`` of the layer's weight matrix; K counts the bias column."""
        D, K = self.weight().shape
        return D, K + self.has_shift(coordinates)

    def factor_shapes(self, coordinates: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a term's factors A and G; with groups, one matrix for each on axis 0."""
        D, K = self.shape(coordinates)
        rows = D // self.groups
        groups = () if self.groups == 1 else (self.groups,)
        return (*groups, K, K), (*groups, rows, rows)

    def has_shift(self, coordinates: str) -> bool:
        """Whether the map has a bias column: merged with a BatchNorm, it always has."""
        merged = coordinates == "merged" and self.batchnorm is not None
        return merged or self.bias() is not None

    def raw_weight(self) -> Tensor:
        """``[W b]`` of the layer alone, shape ``(D, K)``, differentiable."""
        weight, bias = self.weight(), self.bias()
        return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)

    def merged_weight(self, mean: Tensor | None = None, variance: Tensor | None = None) -> Tensor:
        """``[Wm bm]`` under the given statistics of the BatchNorm's input, differentiable.

        ``Wm = diag(gamma / sigma) W`` and ``bm = beta + gamma (b - mean) / sigma`` with
        ``sigma**2 = variance + eps`` (method: merged weights; Lee et al. 2020, section 3).

        Parameters
        ----------
        mean, variance : Tensor of shape (D,), optional
            Population (biased) statistics. Default: the running statistics.

        Returns
        -------
        Tensor of shape (D, K)
        """
        if self.batchnorm is None:
            return self.raw_weight()
        if mean is None or variance is None:
            mean, variance = self.running_statistics()
        gain, bias = self.gain(variance), self.bias()
        shift = -gain * mean if bias is None else gain * (bias - mean)
        if self.batchnorm.bias is not None:
            shift = shift + self.batchnorm.bias
        return torch.cat([gain[:, None] * self.weight(), shift[:, None]], dim=1)

    def gain(self, variance: Tensor) -> Tensor:
        """Factor ``gamma / sigma`` of shape (D,) by which the BatchNorm scales each output."""
        inverse = torch.rsqrt(variance + self.batchnorm.eps)
        return inverse if self.batchnorm.weight is None else self.batchnorm.weight * inverse

    def running_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, each of shape (D,), that the BatchNorm uses in eval mode."""
        mean, variance = self.batchnorm.running_mean, self.batchnorm.running_var
        if mean is None or variance is None:
            raise BatchNormError(
                f"layer {self.batchnorm_name!r}: expected a BatchNorm with running statistics, "
                "got track_running_stats=False: merged weights are not defined without them"
            )
        return mean, variance

    def weight_matrix(self, coordinates: str) -> Tensor:
        """Return the weights in these coordinates, shape (D, K), under running statistics."""
        return self.merged_weight() if coordinates == "merged" else self.raw_weight()

    def check_batchnorm_input(self, x: Tensor) -> None:
        """Raise unless the BatchNorm's axis 1 holds the layer's outputs."""

    def parameters(self, coordinates: str) -> Iterator[nn.Parameter]:
        """Parameters that the block in these coordinates covers."""
        yield from self.module.parameters(recurse=False)
        if coordinates == "merged" and self.absorbs_scale and self.batchnorm is not None:
            yield from self.batchnorm.parameters(recurse=False)


class LinearLayer(AffineLayer):
    """A Linear, applied along the last axis."""

    def units(self, call: AffineCall) -> Units:
        return Units(_flat_units(call.input))

    def gradients(self, g: Tensor) -> Tensor:
        return _flat_units(g)

    def check_batchnorm_input(self, x: Tensor) -> None:
        if x.dim() != 2:
            raise UnsupportedLayerError(
                f"layer {self.batchnorm_name!r}: expected the BatchNorm after {self.name!r} to see "
                f"a matrix [N, D], got shape {tuple(x.shape)}, whose axis 1 is not the features"
            )


class ConvLayer(AffineLayer):
    """A convolution: an affine map of the patch at each output location."""

    @property
    def groups(self) -> int:
        return int(self.module.groups)

    def units(self, call: AffineCall) -> Units:
        geometry = conv_geometry(call.arguments)
        if call.input.dim() != 2 + len(geometry.kernel):
            axes = ("L", "H, W", "D, H, W")[len(geometry.kernel) - 1]
            raise ShapeError(f"expected shape [N, C, {axes}], got {tuple(call.input.shape)}")
        pointwise = (1, 1, 0, 0)
        sides = zip(geometry.kernel, geometry.stride, geometry.padding, strict=True)
        if all((k, s, *p) == pointwise for k, s, p in sides):
            return Units(_channels_last(call.input))
        return Units(call.input, geometry)


class ChannelLayer(AffineLayer):
    """A normalisation's scale and shift: a map of each channel for itself, ``gamma x + beta``."""

    @property
    def groups(self) -> int:
        return self.weight().shape[0]

    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight.reshape(-1, 1)

    def bias(self) -> Tensor | None:
        bias = super().bias()
        return None if bias is None else bias.reshape(-1)

    def units(self, call: AffineCall) -> Units:
        plain = call.arguments | {"weight": None}
        if "bias" in plain:
            plain["bias"] = None
        with torch.no_grad():
            return Units(self.gradients(call.function(**plain)))

    def gradients(self, g: Tensor) -> Tensor:
        shape = getattr(self.module, "normalized_shape", None)
        if shape is None:
            return _channels_last(g)
        return _flat_units(g.flatten(-len(shape)))


class BatchNormLayer(ChannelLayer):
    """A BatchNorm that no affine layer feeds: merged, a scale and a shift of each channel.

    Its map is ``gamma / sigma x + beta - gamma mu / sigma`` (method: section 3): a layer whose
    own weights are ones, merged with the BatchNorm that it is.
    """

    @property
    def absorbs_scale(self) -> bool:
        return False

    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return torch.ones_like(weight)[:, None]

    def bias(self) -> Tensor | None:
        return None

    def units(self, call: AffineCall) -> Units:
        return Units(_channels_last(call.input))


_KINDS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], type[AffineLayer]], ...] = (
    (nn.Linear, LinearLayer),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvLayer),
    ((nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _InstanceNorm), ChannelLayer),
    (_BatchNorm, BatchNormLayer),
)


def kind_of(module: nn.Module) -> type[AffineLayer] | None:
    """Class of layer that a module's parameters make up, or None."""
    return next((layer for types, layer in _KINDS if isinstance(module, types)), None)


def find_layers(
    model: nn.Module,
    *,
    coordinates: str = "merged",
    layers: Collection[str] | None = None,
    example: Any = None,
) -> list[AffineLayer]:
    """Find every affine layer and the BatchNorm it feeds.

    Parameters
    ----------
    model : torch.nn.Module
    coordinates : {"merged", "raw"}
        With "raw", BatchNorms are not looked for.
    layers : collection of str, optional
        Names of the layers wanted; all others are left out on purpose. By default all, and then
        every trainable parameter must belong to one of them.
    example : optional
        An input batch. With it the data flow is observed in one forward pass (the caller has put
        the model in the mode the pass should run in); without, it is traced symbolically. Shapes
        are not known then: a Linear directly followed by a BatchNorm of its width is taken to be
        fed matrices ``[N, K]``. In ``[N, T, K]`` the BatchNorm's axis 1 would be T, not the
        Linear's outputs, and only an example can tell.

    Returns
    -------
    list of AffineLayer
        In the order of ``model.named_modules()``.

    Raises
    ------
    UnsupportedLayerError
        A trainable parameter lies in no known layer; a layer is shared, unused or tied.
    OptionError
        ``layers`` names what is not there.
    """
    require_choice("coordinates", coordinates, COORDINATES)
    watched = _watched(model)
    _require_known(layers, watched.values())
    if layers is None:
        _require_known_kinds(model)
    found, problems = _survey(model, watched, coordinates, example)
    if layers is None:
        found = [x for x in found if any(p.requires_grad for p in x.parameters(coordinates))]
    else:
        _require_not_merged(layers, found)
        found = [x for x in found if x.name in layers]
    for layer in found:
        if layer.name in problems:
            raise UnsupportedLayerError(f"layer {layer.name!r}: {problems[layer.name]}")
    if not found:
        raise UnsupportedLayerError("model: expected at least one trainable layer, got none")
    return found


def survey_layers(
    model: nn.Module, *, coordinates: str = "merged", example: Any = None
) -> tuple[list[AffineLayer], dict[str, str]]:
    """Find what blocks a model could have, without refusing anything.

    Parameters
    ----------
    model, coordinates, example
        As in `find_layers`.

    Returns
    -------
    layers : list of AffineLayer
        Those with a block.
    reasons : dict of str to str
        For every parameter without a block, frozen or not, why it has none.
    """
    require_choice("coordinates", coordinates, COORDINATES)
    found, problems = _survey(model, _watched(model), coordinates, example)
    usable = [layer for layer in found if layer.name not in problems]
    covered = {id(p) for layer in usable for p in layer.parameters(coordinates)}
    owners = {id(p): x.name for x in found for p in x.parameters(coordinates)}
    reasons = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in covered:
            problem = problems.get(owners.get(id(parameter), ""))
            reasons[name] = (
                problem
                or why_unsupported(model, name)
                or "raw coordinates have no block for a BatchNorm"
            )
    return usable, reasons


def bind_layers(model: nn.Module, batchnorms: Mapping[str, str | None]) -> list[AffineLayer]:
    """Look up layers whose pairing is known already.

    Parameters
    ----------
    batchnorms : mapping of str to str or None
        Layer name to the name of its BatchNorm.

    Raises
    ------
    ModelChangedError
        A name is missing from the model or belongs to a module of another type.
    """
    return [_affine_layer(model, name, batchnorm) for name, batchnorm in batchnorms.items()]


def uncovered_parameters(
    model: nn.Module, layers: Collection[AffineLayer], coordinates: str
) -> tuple[str, ...]:
    """Names of the trainable parameters that no layer's block covers."""
    covered = {id(p) for layer in layers for p in layer.parameters(coordinates)}
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in covered
    )


def conv_geometry(arguments: Arguments) -> Geometry:
    """Geometry of a call of ``F.conv1d``, ``F.conv2d`` or ``F.conv3d``."""
    kernel = list(arguments["weight"].shape[2:])
    stride = _per_dimension(arguments.get("stride", 1), len(kernel))
    dilation = _per_dimension(arguments.get("dilation", 1), len(kernel))
    padding = arguments.get("padding", 0)
    if padding == "valid":
        padding = 0
    if padding == "same":
        # The odd zero goes behind, as torch has it.
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in _per_dimension(padding, len(kernel))]
    return Geometry(kernel, stride, dilation, sides)


def _per_dimension(value: Any, dimensions: int) -> list[int]:
    values = list(value) if isinstance(value, tuple | list) else [value]
    return [int(v) for v in (values * dimensions if len(values) == 1 else values)]


def _channels_last(x: Tensor) -> Tensor:
    """View ``[N, C, ...]`` as units ``[N, T, C]``; ``[N, C]`` is units already."""
    return x if x.dim() <= 2 else x.flatten(2).transpose(1, 2)


def _flat_units(x: Tensor) -> Tensor:
    """View ``[N, ..., K]`` as ``[N, K]`` or ``[N, T, K]``."""
    return x if x.dim() <= 3 else x.flatten(1, -2)


# --- pairing and checks --------------------------------------------------------------------------


def _watched(model: nn.Module) -> dict[nn.Module, str]:
    """Every module that may be a layer, or a BatchNorm after one, by its first name."""
    return {m: name for name, m in model.named_modules() if kind_of(m) is not None}


def _survey(
    model: nn.Module, watched: Mapping[nn.Module, str], coordinates: str, example: Any
) -> tuple[list[AffineLayer], dict[str, str]]:
    """Every layer with parameters, and by name what is wrong with some of them."""
    flow = trace(model, watched) if example is None else observe(model, watched, example)
    pairs = _pair_batchnorms(watched, flow) if coordinates == "merged" else {}
    merged = set(pairs.values())
    found = []
    for module, name in watched.items():
        if name in merged or next(module.parameters(recurse=False), None) is None:
            continue
        if not isinstance(module, _BatchNorm):
            found.append(_affine_layer(model, name, pairs.get(name)))
        elif coordinates == "merged":
            found.append(_affine_layer(model, name, name))
    problems = _tied_parameters(model, found)
    for layer in found:
        if flow.calls(layer.name) != 1:
            problems.setdefault(
                layer.name,
                "expected one call with its own parameters in a forward pass, "
                f"got {flow.calls(layer.name)}",
            )
    return found, problems


def _pair_batchnorms(watched: Mapping[nn.Module, str], flow: DataFlow) -> dict[str, str]:
    """Map each layer to the BatchNorm that is called once and alone consumes its output."""
    producer = {
        value: (name, module)
        for module, name in watched.items()
        if kind_of(module) in (LinearLayer, ConvLayer)
        for value in flow.outputs[name]
    }
    pairs: dict[str, str] = {}
    for module, name in watched.items():
        if not isinstance(module, _BatchNorm) or flow.calls(name) != 1:
            continue
        [value] = flow.inputs[name]
        layer, source = producer.get(value, (None, None))
        if layer is None or flow.consumers[value] != [name]:
            continue
        if _on_features(module, source, flow.dimensions.get(layer)):
            pairs[layer] = name
    return pairs


def _on_features(batchnorm: _BatchNorm, source: Any, dimensions: int | None) -> bool:
    """Whether the BatchNorm's axis 1 holds the source's outputs, whatever can be known of that.

    Axis 1 does so in ``[N, D]`` of a Linear and ``[N, D, ...]`` of a convolution, which have as
    many dimensions as the weight. Those of a traced value are not known: all that the BatchNorm
    accepts are possible.
    """
    possible = _accepted_dimensions(batchnorm) if dimensions is None else (dimensions,)
    return batchnorm.num_features == len(source.weight) and source.weight.dim() in possible


def _accepted_dimensions(batchnorm: _BatchNorm) -> Collection[int]:
    if isinstance(batchnorm, nn.BatchNorm2d):
        return (4,)
    if isinstance(batchnorm, nn.BatchNorm3d):
        return (5,)
    return (2, 3) if isinstance(batchnorm, nn.BatchNorm1d) else range(2, 6)


def _require_not_merged(names: Collection[str], found: Collection[AffineLayer]) -> None:
    for layer in found:
        if layer.batchnorm_name in names and layer.batchnorm_name != layer.name:
            raise OptionError(
                f"layers: expected layers of their own, got {layer.batchnorm_name!r}, which is "
                f"merged into {layer.name!r}: name that one"
            )


def _require_known(layers: Collection[str] | None, known: Collection[str]) -> None:
    unknown = sorted(set(layers or ()) - set(known))
    if unknown:
        raise OptionError(
            f"layers: expected names of affine layers of the model, got {', '.join(unknown)}"
        )
    if layers is not None and not layers:
        raise OptionError("layers: expected at least one name, got none")


def _affine_layer(model: nn.Module, name: str, batchnorm_name: str | None) -> AffineLayer:
    module = _submodule(model, name, nn.Module)
    kind = kind_of(module)
    if kind is None:
        raise ModelChangedError(
            f"layer {name!r}: expected an affine layer, got {type(module).__name__}"
        )
    if kind is BatchNormLayer and batchnorm_name != name:
        raise ModelChangedError(f"layer {name!r}: expected a layer before a BatchNorm, got one")
    if batchnorm_name is None:
        return kind(name, module)
    return kind(name, module, batchnorm_name, _submodule(model, batchnorm_name, _BatchNorm))


def _submodule(model: nn.Module, name: str, kind: type[M]) -> M:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelChangedError(
            f"layer {name!r}: expected it in the model, got a model without it"
        ) from None
    if not isinstance(module, kind):
        raise ModelChangedError(
            f"layer {name!r}: expected a {kind.__name__.strip('_')}, got {type(module).__name__}"
        )
    return module


def _tied_parameters(model: nn.Module, layers: Collection[AffineLayer]) -> dict[str, str]:
    """Layers that share a parameter with another module, and with which."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    modules: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        modules[id(module)].append(name)
    return {
        layer.name: f"expected parameters of its own, got one shared by {', '.join(tied)}"
        for layer in layers
        for parameter in layer.parameters("merged")
        if len(tied := owners[id(parameter)]) > len(modules[id(layer.module)])
    }


def why_unsupported(model: nn.Module, parameter_name: str) -> str | None:
    """Say why no block could ever cover a parameter, or None if one could."""
    path, _, own_name = parameter_name.rpartition(".")
    owner = model.get_submodule(path)
    if kind_of(owner) is None:
        return f"a {type(owner).__name__} has no curvature block"
    if own_name not in ("weight", "bias"):
        return f"{own_name!r} is no weight or bias of a {type(owner).__name__}"
    return None


def _require_known_kinds(model: nn.Module) -> None:
    """Refuse trainable parameters that no block could cover, before the model is run at all."""
    for name, parameter in model.named_parameters():
        reason = why_unsupported(model, name)
        if parameter.requires_grad and reason is not None:
            raise UnsupportedLayerError(
                f"parameter {name!r}: expected it in a Linear, a convolution or a normalisation, "
                f"but {reason}; freeze it or name the wanted layers in layers="
            )
