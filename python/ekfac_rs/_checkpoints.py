"""Checkpoints: files from which long work goes on as if it had not been interrupted.

States as files, random states, and the place in a pass over a loader.
"""

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ekfac_rs import _files
from ekfac_rs.errors import FileFormatError, IncompatibleError, OptionError
from ekfac_rs.loading import Batch, Inputs

# 2: a task may be learnt in several tries, and a pass over a loader has a checkpoint of its own.
_FORMAT = 2


def write_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write nested states, those of torch's own `state_dict` among them.

    Parameters
    ----------
    path : str or os.PathLike
    content : mapping of str
        Of mappings, sequences, tensors, numbers, words and None.

    Raises
    ------
    OptionError
        Something else is among them.
    OSError
        The file cannot be written; the one that was there stays.
    """
    tensors: dict[str, Tensor] = {}
    flat = _flat(content, "checkpoint", tensors)
    # Whoever writes a file is the only one that does.
    _files.remove_partial(path)
    _files.write(path, tensors, {"content": flat}, _FORMAT)


def read_checkpoint(
    path: str | os.PathLike[str], device: torch.device | str, what: str
) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote.

    Parameters
    ----------
    path : str or os.PathLike
    device : torch.device or str
    what : str
        The file is expected to be, for errors.

    Raises
    ------
    FileFormatError
        The file is truncated, corrupted, of a newer format or no checkpoint.
    FileNotFoundError
        There is no such file.
    """
    tensors, metadata = _files.read(path, device, range(1, _FORMAT + 1), what)
    try:
        content = _nested(metadata["content"], tensors)
    except (KeyError, ValueError, TypeError) as error:
        raise FileFormatError(f"{path}: expected {what}, got: {error!r}") from error
    if not isinstance(content, dict):
        raise FileFormatError(f"{path}: expected {what}, got a {type(content).__name__}")
    return content


# JSON has no tensors, tuples or keys that are not words: each of these is a mapping of one entry.
_TENSOR, _TUPLE, _ITEMS, _INPUTS = "tensor", "tuple", "items", "inputs"


def _flat(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value in JSON's own types, its tensors put aside."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value
        return {_TENSOR: key}
    if isinstance(value, Inputs):
        return {_INPUTS: _flat((value.args, value.kwargs), place, tensors)}
    if isinstance(value, Mapping):
        items = [
            [_flat(key, place, tensors), _flat(item, f"{place}[{key!r}]", tensors)]
            for key, item in value.items()
        ]
        return {_ITEMS: items}
    if isinstance(value, list | tuple):
        values = [_flat(item, f"{place}[{k}]", tensors) for k, item in enumerate(value)]
        return values if isinstance(value, list) else {_TUPLE: values}
    raise OptionError(
        f"{place}: expected tensors, numbers, words, and lists and mappings of them, which a "
        f"checkpoint can hold, got a {type(value).__name__}"
    )


def _nested(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `_flat` was given."""
    if isinstance(value, list):
        return [_nested(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == _TENSOR:
        # In memory of its own: a file's begins anywhere, and sums over it may round otherwise.
        return tensors[inner].clone()
    if kind == _TUPLE:
        return tuple(_nested(item, tensors) for item in inner)
    if kind == _INPUTS:
        return Inputs(*_nested(inner, tensors))
    if kind == _ITEMS:
        return {_nested(key, tensors): _nested(item, tensors) for key, item in inner}
    raise ValueError(f"unknown kind of value {kind!r}")


# --- random states -------------------------------------------------------------------------------


def random_states(generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, and of these."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": on_gpus,
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_states(states: Mapping[str, Any], generators: Sequence[torch.Generator]) -> None:
    """Put generators back into the states that `random_states` returned.

    Raises
    ------
    IncompatibleError
        There were more of them, or fewer.
    """
    require_generators(states, generators)
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"]:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    for generator, state in zip(generators, states["generators"], strict=True):
        generator.set_state(state.cpu())


def require_generators(states: Mapping[str, Any], generators: Sequence[torch.Generator]) -> None:
    """Raise `IncompatibleError` unless there are as many generators as when states were taken."""
    if len(states["generators"]) != len(generators):
        raise IncompatibleError(
            f"generator: expected {len(states['generators'])}, given and of the loader, got "
            f"{len(generators)}"
        )


@contextmanager
def rewound_on_failure(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Put the process's generators, and these, back if anything inside fails."""
    found = random_states(generators)
    try:
        yield
    except BaseException:
        set_random_states(found, generators)
        raise


# --- the place in a loader ------------------------------------------------------------------------


def pass_over(
    batches: Iterable[Batch], count: int, is_last: Callable[[Batch], bool], call: str
) -> None:
    """Go through what an interrupted pass has seen of a loader.

    Parameters
    ----------
    batches : iterable of Batch
        No more than ``count``.
    count : int
        That were seen.
    is_last : callable
        Whether a mini-batch is the last one of them.
    call : str
        That was interrupted, for errors.

    Raises
    ------
    IncompatibleError
        It is not there, or another one.
    """
    seen, last = 0, None
    for batch in batches:
        seen, last = seen + 1, batch
    if seen == count and (last is None or is_last(last)):
        return
    got = "another one" if seen == count else f"{seen} in all"
    raise IncompatibleError(
        f"{call}: expected the loader to yield mini-batch {count} of the pass that was interrupted "
        f"again, got {got}: its order has to follow from random states"
    )


def fingerprint(batch: Batch) -> str:
    """Return what tells a mini-batch from others, all of its inputs and targets."""
    tensors = [*batch.inputs.tensors(), batch.targets]
    return _files.fingerprint({str(place): tensor for place, tensor in enumerate(tensors)})
