"""Hundreds of calls use no more memory than the first ones."""

from collections.abc import Callable

import pytest
import torch

import ekfac_rs as ek
from ekfac_rs import _core
from ekfac_rs._tensors import borrow
from memory import needs_proc, resident

pytestmark = needs_proc

CALLS = 500


def cases() -> dict[str, Callable[[], object]]:
    """Each keeps at least 40 kB of its own for as long as it is held."""
    generator = torch.Generator().manual_seed(0)
    A, G = (torch.randn(n, 2 * n, generator=generator, dtype=torch.float64) for n in (40, 30))
    A, G = A @ A.mT, G @ G.mT
    term, other = (borrow(A), borrow(G)), (borrow(A + 1.0), borrow(G))
    V, noise = torch.ones(30, 40, dtype=torch.float64), torch.ones(1, 2, 30, 40, dtype=A.dtype)
    out, x, factor = torch.empty_like(V), torch.ones(64, 40), torch.zeros(40, 40)
    operator = _core.KroneckerOperator([term, other])
    inverse, root = _core.KroneckerInverse([term], 0.1), _core.KroneckerRoot([term, other])

    def refused() -> None:
        with pytest.raises(ek.errors.ShapeError):
            operator.apply(borrow(V.mT), borrow(out))

    return {
        "operators made": lambda: _core.KroneckerOperator([term, other]),
        "operators used": lambda: operator.apply(borrow(V), borrow(out)),
        "inverses made": lambda: _core.KroneckerInverse([term], 0.1),
        "inverses used": lambda: inverse.solve(borrow(V), borrow(out)),
        "roots made": lambda: _core.KroneckerRoot([term, other]),
        "roots used": lambda: root.apply(borrow(noise), borrow(out[None])),
        "Grams": lambda: _core.accumulate_gram(
            borrow(x), [borrow(factor)], "kfac-expand", "input", False, 1e-6, "ieee"
        ),
        "errors": refused,
    }


@pytest.mark.parametrize("name", cases())
def test_memory_stays_flat(name):
    work = cases()[name]
    for _ in range(CALLS // 10):
        work()
    before = resident()
    for _ in range(CALLS):
        work()
    # An object lost in every call would be 20 MB.
    assert resident() - before < 8e6
