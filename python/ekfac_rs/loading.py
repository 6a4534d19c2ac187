"""The one checked way from a user's loader to what a model is called with.

Every call that takes a loader reads it through `Loader`, so that they all accept the same
mini-batches and refuse the same ones with the same words.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ekfac_rs._tensors import moved
from ekfac_rs.errors import (
    BatchNormError,
    DtypeError,
    EkfacError,
    EmptyLoaderError,
    LabelError,
    OptionError,
    UnsupportedLossError,
)

# What a user may give as a loader.
Source = Iterable[Any] | Callable[[], Iterable[Any]]

# Of a mapping's targets: that of transformers' data sets.
_TARGETS = "labels"

# What torch says of inputs in a dtype that a layer cannot work with.
_DTYPE_COMPLAINT = re.compile(
    r"same dtype|share same datatype|scalar type|type .* should be the same|"
    r"not implemented for '|can't be cast"
)


@dataclass(frozen=True)
class Inputs:
    """What a model is called with.

    Attributes
    ----------
    args : tuple
    kwargs : dict of str to Any
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, value: Any) -> "Inputs":
        """Arguments as a user gives them.

        A mapping holds keyword arguments, a tuple or list positional ones; anything else is the
        model's only argument.
        """
        if isinstance(value, Inputs):
            return value
        if isinstance(value, Mapping):
            return cls((), dict(value))
        # Not a named tuple, which is a value of its own, as a PackedSequence.
        return cls(tuple(value) if type(value) in (tuple, list) else (value,), {})

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, those inside of lists and dictionaries included."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def examples(self) -> int:
        """Number of examples: the length of the first tensor."""
        for tensor in self.tensors():
            if tensor.dim():
                return len(tensor)
        kinds = ", ".join(type(leaf).__name__ for leaf in tree_leaves((self.args, self.kwargs)))
        raise LabelError(
            f"loader: expected inputs with a tensor that has examples on axis 0, got {kinds}"
        )

    def first(self, count: int) -> "Inputs":
        """Return at most the first ``count`` examples: every tensor with examples on axis 0 cut."""
        examples = self.examples
        if examples <= count:
            return self
        return self._mapped(
            lambda tensor: tensor[:count] if tensor.dim() and len(tensor) == examples else tensor
        )

    def to(self, device: torch.device) -> "Inputs":
        """Return the arguments with all tensors on a device."""
        return self._mapped(lambda tensor: moved(tensor, device))

    def clone(self) -> "Inputs":
        """Return the arguments with tensors of their own."""
        return self._mapped(torch.clone)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        return Inputs(*tree_map_only(Tensor, function, (self.args, self.kwargs)))

    def call(self, model: nn.Module) -> Any:
        """Call the model.

        Raises
        ------
        DtypeError
            A layer cannot work with the inputs' dtype.
        BatchNormError
            A BatchNorm in train mode got a single value a channel.
        """
        try:
            return model(*self.args, **self.kwargs)
        except EkfacError:
            raise
        except RuntimeError as error:
            if not _DTYPE_COMPLAINT.search(str(error)):
                raise
            raise DtypeError(
                f"model: expected inputs that its parameters of {_dtypes(model.parameters())} "
                f"can be applied to, got {_dtypes(self.tensors())} ({error})"
            ) from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise BatchNormError(
                f"model: expected at least 2 values a channel for a BatchNorm in train mode, got a "
                f"mini-batch of {self.examples} (drop_last=True leaves out a short last "
                f"mini-batch): {error}"
            ) from error


@dataclass(frozen=True)
class Batch:
    """A mini-batch.

    Attributes
    ----------
    inputs : Inputs
    targets : Tensor
        Of each example, or of each location of each example, one after another.
    examples : int
        N, counted in the inputs.
    """

    inputs: Inputs
    targets: Tensor
    examples: int

    def first(self, count: int) -> "Batch":
        """Return at most the first ``count`` examples."""
        if self.examples <= count:
            return self
        targets = self.targets[: count * (len(self.targets) // self.examples)]
        return Batch(self.inputs.first(count), targets, count)

    def to(self, device: torch.device) -> "Batch":
        """Return the mini-batch on a device."""
        return Batch(self.inputs.to(device), moved(self.targets, device), self.examples)


class Loader:
    """A user's loader, read in one checked way.

    A mini-batch is a pair ``(x, y)``, where x may be a tuple or a mapping of the model's
    arguments, or a mapping of the model's keyword arguments with the targets under "labels".
    Others need functions that tell what is what. Mini-batches without examples are passed over.

    Parameters
    ----------
    source : iterable, or a function that returns one
        Yields mini-batches; examples are on axis 0.
    device : torch.device
        Where tensors are taken to.
    input_fn : callable, optional
        From a mini-batch to what the model is called with: a tuple of arguments, a mapping of
        keyword arguments, or its only argument.
    target_fn : callable, optional
        From a mini-batch to its targets.

    Raises
    ------
    OptionError
        The source is no iterable, or an iterator that is to be gone through twice.
    EmptyLoaderError
        A pass finds no examples.
    LabelError
        A mini-batch, its inputs or its targets are not of the kind or number expected.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        *,
        input_fn: Callable[[Any], Any] | None = None,
        target_fn: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self._source = source
        self._device = device
        self._input_fn = input_fn
        self._target_fn = target_fn
        if isinstance(source, Tensor):
            raise OptionError(
                f"loader: expected an iterable of mini-batches, got a tensor of shape "
                f"{tuple(source.shape)}: a list with it is one"
            )
        # A pass whose first mini-batch was looked at already.
        self._begun: Iterator[Any] | None = None
        self._ended = False

    def __iter__(self) -> Iterator[Any]:
        """One pass over the mini-batches as the user's loader yields them."""
        begun, self._begun = self._begun, None
        return self._new_pass() if begun is None else begun

    def batches(
        self, max_examples: int | None = None, *, at_least_two: bool = False
    ) -> Iterator[Batch]:
        """One pass over mini-batches with their targets.

        Parameters
        ----------
        max_examples : int, optional
            Stop after this many.
        at_least_two : bool
            Leave out a last example that the limit would make a mini-batch of its own, which no
            BatchNorm could take.
        """
        read = (self._batch(raw) for raw in self)
        return _on_device(read, self._device, max_examples, at_least_two)

    def inputs(self, max_examples: int | None = None) -> Iterator[Inputs]:
        """One pass over the inputs alone: mini-batches may come without targets."""
        read = (self._inputs(raw) for raw in self)
        return _on_device(read, self._device, max_examples, at_least_two=False)

    def example(self, *, with_targets: bool = True) -> Inputs:
        """Look at two examples: they show a model's data flow as well as a mini-batch does.

        The mini-batch looked at is not lost: the next pass begins with it.

        Parameters
        ----------
        with_targets : bool
            Whether mini-batches must have targets.
        """
        iterator = iter(self)
        for raw in iterator:
            inputs = self._batch(raw).inputs if with_targets else self._inputs(raw)
            if inputs.examples:
                self._begun = chain([raw], iterator)
                return inputs.first(2).to(self._device).clone()
        raise _empty()

    def mini_batches(self) -> int:
        """Return how many a pass has; where there is no length, a pass counts them."""
        try:
            return len(self._source)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return sum(1 for _ in self)

    @property
    def has_length(self) -> bool:
        """Whether the number of mini-batches is known beforehand."""
        try:
            return len(self._source) >= 0  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return False

    def generators(self) -> list[torch.Generator]:
        """Return those that the order of mini-batches may be drawn from, but for torch's own."""
        source = self._source
        if isinstance(source, Loader):
            return source.generators()
        batch_sampler = getattr(source, "batch_sampler", None)
        samplers = getattr(source, "sampler", None), getattr(batch_sampler, "sampler", None)
        found = [getattr(x, "generator", None) for x in (source, batch_sampler, *samplers)]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def require_passes(self, passes: int, what_for: str) -> None:
        """Raise `OptionError` if the loader ends before it was gone through so many times."""
        if isinstance(self._source, Loader):
            self._source.require_passes(passes, what_for)
        if passes > 1 and isinstance(self._source, Iterator):
            raise OptionError(
                f"loader: expected one that can be gone through {passes} times for {what_for}, "
                f"got an iterator ({type(self._source).__name__}), which ends after the first; a "
                "function that makes iterators is a loader, too"
            )

    def _new_pass(self) -> Iterator[Any]:
        source = self._source
        if self._ended:
            self.require_passes(2, "this call")
        self._ended = True
        if not isinstance(source, Iterable) and callable(source):
            source = source()
        try:
            return iter(source)
        except TypeError:
            raise OptionError(
                f"loader: expected an iterable of mini-batches, got {type(source).__name__}"
            ) from None

    def _batch(self, raw: Any) -> Batch:
        targets, inputs = self._targets(raw), self._inputs(raw)
        examples, rows = inputs.examples, len(targets) if targets.dim() else 1
        # Several locations of an example may have a row each.
        if rows != examples and (examples == 0 or rows % examples or rows == 0):
            raise LabelError(f"loader: expected as many targets as inputs, got {rows}, {examples}")
        return Batch(inputs, targets, examples)

    def _inputs(self, raw: Any) -> Inputs:
        if self._input_fn is not None:
            return Inputs.of(self._input_fn(raw))
        if isinstance(raw, Mapping):
            return Inputs.of({name: value for name, value in raw.items() if name != _TARGETS})
        if not isinstance(raw, tuple | list):
            return Inputs.of(raw)
        if not 1 <= len(raw) <= 2:
            raise _not_a_pair(raw)
        return Inputs.of(raw[0])

    def _targets(self, raw: Any) -> Tensor:
        if self._target_fn is not None:
            targets = self._target_fn(raw)
        elif isinstance(raw, Mapping):
            if _TARGETS not in raw:
                raise LabelError(
                    f"loader: expected targets under {_TARGETS!r}, got a mapping of {list(raw)}; "
                    "target_fn= can tell where they are"
                )
            targets = raw[_TARGETS]
        elif isinstance(raw, tuple | list) and len(raw) == 2:
            targets = raw[1]
        else:
            raise _not_a_pair(raw)
        if not isinstance(targets, Tensor):
            raise LabelError(f"loader: expected a tensor of targets, got {type(targets).__name__}")
        return targets


def outputs_of(
    model: nn.Module, inputs: Inputs, output_fn: Callable[[Any], Tensor] | None
) -> Tensor:
    """Call a model and return what the loss is taken of.

    Parameters
    ----------
    model : torch.nn.Module
    inputs : Inputs
    output_fn : callable or None
        From what the model returns to its outputs.

    Raises
    ------
    UnsupportedLossError
        It is not one tensor.
    DtypeError, BatchNormError
        See `Inputs.call`.
    """
    outputs = inputs.call(model)
    if output_fn is not None:
        outputs = output_fn(outputs)
    if not isinstance(outputs, Tensor):
        raise UnsupportedLossError(
            f"model: expected one output tensor, got {type(outputs).__name__}; output_fn= can "
            "pick it, as in output_fn=lambda outputs: outputs.logits"
        )
    return outputs


_Read = TypeVar("_Read", Inputs, Batch)


def _on_device(
    read: Iterable[_Read], device: torch.device, max_examples: int | None, at_least_two: bool
) -> Iterator[_Read]:
    seen = 0
    for part in read:
        if part.examples == 0:
            continue
        if max_examples is not None:
            left = max_examples - seen
            if at_least_two and seen and left == 1 < part.examples:
                return
            part = part.first(left)
        seen += part.examples
        yield part.to(device)
        if seen == max_examples:
            return
    if not seen:
        raise _empty()


def _empty() -> EmptyLoaderError:
    return EmptyLoaderError("loader: expected at least one batch of examples, got none")


def _not_a_pair(raw: Any) -> LabelError:
    got = type(raw).__name__
    if isinstance(raw, tuple | list):
        got = f"a {got} of {len(raw)}"
    return LabelError(
        f"loader: expected pairs (x, y) or mappings, got {got}; input_fn= and target_fn= can tell "
        "inputs from targets"
    )


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
