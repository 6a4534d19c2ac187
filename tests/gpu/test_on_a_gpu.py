"""What only a real GPU can show: streams, graphs, memory, devices."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekfac_rs as ek
from ekfac_rs import _core
from ekfac_rs._tensors import borrow

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


@pytest.fixture(autouse=True)
def _ieee_convolutions() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def network() -> nn.Sequential:
    """Build convolutions, one of them depthwise, and a Linear, under BatchNorm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 5),
    )


def data(device: str = "cuda") -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 3, 6, 6, generator=generator).to(device)
    y = torch.randint(5, (32,), generator=generator).to(device)
    return list(zip(x.split(16), y.split(16), strict=True))


def penalties_of(*copies: nn.Module) -> list[ek.QuadraticPenalty]:
    """One penalty for each copy of a model, all with the curvature of the first."""
    curvature = ek.estimate_curvature(copies[0], data(), labels="empirical")
    anchor = ek.merged_weights(copies[0])
    return [ek.QuadraticPenalty(model, curvature, anchor, damping=0.01) for model in copies]


@torch.no_grad()
def shake(*copies: nn.Module) -> None:
    """Move the weights of all copies alike."""
    for same in zip(*(model.parameters() for model in copies), strict=True):
        noise = 0.1 * torch.randn_like(same[0])
        for p in same:
            p.add_(noise)


def test_a_curvature_agrees_with_that_of_the_cpu():
    model = network()
    on_cpu = ek.estimate_curvature(model, data("cpu"), labels="empirical")
    on_gpu = ek.estimate_curvature(model.cuda(), data(), labels="empirical")
    for name in on_cpu:
        for ours, theirs in zip(on_gpu[name].terms, on_cpu[name].terms, strict=True):
            for ours_factor, theirs_factor in zip(ours, theirs, strict=True):
                scale = float(theirs_factor.abs().max())
                # The forward and backward passes are torch's own, and differ, too.
                torch.testing.assert_close(
                    ours_factor.cpu(), theirs_factor, rtol=0.0, atol=2e-3 * scale
                )


# Torch calls the mode a prototype whenever it is set.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_training_step_makes_torch_wait_for_nothing():
    model = network().cuda()
    (penalty,) = penalties_of(model)
    shake(model)
    (x, y), *_ = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            loss = F.cross_entropy(model(x), y) + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(torch.isfinite(loss))


@pytest.fixture
def side_stream() -> Iterator[torch.cuda.Stream]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream().wait_stream(stream)


def test_a_step_with_the_penalty_is_captured_and_replayed(side_stream):
    model, twin = network().cuda(), network().cuda()
    penalty, twin_penalty = penalties_of(model, twin)
    (x, y), *_ = data()

    def step(of: nn.Module, penalty: ek.QuadraticPenalty) -> Tensor:
        for p in of.parameters():
            p.grad = None
        loss = F.cross_entropy(of(x), y) + penalty()
        loss.backward()
        return loss

    for _ in range(3):  # what torch asks for before a capture
        step(model, penalty)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side_stream):
        loss = step(model, penalty)
    gradients = [p.grad for p in model.parameters()]
    for _ in range(2):
        shake(model, twin)
        graph.replay()
        expected = step(twin, twin_penalty)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        for gradient, q in zip(gradients, twin.parameters(), strict=True):
            torch.testing.assert_close(gradient, q.grad, rtol=1e-3, atol=1e-4)


def test_a_curvature_pass_refuses_to_be_captured(side_stream):
    A = torch.eye(3, device="cuda")
    block = ek.KroneckerSum([(A, A)])
    block.trace()
    graph = torch.cuda.CUDAGraph()
    refusal = None
    with torch.cuda.graph(graph, stream=side_stream):
        kept = A + 1.0
        try:
            block.trace()
        except ek.errors.CudaError as error:
            refusal = str(error)
    graph.replay()  # the refusal left the capture as it was
    torch.cuda.synchronize()
    assert torch.equal(kept, A + 1.0)
    assert refusal is not None
    assert "graph is being captured" in refusal


def test_memory_is_not_used_again_while_another_stream_reads_it():
    n = 2000
    A, G = torch.randn(n, n, device="cuda"), torch.eye(n, device="cuda")
    V = torch.randn(n, n, device="cuda")
    expected = G @ V @ A
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(5):
        packed = _core.KroneckerOperator([(borrow(A), borrow(G))])
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # about a tenth of a second
            out = torch.empty_like(V)
            packed.apply(borrow(V), borrow(out))
        # Its factors lay in memory of the default stream, which asks for as much again at once.
        del packed
        scratch = [torch.full((n, n), float("nan"), device="cuda") for _ in range(4)]
        stream.synchronize()
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-2)
        del scratch


def test_memory_is_given_back():
    A = torch.eye(300, device="cuda")
    V = torch.ones(300, 300, device="cuda")
    block = ek.KroneckerSum([(A, A), (A, A)])

    def work() -> None:
        block.product(V), block.quadratic(V), block.solve(V, 0.1), block.eigh()
        ek.KroneckerSum([(A, A)]).sample(2, 0.1)

    work()
    gc.collect()
    before = torch.cuda.memory_allocated()
    work()
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_a_device_without_room_says_so():
    free, _ = torch.cuda.mem_get_info()
    n = int((free / 4) ** 0.5 * 0.6)
    A = torch.eye(n, device="cuda")
    one = torch.ones(1, 1, device="cuda")
    with pytest.raises(ek.errors.OutOfMemoryError, match=r"bytes could not be allocated on cuda:"):
        # In double precision, with vectors beside it.
        ek.KroneckerSum([(A, one)]).solve(torch.ones(1, n, device="cuda"), 0.1)
    del A
    torch.cuda.empty_cache()


def test_the_current_device_stays_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    A = torch.eye(3, device="cuda:1")
    assert ek.KroneckerSum([(A, A)]).trace() == 9.0
    assert torch.cuda.current_device() == 0


def test_tf32_differs_by_no_more_than_its_rounding():
    model = network().cuda()
    exact, rounded = (
        ek.estimate_curvature(model, data(), labels="empirical", precision=precision)
        for precision in ("ieee", "tf32")
    )
    for name in exact:
        difference = exact[name] + (-1.0) * rounded[name]
        assert 0.0 < difference.norm() < 5e-3 * exact[name].norm()


def test_the_info_names_this_machine():
    info = ek.cuda_info()
    assert info["usable"], info["problem"]
    assert info["devices"][0][0] == torch.cuda.get_device_name(0)
    assert info["devices"][0][1] == "{}.{}".format(*torch.cuda.get_device_capability(0))
