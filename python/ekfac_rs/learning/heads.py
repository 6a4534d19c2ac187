"""Which model computes the outputs of which task: one for all, or each task with a head."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ekfac_rs._checks import require_choice
from ekfac_rs._modes import bare_model, plain_name, submodule
from ekfac_rs.batchnorm.statistics import as_found
from ekfac_rs.errors import (
    IncompatibleError,
    ModelChangedError,
    OptionError,
    UnknownLayerError,
    UnsupportedLayerError,
)
from ekfac_rs.layers import find_output_layer
from ekfac_rs.loading import Inputs

HEADS = ("new",)

MakesModel = Callable[[int], nn.Module]


def heads_of(
    model: nn.Module,
    head: str | MakesModel | None,
    output_layer: str | None,
    layers: Collection[str] | None,
) -> "Heads":
    """Return what `ContinualLearner` was asked for by ``head``.

    Raises
    ------
    OptionError
        An unknown head; a callable without the names of shared layers, or with an output layer;
        an output layer among the shared ones.
    UnknownLayerError, UnsupportedLayerError
        There is no such output layer, or it cannot be replaced.
    """
    if output_layer is not None:
        output_linear(model, output_layer)
    if head is None:
        return OneHead(model, output_layer)
    if not callable(head) or isinstance(head, nn.Module):
        require_choice("head", head, HEADS)
        if layers is not None and output_layer in layers:
            raise OptionError(
                f"layers: expected shared layers, got {output_layer!r}, which every task has "
                "one of its own of"
            )
        return NewHeads(model, output_layer)
    if layers is None:
        raise OptionError(
            "layers: expected the names of the layers that all tasks share, with a callable as "
            "head=, got none"
        )
    if output_layer is not None:
        raise OptionError(
            f"output_layer: expected none with a callable as head=, got {output_layer!r}"
        )
    return GivenModels(model, head, layers)


class Heads(ABC):
    """Gives each task its model.

    What a call changes it can take back: it leaves the way back with the ``undo`` it is given.

    Attributes
    ----------
    model : torch.nn.Module
        The one that is in use.
    """

    kind: str
    words: str
    model: nn.Module

    @property
    def own_layer(self) -> str | None:
        """Name of the layer that every task has one of its own of, once known."""
        return None

    @property
    @abstractmethod
    def tasks(self) -> Collection[int] | None:
        """Tasks that have a model; None where one serves all."""

    @abstractmethod
    def begin(
        self, task: int, undo: ExitStack, classes: int | None, count: Callable[[], int] | None
    ) -> None:
        """Bring a task's model into use.

        Parameters
        ----------
        task : int
        undo : ExitStack
        classes : int, optional
            Number of outputs that it is to have.
        count : callable, optional
            Tells that number where ``classes`` does not. None where the task must have begun.
        """

    @abstractmethod
    def bind(self, example: Callable[[], Inputs | None], undo: ExitStack) -> None:
        """Find out what a task has of its own before another one begins."""

    @abstractmethod
    def share(self, names: Collection[str], undo: ExitStack) -> None:
        """Let the models of all tasks share modules of these names, besides those they do."""

    @abstractmethod
    def use(self, task: int, undo: ExitStack) -> None:
        """Bring the model of a task that has one into use."""

    @contextmanager
    def used(self, task: int) -> Iterator[nn.Module]:
        """Use the model of a task for a while."""
        with ExitStack() as undo:
            self.use(task, undo)
            yield self.model

    def grow(self, classes: int, example: Inputs | None, undo: ExitStack) -> str:
        """Give the output layer as many outputs as there are classes; return its name."""
        raise OptionError(f"grow: expected one output layer for all tasks, got {self.words}")

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what the state of the model in use does not hold."""

    @abstractmethod
    def reshape(self, state: Mapping[str, Any], undo: ExitStack) -> None:
        """Give the models the shapes of a state, nothing else of it yet."""

    @abstractmethod
    def load_tensors(self, state: Mapping[str, Any]) -> None:
        """Load the tensors of a state whose shapes the models have."""


class OneHead(Heads):
    """One model, with one output layer, for all tasks."""

    kind = "one"
    words = "one output layer for all tasks"

    def __init__(self, model: nn.Module, output_layer: str | None) -> None:
        self.model = model
        self.output_layer = output_layer
        # By name, before it ever grew.
        self._first_outputs: dict[str, int] = {}

    @property
    def tasks(self) -> None:
        """None: all have this model."""

    def begin(
        self, task: int, undo: ExitStack, classes: int | None, count: Callable[[], int] | None
    ) -> None:
        if classes is not None:
            raise OptionError(
                f"classes: expected none with one output layer for all tasks, got {classes}: "
                'head="new" gives each task one of its own'
            )

    def bind(self, example: Callable[[], Inputs | None], undo: ExitStack) -> None:
        pass

    def share(self, names: Collection[str], undo: ExitStack) -> None:
        pass

    def use(self, task: int, undo: ExitStack) -> None:
        pass

    def grow(self, classes: int, example: Inputs | None, undo: ExitStack) -> str:
        name = self.output_layer or found_output_layer(self.model, example)
        outputs = output_linear(self.model, name).out_features
        if classes <= outputs:
            raise OptionError(
                f"classes: expected more than the {outputs} outputs of layer {name!r}, got "
                f"{classes}"
            )
        self._resize(name, classes, undo)
        return name

    def _resize(self, name: str, outputs: int, undo: ExitStack) -> None:
        layer = output_linear(self.model, name)
        if name not in self._first_outputs:
            self._first_outputs[name] = layer.out_features
            undo.callback(self._first_outputs.pop, name)
        if outputs != layer.out_features:
            resize(layer, outputs, undo)

    def state_dict(self) -> dict[str, Any]:
        outputs = {
            name: output_linear(self.model, name).out_features for name in self._first_outputs
        }
        return {"kind": self.kind, "outputs": outputs}

    def reshape(self, state: Mapping[str, Any], undo: ExitStack) -> None:
        for name, outputs in (self._first_outputs | state.get("outputs", {})).items():
            self._resize(name, outputs, undo)

    def load_tensors(self, state: Mapping[str, Any]) -> None:
        pass


class NewHeads(Heads):
    """One model whose output layer is exchanged: every task has one of its own.

    The model's own is the first task's.
    """

    kind = "new"
    words = "an output layer for each task"

    def __init__(self, model: nn.Module, output_layer: str | None) -> None:
        self.model = model
        self.output_layer = output_layer
        # Empty before the first task is over: its layer is what the model has.
        self._layers: dict[int, nn.Linear] = {}
        self._used = 0

    @property
    def own_layer(self) -> str | None:
        """Name of the output layer, once known."""
        return self.output_layer

    @property
    def tasks(self) -> Collection[int]:
        """Tasks that have an output layer."""
        return self._layers.keys() or (0,)

    def begin(
        self, task: int, undo: ExitStack, classes: int | None, count: Callable[[], int] | None
    ) -> None:
        if task == 0 and not self._layers:
            if classes is not None:
                raise OptionError(
                    f"classes: expected none for the first task, whose output layer is the "
                    f"model's own, got {classes}"
                )
            return
        if task not in self._layers:
            if count is None:
                raise OptionError(
                    f"task {task}: expected fit before consolidate, which gives the task its "
                    "output layer"
                )
            like = self._layers[self._used]
            self._layers[task] = new_linear(like, count() if classes is None else classes)
            undo.callback(self._layers.pop, task)
        outputs = self._layers[task].out_features
        if classes not in (None, outputs):
            raise OptionError(
                f"classes: expected {outputs}, as task {task} began with, got {classes}"
            )
        self.use(task, undo)

    def bind(self, example: Callable[[], Inputs | None], undo: ExitStack) -> None:
        if self._layers:
            return
        if self.output_layer is None:
            undo.callback(setattr, self, "output_layer", None)
            self.output_layer = found_output_layer(self.model, example())
        undo.callback(self._layers.clear)
        self._layers[0] = output_linear(self.model, self.output_layer)

    def share(self, names: Collection[str], undo: ExitStack) -> None:
        pass

    def use(self, task: int, undo: ExitStack) -> None:
        if not self._layers:
            return
        if self._registered() is not self._layers[self._used]:
            raise ModelChangedError(
                f"layer {self.output_layer!r}: expected the output layer of task {self._used}, "
                "which the learner put there, got another"
            )
        if task != self._used:
            undo.callback(self._put, self._used)
            self._put(task)

    def _put(self, task: int) -> None:
        layer = self._layers[task]
        layer.training = self._registered().training
        register(self.model, str(self.output_layer), layer)
        self._used = task

    def _registered(self) -> nn.Module:
        return registered(self.model, str(self.output_layer))

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "output_layer": self.output_layer if self._layers else None,
            "used": self._used,
            "layers": {task: layer.state_dict() for task, layer in self._layers.items()},
        }

    def reshape(self, state: Mapping[str, Any], undo: ExitStack) -> None:
        if self._layers:
            # So that the model's own layer, with whatever its user hooked to it, is used again.
            self.use(0, undo)
        undo.callback(self._become, self.output_layer, self._layers, self._used)
        name = state["output_layer"]
        if name is None:
            self._become(self.output_layer, {}, 0)
            return
        if self.output_layer not in (None, name):
            raise IncompatibleError(
                f"state: expected the output layer {self.output_layer!r}, got {name!r}"
            )
        own = output_linear(self.model, name)
        layers = {}
        for task, tensors in state["layers"].items():
            # The model's own stays the first task's: others may refer to it.
            layer = own if task == 0 else new_linear(own, len(tensors["weight"]))
            require_same_tensors(layer, tensors, f"layer {name!r} of task {task}")
            layers[task] = layer
        undo.callback(register, self.model, name, own)
        self._become(name, layers, 0)
        self._put(state["used"])

    def _become(self, output_layer: str | None, layers: dict[int, nn.Linear], used: int) -> None:
        self.output_layer, self._layers, self._used = output_layer, layers, used

    def load_tensors(self, state: Mapping[str, Any]) -> None:
        for task, tensors in state["layers"].items():
            self._layers[task].load_state_dict(tensors)


class GivenModels(Heads):
    """A model for each task, made by the user, that share the layers of some names."""

    kind = "given"
    words = "a given model for each task"

    def __init__(self, model: nn.Module, make: MakesModel, shared: Collection[str]) -> None:
        self.model = model
        self._make = make
        self._shared = tuple(shared)
        self._models = {0: model}

    @property
    def tasks(self) -> Collection[int]:
        """Tasks whose model was asked for."""
        return self._models.keys()

    def begin(
        self, task: int, undo: ExitStack, classes: int | None, count: Callable[[], int] | None
    ) -> None:
        if classes is not None:
            raise OptionError(
                f"classes: expected none with a callable as head=, which makes them, got {classes}"
            )
        self._require_made(task, undo)
        self.use(task, undo)

    def bind(self, example: Callable[[], Inputs | None], undo: ExitStack) -> None:
        pass

    def share(self, names: Collection[str], undo: ExitStack) -> None:
        undo.callback(setattr, self, "_shared", self._shared)
        self._shared = tuple(dict.fromkeys((*self._shared, *names)))
        for task, model in self._models.items():
            self._require_shared(model, task)

    def _require_made(self, task: int, undo: ExitStack) -> None:
        if task not in self._models:
            model = self._make(task)
            if not isinstance(model, nn.Module):
                raise OptionError(
                    f"head: expected a torch.nn.Module for task {task}, got {type(model).__name__}"
                )
            model = bare_model(model)
            self._require_shared(model, task)
            undo.callback(self._models.pop, task)
            self._models[task] = model

    def _require_shared(self, model: nn.Module, task: int) -> None:
        for name in self._shared:
            try:
                same = submodule(model, name) is submodule(self._models[0], name)
            except AttributeError:
                same = False
            if not same:
                raise ModelChangedError(
                    f"layer {name!r}: expected the very module that the first task's model has, "
                    f"in the model of task {task} under the same name, got another or none"
                )

    def use(self, task: int, undo: ExitStack) -> None:
        undo.callback(setattr, self, "model", self.model)
        self.model = self._models[task]

    def state_dict(self) -> dict[str, Any]:
        used = next(task for task, model in self._models.items() if model is self.model)
        models = {task: model.state_dict() for task, model in self._models.items()}
        return {"kind": self.kind, "used": used, "models": models}

    def reshape(self, state: Mapping[str, Any], undo: ExitStack) -> None:
        undo.callback(setattr, self, "_models", self._models)
        self._models = {task: m for task, m in self._models.items() if task in state["models"]}
        for task, tensors in state["models"].items():
            self._require_made(task, undo)
            require_same_tensors(self._models[task], tensors)
        self.use(state["used"], undo)

    def load_tensors(self, state: Mapping[str, Any]) -> None:
        for task, tensors in state["models"].items():
            self._models[task].load_state_dict(tensors)


# --- output layers -------------------------------------------------------------------------------


def found_output_layer(model: nn.Module, example: Inputs | None) -> str:
    """Find the Linear whose output is the model's."""
    with as_found(model):
        model.eval()
        return find_output_layer(model, example=example)


def output_linear(model: nn.Module, name: str) -> nn.Linear:
    """Return the output layer of this name.

    Raises
    ------
    UnknownLayerError
        There is none.
    UnsupportedLayerError
        It is no plain Linear, or not one that can be replaced.
    """
    try:
        layer = registered(model, name)
    except (AttributeError, KeyError):
        raise UnknownLayerError(
            f"output_layer: expected the name of a Linear inside the model, got {name!r}"
        ) from None
    if type(layer) is not nn.Linear:
        raise UnsupportedLayerError(
            f"layer {name!r}: expected a torch.nn.Linear as output layer, got "
            f"{type(layer).__name__}: a callable as head= can make other heads"
        )
    uses = [plain_name(n) for n, m in model.named_modules(remove_duplicate=False) if m is layer]
    weights = model.named_parameters(remove_duplicate=False)
    if len(uses) > 1 or sum(p is layer.weight for _, p in weights) > 1:
        raise UnsupportedLayerError(
            f"layer {name!r}: expected an output layer with a weight of its own, in one place of "
            "the model, got one that is shared"
        )
    return layer


def registered(model: nn.Module, name: str) -> nn.Module:
    """Return the module of a plain name, as its parent holds it."""
    outer, _, own_name = name.rpartition(".")
    module = submodule(model, outer)._modules[own_name]
    if module is None:
        raise KeyError(name)
    return module


def register(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one that has this plain name."""
    outer, _, own_name = name.rpartition(".")
    submodule(model, outer)._modules[own_name] = module


def new_linear(like: nn.Linear, outputs: int) -> nn.Linear:
    """Make a Linear of zeros; the user's random state stays as it is."""
    layer: nn.Linear = skip_init(  # type: ignore[no-untyped-call]
        nn.Linear,
        like.in_features,
        outputs,
        bias=like.bias is not None,
        device=like.weight.device,
        dtype=like.weight.dtype,
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer


def resize(layer: nn.Linear, outputs: int, undo: ExitStack) -> None:
    """Let a Linear have more rows, of zeros, or fewer; the module stays the same."""

    def become(outputs: int, parameters: Mapping[str, nn.Parameter]) -> None:
        layer.out_features = outputs
        for name, parameter in parameters.items():
            layer.register_parameter(name, parameter)

    def resized(parameter: nn.Parameter) -> nn.Parameter:
        values = parameter.detach().new_zeros(outputs, *parameter.shape[1:])
        kept = parameter.detach()[:outputs]
        values[: len(kept)] = kept
        return nn.Parameter(values, parameter.requires_grad)

    before = dict(layer.named_parameters(recurse=False))
    undo.callback(become, layer.out_features, before)
    become(outputs, {name: resized(parameter) for name, parameter in before.items()})


def require_same_tensors(
    module: nn.Module, state: Mapping[str, Tensor], place: str = "this model"
) -> None:
    """Refuse a module's state before anything is written of it."""
    own = module.state_dict()
    names = own.keys() ^ state.keys()
    if names:
        raise IncompatibleError(
            f"state: expected the tensors of {place}, got others: {', '.join(sorted(names))}"
        )
    for name, tensor in own.items():
        if _shape(tensor) != _shape(state[name]):
            raise IncompatibleError(
                f"state: expected {name!r} of {place} of shape {_shape(tensor)}, got "
                f"{_shape(state[name])}"
            )


def _shape(value: object) -> tuple[int, ...] | None:
    """Shape of a tensor; None for a module's extra state, which may be anything."""
    return tuple(value.shape) if isinstance(value, Tensor) else None
