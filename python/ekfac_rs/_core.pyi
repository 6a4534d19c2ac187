"""The Rust core. Tensors cross as borrowed descriptors, never as copies."""

from collections.abc import Sequence
from typing import TypeAlias, final

__all__ = [
    "KroneckerInverse",
    "KroneckerOperator",
    "KroneckerRoot",
    "Tensor",
    "Term",
    "accumulate_gram",
    "build_info",
    "conjugate_gradients",
    "eigh",
    "kronecker_compress",
    "kronecker_dense",
    "kronecker_diagonal",
    "kronecker_inner",
    "kronecker_product",
    "kronecker_quadratic",
    "kronecker_top_eigenvalue",
    "kronecker_trace",
    "num_threads",
    "set_num_threads",
    "strata",
    "symmetrize",
]

# (data pointer, shape, strides in elements, dtype, device, stream, owner): dtype is "float32",
# "float64", "float16" or "bfloat16"; device is "cpu" or "cuda:<index>"; stream is 0 on the CPU.
# The owner is the tensor itself, which a descriptor so keeps alive; the caller leaves it unchanged
# during the call.
Tensor: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...], str, str, int, object]
Term: TypeAlias = tuple[Tensor, Tensor]  # (A [K, K], G [D, D]), both symmetric, full storage

def build_info() -> dict[str, str]: ...
def set_num_threads(threads: int) -> None: ...
def num_threads() -> int: ...
def strata() -> dict[str, list[str]]: ...
def accumulate_gram(
    x: Tensor,
    out: Sequence[Tensor],
    approximation: str,
    role: str,
    append_one: bool,
    scale: float,
) -> list[int]: ...
def symmetrize(x: Tensor) -> None: ...
def eigh(x: Tensor, values: Tensor, vectors: Tensor) -> None: ...
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
    """A sum of terms packed for many products (numerically rank-deficient factors as thin ones)."""

    def __new__(cls, terms: Sequence[Term]) -> KroneckerOperator: ...
    def apply(self, v: Tensor, out: Tensor) -> float: ...
    @property
    def flops(self) -> int: ...
