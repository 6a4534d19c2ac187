"""Fixtures shared by all tests."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import pytest
import torch

import ekfac_rs as ek
from pairs import choices_of, covering

# The networks here are tiny: more threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every device the package computes on."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device")
        info = ek.cuda_info()
        if not info["usable"]:
            pytest.skip(f"ekfac_rs cannot use CUDA: {info['problem']}")
    # Torch would round what goes into convolutions on a GPU to ten bits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield request.param


# Files that take longest: begun first, they do not run alone at the end.
LONG = (
    *("gpu/test_emulated.py", "experiments/test_finegrained.py", "exactness/test_convolutions.py"),
    *("penalty/test_stable_step.py", "exactness/test_corrections.py", "test_memory.py"),
)


# A test of options with more combinations than the first is made with every pair of two choices
# instead; where these are more than the second, with every choice.
MANY_CASES, MANY_PAIRS = 12, 50


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let all combinations be asked for."""
    parser.addoption(
        "--thorough",
        action="store_true",
        help="also tests marked as thorough, and all combinations of options where they are more "
        f"than {MANY_CASES}, not only every pair of two choices or, of a great many, every choice",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is for thorough runs; put long files first, their order stays."""
    if not config.getoption("thorough"):
        enough = with_enough_combinations(
            x for x in items if x.get_closest_marker("thorough") is None
        )
        config.hook.pytest_deselected(items=[item for item in items if item not in enough])
        items[:] = [item for item in items if item in enough]
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))


def with_enough_combinations(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Return items such that tests have pairs of their options, or all options, on each device."""
    enough, cases = set(), defaultdict(list)
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is None:
            enough.add(item)
        else:
            test = item.nodeid.partition("[")[0]
            cases[test, callspec.params.get("device")].append(item)
    for group in cases.values():
        if len(group) > MANY_CASES:
            choices = [choices_of(item.callspec.params) for item in group]
            chosen = covering(choices)
            if len(chosen) > MANY_PAIRS:
                chosen = covering(choices, together=1)
            group = [group[i] for i in chosen]
        enough.update(group)
    return enough


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random numbers on the CPU."""
    return torch.Generator().manual_seed(0)
