"""Watches a model's forward pass: which affine functions it calls, and who consumes which value.

Functions are watched, not modules: a subclass of ``nn.Conv2d`` that pads its input first, or one
of ``nn.BatchNorm2d`` with an activation of its own, calls the same ``F.conv2d`` and
``F.batch_norm`` with its own parameters as the plain module does.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ekfac_rs.errors import UnsupportedLayerError
from ekfac_rs.loading import Inputs

Arguments = dict[str, Any]

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_WITH_STATISTICS = ("input", "running_mean", "running_var", "weight", "bias", "training")

# Every function a layer may compute with, and the names of its positional arguments.
_SIGNATURES: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.conv1d: _CONVOLUTION,
    F.conv2d: _CONVOLUTION,
    F.conv3d: _CONVOLUTION,
    F.batch_norm: (*_WITH_STATISTICS, "momentum", "eps"),
    F.instance_norm: (*_WITH_STATISTICS[:-1], "use_input_stats", "momentum", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
}


@dataclass(frozen=True)
class AffineCall:
    """One call of an affine function on behalf of a module.

    Attributes
    ----------
    module : torch.nn.Module
        Whose parameters it computes with.
    function : callable
    arguments : dict of str to Any
        By the function's own names.
    """

    module: nn.Module
    function: Callable[..., Any]
    arguments: Arguments

    @property
    def input(self) -> Any:
        """What the function is applied to."""
        return self.arguments["input"]


class AffineCalls(TorchFunctionMode):
    """Hands every affine call of some modules to `on_call`, which returns the value to go on with.

    A module is known by the weight it passes. A normalisation without affine parameters has
    none: there it is the innermost watched module being called.

    Parameters
    ----------
    modules : collection of torch.nn.Module
        To watch.
    """

    def __init__(self, modules: Collection[nn.Module]) -> None:
        super().__init__()
        self._owners = {
            id(module.weight): module
            for module in modules
            if isinstance(getattr(module, "weight", None), Tensor)
        }
        self._without_weight = [m for m in modules if getattr(m, "weight", None) is None]
        self._active: list[nn.Module] = []

    def on_call(self, call: AffineCall, result: Tensor) -> Tensor:
        """Take note of a call; the model goes on with what is returned."""
        raise NotImplementedError

    def on_other(self, name: str, arguments: Any, result: Any) -> None:
        """Take note of any other function."""

    def before(self, arguments: Any) -> Any:
        """Look at arguments before the function may change them; handed to `on_other`."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the calls made inside."""

        def enter(module: nn.Module, args: Any) -> None:
            self._active.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._active.pop()

        handles = [m.register_forward_pre_hook(enter) for m in self._without_weight]
        handles += [m.register_forward_hook(leave) for m in self._without_weight]
        with removed_afterwards(handles), self:
            self._active.clear()
            yield

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        seen = self.before((args, kwargs))
        result = func(*args, **kwargs)
        if func in _SIGNATURES:
            arguments = dict(zip(_SIGNATURES[func], args, strict=False)) | kwargs
            module = self._owner(arguments.get("weight"))
            if module is not None:
                return self.on_call(AffineCall(module, func, arguments), result)
        self.on_other(getattr(func, "__name__", str(func)), seen, result)
        return result

    def _owner(self, weight: Tensor | None) -> nn.Module | None:
        if weight is not None:
            return self._owners.get(id(weight))
        return self._active[-1] if self._active else None


@dataclass
class DataFlow:
    """Which module made which value, and who consumes each value.

    Values are hashable stand-ins. ``outputs`` is by module name, with one entry for each call;
    the inputs' entries stand at the same places.
    """

    inputs: dict[str, list[Hashable]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[Hashable]] = field(default_factory=lambda: defaultdict(list))
    consumers: dict[Hashable, list[str]] = field(default_factory=lambda: defaultdict(list))
    # Of the outputs, where they were observed.
    dimensions: dict[str, int] = field(default_factory=dict)

    def calls(self, name: str) -> int:
        """How many times the module was called."""
        return len(self.outputs[name])


@contextmanager
def removed_afterwards(handles: Collection[Any]) -> Iterator[None]:
    """Remove hooks on the way out, whatever happens inside."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- traced symbolically -------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Looks into every module but torch's own, and normalisations, which check their input."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _NormBase) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, watched: Mapping[nn.Module, str]) -> DataFlow:
    """Find the data flow without running the model.

    Parameters
    ----------
    model : torch.nn.Module
    watched : mapping of torch.nn.Module to str
        The modules of interest and their names.

    Raises
    ------
    UnsupportedLayerError
        The model's forward depends on values.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's own forward raises on symbolic input
        raise UnsupportedLayerError(
            f"model: its data flow cannot be traced symbolically ({type(error).__name__}: "
            f"{error}); pass example= with an input batch"
        ) from error
    owners = {id(m.weight): m for m in watched if isinstance(m.weight, Tensor)}
    flow = DataFlow()
    for node in graph.nodes:
        label = str(node.target)
        module = _module_of(node, model, owners)
        if module is not None and module in watched:
            label = watched[module]
            flow.inputs[label].extend(node.all_input_nodes[:1])
            flow.outputs[label].append(node)
        for value in node.all_input_nodes:
            flow.consumers[value].append(label)
    return flow


def _module_of(
    node: fx.Node, model: nn.Module, owners: Mapping[int, nn.Module]
) -> nn.Module | None:
    if node.op == "call_module":
        return model.get_submodule(str(node.target))
    if node.op == "call_function" and node.target in _SIGNATURES:
        names = _SIGNATURES[node.target]
        weight = (dict(zip(names, node.args, strict=False)) | node.kwargs).get("weight")
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            return owners.get(id(model.get_parameter(str(weight.target))))
    return None


# --- observed in one forward pass ----------------------------------------------------------------


class _Observer(AffineCalls):
    def __init__(self, watched: Mapping[nn.Module, str]) -> None:
        super().__init__(list(watched))
        self.flow = DataFlow()
        self._watched = watched
        # Identities are only unique while the objects live.
        self._alive: list[Tensor] = []

    def key(self, tensor: Tensor) -> Hashable:
        # The version tells a value from what an in-place operation made of it.
        self._alive.append(tensor)
        return id(tensor), tensor._version

    def before(self, arguments: Any) -> list[Hashable]:
        return [self.key(x) for x in tree_leaves(arguments) if isinstance(x, Tensor)]

    def on_call(self, call: AffineCall, result: Tensor) -> Tensor:
        name, value = self._watched[call.module], self.key(call.input)
        self.flow.inputs[name].append(value)
        self.flow.consumers[value].append(name)
        self.flow.outputs[name].append(self.key(result))
        self.flow.dimensions[name] = result.dim()
        return result

    def on_other(self, name: str, arguments: list[Hashable], result: Any) -> None:
        if any(isinstance(x, Tensor) for x in tree_leaves(result)):
            for value in arguments:
                self.flow.consumers[value].append(name)


def observe(model: nn.Module, watched: Mapping[nn.Module, str], example: Any) -> DataFlow:
    """Find the data flow of one forward pass.

    Parameters
    ----------
    model : torch.nn.Module
        In the mode the pass should run in.
    watched : mapping of torch.nn.Module to str
        The modules of interest and their names.
    example
        An input batch: what the model is called with, as `Inputs.of` takes it.
    """
    observer = _Observer(watched)
    with torch.no_grad(), observer.watching():
        output = Inputs.of(example).call(model)
    for value in tree_leaves(output):
        if isinstance(value, Tensor):
            observer.flow.consumers[observer.key(value)].append("the model's output")
    return observer.flow
