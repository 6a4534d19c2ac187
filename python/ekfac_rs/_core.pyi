"""The Rust core. Tensors cross as borrowed descriptors, never as copies."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

__all__ = [
    "Factor",
    "KroneckerInverse",
    "KroneckerOperator",
    "KroneckerRoot",
    "Layer",
    "Note",
    "Product",
    "Tensor",
    "Term",
    "accumulate_gram",
    "accumulate_patch_gram",
    "apply_operators",
    "batch_moments",
    "build_info",
    "compile_cuda_kernels",
    "conjugate_gradients",
    "cuda_info",
    "cuda_kernels",
    "eigh",
    "error_classes",
    "kronecker_compress",
    "kronecker_dense",
    "kronecker_diagonal",
    "kronecker_inner",
    "kronecker_product",
    "kronecker_quadratic",
    "kronecker_top_eigenvalue",
    "kronecker_trace",
    "merge",
    "merge_backward",
    "moments_backward",
    "num_threads",
    "set_cuda_allocator",
    "set_num_threads",
    "strata",
    "symmetrize",
]

# (data pointer, shape, strides in elements, dtype, device, stream, owner): dtype is "float32",
# "float64", "float16" or "bfloat16"; device is "cpu" or "cuda:<index>"; stream is 0 on the CPU.
# The owner is the tensor itself, which a descriptor so keeps alive; the caller leaves it unchanged
# during the call.
Tensor: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...], str, str, int, object]
# (A [K, K], G [D, D]), both symmetric, in full storage; or stacks of them, (A [groups, K, K],
# G [groups, D / groups, D / groups]): each group of consecutive rows of V, [D, K], has its own.
Term: TypeAlias = tuple[Tensor, Tensor]
# A symmetric matrix and None; or a root [n, r] and what is on the diagonal beside.
Factor: TypeAlias = tuple[Tensor, float | None]
# (a word of eight bytes on the device of the units, described as float64; the number that stands
# for the mini-batch's first example).
Note: TypeAlias = tuple[Tensor, int]

def build_info() -> dict[str, str]:
    """Tell what the core of this build is.

    Returns
    -------
    dict
        "version"; "profile", which is "release" or "debug"; "simd", the instruction set that it
        uses on this machine; "threads", whose share its work: those of the "OpenMP" run-time that
        torch has loaded, or its "own" where there is none and in forked children.
    """

def error_classes() -> list[str]:
    """Return the class of each kind of error of the core: of `ekfac_rs.errors`, or Python's own."""

def set_num_threads(threads: int) -> None:
    """Set the number of threads that the core uses from the next call on.

    Parameters
    ----------
    threads : int
        At least 1. What torch uses for its own work stays (`torch.set_num_threads`).

    Raises
    ------
    OptionError
        It is below 1.
    """

def num_threads() -> int:
    """Return the number of threads that the core uses.

    Returns
    -------
    int
        What was set last; until then torch's number (`torch.get_num_threads`), or, where torch has
        no OpenMP, that of the processors that the process may use.
    """

def cuda_info() -> dict[str, Any]:
    """See `ekfac_rs.cuda_info`."""

def set_cuda_allocator(
    allocate: Callable[[int, int, int], int], release: Callable[[int], None]
) -> None:
    """Set where device memory comes from.

    ``allocate(bytes, device, stream)`` returns an address and ``release(address)`` takes it back;
    what is released may be handed out at once to later work on the same stream. A `MemoryError` or
    `torch.OutOfMemoryError` of the former becomes an `OutOfMemoryError`, a `KeyboardInterrupt`
    stays one, and anything else becomes a `CudaError`.
    """

def cuda_kernels() -> list[str]: ...
def compile_cuda_kernels(element: str, real: str, architecture: str) -> bytes:
    """Compile all kernels that read dtype ``element`` and compute in ``real`` ("float32" or
    "float64"), for an architecture such as "sm_90"; needs NVRTC, but no device.
    """

def strata() -> dict[str, list[str]]: ...
def accumulate_gram(
    x: Tensor,
    out: Sequence[Tensor],
    approximation: str,
    role: str,
    append_one: bool,
    scale: float,
    precision: str,
    note: Note | None = None,
) -> list[int]:
    """Add ``scale * N * F_k`` of a mini-batch to the lower triangle of ``out[k]``, per stratum k.

    ``x`` is ``[N, K]`` or ``[N, T, K]``; ``role`` is "input" or "gradient"; ``append_one`` (inputs
    only) appends a constant 1 to every unit. Outputs are ``[K', K']`` with K' = K or K + 1, of the
    dtype of ``x``, or float32 for half precision. Outputs ``[groups, K', K']`` split the features
    into consecutive blocks with a factor each: K' is then K / groups, or one more. The output of
    the stratum "mean", whose factor has rank one, may be a row ``[K']`` or ``[groups, K']``: its
    root is added then, the row whose square is ``scale * N * F_k``. ``precision`` of float32
    products on a GPU is "ieee", "tf32" or "bf16". Returns the strata's degrees of freedom.

    NaN or infinity in ``x`` is an error, before any output changes. With a ``note``, which is for
    GPUs, nobody waits to hear of it: the number of the first such example, counted from the number
    in the note, lowers the word there (eight bytes, to be all ones before), and the outputs are
    good for nothing.
    """

def accumulate_patch_gram(
    x: Tensor,
    out: Sequence[Tensor],
    approximation: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[tuple[int, int]],
    append_one: bool,
    scale: float,
    precision: str,
    note: Note | None = None,
) -> list[int]:
    """As `accumulate_gram` for the inputs of a convolution, without unfolding them.

    ``x`` is ``[N, C, *spatial]`` in any memory layout, with 1 to 3 spatial dimensions; the geometry
    has one entry per spatial dimension, ``padding`` (before, after) with zeros, which are data.
    Units are output locations; features are ordered as ``weight.flatten(1)``. Outputs are
    ``[K', K']`` with K' = C times the kernel positions (or one more), or ``[groups, K', K']`` for
    consecutive blocks of ``C / groups`` channels.
    """

def symmetrize(x: Tensor, divisor: float) -> None:
    """Divide the lower triangle of a matrix and copy it to the upper; of each one of a stack."""

def eigh(x: Tensor, values: Tensor, vectors: Tensor) -> None:
    """Decompose a symmetric matrix ``[n, n]``, or every one of a stack ``[groups, n, n]``.

    Writes ascending eigenvalues (``[n]`` or ``[groups, n]``) and eigenvectors in columns.
    """

def kronecker_product(terms: Sequence[Term], v: Tensor, out: Tensor, damping: float) -> None: ...
def kronecker_quadratic(terms: Sequence[Term], v: Tensor) -> float: ...
def kronecker_inner(terms: Sequence[Term], others: Sequence[Term]) -> float: ...
def kronecker_diagonal(terms: Sequence[Term], out: Tensor) -> None: ...
def kronecker_dense(terms: Sequence[Term], out: Tensor) -> None: ...
def kronecker_trace(terms: Sequence[Term]) -> float: ...
def kronecker_top_eigenvalue(terms: Sequence[Term], damping: float) -> float: ...
def kronecker_compress(terms: Sequence[Term], out: Sequence[Term]) -> float: ...
def conjugate_gradients(
    terms: Sequence[Term],
    damping: float,
    v: Tensor,
    out: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[int, float]: ...

@final
class KroneckerInverse:
    """Exact inverse of one damped term, or of a sum of two terms."""

    def __new__(cls, terms: Sequence[Term], damping: float) -> KroneckerInverse: ...
    def solve(self, v: Tensor, out: Tensor) -> None: ...
    def logdet(self) -> float: ...
    def sample(self, noise: Tensor, out: Tensor) -> None: ...

@final
class KroneckerRoot:
    """A square root of a sum of terms: maps white noise to covariance sum_k G_k (x) A_k."""

    def __new__(cls, terms: Sequence[Term]) -> KroneckerRoot: ...
    def apply(self, noise: Tensor, out: Tensor) -> None: ...

@final
class KroneckerOperator:
    """A sum of terms packed for many products, in this precision: "ieee", or, on a GPU, "tf32".

    On the CPU, numerically rank-deficient factors are kept as thin ones.
    """

    def __new__(cls, terms: Sequence[Term], precision: str = "ieee") -> KroneckerOperator: ...
    @staticmethod
    def from_factors(
        shape: tuple[int, int],
        terms: Sequence[tuple[Factor | None, Factor | None]],
        precision: str = "ieee",
    ) -> KroneckerOperator:
        """Pack terms (A, G) of one group whose factors may be known by their roots; None: identity.

        Of each term both factors are whole, or one is a root with nothing beside.
        """

    def apply(self, v: Tensor, out: Tensor) -> None:
        """Write the product."""

    @property
    def flops(self) -> int: ...

# An operator, V [D, K], the result, the damping, and two float64 numbers [1, 2] for inner products.
Product: TypeAlias = tuple[KroneckerOperator, Tensor, Tensor, float, Tensor]

def apply_operators(products: Sequence[Product], scale: float) -> None:
    """Write ``scale * H V + damping * V`` for each of these, and ``<V, H V>`` and ``<V, V>``.

    On the CPU the threads share the products.
    """

def batch_moments(inputs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Write mean and population variance by channel of inputs [N, C, S] of one type, on the CPU."""

def moments_backward(
    x: Tensor,
    mean: Tensor,
    of_mean: Tensor | None,
    of_variance: Tensor | None,
    out: Tensor,
    keep: bool,
) -> None:
    """Write what the gradients of the moments of x [N, C, S] become in x; or add it to ``out``."""

# What merged weights are made of: weight [D, K]; bias and gamma or None, mean and variance, each
# [D]; epsilon. All without gaps.
Layer: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, float]

def merge(layers: Sequence[tuple[Layer, Tensor | None, Tensor, Tensor]]) -> None:
    """For (layer, beta, anchor, out) write merged weights [D, K + 1] less the anchor."""

def merge_backward(layers: Sequence[tuple[Layer, Tensor, Sequence[Tensor | None]]]) -> None:
    """For (layer, gradient, out) write gradients of weight, bias, gamma, beta, mean, variance."""
