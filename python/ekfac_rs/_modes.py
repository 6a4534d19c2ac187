"""What a caller may have switched on around us, or wrapped around a model."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ekfac_rs.errors import UnsupportedLayerError

# Where `torch.compile` keeps the module that it wraps.
_COMPILED = "_orig_mod"

# By name: importing them all would take longer than everything else here.
_DISTRIBUTED = "DistributedDataParallel"
_PARALLEL = {"DataParallel", _DISTRIBUTED, "FullyShardedDataParallel", "FSDPModule"}


@contextmanager
def own_modes() -> Iterator[None]:
    """Gradients on, inference mode off, compiled modules run eagerly: those compute unobserved.

    Under autocast weights are rounded anew in every pass. Torch keeps rounded ones until the
    caller's autocast ends, past every step that changes them, and from passes without gradients.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.callback(torch.clear_autocast_cache)
        modes.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        if "torch._dynamo" in sys.modules:  # or nothing can have been compiled
            modes.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def without_autocast(device: torch.device) -> torch.autocast:
    """Return a context in which nothing is rounded but by the model itself."""
    return torch.autocast(device.type, enabled=False)


def torch_precision(*, of_convolutions: bool) -> str:
    """To what torch rounds float32 operands on a GPU, of its products or its convolutions."""
    backends = torch.backends
    backend = getattr(backends.cudnn, "conv", None) if of_convolutions else backends.cuda.matmul
    chosen = getattr(backend, "fp32_precision", None)
    if chosen is None:  # before torch 2.9
        old = backends.cudnn if of_convolutions else backends.cuda.matmul
        chosen = "tf32" if old.allow_tf32 else "ieee"
    return "tf32" if chosen == "tf32" else "ieee"


def bare_model(model: nn.Module) -> nn.Module:
    """Return the network that `torch.compile` or DistributedDataParallel may have wrapped.

    Of the latter's hooks, which exchange gradients, a pass of the network itself knows nothing.

    Raises
    ------
    UnsupportedLayerError
        Its parameters are elsewhere (another parallel wrapper), or autograd cannot follow them.
    """
    model = _unwrapped(model)
    while _is_distributed(model):
        model = _unwrapped(model.get_submodule("module"))
    for name, module in model.named_modules():
        wrappers = _PARALLEL & _names_of_kinds(module)
        if wrappers:
            place = f"module {name!r}" if name else "model"
            raise UnsupportedLayerError(
                f"{place}: expected a network with parameters of its own, whole and on one "
                f"device, got a {wrappers.pop()}: pass the one inside (its .module)"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # A lazy one has no memory yet, and is refused as such.
        if not is_lazy(tensor) and tensor.is_inference():
            raise UnsupportedLayerError(
                f"model: expected tensors that autograd can follow, got {plain_name(name)!r} made "
                "under torch.inference_mode(): make the model, or copy it, outside"
            )
    return model


def distributed_wrapper(model: nn.Module) -> Any:
    """Return the DistributedDataParallel around a network, or None."""
    model = _unwrapped(model)
    return model if _is_distributed(model) else None


def plain_name(name: str) -> str:
    """Name of a module or parameter without what `torch.compile` has put into it."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Return the module of a plain name.

    Raises
    ------
    AttributeError
        There is none.
    """
    return _unwrapped(model.get_submodule(name))


def _unwrapped(module: nn.Module) -> nn.Module:
    while _COMPILED in module._modules:
        module = module.get_submodule(_COMPILED)
    return module


def _is_distributed(module: nn.Module) -> bool:
    return _DISTRIBUTED in _names_of_kinds(module)


def _names_of_kinds(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}
