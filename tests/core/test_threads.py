"""Any number of threads gives the same results, and threads may share objects."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import ekfac_rs as ek
from ekfac_rs import _core
from ekfac_rs._tensors import borrow
from ekfac_rs.errors import OptionError


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = ek.num_threads()
    yield
    ek.set_num_threads(before)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def gram(x: Tensor, size: int, approximation: str, append_one: bool) -> list[Tensor]:
    """The factors of dense units, in the dtype that is computed in."""
    strata = len(_core.strata()[approximation])
    out = [torch.zeros(size, size, dtype=x.dtype) for _ in range(strata)]
    borrowed = [borrow(tensor) for tensor in out]
    _core.accumulate_gram(
        borrow(x), borrowed, approximation, "input", append_one, 1.0 / len(x), "ieee"
    )
    return [tensor.tril() for tensor in out]


def patch_gram(x: Tensor, approximation: str) -> list[Tensor]:
    """The factors of the patches of a 3 x 3 kernel."""
    size = 9 * x.shape[1] + 1
    strata = len(_core.strata()[approximation])
    out = [torch.zeros(size, size, dtype=x.dtype) for _ in range(strata)]
    borrowed = [borrow(tensor) for tensor in out]
    ones, padding = [1, 1], [(1, 1), (1, 1)]
    _core.accumulate_patch_gram(
        borrow(x), borrowed, approximation, [3, 3], ones, ones, padding, True, 1 / len(x), "ieee"
    )
    return [tensor.tril() for tensor in out]


def grouped_gram(x: Tensor, groups: int) -> list[Tensor]:
    """The factors of consecutive blocks of features."""
    size = x.shape[-1] // groups
    out = torch.zeros(groups, size, size, dtype=x.dtype)
    _core.accumulate_gram(borrow(x), [borrow(out)], "kfac-expand", "input", False, 1.0, "ieee")
    return [out.tril()]


def terms(D: int, K: int, dtype: torch.dtype, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Two terms of full rank and a thin one."""
    found = []
    for index, rank in enumerate([2.0, 2.0, 0.1]):
        A, G = (
            noise(size, int(rank * size), seed=seed + 2 * index + side, dtype=torch.float64)
            for side, size in enumerate([K, D])
        )
        found.append(((A @ A.mT / K).to(dtype), (G @ G.mT / D).to(dtype)))
    return found


def multiplied(
    operators: list[_core.KroneckerOperator],
    deviations: list[Tensor],
    scale: float = 1.0,
    damping: float = 0.0,
) -> tuple[list[Tensor], list[list[float]]]:
    """Products of several layers, and the inner products told of each."""
    out = [torch.full_like(V, torch.nan) for V in deviations]
    inner = torch.full((len(out), 1, 2), torch.nan, dtype=torch.float64)
    layers = zip(operators, deviations, out, inner, strict=True)
    products = [(op, borrow(V), borrow(to), damping, borrow(told)) for op, V, to, told in layers]
    _core.apply_operators(products, scale)
    return out, inner[:, 0].tolist()


def packed_product(block: ek.KroneckerSum, V: Tensor) -> Tensor:
    operator = _core.KroneckerOperator([(borrow(A), borrow(G)) for A, G in block.terms])
    out = torch.empty_like(V)
    operator.apply(borrow(V), borrow(out))
    return out


def kronecker_cases(dtype: torch.dtype) -> dict[str, Callable[[], list[Tensor]]]:
    D, K = 160, 210
    block = ek.KroneckerSum(terms(D, K, dtype))
    one, two = (ek.KroneckerSum(block.terms[:count]) for count in (1, 2))
    V, stack = noise(D, K, dtype=dtype), noise(3, D, K, seed=1, dtype=dtype)
    draw = torch.Generator
    return {
        "product": lambda: [block.product(V)],
        "stack of products": lambda: [block.product(stack)],
        "packed product": lambda: [packed_product(block, V)],
        "quadratic form": lambda: [torch.tensor(block.quadratic(V))],
        "inverse of one term": lambda: [one.solve(V, damping=0.1)],
        "inverse of two terms": lambda: [two.solve(V)],
        "conjugate gradients": lambda: [block.solve(V, damping=0.1, tolerance=1e-10)],
        "samples of the inverse": lambda: [one.sample(2, damping=0.1, generator=draw())],
        "compression": lambda: [block.compress(2).product(V)],
        "top eigenvalue": lambda: [torch.tensor(block.top_eigenvalue())],
        "eigenvalues": lambda: [pair for found in block.eigh() for pair in found[::2]],
    }


def gram_cases(dtype: torch.dtype) -> dict[str, Callable[[], list[Tensor]]]:
    # Tall, square and wide: each is cut for threads in a way of its own.
    tall, square, wide = (
        noise(*shape, dtype=dtype) for shape in [(4000, 60), (600, 2, 300), (96, 9, 500)]
    )
    images, channels = noise(40, 20, 18, 17, dtype=dtype), noise(900, 64, dtype=dtype)
    # Each example's locations lie side by side, and are squared where they are.
    outside = noise(30, 24, 200, dtype=dtype).transpose(1, 2)
    return {
        **{
            f"{name}, {approximation}": (
                lambda x=x, approximation=approximation: gram(
                    x, x.shape[-1] + 1, approximation, True
                )
            )
            for name, x in [
                *(("tall", tall), ("square", square), ("wide", wide)),
                ("channels outside", outside),
            ]
            for approximation in _core.strata()
        },
        **{
            f"patches, {approximation}": (
                lambda approximation=approximation: patch_gram(images, approximation)
            )
            for approximation in _core.strata()
        },
        "groups": lambda: grouped_gram(channels, 32),
    }


def results_of(cases: dict[str, Callable[[], list[Tensor]]], threads: int) -> dict[str, list]:
    ek.set_num_threads(threads)
    assert ek.num_threads() == threads
    return {name: work() for name, work in cases.items()}


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize("cases", [gram_cases, kronecker_cases])
def test_results_do_not_depend_on_the_number_of_threads(cases, dtype):
    made = cases(dtype)
    alone = results_of(made, 1)
    again = results_of(made, 1)
    # Sums are cut differently for threads: they agree to rounding.
    tolerance = 100 * torch.finfo(dtype).eps
    for threads in (2, 4):
        shared = results_of(made, threads)
        repeated = results_of(made, threads)
        for name, expected in alone.items():
            for first, second in zip(expected, again[name], strict=True):
                assert torch.equal(first, second), name
            for first, second in zip(shared[name], repeated[name], strict=True):
                assert torch.equal(first, second), f"{name}, {threads} threads"
            for got, wanted in zip(shared[name], expected, strict=True):
                # One location leaves nothing within examples.
                error, length = float((got - wanted).norm()), float(wanted.norm())
                assert error <= tolerance * length, f"{name}, {threads} threads: {error}"


def run_together(*works: Callable[[], None]) -> None:
    """Run each on a thread of its own, all from one moment on, and raise what any raised."""
    failures: list[BaseException] = []
    ready = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        ready.wait()
        try:
            work()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread waits for ever"
    for failure in failures:
        raise failure


@pytest.mark.parametrize("count", [0, -1, -(2**40)])
def test_a_number_below_one_is_refused_and_changes_nothing(count):
    ek.set_num_threads(2)
    with pytest.raises(OptionError, match=f"threads must be at least 1, got {count}"):
        ek.set_num_threads(count)
    assert ek.num_threads() == 2


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("D", "K"), [(12, 15), (150, 170)])
def test_two_threads_may_share_an_operator(D, K, count):
    ek.set_num_threads(count)
    block = ek.KroneckerSum(terms(D, K, torch.float64))
    operator = _core.KroneckerOperator([(borrow(A), borrow(G)) for A, G in block.terms])
    inverse = _core.KroneckerInverse([tuple(map(borrow, block.terms[0]))], 0.1)
    damped = ek.KroneckerSum(block.terms[:1])

    def work(seed: int) -> None:
        for repetition in range(40):
            V = noise(D, K, seed=100 * seed + repetition, dtype=torch.float64)
            solved = torch.empty_like(V)
            [packed], [(inner, _)] = multiplied([operator], [V])
            product = block.product(V)
            torch.testing.assert_close(packed, product, rtol=1e-9, atol=1e-9)
            assert inner == pytest.approx(float((V * product).sum()), rel=1e-8)
            inverse.solve(borrow(V), borrow(solved))
            back = damped.product(solved) + 0.1 * solved
            torch.testing.assert_close(back, V, rtol=1e-8, atol=1e-8)

    run_together(lambda: work(1), lambda: work(2))


def test_the_number_of_threads_may_change_while_others_work():
    block = ek.KroneckerSum(terms(100, 140, torch.float64))
    V = noise(100, 140, dtype=torch.float64)
    expected = block.product(V)
    done = threading.Event()

    def work() -> None:
        try:
            for _ in range(200):
                torch.testing.assert_close(block.product(V), expected)
        finally:
            done.set()

    def change() -> None:
        for count in range(10**6):
            if done.is_set():
                break
            ek.set_num_threads(1 + count % 4)

    run_together(work, change)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_share_the_products_of_several_layers(count):
    ek.set_num_threads(count)
    # More than a thread's share, less, and so little that nobody would share it.
    sizes = [(150, 300), *[(60, 120)] * 7, (120, 60), (3, 2)]
    blocks = [ek.KroneckerSum(terms(*size, torch.float64)) for size in sizes]
    deviations = [noise(*size, dtype=torch.float64) for size in sizes]
    operators = [
        _core.KroneckerOperator([(borrow(A), borrow(G)) for A, G in block.terms])
        for block in blocks
    ]
    out, inner = multiplied(operators, deviations, 2.0, 0.5)
    for block, V, to, (curved, flat) in zip(blocks, deviations, out, inner, strict=True):
        expected = block.product(V)
        torch.testing.assert_close(to, 2.0 * expected + 0.5 * V)
        assert curved == pytest.approx(float((V * expected).sum()))
        assert flat == pytest.approx(float(V.square().sum()))


def test_outputs_that_share_memory_are_refused():
    block = ek.KroneckerSum(terms(4, 3, torch.float64))
    operator = _core.KroneckerOperator([(borrow(A), borrow(G)) for A, G in block.terms])
    V, out = torch.ones(2, 4, 3, dtype=torch.float64), torch.zeros(3, 4, 3, dtype=torch.float64)
    inner = torch.zeros(2, 1, 2, dtype=torch.float64)

    def apply(first, second, *told):
        layers = zip(V, (first, second), told, strict=True)
        products = [(operator, borrow(v), borrow(to), 0.0, borrow(n)) for v, to, n in layers]
        _core.apply_operators(products, 1.0)

    apply(out[0], out[1], *inner)
    flat = out.view(-1)
    shifted = flat[6:18].view(4, 3)
    for first, second, told in [
        (out[0], out[0], inner),
        (out[0], shifted, inner),
        (out[0], V[1], inner),
        (out[0], V[0], inner),
        (out[0], out[1], inner[:1].expand(2, 1, 2)),
        (out[0], out[1], flat[10:14].view(2, 1, 2)),
    ]:
        with pytest.raises(ek.errors.OptionError, match="must not share memory"):
            apply(first, second, *told)
