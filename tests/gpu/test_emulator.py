"""The emulated CUDA libraries do what the real ones document."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpu.emulator_build import CompilerMissingError, build

TOLERANCES = {np.float32: 1e-5, np.float64: 1e-13}
LETTERS = {np.float32: "S", np.float64: "D"}
DATA_TYPES = {np.float32: 0, np.float64: 1}
LOWER, UPPER = 0, 1
INVALID_VALUE = {"cuda": 1, "cublas": 7, "cusolver": 3}

KERNELS = r"""
#ifndef FACTOR
#error no factor
#endif

template <typename Real>
__device__ __forceinline__ Real scaled(Real value) {
    return static_cast<Real>(FACTOR) * value;
}

#define SCALE(name, Real)                                                             \
    extern "C" __global__ void name(const Real* __restrict__ x, Real* y, size_t n, Real shift) { \
        const size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x;  \
        if (i >= n) return;                                                           \
        y[i] = scaled(x[i]) + shift;                                                  \
    }
SCALE(scale_f32, float)
SCALE(scale_f64, double)

extern "C" __global__ void __launch_bounds__(256) block_sums(const float* x, float* sums, int n) {
    __shared__ float partial[256];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    partial[threadIdx.x] = i < n ? x[i] : 0.0f;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}

// Every thread writes before any reads, and a thread reads what one far away wrote.
extern "C" __global__ void reverse(int* values) {
    extern __shared__ int copy[];
    const int count = blockDim.x * blockDim.y * blockDim.z;
    const int i = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    copy[i] = values[i];
    __syncthreads();
    values[i] = copy[count - 1 - i];
}

extern "C" __global__ void counters(unsigned long long* first, double* total, int* most) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicMin(first, static_cast<unsigned long long>(i + 7));
    atomicAdd(total, 0.5);
    atomicMax(most, max(i, 3));
}

extern "C" __global__ void mathematics(float* y, double* z) {
    y[0] = sqrt(2.0f);
    y[1] = rsqrtf(4.0f);
    y[2] = __uint_as_float(__float_as_uint(1.5f));
    y[3] = isfinite(y[0]) && isnan(0.0f * (1.0f / 0.0f)) ? 1.0f : 0.0f;
    z[0] = fma(2.0, 3.0, pow(2.0, 0.5));
    z[1] = __longlong_as_double(__double_as_longlong(-2.5));
}
"""


class Libraries:
    """The four libraries; a call that fails raises with the library's status."""

    def __init__(self, directory: Path) -> None:
        self.libraries = {
            name: ctypes.CDLL(str(directory / f"lib{name}.so"))
            for name in ("cuda", "cublas", "cusolver", "nvrtc")
        }

    def status(self, name: str, *arguments: Any) -> int:
        prefixes = {"cublas": "cublas", "cusolver": "cusolver", "nvrtc": "nvrtc", "cu": "cuda"}
        library = next(value for key, value in prefixes.items() if name.startswith(key))
        return getattr(self.libraries[library], name)(*arguments)

    def __call__(self, name: str, *arguments: Any) -> None:
        status = self.status(name, *arguments)
        assert status == 0, f"{name} returned {status}"


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libraries]:
    try:
        directory = build(tmp_path_factory.mktemp("emulator"))
    except CompilerMissingError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EKFAC_EMULATOR_CACHE", str(directory / "cache"))
        libraries = Libraries(directory)
        libraries("cuInit", 0)
        context = c_void_p()
        libraries("cuDevicePrimaryCtxRetain", byref(context), 0)
        libraries("cuCtxSetCurrent", context)
        yield libraries


@pytest.fixture
def blas(emulator: Libraries) -> Iterator[c_void_p]:
    handle = c_void_p()
    emulator("cublasCreate_v2", byref(handle))
    yield handle
    emulator("cublasDestroy_v2", handle)


@pytest.fixture
def solver(emulator: Libraries) -> Iterator[tuple[c_void_p, c_void_p]]:
    handle, parameters = c_void_p(), c_void_p()
    emulator("cusolverDnCreate", byref(handle))
    emulator("cusolverDnCreateParams", byref(parameters))
    yield handle, parameters
    emulator("cusolverDnDestroyParams", parameters)
    emulator("cusolverDnDestroy", handle)


def data(array: np.ndarray) -> c_void_p:
    return c_void_p(array.ctypes.data)


def scalar(value: float, dtype: type) -> Any:
    return byref(np.ctypeslib.as_ctypes_type(dtype)(value))


def operation(matrix: np.ndarray, transposed: bool) -> np.ndarray:
    return matrix.T if transposed else matrix


class Operands:
    """Column-major matrices with gaps between their columns."""

    def __init__(self, seed: int, dtype: type) -> None:
        self.generator = np.random.default_rng(seed)
        self.dtype = dtype

    def matrix(self, rows: int, columns: int) -> tuple[np.ndarray, int]:
        leading = rows + int(self.generator.integers(0, 4))
        storage = self.generator.standard_normal((columns, leading)).astype(self.dtype)
        return storage.T[:rows], leading

    def size(self, largest: int = 70) -> int:
        return int(self.generator.integers(1, largest))


def sizes(suffix: str) -> Callable[[int], Any]:
    return ctypes.c_int64 if suffix.endswith("_64") else c_int


def assert_close(result: np.ndarray, expected: np.ndarray, dtype: type) -> None:
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(result, expected, rtol=0, atol=TOLERANCES[dtype] * scale)


both_types = pytest.mark.parametrize("dtype", [np.float32, np.float64])
both_widths = pytest.mark.parametrize("suffix", ["_v2", "_v2_64"])
triangles = pytest.mark.parametrize("fill", [LOWER, UPPER], ids=["lower", "upper"])


@both_types
@both_widths
@pytest.mark.parametrize("transposed_a", [False, True])
@pytest.mark.parametrize("transposed_b", [False, True])
def test_gemm(
    emulator: Libraries,
    blas: c_void_p,
    dtype: type,
    suffix: str,
    transposed_a: bool,
    transposed_b: bool,
) -> None:
    size = sizes(suffix)
    for seed in range(8):
        operands = Operands(seed, dtype)
        m, n, k = operands.size(700 if seed == 0 else 70), operands.size(), operands.size()
        a, lda = operands.matrix(*((k, m) if transposed_a else (m, k)))
        b, ldb = operands.matrix(*((n, k) if transposed_b else (k, n)))
        c, ldc = operands.matrix(m, n)
        alpha, beta = (1.0, 0.0) if seed % 2 else (-1.5, 0.5)
        product = operation(a, transposed_a).astype(float) @ operation(b, transposed_b)
        expected = alpha * product + beta * c
        if beta == 0:
            c[:] = np.nan
        emulator(
            f"cublas{LETTERS[dtype]}gemm{suffix}",
            *(blas, int(transposed_a), int(transposed_b), size(m), size(n), size(k)),
            *(scalar(alpha, dtype), data(a), size(lda), data(b), size(ldb)),
            *(scalar(beta, dtype), data(c), size(ldc)),
        )
        assert_close(c, expected, dtype)


@both_types
@pytest.mark.parametrize("suffix", ["", "_64"])
def test_batched_gemm_strides_may_be_zero_or_leave_gaps(
    emulator: Libraries, blas: c_void_p, dtype: type, suffix: str
) -> None:
    size = sizes(suffix)
    generator = np.random.default_rng(0)
    count, m, n, k = 3, 5, 4, 6
    a = generator.standard_normal((count, k + 1, m)).astype(dtype)
    b = generator.standard_normal((n, k)).astype(dtype)
    c = np.full((count, n, m), np.nan, dtype)

    def call(stride_c: int) -> int:
        return emulator.status(
            f"cublas{LETTERS[dtype]}gemmStridedBatched{suffix}",
            *(blas, 0, 0, size(m), size(n), size(k), scalar(1, dtype)),
            *(data(a), size(m), ctypes.c_longlong((k + 1) * m)),
            *(data(b), size(k), ctypes.c_longlong(0)),
            *(scalar(0, dtype), data(c), size(m), ctypes.c_longlong(stride_c), size(count)),
        )

    assert call(n * m) == 0
    expected = np.stack([(a[i, :k].T.astype(float) @ b.T).T for i in range(count)])
    assert_close(c, expected, dtype)
    assert call(n * m - 1) == INVALID_VALUE["cublas"]


# Numbers of the types of operands and of what products compute in, as library_types.h and
# cublas_api.h have them, and how operands are rounded.
NARROW = {
    "float16": (2, 68, torch.float16),
    "bfloat16": (14, 68, torch.bfloat16),
    "float32": (0, 68, None),
    "tf32": (0, 77, None),
}


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2**11).round(), exponent - 11).float()


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False)])
def test_products_of_narrow_types_have_sums_in_single_precision(
    emulator: Libraries, blas: c_void_p, name: str, transposed: tuple[bool, bool]
) -> None:
    kind, compute, dtype = NARROW[name]
    generator = torch.Generator().manual_seed(0)
    count, m, n, k, gap = 3, 5, 4, 37, 2
    (rows_a, columns_a), (rows_b, columns_b) = (
        (k, m) if transposed[0] else (m, k),
        (n, k) if transposed[1] else (k, n),
    )
    # Column by column, each matrix followed by a column that belongs to none.
    a = torch.randn(count, columns_a + 1, rows_a + gap, generator=generator).to(dtype)
    b = torch.randn(columns_b, rows_b, generator=generator).to(dtype)
    c = torch.randn(count, n, m, generator=generator)
    left, right = a[:, :columns_a, :rows_a].mT.float(), b.T.float()
    if name == "tf32":
        left, right = rounded_to_tf32(left), rounded_to_tf32(right)
    left, right = (x.mT if t else x for x, t in zip((left, right), transposed, strict=True))
    expected = 0.5 * left.double() @ right.double() + 2.0 * c.mT.double()
    flops = emulator.libraries["cublas"].emulator_asked
    flops.restype = ctypes.c_double
    before = flops(name.encode())

    def call(kind_b: int) -> int:
        return emulator.status(
            "cublasGemmStridedBatchedEx_64",
            *(blas, *map(int, transposed), *map(ctypes.c_int64, (m, n, k))),
            *(scalar(0.5, np.float32), c_void_p(a.data_ptr()), kind),
            *(ctypes.c_int64(rows_a + gap), ctypes.c_longlong(a.stride(0))),
            *(c_void_p(b.data_ptr()), kind_b, ctypes.c_int64(rows_b), ctypes.c_longlong(0)),
            *(scalar(2.0, np.float32), c_void_p(c.data_ptr()), 0),
            *(ctypes.c_int64(m), ctypes.c_longlong(n * m), ctypes.c_int64(count), compute, -1),
        )

    assert call(kind) == 0
    torch.testing.assert_close(c.mT.double(), expected, rtol=1e-5, atol=1e-5)
    assert flops(name.encode()) - before == 2.0 * count * m * n * k
    assert call(1) == INVALID_VALUE["cublas"]


@both_types
@both_widths
@triangles
@pytest.mark.parametrize("side", [0, 1], ids=["left", "right"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("unit", [False, True])
def test_trsm(
    emulator: Libraries,
    blas: c_void_p,
    dtype: type,
    suffix: str,
    fill: int,
    side: int,
    transposed: bool,
    unit: bool,
) -> None:
    size = sizes(suffix)
    for seed in range(3):
        operands = Operands(seed, dtype)
        m, n = operands.size(), operands.size()
        order = m if side == 0 else n
        a, lda = operands.matrix(order, order)
        a *= 0.5 / order
        a[np.diag_indices(order)] += 2
        b, ldb = operands.matrix(m, n)
        before = b.astype(float)
        triangle = (np.tril(a) if fill == LOWER else np.triu(a)).astype(float)
        if unit:
            np.fill_diagonal(triangle, 1)
            np.fill_diagonal(a, np.nan)
        a[np.triu_indices(order, 1) if fill == LOWER else np.tril_indices(order, -1)] = np.nan
        emulator(
            f"cublas{LETTERS[dtype]}trsm{suffix}",
            *(blas, side, fill, int(transposed), int(unit), size(m), size(n)),
            *(scalar(1.5, dtype), data(a), size(lda), data(b), size(ldb)),
        )
        left = operation(triangle, transposed)
        product = left @ b if side == 0 else b @ left
        assert_close(product, 1.5 * before, dtype)


def test_blas_refuses_wrong_arguments(emulator: Libraries, blas: c_void_p) -> None:
    a = np.ones((4, 4))
    one = scalar(1, np.float64)

    def gemm(handle: c_void_p, lda: int, ldc: int, m: int = 4, transposed: int = 0) -> int:
        return emulator.status(
            "cublasDgemm_v2",
            *(handle, transposed, 0, m, 4, 3, one, data(a), lda, data(a), 4, one, data(a), ldc),
        )

    assert gemm(blas, 3, 4) == INVALID_VALUE["cublas"]
    assert gemm(blas, 4, 3) == INVALID_VALUE["cublas"]
    assert gemm(blas, 4, 4, m=-1) == INVALID_VALUE["cublas"]
    assert gemm(blas, 2, 4, transposed=1) == INVALID_VALUE["cublas"]
    assert gemm(blas, 4, 4, transposed=9) == INVALID_VALUE["cublas"]
    assert gemm(c_void_p(), 4, 4) == 1
    assert emulator.status("cublasSetWorkspace_v2", blas, c_void_p(257), c_size_t(8)) != 0


def symmetric(generator: np.random.Generator, n: int, kind: str) -> np.ndarray:
    if kind == "zero":
        return np.zeros((n, n))
    if kind == "diagonal":
        return np.diag(generator.standard_normal(n))
    # Few columns give many eigenvalues of zero.
    columns = max(1, n // 3) if kind == "low rank" else 2 * n
    factor = generator.standard_normal((n, columns))
    return factor @ factor.T / columns - (0.5 * np.eye(n) if kind == "indefinite" else 0)


def decompose(
    emulator: Libraries,
    solver: tuple[c_void_p, c_void_p],
    a: np.ndarray,
    fill: int,
    count: int | None = None,
    short_workspace: bool = False,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Eigenvalues, info and status for an array of `count` matrices, (count, n, leading)."""
    n, leading = a.shape[-2:]
    values = np.full((count or 1, n), np.nan, a.dtype)
    info = np.full(count or 1, -1, np.int32)
    kind = DATA_TYPES[a.dtype.type]
    name = "cusolverDnXsyevd" if count is None else "cusolverDnXsyevBatched"
    batch = () if count is None else (ctypes.c_int64(count),)
    matrix = (*solver, 1, fill, ctypes.c_int64(n), kind, data(a), ctypes.c_int64(leading))
    matrix += (kind, data(values), kind)
    device_bytes, host_bytes = c_size_t(), c_size_t()
    emulator(f"{name}_bufferSize", *matrix, byref(device_bytes), byref(host_bytes), *batch)
    device = np.empty(device_bytes.value, np.uint8)
    host = np.empty(host_bytes.value, np.uint8)
    device_bytes.value -= short_workspace
    workspace = (data(device), device_bytes, data(host), host_bytes)
    status = emulator.status(name, *matrix, *workspace, data(info), *batch)
    return values, info, status


def check_decomposition(
    matrix: np.ndarray, values: np.ndarray, vectors: np.ndarray, dtype: type
) -> None:
    """Rows of `vectors` are the eigenvectors."""
    assert_close(values, np.linalg.eigvalsh(matrix), dtype)
    assert np.all(np.diff(values) >= 0)
    assert_close(vectors.astype(float) @ vectors.T, np.eye(len(values)), dtype)
    assert_close(vectors.T @ np.diag(values.astype(float)) @ vectors, matrix, dtype)


@both_types
@triangles
@pytest.mark.parametrize("kind", ["definite", "indefinite", "low rank", "diagonal", "zero"])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 90])
def test_eigendecomposition(
    emulator: Libraries,
    solver: tuple[c_void_p, c_void_p],
    dtype: type,
    fill: int,
    kind: str,
    n: int,
) -> None:
    matrix = symmetric(np.random.default_rng(n), n, kind).astype(dtype)
    a = np.full((1, n, n + 2), np.nan, dtype)
    # A row here is a column there, so the triangle named lower is our upper one.
    kept = np.triu_indices(n) if fill == LOWER else np.tril_indices(n)
    a[0, :, :n][kept] = matrix[kept]
    values, info, status = decompose(emulator, solver, a, fill)
    assert (status, info[0]) == (0, 0)
    check_decomposition(matrix.astype(float), values[0], a[0, :, :n], dtype)
    assert np.isnan(a[0, :, n:]).all()


@both_types
def test_batched_eigendecompositions(
    emulator: Libraries, solver: tuple[c_void_p, c_void_p], dtype: type
) -> None:
    generator = np.random.default_rng(0)
    matrices = np.stack([symmetric(generator, 12, "definite") for _ in range(5)]).astype(dtype)
    a = matrices.copy()
    values, info, status = decompose(emulator, solver, a, UPPER, count=5)
    assert status == 0
    assert not info.any()
    for index in range(5):
        check_decomposition(matrices[index].astype(float), values[index], a[index], dtype)


def rotate(
    emulator: Libraries, solver: tuple[c_void_p, c_void_p], a: np.ndarray, fill: int, short: int = 0
) -> tuple[np.ndarray, np.ndarray, int]:
    """Eigenvalues, info and status for an array of small matrices, (count, n, n)."""
    count, n = a.shape[:2]
    values, info = np.full((count, n), np.nan, a.dtype), np.full(count, -1, np.int32)
    settings, elements = c_void_p(), c_int()
    emulator("cusolverDnCreateSyevjInfo", byref(settings))
    letter = {np.float32: "S", np.float64: "D"}[a.dtype.type]
    name = f"cusolverDn{letter}syevjBatched"
    matrix = (solver[0], 1, fill, n, data(a), n, data(values))
    emulator(f"{name}_bufferSize", *matrix, byref(elements), settings, count)
    work = np.empty(elements.value, a.dtype)
    given = (data(work), elements.value - short, data(info), settings, count)
    status = emulator.status(name, *matrix, *given)
    emulator("cusolverDnDestroySyevjInfo", settings)
    return values, info, status


@both_types
@triangles
@pytest.mark.parametrize("n", [1, 9, 32])
def test_rotations(
    emulator: Libraries, solver: tuple[c_void_p, c_void_p], dtype: type, fill: int, n: int
) -> None:
    generator = np.random.default_rng(0)
    matrices = np.stack([symmetric(generator, n, "indefinite") for _ in range(4)]).astype(dtype)
    a = matrices.copy()
    values, info, status = rotate(emulator, solver, a, fill)
    assert status == 0
    assert not info.any()
    for index in range(4):
        check_decomposition(matrices[index].astype(float), values[index], a[index], dtype)
    assert rotate(emulator, solver, matrices.copy(), fill, short=1)[2] == 3


def test_rotations_of_large_matrices_are_refused(
    emulator: Libraries, solver: tuple[c_void_p, c_void_p]
) -> None:
    settings, elements = c_void_p(), c_int()
    emulator("cusolverDnCreateSyevjInfo", byref(settings))
    a, values = np.eye(33), np.empty(33)
    given = (solver[0], 1, LOWER, 33, data(a), 33, data(values), byref(elements), settings, 1)
    assert emulator.status("cusolverDnDsyevjBatched_bufferSize", *given) == 3
    emulator("cusolverDnDestroySyevjInfo", settings)


def test_a_workspace_that_is_too_small_is_refused(
    emulator: Libraries, solver: tuple[c_void_p, c_void_p]
) -> None:
    a = np.eye(3)[None]
    assert decompose(emulator, solver, a, LOWER, short_workspace=True)[2] == 3


def test_an_eigendecomposition_with_nan_ends(
    emulator: Libraries, solver: tuple[c_void_p, c_void_p]
) -> None:
    values, info, status = decompose(emulator, solver, np.full((1, 4, 4), np.nan), LOWER)
    assert (status, info[0]) == (0, 1)
    assert np.isnan(values).all()


def factorize(
    emulator: Libraries, solver: tuple[c_void_p, c_void_p], a: np.ndarray, fill: int
) -> int:
    n, leading = a.shape
    kind = DATA_TYPES[a.dtype.type]
    info = np.full(1, -1, np.int32)
    matrix = (*solver, fill, ctypes.c_int64(n), kind, data(a), ctypes.c_int64(leading), kind)
    device_bytes, host_bytes = c_size_t(), c_size_t()
    emulator("cusolverDnXpotrf_bufferSize", *matrix, byref(device_bytes), byref(host_bytes))
    device = np.empty(device_bytes.value, np.uint8)
    host = np.empty(host_bytes.value, np.uint8)
    workspace = (data(device), device_bytes, data(host), host_bytes)
    emulator("cusolverDnXpotrf", *matrix, *workspace, data(info))
    return int(info[0])


@both_types
@triangles
@pytest.mark.parametrize("n", [1, 2, 33])
def test_cholesky(
    emulator: Libraries, solver: tuple[c_void_p, c_void_p], dtype: type, fill: int, n: int
) -> None:
    matrix = (symmetric(np.random.default_rng(n), n, "definite") + 0.1 * np.eye(n)).astype(dtype)
    a = np.full((n, n + 1), np.nan, dtype)
    kept = np.triu_indices(n) if fill == LOWER else np.tril_indices(n)
    a[:, :n][kept] = matrix[kept]
    assert factorize(emulator, solver, a, fill) == 0
    rows = a[:, :n]
    factor = (np.triu(rows).T if fill == LOWER else np.tril(rows)).astype(float)
    assert_close(factor @ factor.T, matrix, dtype)
    assert np.isnan(rows).sum() == n * (n - 1) // 2


@triangles
def test_cholesky_names_the_first_bad_pivot(
    emulator: Libraries, solver: tuple[c_void_p, c_void_p], fill: int
) -> None:
    matrix = np.diag([1.0, 2.0, -3.0, 4.0])
    assert factorize(emulator, solver, matrix, fill) == 3


def compile_text(emulator: Libraries, text: str, *options: str) -> tuple[int, str, c_void_p]:
    program = c_void_p()
    emulator("nvrtcCreateProgram", byref(program), text.encode(), b"test.cu", 0, None, None)
    encoded = [option.encode() for option in options]
    status = emulator.status(
        "nvrtcCompileProgram", program, len(encoded), (c_char_p * len(encoded))(*encoded)
    )
    length = c_size_t()
    emulator("nvrtcGetProgramLogSize", program, byref(length))
    log = ctypes.create_string_buffer(length.value)
    emulator("nvrtcGetProgramLog", program, log)
    return status, log.value.decode(), program


class Kernels:
    """The kernels of `KERNELS`, loaded."""

    def __init__(self, emulator: Libraries) -> None:
        self.emulator = emulator
        status, log, program = compile_text(
            emulator, KERNELS, "--gpu-architecture=sm_90", "-DFACTOR=3", "--std=c++17"
        )
        assert status == 0, log
        length = c_size_t()
        emulator("nvrtcGetCUBINSize", program, byref(length))
        image = ctypes.create_string_buffer(length.value)
        emulator("nvrtcGetCUBIN", program, image)
        emulator("nvrtcDestroyProgram", byref(program))
        self.module = c_void_p()
        emulator("cuModuleLoadData", byref(self.module), image)

    def function(self, name: str) -> c_void_p:
        function = c_void_p()
        self.emulator("cuModuleGetFunction", byref(function), self.module, name.encode())
        return function

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        *arguments: Any,
        shared: int = 0,
    ) -> int:
        pointers = (c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
        return self.emulator.status(
            "cuLaunchKernel", self.function(name), *grid, *block, shared, None, pointers, None
        )


@pytest.fixture(scope="module")
def kernels(emulator: Libraries) -> Iterator[Kernels]:
    loaded = Kernels(emulator)
    yield loaded
    emulator("cuModuleUnload", loaded.module)


@both_types
def test_a_kernel_reads_its_arguments_with_their_types(kernels: Kernels, dtype: type) -> None:
    x = np.random.default_rng(0).standard_normal(1000).astype(dtype)
    y = np.zeros(1001, dtype)
    shift = np.ctypeslib.as_ctypes_type(dtype)(0.25)
    name = f"scale_f{8 * x.itemsize}"
    arguments = (data(x), data(y), c_size_t(1000), shift)
    assert kernels.launch(name, (8, 1, 1), (128, 1, 1), *arguments) == 0
    np.testing.assert_array_equal(y[:1000], 3 * x + dtype(0.25))
    assert y[1000] == 0


@pytest.mark.parametrize("repetition", range(2))
def test_threads_wait_for_each_other_at_barriers(kernels: Kernels, repetition: int) -> None:
    x = np.arange(1000, dtype=np.float32) + repetition
    sums = np.zeros(4, np.float32)
    arguments = (data(x), data(sums), c_int(1000))
    assert kernels.launch("block_sums", (4, 1, 1), (256, 1, 1), *arguments) == 0
    np.testing.assert_array_equal(sums, [part.sum() for part in np.split(x, [256, 512, 768])])


@pytest.mark.parametrize("block", [(1024, 1, 1), (8, 4, 32), (1, 1, 1), (7, 3, 2)])
def test_dynamic_shared_memory(kernels: Kernels, block: tuple[int, int, int]) -> None:
    values = np.arange(np.prod(block), dtype=np.int32)
    expected = values[::-1].copy()
    shared = values.nbytes
    assert kernels.launch("reverse", (1, 1, 1), block, data(values), shared=shared) == 0
    np.testing.assert_array_equal(values, expected)


def test_atomics(kernels: Kernels) -> None:
    first, total = np.full(1, 2**64 - 1, np.uint64), np.zeros(1)
    most = np.zeros(1, np.int32)
    arguments = (data(first), data(total), data(most))
    assert kernels.launch("counters", (3, 1, 1), (32, 1, 1), *arguments) == 0
    assert (first[0], total[0], most[0]) == (7, 48.0, 95)


def test_device_functions(kernels: Kernels) -> None:
    y, z = np.zeros(4, np.float32), np.zeros(2)
    assert kernels.launch("mathematics", (1, 1, 1), (1, 1, 1), data(y), data(z)) == 0
    np.testing.assert_allclose(y, [2**0.5, 0.5, 1.5, 1], rtol=1e-7)
    np.testing.assert_allclose(z, [6 + 2**0.5, -2.5])


def test_launches_outside_the_limits_are_refused(kernels: Kernels) -> None:
    pointer = data(np.zeros(1))
    for grid, block in [
        ((0, 1, 1), (1, 1, 1)),
        ((1, 65536, 1), (1, 1, 1)),
        ((2**31, 1, 1), (1, 1, 1)),
        ((1, 1, 1), (1025, 1, 1)),
        ((1, 1, 1), (32, 33, 1)),
        ((1, 1, 1), (1, 1, 0)),
    ]:
        assert kernels.launch("reverse", grid, block, pointer) == INVALID_VALUE["cuda"]
    shared = kernels.launch("reverse", (1, 1, 1), (1, 1, 1), pointer, shared=48 * 1024 + 1)
    assert shared == INVALID_VALUE["cuda"]
    # The kernel's own bound.
    assert kernels.launch("block_sums", (1, 1, 1), (257, 1, 1), pointer, pointer, c_int(0)) == 1


def test_an_unknown_kernel_is_not_found(kernels: Kernels) -> None:
    function = c_void_p()
    assert (
        kernels.emulator.status("cuModuleGetFunction", byref(function), kernels.module, b"no")
        == 500
    )


@pytest.mark.parametrize(
    ("text", "log"),
    [
        ('extern "C" __global__ void broken(int* x) {\n  *x = nothing;\n}', "test.cu:2"),
        ("#include <cmath>\n", "cmath"),
        (KERNELS, "no factor"),
    ],
    ids=["name", "header", "directive"],
)
def test_the_log_says_why_a_source_does_not_compile(
    emulator: Libraries, text: str, log: str
) -> None:
    status, found, _ = compile_text(emulator, text)
    assert status == 6
    assert log in found


def test_unknown_options_are_refused(emulator: Libraries) -> None:
    status, log, _ = compile_text(emulator, "", "--no-such-option")
    assert status == 5
    assert "--no-such-option" in log


def test_only_a_real_architecture_has_a_cubin(emulator: Libraries) -> None:
    status, _, program = compile_text(emulator, "", "--gpu-architecture=compute_90")
    length = c_size_t(1)
    emulator("nvrtcGetCUBINSize", program, byref(length))
    assert (status, length.value) == (0, 0)
    emulator("nvrtcGetPTXSize", program, byref(length))
    assert length.value > 1


def test_memory_moves_only_in_a_context(emulator: Libraries) -> None:
    x, y = np.arange(5.0), np.zeros(5)
    context = c_void_p()
    emulator("cuCtxGetCurrent", byref(context))
    emulator("cuMemcpyHtoDAsync_v2", data(y), data(x), c_size_t(x.nbytes), None)
    np.testing.assert_array_equal(x, y)
    emulator("cuMemsetD8Async", data(y), 0, c_size_t(8), None)
    np.testing.assert_array_equal(y, [0, 1, 2, 3, 4])
    emulator("cuCtxSetCurrent", None)
    assert emulator.status("cuMemcpyDtoHAsync_v2", data(y), data(x), c_size_t(8), None) == 201
    emulator("cuCtxSetCurrent", context)


def test_faults_are_injected(emulator: Libraries, monkeypatch: pytest.MonkeyPatch) -> None:
    version, count, handle = c_int(), c_int(), c_void_p()
    before = emulator.libraries["cuda"].emulator_calls(b"cuDriverGetVersion")
    emulator("cuDriverGetVersion", byref(version))
    assert version.value == 13000
    monkeypatch.setenv(
        "EKFAC_EMULATOR_FAULT",
        "cuInit=100,cublasCreate_v2=3,nvrtcCompileProgram=6,"
        "cuDriverGetVersion=12000!,cuDeviceGetCount=0!,potrf.info=3!,syevd.info=2!",
    )
    assert emulator.status("cuInit", 0) == 100
    assert emulator.status("cublasCreate_v2", byref(handle)) == 3
    assert compile_text(emulator, "")[:2] == (6, "injected fault")
    emulator("cuDriverGetVersion", byref(version))
    emulator("cuDeviceGetCount", byref(count))
    assert (version.value, count.value) == (12000, 0)
    assert emulator.libraries["cuda"].emulator_calls(b"cuDriverGetVersion") == before + 2
    monkeypatch.delenv("EKFAC_EMULATOR_FAULT")
    assert emulator.status("cuInit", 0) == 0


def test_info_is_injected(
    emulator: Libraries, solver: tuple[c_void_p, c_void_p], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = "potrf.info=3!,syevd.info=2!,syevBatched.info=1!,syevjBatched.info=4!"
    monkeypatch.setenv("EKFAC_EMULATOR_FAULT", faults)
    assert rotate(emulator, solver, np.eye(4)[None], LOWER)[1][0] == 4
    assert factorize(emulator, solver, np.eye(4), LOWER) == 3
    assert decompose(emulator, solver, np.eye(4)[None], LOWER)[1][0] == 2
    assert decompose(emulator, solver, np.eye(4)[None], LOWER, count=1)[1][0] == 1


def test_errors_have_names(emulator: Libraries) -> None:
    name = c_char_p()
    emulator("cuGetErrorName", 700, byref(name))
    assert name.value == b"CUDA_ERROR_ILLEGAL_ADDRESS"
    assert emulator.status("cuGetErrorName", 12345, byref(name)) == INVALID_VALUE["cuda"]


def test_devices_are_counted_by_the_environment(
    emulator: Libraries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKFAC_EMULATOR_DEVICES", "2")
    count, device = c_int(), c_int()
    emulator("cuDeviceGetCount", byref(count))
    assert count.value == 2
    emulator("cuDeviceGet", byref(device), 1)
    assert emulator.status("cuDeviceGet", byref(device), 2) == 101


def test_functions_can_be_left_out(emulator: Libraries, tmp_path: Path) -> None:
    build(tmp_path, without=["cusolverDnXsyevBatched", "cublasSgemm_v2_64"])
    # Under the plain names, as the backend finds them.
    program = (
        "import ctypes\n"
        "solver, blas = ctypes.CDLL('libcusolver.so'), ctypes.CDLL('libcublas.so')\n"
        "assert not hasattr(solver, 'cusolverDnXsyevBatched')\n"
        "assert hasattr(solver, 'cusolverDnXsyevBatched_bufferSize')\n"
        "assert not hasattr(blas, 'cublasSgemm_v2_64') and hasattr(blas, 'cublasSgemm_v2')\n"
        "ctypes.CDLL('libcuda.so'), ctypes.CDLL('libnvrtc.so')\n"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
