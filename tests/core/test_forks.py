"""A forked child, such as a worker of a DataLoader, computes with threads of its own."""

import os
import threading

import pytest
import torch

import ekfac_rs as ek
from ekfac_rs import _core
from ekfac_rs._tensors import borrow
from processes import SECONDS, in_child, with_threads

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="only systems with fork")


def block_and_product() -> tuple[ek.KroneckerSum, torch.Tensor, torch.Tensor]:
    """A sum large enough for every thread, and a product with it."""
    generator = torch.Generator().manual_seed(0)
    A, G = (torch.randn(n, 2 * n, generator=generator, dtype=torch.float64) for n in (220, 180))
    block = ek.KroneckerSum([(A @ A.mT, G @ G.mT), (G.new_ones(220, 220), G @ G.mT)])
    V = torch.randn(180, 220, generator=generator, dtype=torch.float64)
    return block, V, block.product(V)


@pytest.fixture(autouse=True)
def _threads():
    with with_threads(3):
        yield


def test_a_child_computes_after_its_parent_used_threads():
    block, V, expected = block_and_product()
    operator = _core.KroneckerOperator([(borrow(A), borrow(G)) for A, G in block.terms])
    packed = torch.empty_like(V)
    operator.apply(borrow(V), borrow(packed))

    def work() -> None:
        assert ek.num_threads() == 3
        torch.testing.assert_close(block.product(V), expected)
        # Also what the parent packed.
        out = torch.empty_like(V)
        operator.apply(borrow(V), borrow(out))
        torch.testing.assert_close(out, packed)
        assert block.top_eigenvalue() > 0
        ek.set_num_threads(2)
        torch.testing.assert_close(block.product(V), expected)

    in_child(work)
    # The parent's own threads are still at work.
    torch.testing.assert_close(block.product(V), expected)


def test_a_child_of_a_child_computes():
    block, V, expected = block_and_product()

    def grandchild() -> None:
        torch.testing.assert_close(block.product(V), expected)

    def child() -> None:
        torch.testing.assert_close(block.product(V), expected)
        in_child(grandchild)

    in_child(child)


def test_a_child_forked_in_the_middle_of_another_thread_s_work_computes():
    block, V, expected = block_and_product()
    small = ek.KroneckerSum([(torch.eye(3), torch.eye(2))])
    done = threading.Event()

    def keep_busy(work) -> None:
        while not done.is_set():
            work()

    # One in long products, one in and out of the core all the time, one changing the team.
    works = [
        lambda: block.product(V),
        lambda: small.trace(),
        lambda: ek.set_num_threads(3),
    ]
    threads = [threading.Thread(target=keep_busy, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()

    def work() -> None:
        torch.testing.assert_close(block.product(V), expected)

    try:
        for _ in range(20):
            in_child(work)
    finally:
        done.set()
        for thread in threads:
            thread.join(SECONDS)
