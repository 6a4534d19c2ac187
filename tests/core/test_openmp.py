"""Work runs on torch's own OpenMP team, and on a pool of our own where there is none."""

import os
import signal
import sys
import threading
import time

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import ekfac_rs as ek
from ekfac_rs import _core
from ekfac_rs._tensors import borrow
from processes import SECONDS, forks_allowed, in_child, in_fresh_process, with_threads

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.openmp.is_available(),
    reason="only where torch has loaded its OpenMP run-time for all to see",
)


@pytest.fixture(autouse=True)
def _threads():
    with with_threads(2):
        yield


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[1], x.shape[1])
    _core.accumulate_gram(borrow(x), [borrow(out)], "kfac-expand", "input", False, 1.0, "ieee")
    return out.tril()


def results() -> list[Tensor]:
    """Products and Gram matrices, each large enough to be cut for threads."""
    terms = [(noise(220, 220, seed=k), noise(180, 180, seed=k + 2)) for k in range(2)]
    block = ek.KroneckerSum([(A @ A.mT, G @ G.mT) for A, G in terms])
    V = noise(180, 220)
    operator, packed = (
        _core.KroneckerOperator([tuple(map(borrow, t)) for t in block.terms]),
        V.clone(),
    )
    operator.apply(borrow(V), borrow(packed))
    return [block.product(V), packed, gram(noise(600, 300)), gram(noise(4000, 60)), block.solve(V)]


def test_no_thread_is_started_where_torch_has_its_team():
    printed = in_fresh_process(
        """
        import os, torch
        import ekfac_rs as ek

        torch.set_num_threads(2)

        def threads():
            return len(os.listdir("/proc/self/task"))

        x = torch.randn(512, 512)
        (x @ x).exp()
        before = threads()
        # Short work, and work that is long enough for Ctrl-C to be looked for.
        terms = [(x @ x.T, x @ x.T) for _ in range(3)]
        block = ek.KroneckerSum(terms)
        block.product(x)
        block.product(torch.randn(20, 512, 512))
        assert torch.get_num_threads() == ek.num_threads() == 2
        print(ek.build_info()["threads"], threads() - before)
        """
    )
    assert printed == "OpenMP 0"


def test_the_number_of_threads_is_torch_s_until_one_is_set():
    printed = in_fresh_process(
        """
        import threading, torch
        import ekfac_rs as ek

        torch.set_num_threads(2)
        seen = [ek.num_threads()]
        torch.set_num_threads(1)
        seen.append(ek.num_threads())

        def elsewhere():
            torch.ones(10**5).exp()  # torch tells a thread at its first work to be shared
            seen.append(ek.num_threads())

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        torch.set_num_threads(3)
        seen.append(ek.num_threads())
        ek.set_num_threads(2)
        seen.append(ek.num_threads())
        torch.set_num_threads(1)
        print(*seen, ek.num_threads(), torch.get_num_threads())
        """
    )
    assert printed == "2 1 1 3 2 2 1"


@pytest.mark.parametrize(("of_torch", "own"), [(1, 2), (2, 1), (2, 4), (4, 2), (3, 3)])
def test_numbers_of_threads_may_differ(of_torch, own):
    before = torch.get_num_threads()
    try:
        ek.set_num_threads(1)
        expected = results()
        torch.set_num_threads(of_torch)
        ek.set_num_threads(own)
        for _ in range(3):
            for got, wanted in zip(results(), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max())
    finally:
        torch.set_num_threads(before)


def test_a_pool_of_our_own_gives_the_same_bits():
    assert ek.build_info()["threads"] == "OpenMP"
    expected = results()

    def work() -> None:
        assert ek.build_info()["threads"] == "own"
        for got, wanted in zip(results(), expected, strict=True):
            assert torch.equal(got, wanted)

    in_child(work)
    assert ek.build_info()["threads"] == "OpenMP"
    for got, wanted in zip(results(), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_child_computes_though_its_parent_s_team_was_used_by_torch_alone():
    printed = in_fresh_process(
        """
        import os, torch
        import ekfac_rs as ek

        torch.set_num_threads(2)
        x = torch.randn(512, 512)
        (x @ x).exp()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # as DataLoader does: torch's own team hangs there
            ek.set_num_threads(2)
            block = ek.KroneckerSum([(torch.eye(512), torch.eye(512))])
            os._exit(0 if torch.equal(block.product(x), x) else 1)
        print(os.waitpid(child, 0)[1])
        """
    )
    assert printed == "0"


class Products(Dataset):
    """Items that take the core to make."""

    def __init__(self) -> None:
        self.block = ek.KroneckerSum([(2.0 * torch.eye(300), torch.eye(250))])

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return self.block.product(torch.full((250, 300), float(index)))


def test_workers_of_a_loader_compute():
    data = Products()
    for index, item in enumerate(data):
        assert item.eq(2.0 * index).all()
        if index == 5:
            break
    with forks_allowed():
        loader = DataLoader(
            data, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=SECONDS
        )
        batches = list(loader)
    expected = 2.0 * torch.arange(6.0)[:, None, None].expand(6, 250, 300)
    torch.testing.assert_close(torch.cat(batches), expected, rtol=0, atol=0)


class Stopped(Exception):
    pass


def stop(signum: int, frame: object) -> None:
    raise Stopped


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.thorough), 4])
@pytest.mark.parametrize(
    ("handler", "raised"), [(signal.default_int_handler, KeyboardInterrupt), (stop, Stopped)]
)
def test_a_signal_ends_a_long_region_early(threads, handler, raised):
    # Minutes of work in one call: the rows are all the same one.
    x = noise(1, 1024).expand(10**7, 1024)
    out = torch.zeros(1024, 1024)
    pressed: list[float] = []

    def press() -> None:
        pressed.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    ek.set_num_threads(threads)
    expected = results()
    before = signal.signal(signal.SIGINT, handler)
    timer = threading.Timer(0.5, press)
    timer.start()
    try:
        with pytest.raises(raised):
            _core.accumulate_gram(
                borrow(x), [borrow(out)], "kfac-expand", "gradient", False, 1.0, "ieee"
            )
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - pressed[0] < 5.0
    # The team is still good for work.
    for got, wanted in zip(results(), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_signal_s_handler_may_compute():
    x = noise(1, 512).expand(4 * 10**5, 512)
    out = torch.zeros(512, 512)
    expected, computed = results(), []
    before = signal.signal(signal.SIGALRM, lambda *_: computed.append(results()))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        _core.accumulate_gram(
            borrow(x), [borrow(out)], "kfac-expand", "gradient", False, 1.0, "ieee"
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert len(computed) == 1
    for got, wanted in zip(computed[0], expected, strict=True):
        assert torch.equal(got, wanted)
