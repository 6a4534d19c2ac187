"""What a kind of layer answers about itself: a new kind is a subclass of `AffineLayer`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ekfac_rs import _core
from ekfac_rs._modes import torch_precision
from ekfac_rs._tensors import borrow, is_supported
from ekfac_rs.errors import BatchNormError

COORDINATES = ("merged", "raw")

Arguments = dict[str, Any]
Function = Callable[..., Any]

# Parameters that a block may cover: those a module of any kind keeps under these names.
PARAMETERS = ("weight", "bias")

# Of gradients of single examples held at a time: 256 MB in float32.
_ELEMENTS = 1 << 26


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
    kept : mapping of str to Tensor
        The module's own tensors, as they were before it was called: others may stand in for them
        during a pass (`torch.func.functional_call`).
    """

    module: nn.Module
    function: Function
    arguments: Arguments
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def input(self) -> Any:
        """What the function is applied to."""
        return self.arguments["input"]


class Geometry(NamedTuple):
    """How a convolution's patches lie in its input; one entry for each spatial dimension.

    ``padding`` holds the zeros before and after: other padding modes reach a convolution padded.
    """

    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    padding: list[tuple[int, int]]


@dataclass(frozen=True)
class Units:
    """A layer's inputs in one mini-batch, without the appended one.

    ``values`` are the units themselves, ``[N, K]`` or ``[N, T, K]``, side by side with groups.
    """

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def part(self, examples: slice) -> Self:
        """Return the units of some of the examples."""
        return replace(self, values=self.values[examples])

    def to(self, dtype: torch.dtype) -> Self:
        """Return the units in a dtype to compute in."""
        return replace(self, values=self.values.to(dtype))

    def accumulate(
        self,
        out: Sequence[Tensor],
        approximation: str,
        append_one: bool,
        precision: str,
        note: _core.Note | None,
    ) -> list[int]:
        """Add N times the input factor of stratum k to the lower triangle of ``out[k]``.

        Returns
        -------
        list of int
            The strata's degrees of freedom.
        """
        factors = [borrow(A) for A in out]
        options = (approximation, "input", append_one, 1.0, precision, note)
        return _core.accumulate_gram(borrow(self.values), factors, *options)


_KINDS: "list[type[AffineLayer]]" = []


def kind_of(module: nn.Module) -> "type[AffineLayer] | None":
    """Class of layer that a module's parameters make up, or None."""
    return next((kind for kind in _KINDS if isinstance(module, kind.modules)), None)


def argument_names(function: Function) -> tuple[str, ...] | None:
    """Names of the positional arguments of a function that layers compute with, or None."""
    return next((kind.functions[function] for kind in _KINDS if function in kind.functions), None)


def kinds_in_words() -> str:
    """Every kind there is, as a list for messages."""
    *words, last = dict.fromkeys(kind.noun for kind in _KINDS)
    return f"{', '.join(words)} or {last}"


@dataclass(frozen=True)
class AffineLayer:
    """An affine map ``h = W a + b`` inside a model, and the BatchNorm that consumes its output.

    ``W`` is a matrix of shape (D, K). With groups it is block diagonal: consecutive blocks of
    D / groups rows, each with inputs of its own, and K counts the inputs of one block.

    A kind of layer is a subclass that names its ``modules``: it is found, paired, described,
    merged, accumulated and refused by what it answers here, and nothing else needs to know it.

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

    # --- what a kind stands for ---

    noun: ClassVar[str]
    """The kind in words, with its article."""
    modules: ClassVar[tuple[type[nn.Module], ...]]
    """Modules whose parameters make up such a layer."""
    functions: ClassVar[Mapping[Function, tuple[str, ...]]]
    """What they compute with, and the names of its positional arguments."""
    stored: ClassVar[tuple[str, ...]] = PARAMETERS
    """Arguments of the functions that are tensors kept by the module under the same names."""
    absorbs_scale: ClassVar[bool] = True
    """Whether the layer has weights that take up a BatchNorm's scale; a BatchNorm has none."""

    name: str
    module: Any
    batchnorm_name: str | None = None
    batchnorm: Any = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "modules" in vars(cls):
            _KINDS.append(cls)

    @classmethod
    def why_unsupported(cls, module: nn.Module) -> str | None:
        """Say why a module of this kind has no block, whatever is done with it, or None."""
        for name in PARAMETERS:
            parameter: Any = module._parameters.get(name)
            if parameter is None:
                if _is_computed(module, name):
                    return (
                        f"expected a {name} that is a parameter, got one computed from others "
                        "(parametrised, normed or pruned)"
                    )
            elif not is_supported(parameter.dtype):
                return f"expected a {name} of real floating-point numbers, got {parameter.dtype}"
            elif is_lazy(parameter):
                return f"expected an initialised {name}, got a lazy one that no input has shaped"
        return None

    @classmethod
    def why_refused(cls, call: AffineCall) -> str | None:
        """Say in what a call is not the one that the module's attributes promise, or None."""
        for name in PARAMETERS:
            if call.arguments.get(name) is not call.kept.get(name):
                return f"expected a call with its own parameters, got another {name} or none"
        return None

    def channel_axis(self, dimensions: int) -> int | None:
        """Axis of the outputs in a value of so many dimensions.

        None where there is no such value, or where a BatchNorm after it is not merged.
        """
        return None

    def in_words(self, coordinates: str) -> str:
        """Return the block in words, for `describe`."""
        D, K = self.shape(coordinates)
        if self.groups > 1:
            return f"Kronecker, {self.groups} groups of {D // self.groups} x {K}"
        return f"Kronecker {D} x {K}"

    # --- weights and their gradients ---

    @property
    def groups(self) -> int:
        """Number of diagonal blocks."""
        return 1

    def by_group(self, rows: Tensor) -> Tensor:
        """View something of each output as ``[groups, outputs of a group, ...]``."""
        return rows.reshape(self.groups, -1, *rows.shape[1:])

    def torch_precision(self) -> str:
        """To what torch rounds this layer's operands on a GPU: "ieee" or "tf32"."""
        return torch_precision(of_convolutions=False)

    @property
    def like(self) -> Tensor:
        """A parameter of the layer, which tells its dtype and device."""
        parameter: Tensor = next(self.module.parameters(recurse=False))
        return parameter

    def weight(self) -> Tensor:
        """``W`` of shape (D, K), without bias column, differentiable."""
        return self.as_matrix(self.module.weight)

    def as_matrix(self, stored: Tensor) -> Tensor:
        """Return what the module stores as its weight, or its gradient, as a matrix (D, K)."""
        return stored.flatten(1)

    def as_stored(self, weight: Tensor) -> Tensor:
        """Return a matrix (D, K) as the module stores it: `as_matrix` the other way round."""
        return weight.reshape(self.module.weight.shape)

    def bias(self) -> Tensor | None:
        """``b`` of shape (D,), or None."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias

    def units(self, call: AffineCall) -> Units:
        """Return the inputs of the affine map, from the call of its function."""
        raise NotImplementedError

    def gradients(self, g: Tensor) -> Tensor:
        """Gradients at the output as units, ``[N, D]`` or ``[N, T, D]``."""
        return channels_last(g)

    def gradient(self, units: Units, g: Tensor) -> Tensor:
        """Gradient ``sum_u g_u a_u^T`` of ``W`` over all units, shape (D, K)."""
        a, g = (
            x.reshape(-1, self.groups, x.shape[-1] // self.groups).movedim(1, 0)
            for x in (units.values, g)
        )
        return (g.mT @ a).flatten(0, 1)

    def example_gradients(self, units: Units, g: Tensor) -> Tensor:
        """Gradient ``sum_t g_nt a_nt^T`` of ``W`` for each example, shape (N, D, K)."""
        a, g = (
            x.reshape(len(x), -1, self.groups, x.shape[-1] // self.groups)
            for x in (units.values, g)
        )
        return torch.einsum("ntgd,ntgk->ngdk", g, a).flatten(1, 2)

    def squared_gradients(self, units: Units, g: Tensor) -> Tensor:
        """Sum over examples of the squares of `example_gradients`, shape (D, K)."""
        squares = g.new_zeros(self.weight().shape)
        # A slice of examples at a time bounds the memory their gradients take.
        share = max(1, _ELEMENTS // squares.numel())
        for start in range(0, len(g), share):
            examples = slice(start, start + share)
            gradients = self.example_gradients(units.part(examples), g[examples])
            squares += gradients.square().sum(dim=0)
        return squares

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
        gain, shift = self.merged_map(mean, variance)
        return torch.cat([gain[:, None] * self.weight(), shift[:, None]], dim=1)

    def merged_map(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and shift, each of shape (D,), of the map with its BatchNorm."""
        gain, bias = self.gain(variance), self.bias()
        shift = -gain * mean if bias is None else gain * (bias - mean)
        if self.batchnorm.bias is not None:
            shift = shift + self.batchnorm.bias
        return gain, shift

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
        modules = [self.module]
        if coordinates == "merged" and self.absorbs_scale and self.batchnorm is not None:
            modules.append(self.batchnorm)
        for module in modules:
            stored = (module._parameters.get(name) for name in PARAMETERS)
            yield from (parameter for parameter in stored if parameter is not None)


def _is_computed(module: nn.Module, name: str) -> bool:
    """Whether a module makes up an attribute of this name instead of keeping a parameter."""
    return isinstance(getattr(type(module), name, None), property) or any(
        kept.get(name) is not None for kept in (vars(module), module._buffers)
    )


def channels_last(x: Tensor) -> Tensor:
    """View ``[N, C, ...]`` as units ``[N, T, C]``; ``[N, C]`` is units already."""
    return x if x.dim() <= 2 else x.flatten(2).transpose(1, 2)


def flat_units(x: Tensor) -> Tensor:
    """View ``[N, ..., K]`` as ``[N, K]`` or ``[N, T, K]``."""
    return x if x.dim() <= 3 else x.flatten(1, -2)
