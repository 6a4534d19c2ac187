"""Finds the affine layers of a model and the BatchNorm each one feeds, from the data flow."""

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ekfac_rs._tensors import require_choice
from ekfac_rs.errors import (
    BatchNormError,
    ModelChangedError,
    OptionError,
    UnsupportedLayerError,
)

COORDINATES = ("merged", "raw")

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class AffineLayer:
    """A Linear layer and the BatchNorm that consumes its output, if any.

    Attributes
    ----------
    name : str
        Name of the Linear in ``model.named_modules()``.
    linear : torch.nn.Linear
    batchnorm_name : str or None
        Name of the BatchNorm the layer feeds directly and exclusively.
    batchnorm : torch.nn.BatchNorm1d or None
    """

    name: str
    linear: nn.Linear
    batchnorm_name: str | None = None
    batchnorm: nn.BatchNorm1d | None = None

    def shape(self, coordinates: str) -> tuple[int, int]:
        """Shape ``(D, K)`` of the layer's weight matrix; K counts the bias column."""
        return self.linear.out_features, self.linear.in_features + self.has_shift(coordinates)

    def has_shift(self, coordinates: str) -> bool:
        """Whether the map has a bias column: merged with a BatchNorm, it always has."""
        merged = coordinates == "merged" and self.batchnorm is not None
        return merged or self.linear.bias is not None

    def raw_weight(self) -> Tensor:
        """``[W b]`` of the Linear alone, shape ``(D, K)``, differentiable."""
        weight, bias = self.linear.weight, self.linear.bias
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
        gain = self.gain(variance)
        bias = self.linear.bias
        shift = -gain * mean if bias is None else gain * (bias - mean)
        if self.batchnorm.bias is not None:
            shift = shift + self.batchnorm.bias
        return torch.cat([gain[:, None] * self.linear.weight, shift[:, None]], dim=1)

    def gain(self, variance: Tensor) -> Tensor:
        """Factor ``gamma / sigma`` of shape (D,) by which the BatchNorm scales each output."""
        assert self.batchnorm is not None
        inverse = torch.rsqrt(variance + self.batchnorm.eps)
        return inverse if self.batchnorm.weight is None else self.batchnorm.weight * inverse

    def running_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, each of shape (D,), that the BatchNorm uses in eval mode."""
        assert self.batchnorm is not None
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

    def require_channels_last_axis(self, x: Tensor) -> None:
        """Raise unless the BatchNorm's input ``x`` is ``[N, D]``: else it mixes other axes."""
        if x.dim() != 2:
            raise UnsupportedLayerError(
                f"layer {self.batchnorm_name!r}: expected the BatchNorm after {self.name!r} to see "
                f"a matrix [N, D], got shape {tuple(x.shape)}, whose axis 1 is not the features"
            )

    def parameters(self, coordinates: str) -> Iterator[nn.Parameter]:
        """Parameters that the block in these coordinates covers."""
        yield from self.linear.parameters()
        if coordinates == "merged" and self.batchnorm is not None:
            yield from self.batchnorm.parameters()


@dataclass
class _DataFlow:
    """Which module call made which value, and who consumes each value."""

    inputs: dict[str, list[Hashable]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[Hashable]] = field(default_factory=lambda: defaultdict(list))
    consumers: dict[Hashable, list[str]] = field(default_factory=lambda: defaultdict(list))

    def calls(self, name: str) -> int:
        return len(self.outputs[name])


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
        the model in the mode the pass should run in); without, it is traced symbolically.

    Returns
    -------
    list of AffineLayer
        In the order of ``model.named_modules()``.

    Raises
    ------
    UnsupportedLayerError
        A trainable parameter lies in no known layer; a layer is shared, unused or tied; a Linear
        feeds a BatchNorm and something else; a BatchNorm with parameters is fed by no Linear.
    OptionError
        ``layers`` names what is not there.
    """
    require_choice("coordinates", coordinates, COORDINATES)
    names = {module: name for name, module in model.named_modules()}
    linears = {
        name: module
        for module, name in names.items()
        if isinstance(module, nn.Linear) and (layers is None or name in layers)
    }
    _require_known(layers, linears)
    if layers is None:
        _require_known_kinds(model)
    flow = _trace(model, names) if example is None else _observe(model, names, example)
    batchnorms = _pair_batchnorms(names, linears, flow) if coordinates == "merged" else {}
    found = [_affine_layer(model, name, batchnorms.get(name)) for name in linears]
    if layers is None:
        found = [x for x in found if any(p.requires_grad for p in x.parameters(coordinates))]
    for layer in found:
        if flow.calls(layer.name) != 1:
            raise UnsupportedLayerError(
                f"layer {layer.name!r}: expected one call in a forward pass, "
                f"got {flow.calls(layer.name)}"
            )
    _refuse_tied_parameters(model, found)
    if layers is None:
        _require_all_covered(model, found, coordinates)
    if not found:
        raise UnsupportedLayerError("model: expected at least one trainable Linear, got none")
    return found


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


def _require_known(layers: Collection[str] | None, linears: Mapping[str, nn.Linear]) -> None:
    unknown = sorted(set(layers or ()) - set(linears))
    if unknown:
        raise OptionError(
            f"layers: expected names of Linear layers of the model, got {', '.join(unknown)}"
        )
    if layers is not None and not layers:
        raise OptionError("layers: expected at least one name, got none")


def _affine_layer(model: nn.Module, name: str, batchnorm_name: str | None) -> AffineLayer:
    linear = _submodule(model, name, nn.Linear)
    if batchnorm_name is None:
        return AffineLayer(name, linear)
    batchnorm = _submodule(model, batchnorm_name, nn.BatchNorm1d)
    return AffineLayer(name, linear, batchnorm_name, batchnorm)


def _submodule(model: nn.Module, name: str, kind: type[M]) -> M:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelChangedError(
            f"layer {name!r}: expected a {kind.__name__}, got a model without it"
        ) from None
    if not isinstance(module, kind):
        raise ModelChangedError(
            f"layer {name!r}: expected a {kind.__name__}, got {type(module).__name__}"
        )
    return module


def _pair_batchnorms(
    names: Mapping[nn.Module, str], linears: Mapping[str, nn.Linear], flow: _DataFlow
) -> dict[str, str]:
    """Map each Linear to the BatchNorm whose input is the Linear's output."""
    producer = {value: name for name in linears for value in flow.outputs[name]}
    pairs: dict[str, str] = {}
    for module, name in names.items():
        if not isinstance(module, nn.BatchNorm1d):
            continue
        for value in flow.inputs[name]:
            linear = producer.get(value)
            if linear is None:
                continue
            if flow.calls(name) != 1:
                raise UnsupportedLayerError(
                    f"layer {name!r}: expected a BatchNorm called once in a forward pass, "
                    f"got {flow.calls(name)} calls"
                )
            if flow.consumers[value] != [name]:
                raise UnsupportedLayerError(
                    f"layer {linear!r}: expected its BatchNorm {name!r} to be the only consumer of "
                    f"its output, got {', '.join(flow.consumers[value])}: they cannot be merged"
                )
            pairs[linear] = name
    return pairs


def _refuse_tied_parameters(model: nn.Module, layers: Collection[AffineLayer]) -> None:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    modules: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        modules[id(module)].append(name)
    for layer in layers:
        for parameter in layer.parameters("merged"):
            tied = owners[id(parameter)]
            if len(tied) > len(modules[id(layer.linear)]):
                raise UnsupportedLayerError(
                    f"layer {layer.name!r}: expected parameters of its own, "
                    f"got one shared by {', '.join(tied)}"
                )


def _require_known_kinds(model: nn.Module) -> None:
    """Refuse trainable parameters that no block could cover, before the model is run at all."""
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.requires_grad and not isinstance(owner, nn.Linear | nn.BatchNorm1d):
            _refuse_parameter(name, f"a {type(owner).__name__}, which has no curvature block")


def _require_all_covered(
    model: nn.Module, layers: Collection[AffineLayer], coordinates: str
) -> None:
    if coordinates == "raw":
        return  # what is left are BatchNorms; Curvature.uncovered lists them
    for name in uncovered_parameters(model, layers, coordinates):
        _refuse_parameter(name, "a BatchNorm that no Linear feeds directly")


def _refuse_parameter(name: str, came: str) -> NoReturn:
    raise UnsupportedLayerError(
        f"parameter {name!r}: expected it in a Linear or in the BatchNorm after one, got {came}; "
        "freeze it or name the wanted layers in layers="
    )


# --- data flow, traced ---------------------------------------------------------------------------


def _trace(model: nn.Module, names: Mapping[nn.Module, str]) -> _DataFlow:
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever the model's own forward raises on symbolic input
        raise UnsupportedLayerError(
            f"model: its data flow cannot be traced symbolically ({type(error).__name__}: "
            f"{error}); pass example= with an input batch"
        ) from error
    flow = _DataFlow()
    for node in graph.nodes:
        label = str(node.target)
        if node.op == "call_module":
            label = names[model.get_submodule(label)]
            flow.inputs[label].extend(node.all_input_nodes[:1])
            flow.outputs[label].append(node)
        for value in node.all_input_nodes:
            flow.consumers[value].append(label)
    return flow


# --- data flow, observed -------------------------------------------------------------------------


class _ConsumerLog(TorchFunctionMode):
    """Logs which torch functions consume which values, outside of the watched modules."""

    def __init__(self, flow: _DataFlow) -> None:
        super().__init__()
        self.flow = flow
        self.inside_watched = 0
        # Identities are only unique while the objects live.
        self.alive: list[Tensor] = []

    def key(self, tensor: Tensor) -> Hashable:
        # The version tells a value from what an in-place operation made of it.
        self.alive.append(tensor)
        return id(tensor), tensor._version

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside_watched:
            return func(*args, **kwargs)
        values = [self.key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **kwargs)
        if any(isinstance(x, Tensor) for x in tree_leaves(result)):
            for value in values:
                self.flow.consumers[value].append(getattr(func, "__name__", str(func)))
        return result


def _observe(model: nn.Module, names: Mapping[nn.Module, str], example: Any) -> _DataFlow:
    flow = _DataFlow()
    log = _ConsumerLog(flow)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = log.key(next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)))
        flow.inputs[names[module]].append(value)
        flow.consumers[value].append(names[module])
        log.inside_watched += 1

    def leave(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        log.inside_watched -= 1
        flow.outputs[names[module]].append(log.key(output))

    watched = [m for m in names if isinstance(m, nn.Linear | nn.BatchNorm1d)]
    handles = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in watched]
    handles += [m.register_forward_hook(leave) for m in watched]
    with removed_afterwards(handles), torch.no_grad(), log:
        output = model(example)
    for value in tree_leaves(output):
        if isinstance(value, Tensor):
            flow.consumers[log.key(value)].append("the model's output")
    return flow


@contextmanager
def removed_afterwards(handles: Collection[Any]) -> Iterator[None]:
    """Remove hooks on the way out, whatever happens inside."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
