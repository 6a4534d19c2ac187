"""Watches a model's forward pass: which affine functions it calls, and who consumes which value.

Functions are watched, not modules: a subclass of ``nn.Conv2d`` that pads its input first, or one
of ``nn.BatchNorm2d`` with an activation of its own, calls the same ``F.conv2d`` and
``F.batch_norm`` with its own parameters as the plain module does. What a call was made with is
held against what the module keeps, and anything else that is done with a module's tensors is
noticed: what a layer computes is never guessed from its attributes.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ekfac_rs.errors import UnsupportedLayerError
from ekfac_rs.layers.base import AffineCall, Arguments, Function
from ekfac_rs.layers.kinds import argument_names, kind_of
from ekfac_rs.loading import Inputs

# Who consumes what the model returns.
THE_OUTPUT = "the model's output"

# What a function may tell about a module's tensor without using its values.
_FACTS = (
    *(bool, int, str, torch.Size, torch.dtype, torch.device),
    *(torch.layout, torch.memory_format),
)
_NAMES_OF_FACTS = frozenset(
    (
        *("shape", "size", "dim", "ndim", "numel", "stride", "element_size", "is_contiguous"),
        *("dtype", "device", "layout", "is_cuda", "get_device", "requires_grad", "is_leaf"),
        *("is_floating_point", "is_complex"),
    )
)


class _Stored:
    """The tensors that watched modules keep, and which call is a module's own."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.place: dict[int, tuple[nn.Module, str]] = {}
        self.kept: dict[nn.Module, dict[str, Tensor]] = {}
        for module in modules:
            self.kept[module] = own = {}
            for name in _kind(module).stored:
                tensor = module._parameters.get(name, module._buffers.get(name))
                if tensor is not None:
                    own[name] = tensor
                    self.place[id(tensor)] = module, name

    def call(
        self, function: Function, arguments: Arguments, without_weight: nn.Module | None
    ) -> AffineCall | None:
        """Return the call of a watched module that this is: one with its weight."""
        weight = arguments.get("weight")
        module, name = without_weight, "weight"
        if weight is not None:
            module, name = self.place.get(id(weight), (None, ""))
        if module is None or name != "weight" or function not in _kind(module).functions:
            return None
        return AffineCall(module, function, arguments, self.kept[module])

    def stood_in_for(
        self, args: tuple[Any, ...], kwargs: Arguments
    ) -> tuple[tuple[Any, ...], Arguments]:
        """Return arguments with copies of stored tensors: nothing refused may write to these."""
        copied: tuple[tuple[Any, ...], Arguments] = tree_map_only(
            Tensor, lambda x: x.clone() if id(x) in self.place else x, (args, kwargs)
        )
        return copied

    def misused(self, values: Iterable[Any]) -> Iterator[tuple[nn.Module, str]]:
        """Modules and names of the tensors among the values that a module keeps."""
        return (self.place[id(value)] for value in values if id(value) in self.place)


def _leaves(value: Any) -> list[Any]:
    """Take what torch's own functions take and return out of tuples, lists and dictionaries.

    Torch's trees know of more, which takes several times as long, for every operation of a model.
    """
    if isinstance(value, tuple | list):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return _leaves([*value.values()]) if isinstance(value, dict) else [value]


def _kind(module: nn.Module) -> Any:
    kind = kind_of(module)
    assert kind is not None
    return kind


def _others(call: AffineCall) -> list[Any]:
    """Arguments of a module's own call that are not its own tensors at their places."""
    return [value for name, value in call.arguments.items() if value is not call.kept.get(name)]


def _misuse(name: str, function: str) -> str:
    return f"expected its {name} in its own call alone, got it used by {function!r}, too"


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
        self._stored = _Stored(modules)
        self._without_weight = [m for m in modules if getattr(m, "weight", None) is None]
        self._active: list[nn.Module] = []

    def on_call(self, call: AffineCall, result: Tensor) -> Tensor:
        """Take note of a call; the model goes on with what is returned."""
        raise NotImplementedError

    def on_problem(self, module: nn.Module, problem: str) -> None:
        """Take note that a module's tensors are used otherwise than it promises."""
        raise NotImplementedError

    def on_other(self, name: str, arguments: Any, result: Any) -> None:
        """Take note of any other function."""

    def before(self, arguments: list[Any]) -> Any:
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
        leaves = _leaves((args, kwargs))
        seen = self.before(leaves)
        call, names = None, argument_names(func)
        if names is not None:
            arguments = dict(zip(names, args, strict=False)) | kwargs
            call = self._stored.call(func, arguments, self._active[-1] if self._active else None)
        if (
            call is None
            and any(self._stored.misused(leaves))
            and _name_of(func) not in _NAMES_OF_FACTS
        ):
            args, kwargs = self._stored.stood_in_for(args, kwargs)
        result = func(*args, **kwargs)
        if call is not None:
            leaves = _leaves(_others(call))
            problem = _kind(call.module).why_refused(call)
            if problem is not None:
                self.on_problem(call.module, problem)
                call = None
        for module, name in self._stored.misused(leaves):
            if not _is_fact(func, result):
                self.on_problem(module, _misuse(name, _name_of(func)))
        if call is not None:
            return self.on_call(call, result)
        self.on_other(_name_of(func), seen, result)
        return result


def _is_fact(function: Function, result: Any) -> bool:
    """Whether a function told something about a tensor that does not depend on its values."""
    if result is None:
        return getattr(function, "__name__", "") == "__get__"
    return all(isinstance(leaf, _FACTS) for leaf in _leaves(result))


def _name_of(function: Function) -> str:
    name = str(getattr(function, "__name__", function))
    # Getters of all attributes have the same name.
    return str(function.__self__.__name__) if name == "__get__" else name  # type: ignore[attr-defined]


@dataclass
class DataFlow:
    """Which module made which value, and who consumes each value.

    Values are hashable stand-ins. ``outputs`` is by module name, with one entry for each call;
    the inputs' entries stand at the same places. ``problems`` tells by module name what was done
    with its tensors that the module does not promise; such a call is none of the module's own.
    """

    inputs: dict[str, list[Hashable]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[Hashable]] = field(default_factory=lambda: defaultdict(list))
    consumers: dict[Hashable, list[str]] = field(default_factory=lambda: defaultdict(list))
    problems: dict[str, str] = field(default_factory=dict)
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
    """Looks into every module but those that do no other than torch's own."""

    _in_normalisation = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if kind_of(m) is not None:
            return _is_plain(m)
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        outside, self._in_normalisation = self._in_normalisation, isinstance(m, _NormBase)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._in_normalisation = outside

    def to_bool(self, obj: fx.Proxy) -> bool:
        # A normalisation raises unless its input has the dimensions it takes: it has them.
        compared = obj.node.args[0] if obj.node.target is operator.ne else None
        if self._in_normalisation and isinstance(compared, fx.Node) and compared.target == "dim":
            return False
        return super().to_bool(obj)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # A trace is no pass: what a normalisation counts and keeps stays as it is.
        self.proxy_buffer_attributes = attr in _STATISTICS
        return super().getattr(attr, attr_val, parameter_proxy_cache)


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _is_plain(module: nn.Module) -> bool:
    """Whether a module runs the forward of the torch module that its kind stands for."""
    forwards = {vars(kind).get("forward") for m in _kind(module).modules for kind in m.__mro__}
    return "forward" not in vars(module) and type(module).forward in forwards


def _has_foreign_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks that may change what it computes, or use it elsewhere."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return not all(getattr(hook, "observes_only", False) for hook in hooks)


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
        The model's forward depends on values, or cannot be looked into.
    """
    for module, name in watched.items():
        if getattr(module, "weight", None) is None and not _is_plain(module):
            raise UnsupportedLayerError(
                f"layer {name!r}: expected a {type(module).__name__} with a weight to know it by "
                "in a symbolic trace, got none; pass example= with an input batch"
            )
        if _has_foreign_hooks(module):
            raise UnsupportedLayerError(
                f"layer {name!r}: expected a {type(module).__name__} without forward hooks, which "
                "a symbolic trace does not see, got one with; pass example= with an input batch"
            )
    if model in watched:
        model = nn.Sequential(model)  # whose only layer may be looked at from outside
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's own forward raises on symbolic input
        raise UnsupportedLayerError(
            f"model: its data flow cannot be traced symbolically ({type(error).__name__}: "
            f"{error}); pass example= with an input batch"
        ) from error
    tensors = {node: _attribute(model, node) for node in graph.nodes if node.op == "get_attr"}
    stored = _Stored(watched)
    flow = DataFlow()
    for node in graph.nodes:
        if node.op == "get_attr" or _is_fact_of(node):
            continue
        caller, others = _own_call(node, model, stored, tensors, watched, flow)
        label = watched[caller] if caller is not None else _label(node)
        if caller is not None:
            flow.inputs[label].extend(node.all_input_nodes[:1])
            flow.outputs[label].append(node)
        for owner, name in stored.misused(others):
            flow.problems.setdefault(watched[owner], _misuse(name, label))
        for value in node.all_input_nodes:
            flow.consumers[value].append(label)
    return flow


def _own_call(
    node: fx.Node,
    model: nn.Module,
    stored: _Stored,
    tensors: Mapping[fx.Node, Any],
    watched: Mapping[nn.Module, str],
    flow: DataFlow,
) -> tuple[nn.Module | None, list[Any]]:
    """Watched module whose own call this is, and the arguments that are not its tensors."""
    others = [tensors[value] for value in node.all_input_nodes if value in tensors]
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return (module if module in watched else None), others
    if not callable(node.target) or (names := argument_names(node.target)) is None:
        return None, others
    arguments = {
        name: tensors.get(value, value) if isinstance(value, fx.Node) else value
        for name, value in (dict(zip(names, node.args, strict=False)) | node.kwargs).items()
    }
    call = stored.call(node.target, arguments, None)
    if call is None:
        return None, others
    problem = _kind(call.module).why_refused(call)
    if problem is None:
        return call.module, _others(call)
    flow.problems.setdefault(watched[call.module], problem)
    return None, _others(call)


def _attribute(model: nn.Module, node: fx.Node) -> Any:
    path, _, name = str(node.target).rpartition(".")
    return getattr(model.get_submodule(path), name, None)


def _is_fact_of(node: fx.Node) -> bool:
    """Whether a node asks a tensor for its shape or the like."""
    if node.op == "call_method":
        return node.target in _NAMES_OF_FACTS
    return node.target is getattr and node.args[1] in _NAMES_OF_FACTS


def _label(node: fx.Node) -> str:
    if node.op == "output":
        return THE_OUTPUT
    if node.target is getattr:
        return str(node.args[1])
    return getattr(node.target, "__name__", str(node.target))


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

    def before(self, arguments: list[Any]) -> list[Hashable]:
        return [self.key(x) for x in arguments if isinstance(x, Tensor)]

    def on_call(self, call: AffineCall, result: Tensor) -> Tensor:
        name, value = self._watched[call.module], self.key(call.input)
        self.flow.inputs[name].append(value)
        self.flow.consumers[value].append(name)
        self.flow.outputs[name].append(self.key(result))
        self.flow.dimensions[name] = result.dim()
        return result

    def on_problem(self, module: nn.Module, problem: str) -> None:
        self.flow.problems.setdefault(self._watched[module], problem)

    def on_other(self, name: str, arguments: list[Hashable], result: Any) -> None:
        if any(isinstance(x, Tensor) for x in _leaves(result)):
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
            observer.flow.consumers[observer.key(value)].append(THE_OUTPUT)
    return observer.flow
