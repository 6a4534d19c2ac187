"""Passes that can be interrupted: where they are written down, and where they go on."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ekfac_rs._checkpoints import (
    fingerprint,
    pass_over,
    random_states,
    read_checkpoint,
    require_generators,
    set_random_states,
    write_checkpoint,
)
from ekfac_rs._checks import require_count
from ekfac_rs._files import fingerprint as fingerprint_of_tensors
from ekfac_rs._files import require_folder
from ekfac_rs._modes import plain_name, torch_precision
from ekfac_rs.curvature.curvature import Curvature
from ekfac_rs.curvature.settings import PassSettings
from ekfac_rs.errors import EkfacError, FileFormatError, IncompatibleError
from ekfac_rs.loading import Batch, Loader

_WHAT = "a checkpoint of estimate_curvature"
_WEIGHTS = "weights"

State = Mapping[str, Any]


def call_of(
    model: nn.Module, settings: PassSettings, source: Loader, **arguments: object
) -> dict[str, Any]:
    """Return what passes depend on and what tells it from others, in words, numbers and digests."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = {
        plain_name(name): fingerprint_of_tensors({"": tensor})
        for name, tensor in tensors.items()
        # Counters have no part in it.
        if tensor.is_floating_point() or isinstance(tensor, nn.Parameter)
    }
    devices = sorted({str(tensor.device.type) for tensor in tensors.values()})
    on_gpu = "cuda" in devices
    return {
        **asdict(settings),
        **arguments,
        "device": devices,
        "tf32 in torch": [torch_precision(of_convolutions=x) for x in (False, True) if on_gpu],
        "mini-batches of the loader": source.mini_batches() if source.has_length else None,
        _WEIGHTS: weights,
    }


class Recovery:
    """How far the passes of one call have come; a file of it, if there is to be one.

    Parameters
    ----------
    path : str or os.PathLike, optional
        Of a checkpoint, to go on from where it is there. None: nothing is written.
    every : int
        Mini-batches between two.
    call : callable
        Returns what the passes depend on (`call_of`).
    generators : sequence of torch.Generator
        Drawn from, beside those of the process.
    device : torch.device
        Of the sums.

    Attributes
    ----------
    index : int
        Of the pass to begin, or to go on with: 0 is the one that makes a curvature, others correct
        it.
    curvature : Curvature or None
        What the passes before it have made.
    is_over : bool
        Whether that is all.

    Raises
    ------
    FileFormatError
        The file is truncated, corrupted, of a newer format or no such checkpoint.
    FileNotFoundError
        There is no directory for it.
    IncompatibleError
        It is of other passes that were interrupted.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        every: int,
        call: Callable[[], dict[str, Any]],
        generators: Sequence[torch.Generator],
        device: torch.device,
    ) -> None:
        require_count("every", every)
        self._path, self._every, self._generators = path, every, generators
        self.index, self.is_over = 0, False
        self.curvature: Curvature | None = None
        # Of the present pass.
        self._batches = 0
        self._first: str | None = None
        self._last: Batch | None = None
        self._random_before: dict[str, Any] = {}
        # What the file says of a pass, until that goes on.
        self._found: dict[str, Any] | None = None
        if path is None:
            return
        require_folder(path)
        self._call = call()
        if Path(path).exists():
            self._read(path, device)

    def _read(self, path: str | os.PathLike[str], device: torch.device) -> None:
        content = read_checkpoint(path, device, _WHAT)
        try:
            call, found = dict(content["call"]), dict(content["pass"])
            index, is_over, made = found["index"], found["over"], found["curvature"]
            curvature = None if made is None else Curvature.from_tensors(*made)
        except (KeyError, TypeError, ValueError, AttributeError, EkfacError) as error:
            raise FileFormatError(f"{path}: expected {_WHAT}, got {error!r}") from error
        other = self._difference(call)
        if other is None:
            require_generators(found["random"], self._generators)
            self._found, self.index, self.curvature, self.is_over = found, index, curvature, is_over
        elif not is_over:
            raise IncompatibleError(
                f"{other}: with the same model and arguments it goes on, another call takes "
                f"another file, or {path} is deleted"
            )

    def _difference(self, theirs: State) -> str | None:
        """Say what differs between this call and that of the file."""
        ours = self._call
        for name in ours[_WEIGHTS].keys() | theirs[_WEIGHTS].keys():
            if ours[_WEIGHTS].get(name) != theirs[_WEIGHTS].get(name):
                layer, _, tensor = name.rpartition(".")
                return (
                    f"layer {layer!r}: expected the {tensor} of the pass in {self._path} that was "
                    "interrupted, got another one"
                )
        for name, value in ours.items():
            if value != theirs.get(name):
                return (
                    f"{name}: expected {theirs.get(name)!r}, of the pass in {self._path} that was "
                    f"interrupted, got {value!r}"
                )
        return None

    def prepare(self) -> None:
        """Put random states where they were before the pass; called before the loader is."""
        if self._found is not None:
            set_random_states(self._found["random_before"], self._generators)
        self._begin()

    def begin(self, index: int, curvature: Curvature, state: Callable[[], State]) -> None:
        """Begin a pass that corrects a curvature, and write that down; called before the loader."""
        self.index, self.curvature = index, curvature
        self._begin()
        self._write(state)

    def _begin(self) -> None:
        if self._path is not None:
            self._batches, self._first, self._last = 0, None, None
            self._random_before = random_states(self._generators)

    def go_on(self, batches: Iterator[Batch], load: Callable[[State], None]) -> None:
        """Take up the pass that was interrupted, if one was: pass over what it has seen.

        Raises
        ------
        IncompatibleError
            The loader yields other mini-batches.
        FileFormatError
            The file's state is not one of these passes.
        """
        if self._found is None:
            return
        found, self._found = self._found, None
        seen: int = found["batches"]
        last = found["last"]
        pass_over(
            islice(batches, seen),
            seen,
            lambda batch: fingerprint(batch) == last,
            "estimate_curvature",
        )
        if seen:  # or the pass has only begun, as it did before
            set_random_states(found["random"], self._generators)
        try:
            load(found["state"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FileFormatError(f"{self._path}: expected {_WHAT}, got {error!r}") from error
        self._batches, self._first = seen, found["first"]

    def watched(self, batches: Iterable[Batch], state: Callable[[], State]) -> Iterator[Batch]:
        """Yield mini-batches; write the state down when one is done with and it is time to."""
        for batch in batches:
            yield batch
            if self._path is None:
                continue
            self._batches, self._last = self._batches + 1, batch
            self._first = self._first or fingerprint(batch)
            if self._batches % self._every == 0:
                self._write(state)

    def end(self, curvature: Curvature) -> None:
        """Write down that all passes are over."""
        # What is left to tell another loader by is how it begins.
        self.curvature, self.is_over, self._batches = curvature, True, 1
        self._write(dict)

    def _write(self, state: Callable[[], State]) -> None:
        if self._path is None:
            return
        made, last = self.curvature, None
        if self._batches:
            last = self._first if self.is_over or self._last is None else fingerprint(self._last)
        random = random_states(self._generators)
        this = {
            "index": self.index,
            "over": self.is_over,
            "curvature": None if made is None else (made.tensors(), made.metadata()),
            "batches": self._batches,
            "first": self._first,
            "last": last,
            # Between two passes there is nothing to pass over.
            "random_before": self._random_before if self._batches else random,
            "random": random,
            "state": state(),
        }
        write_checkpoint(self._path, {"call": self._call, "pass": this})
