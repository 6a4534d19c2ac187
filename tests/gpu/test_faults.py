"""What goes wrong on a GPU is told by type and name, and leaves nothing broken behind.

Runs over emulated libraries alone (see test_emulated.py), which fail on demand.
"""

import gc
import itertools
import os

import pytest
import torch

import ekfac_rs as ek
from ekfac_rs import _core
from gpu import emulated_device
from gpu.devices import EMULATED, EMULATED_CUDA
from gpu.emulated_device import calls

pytestmark = pytest.mark.skipif(
    not os.environ.get(EMULATED), reason="runs over emulated CUDA libraries only"
)

FAULT = "EKFAC_EMULATOR_FAULT"
_devices = itertools.count(1)


def on(device: int, tensor: torch.Tensor, stream: int = 1) -> _core.Tensor:
    """Describe a tensor as lying on this device."""
    address, shape, strides, dtype, _, _, owner = EMULATED_CUDA.borrow(tensor)
    return address, shape, strides, dtype, f"cuda:{device}", stream, owner


@pytest.fixture
def device() -> int:
    """A device nobody has used: nothing is made for it yet."""
    return next(_devices)


def factor(device: int) -> None:
    x, out = torch.ones(4, 3), torch.zeros(3, 3)
    _core.accumulate_gram(
        on(device, x), [on(device, out)], "kfac-expand", "input", False, 1.0, "ieee"
    )
    assert torch.equal(out.tril(), torch.full((3, 3), 4.0).tril())


def product(device: int) -> None:
    A, G, V, out = 2.0 * torch.eye(3), torch.eye(2), torch.ones(2, 3), torch.zeros(2, 3)
    _core.kronecker_product([(on(device, A), on(device, G))], on(device, V), on(device, out), 0.0)
    assert torch.equal(out, 2.0 * V)


def operator(device: int) -> None:
    A, G, V, out = 2.0 * torch.eye(3), torch.eye(2), torch.ones(2, 3), torch.zeros(2, 3)
    packed = _core.KroneckerOperator([(on(device, A), on(device, G))])
    packed.apply(on(device, V), on(device, out))
    assert torch.equal(out, 2.0 * V)


def decomposition(device: int) -> None:
    x, values, vectors = torch.eye(3), torch.zeros(3), torch.zeros(3, 3)
    _core.eigh(on(device, x), on(device, values), on(device, vectors))
    assert torch.equal(values, torch.ones(3))


def small_ones(device: int) -> None:
    x, values, vectors = torch.eye(3).repeat(4, 1, 1), torch.zeros(4, 3), torch.zeros(4, 3, 3)
    _core.eigh(on(device, x), on(device, values), on(device, vectors))
    assert torch.equal(values, torch.ones(4, 3))


def inverse(device: int) -> None:
    terms = [(torch.eye(3) * k, torch.eye(2)) for k in (1.0, 2.0)]
    V, out = torch.ones(2, 3), torch.zeros(2, 3)
    solver = _core.KroneckerInverse([(on(device, A), on(device, G)) for A, G in terms], 0.0)
    solver.solve(on(device, V), on(device, out))
    torch.testing.assert_close(out, V / 3.0)


CudaError, OutOfMemory = ek.errors.CudaError, ek.errors.OutOfMemoryError
FAULTS = [
    ("cuInit=100", product, CudaError, "cuInit failed: CUDA_ERROR_NO_DEVICE"),
    ("cuDeviceGetCount=0!", product, ek.errors.DeviceError, "the driver has 0"),
    ("cuDeviceGetAttribute=1", product, CudaError, "cuDeviceGetAttribute"),
    ("cuDevicePrimaryCtxRetain=2", product, OutOfMemory, "cuDevicePrimaryCtxRetain ran out"),
    ("cuCtxSetCurrent=201", product, CudaError, "cuCtxSetCurrent"),
    ("cublasCreate_v2=3", product, OutOfMemory, "cublasCreate ran out of device memory"),
    ("cublasCreate_v2=1", product, CudaError, "cublasCreate failed"),
    ("cublasSetStream_v2=1", product, CudaError, "cublasSetStream"),
    ("cublasSetWorkspace_v2=7", product, CudaError, "cublasSetWorkspace"),
    ("cublasSgemm_v2_64=13", product, CudaError, "gemm failed: CUBLAS_STATUS_EXECUTION_FAILED"),
    ("cusolverDnCreate=1", product, CudaError, "cusolverDnCreate"),
    ("cublasGemmStridedBatchedEx_64=14", factor, CudaError, "CUBLAS_STATUS_INTERNAL_ERROR"),
    ("nvrtcCompileProgram=6", factor, CudaError, "did not compile for sm_90.*injected fault"),
    ("nvrtcCreateProgram=1", factor, CudaError, "nvrtcCreateProgram"),
    ("cuModuleLoadData=209", factor, CudaError, "cuModuleLoadData.*NO_BINARY_FOR_GPU"),
    ("cuModuleGetFunction=500", factor, CudaError, "cuModuleGetFunction"),
    ("cuLaunchKernel=719", factor, CudaError, "launch of kernel sum_dense failed"),
    ("cuMemcpyDtoHAsync_v2=700", factor, CudaError, "cuMemcpyDtoHAsync.*ILLEGAL_ADDRESS"),
    ("cuMemsetD8Async=2", operator, OutOfMemory, "cuMemsetD8Async ran out of device memory"),
    ("cuMemsetD8Async=700", operator, CudaError, "cuMemsetD8Async failed: CUDA_ERROR_ILLEGAL"),
    ("cuStreamSynchronize=700", factor, CudaError, "cuStreamSynchronize"),
    ("cusolverDnXsyevd_bufferSize=7", decomposition, CudaError, "cusolverDnXsyevd_bufferSize"),
    ("cusolverDnXsyevd=7", decomposition, CudaError, "cusolverDnXsyevd failed"),
    ("syevd.info=2!", decomposition, ek.errors.NumericalError, "3 x 3 .* did not converge"),
    ("cusolverDnCreateSyevjInfo=2", small_ones, OutOfMemory, "cusolverDnCreateSyevjInfo"),
    ("cusolverDnSsyevjBatched=7", small_ones, CudaError, "cusolverDnSsyevjBatched failed"),
    ("syevjBatched.info=4!", small_ones, ek.errors.NumericalError, "3 x 3 .* did not converge"),
    ("cusolverDnXpotrf=7", inverse, CudaError, "cusolverDnXpotrf failed"),
    ("potrf.info=2!", inverse, ek.errors.NumericalError, "singular or indefinite"),
    ("cublasDtrsm_v2_64=14", inverse, CudaError, "trsm failed"),
    ("cuStreamIsCapturing=1!", factor, CudaError, "graph is being captured"),
    ("cuStreamIsCapturing=1!", inverse, CudaError, "graph is being captured"),
]


@pytest.mark.parametrize(("fault", "call", "error", "message"), FAULTS)
def test_a_fault_is_named_and_the_next_call_works(device, monkeypatch, fault, call, error, message):
    monkeypatch.setenv(FAULT, fault)
    with pytest.raises(error, match=message):
        call(device)
    monkeypatch.delenv(FAULT)
    call(device)


def test_a_fault_names_the_layer(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    monkeypatch.setenv(FAULT, "cuLaunchKernel=719")
    with pytest.raises(CudaError, match="layer '0': input: launch of kernel"):
        ek.estimate_curvature(model, [(torch.ones(4, 3), torch.zeros(4, dtype=torch.long))])


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (torch.OutOfMemoryError("full"), OutOfMemory, "24 bytes .* on cuda:{}: .*full"),
        (MemoryError("full"), OutOfMemory, "24 bytes .* on cuda:{}: .*full"),
        (RuntimeError("illegal memory access"), CudaError, "24 bytes .*illegal memory access"),
        (KeyboardInterrupt(), KeyboardInterrupt, "interrupted"),
    ],
)
def test_what_the_allocator_raises_is_passed_on(device, raised, error, message):
    def refuse(size: int, device: int, stream: int) -> int:
        raise raised

    _core.set_cuda_allocator(refuse, lambda address: None)
    try:
        with pytest.raises(error, match=message.format(device)) as caught:
            product(device)
        assert type(caught.value) is error
    finally:
        emulated_device.use()
    product(device)


def test_an_object_dropped_by_an_exception_does_not_swallow_it(device):
    G = on(device, torch.eye(2))
    with pytest.raises(ek.errors.ShapeError):
        _core.KroneckerRoot([(on(device, torch.eye(3)), G)]).apply(
            on(device, torch.ones(5)), on(device, torch.ones(5))
        )


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ek.errors.DeviceError, match="no device cuda:1000"):
        product(1000)


def test_the_product_of_a_penalty_may_be_captured(device, monkeypatch):
    A, G, V, out = 2.0 * torch.eye(3), torch.eye(2), torch.ones(2, 3), torch.zeros(2, 3)
    packed = _core.KroneckerOperator([(on(device, A), on(device, G))])
    monkeypatch.setenv(FAULT, "cuStreamIsCapturing=1!")
    waits, launches = calls("cuda", "cuStreamSynchronize"), calls("cuda", "cuLaunchKernel")
    packed.apply(on(device, V), on(device, out))
    assert torch.equal(out, 2.0 * V)
    assert calls("cuda", "cuStreamSynchronize") == waits
    # A kernel's first launch would load code, which a capture does not allow.
    assert calls("cuda", "cuLaunchKernel") == launches


def test_a_penalty_never_waits_for_the_device():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    x = torch.randn(8, 3)
    curvature = ek.estimate_curvature(model, [(x, torch.zeros(8, 4))], loss="mse")
    penalty = ek.QuadraticPenalty(model, curvature, ek.merged_weights(model), damping=0.1)
    waits = calls("cuda", "cuStreamSynchronize")
    for _ in range(3):
        model(x)
        penalty().backward()
    assert calls("cuda", "cuStreamSynchronize") == waits


def test_memory_is_given_back(device):
    for call in (factor, product, operator, decomposition, small_ones, inverse):
        call(device)
        gc.collect()
        before = emulated_device.allocated()
        call(device)
        gc.collect()
        assert emulated_device.allocated() == before


def test_memory_is_given_back_after_a_fault(device, monkeypatch):
    for call, fault in [
        (factor, "cublasGemmStridedBatchedEx_64=14"),
        (inverse, "cublasDtrsm_v2_64=14"),
    ]:
        call(device)
        gc.collect()
        before = emulated_device.allocated()
        monkeypatch.setenv(FAULT, fault)
        with pytest.raises(CudaError):
            call(device)
        monkeypatch.delenv(FAULT)
        gc.collect()
        assert emulated_device.allocated() == before


def test_use_on_another_stream_holds_back_the_stream_that_memory_came_from(device):
    A, G, V, out = 2.0 * torch.eye(3), torch.eye(2), torch.ones(2, 3), torch.zeros(2, 3)
    packed = _core.KroneckerOperator([(on(device, A), on(device, G))])
    waits = calls("cuda", "cuStreamWaitEvent")
    packed.apply(on(device, V), on(device, out))
    assert calls("cuda", "cuStreamWaitEvent") == waits
    packed.apply(on(device, V, stream=2), on(device, out, stream=2))
    assert torch.equal(out, 2.0 * V)
    assert calls("cuda", "cuStreamWaitEvent") == waits + 1


def test_each_device_is_set_up_once(device):
    product(device)
    made = calls("cublas", "cublasCreate_v2"), calls("nvrtc", "nvrtcCompileProgram")
    product(device)
    factor(device)
    assert calls("cublas", "cublasCreate_v2") == made[0]
    retained = calls("cuda", "cuDevicePrimaryCtxRetain")
    product(device)
    assert calls("cuda", "cuDevicePrimaryCtxRetain") == retained


def test_info_tells_of_the_devices():
    info = ek.cuda_info()
    assert info["usable"]
    assert info["problem"] is None
    assert info["driver_version"] == "13.0"
    assert info["devices"][0] == ("emulated device", "9.0")
