"""Finds, binds and refuses the layers of a model."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ekfac_rs._checks import require_choice, require_finite
from ekfac_rs._modes import plain_name, submodule
from ekfac_rs._tensors import is_supported
from ekfac_rs.errors import (
    ModelChangedError,
    OptionError,
    UnknownLayerError,
    UnsupportedLayerError,
)
from ekfac_rs.layers.base import COORDINATES, PARAMETERS, AffineLayer
from ekfac_rs.layers.dataflow import THE_OUTPUT, observe, trace
from ekfac_rs.layers.kinds import kind_of, kinds_in_words
from ekfac_rs.layers.pairing import pair_batchnorms

M = TypeVar("M", bound=nn.Module)


def find_layers(
    model: nn.Module,
    *,
    coordinates: str = "merged",
    layers: Collection[str] | None = None,
    example: Any = None,
    trainable: bool = True,
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
    trainable : bool
        By default only layers with a trainable parameter are meant; otherwise frozen ones, too.

    Returns
    -------
    list of AffineLayer
        In the order of ``model.named_modules()``.

    Raises
    ------
    UnsupportedLayerError
        A trainable parameter lies in no known layer; a layer is shared, unused or tied; it
        computes with other weights, statistics or constants than it keeps, or something else
        computes with its own; its weights are parametrised, lazy or no real floating-point numbers.
    OptionError
        ``layers`` is no collection of names.
    UnknownLayerError
        It names what is not there.
    """
    require_choice("coordinates", coordinates, COORDINATES)
    watched = _watched(model)
    if layers is None:
        _require_known_kinds(model)
    else:
        require_names(layers, model)
        _require_possible(layers, model)
    found, problems = _survey(model, watched, coordinates, example)
    if layers is not None:
        _require_not_merged(layers, found)
        found = [x for x in found if x.name in layers]
    elif trainable:
        found = [x for x in found if any(p.requires_grad for p in x.parameters(coordinates))]
    for layer in found:
        if layer.name in problems:
            raise UnsupportedLayerError(f"layer {layer.name!r}: {problems[layer.name]}")
    if not found:
        kind = "trainable layer" if trainable else "layer"
        raise UnsupportedLayerError(f"model: expected at least one {kind}, got none")
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
            reasons[plain_name(name)] = (
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


def find_output_layer(model: nn.Module, *, example: Any = None) -> str:
    """Find the one Linear whose output is the model's, as it is.

    Parameters
    ----------
    model, example
        As in `find_layers`.

    Returns
    -------
    str
        Its name.

    Raises
    ------
    OptionError
        There is none, or more than one: only their user can tell which is meant.
    UnsupportedLayerError
        The data flow cannot be traced.
    """
    watched = _watched(model)
    flow = trace(model, watched) if example is None else observe(model, watched, example)
    found = [
        name
        for module, name in watched.items()
        if isinstance(module, nn.Linear)
        and any(flow.consumers[value] == [THE_OUTPUT] for value in flow.outputs[name])
    ]
    if len(found) != 1 or not found[0]:
        got = ", ".join(map(repr, found)) or "none"
        raise OptionError(
            "output_layer: expected one Linear inside the model whose output is the model's, got "
            f"{got}: name the one that is meant"
        )
    return found[0]


def uncovered_parameters(
    model: nn.Module, layers: Collection[AffineLayer], coordinates: str
) -> tuple[str, ...]:
    """Names of the trainable parameters that no layer's block covers."""
    covered = {id(p) for layer in layers for p in layer.parameters(coordinates)}
    return tuple(
        plain_name(name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in covered
    )


# --- pairing and checks --------------------------------------------------------------------------


def _watched(model: nn.Module) -> dict[nn.Module, str]:
    """Every module that may be a layer, or a BatchNorm after one, by its first name."""
    return {
        module: plain_name(name)
        for name, module in model.named_modules()
        if (kind := kind_of(module)) is not None and kind.why_unsupported(module) is None
    }


def _survey(
    model: nn.Module, watched: Mapping[nn.Module, str], coordinates: str, example: Any
) -> tuple[list[AffineLayer], dict[str, str]]:
    """Every layer with parameters, and by name what is wrong with some of them."""
    flow = trace(model, watched) if example is None else observe(model, watched, example)
    pairs = pair_batchnorms(watched, flow) if coordinates == "merged" else {}
    merged = set(pairs.values())
    found = []
    for module, name in watched.items():
        if name in merged or next(module.parameters(recurse=False), None) is None:
            continue
        if not isinstance(module, _BatchNorm):
            found.append(_affine_layer(model, name, pairs.get(name)))
        elif coordinates == "merged":
            found.append(_affine_layer(model, name, name))
    problems = flow.problems | _tied_parameters(model, found)
    for layer in found:
        if layer.batchnorm is None or layer.batchnorm_name not in flow.problems:
            continue
        problems.setdefault(
            layer.name,
            f"its BatchNorm {layer.batchnorm_name!r}: {flow.problems[layer.batchnorm_name]}",
        )
    for layer in found:
        if flow.calls(layer.name) != 1:
            problems.setdefault(
                layer.name,
                "expected one call with its own parameters in a forward pass, "
                f"got {flow.calls(layer.name)}",
            )
    return found, problems


def _require_not_merged(names: Collection[str], found: Collection[AffineLayer]) -> None:
    for layer in found:
        if layer.batchnorm_name in names and layer.batchnorm_name != layer.name:
            raise OptionError(
                f"layers: expected layers of their own, got {layer.batchnorm_name!r}, which is "
                f"merged into {layer.name!r}: name that one"
            )


def require_names(layers: Collection[str], model: nn.Module) -> None:
    """Refuse what names no layer.

    Raises
    ------
    OptionError
        No collection of names, or an empty one.
    UnknownLayerError
        A name is no affine layer's.
    """
    names = isinstance(layers, Collection) and all(isinstance(name, str) for name in layers)
    if isinstance(layers, str | bytes) or not names:
        raise OptionError(f"layers: expected a collection of names, got {layers!r}")
    if not layers:
        raise OptionError("layers: expected at least one name, got none")
    unknown = sorted(set(layers) - set(_modules_of_kinds(model)))
    if unknown:
        raise UnknownLayerError(
            f"layers: expected names of affine layers of the model, got {', '.join(unknown)}"
        )


def _require_possible(layers: Collection[str], model: nn.Module) -> None:
    """Refuse layers that can have no block."""
    modules = _modules_of_kinds(model)
    for name in layers:
        kind = kind_of(modules[name])
        reason = None if kind is None else kind.why_unsupported(modules[name])
        if reason is not None:
            raise UnsupportedLayerError(f"layer {name!r}: {reason}")


def _modules_of_kinds(model: nn.Module) -> dict[str, nn.Module]:
    return {plain_name(n): m for n, m in model.named_modules() if kind_of(m) is not None}


def _affine_layer(model: nn.Module, name: str, batchnorm_name: str | None) -> AffineLayer:
    module = _submodule(model, name, nn.Module)
    kind = kind_of(module)
    if kind is None:
        raise ModelChangedError(
            f"layer {name!r}: expected an affine layer, got {type(module).__name__}"
        )
    reason = kind.why_unsupported(module)
    if reason is not None:
        raise ModelChangedError(f"layer {name!r}: {reason}")
    if not kind.absorbs_scale and batchnorm_name != name:
        raise ModelChangedError(f"layer {name!r}: expected a layer before a BatchNorm, got one")
    if batchnorm_name is None:
        return kind(name, module)
    return kind(name, module, batchnorm_name, _submodule(model, batchnorm_name, _BatchNorm))


def _submodule(model: nn.Module, name: str, kind: type[M]) -> M:
    try:
        module = submodule(model, name)
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
        owners[id(parameter)].append(plain_name(name))
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
    # A parametrised weight is kept by a module inside the layer.
    outer, inside, _ = f".{path}.".partition(".parametrizations.")
    owner = model.get_submodule(outer.strip(".") if inside else path)
    kind = kind_of(owner)
    if kind is None:
        return f"a {type(owner).__name__} has no curvature block"
    reason = kind.why_unsupported(owner)
    if reason is None and own_name not in PARAMETERS:
        reason = f"{own_name!r} is no weight or bias of a {type(owner).__name__}"
    return reason


def require_finite_parameters(model: nn.Module) -> None:
    """Raise `NonFiniteError` if a parameter holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise UnsupportedLayerError(
                f"parameter {plain_name(name)!r}: expected it initialised, got a lazy one: pass an "
                "input through the model first"
            )
        if is_supported(parameter.dtype):
            require_finite(f"parameter {plain_name(name)!r}", parameter.detach())


def _require_known_kinds(model: nn.Module) -> None:
    """Refuse trainable parameters that no block could cover, before the model is run at all."""
    for name, parameter in model.named_parameters():
        reason = why_unsupported(model, name)
        if parameter.requires_grad and reason is not None:
            raise UnsupportedLayerError(
                f"parameter {plain_name(name)!r}: expected it in {kinds_in_words()}, but "
                f"{reason}; freeze it or name the wanted layers in layers="
            )
