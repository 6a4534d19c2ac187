"""Decompositions are shared out: each is made once, and all processes have all results."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import ekfac_rs as ek
from ekfac_rs._ranks import assigned
from ekfac_rs.errors import OptionError
from nets import classification_loader, mlp
from team import Failure, team_of

COUNT = 3


@pytest.fixture(scope="module")
def team():
    with team_of(COUNT) as three:
        yield three


def made(*widths):
    """The same curvature in every process."""
    model = mlp(*widths)
    generator = torch.Generator().manual_seed(0)
    batches = classification_loader(widths[0], widths[-1])
    return ek.estimate_curvature(model, batches, approximation="xkfac", generator=generator)


def vectors(curvature):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(block.shape, generator=generator, dtype=block.dtype)
        for name, block in curvature.items()
    }


def solved(rank, times):
    curvature = made(9, 8, 7, 6, 5, 4)
    V, calls = vectors(curvature), []

    def solve(name, block):
        calls.append(name)
        return block.solve(V[name], damping=0.1)

    for _ in range(times):
        found = ek.distributed.map_blocks(curvature, solve)
    return found, calls


def test_solutions_are_those_of_one_process_each_made_on_one(team):
    results = team.results(solved, 2)
    curvature = made(9, 8, 7, 6, 5, 4)
    V = vectors(curvature)
    for found, calls in results:
        assert list(found) == list(curvature)
        for name, block in curvature.items():
            torch.testing.assert_close(found[name], block.solve(V[name], damping=0.1))
            assert torch.equal(found[name], results[0][0][name])
        # The second time where it was made the first time.
        assert calls[: len(calls) // 2] == calls[len(calls) // 2 :]
    assert all(calls for _, calls in results)
    assert sorted(name for _, calls in results for name in calls) == sorted(
        [*curvature, *curvature]
    )


def decomposed(rank):
    return ek.distributed.map_blocks(made(4, 3, 2), lambda name, block: block.eigh())


def test_results_keep_their_form_where_some_have_nothing_to_do(team):
    curvature = made(4, 3, 2)
    assert len(curvature) < COUNT
    for found in team.results(decomposed):
        for name, block in curvature.items():
            assert len(found[name]) == len(block.terms)
            for mine, theirs in zip(found[name], block.eigh(), strict=True):
                assert [x.shape for x in mine] == [x.shape for x in theirs]
                torch.testing.assert_close(mine[0], theirs[0])


def of_one_group(rank):
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    return ek.distributed.map_blocks(made(4, 3, 2), lambda name, block: block.diagonal(), group)


def test_a_group_shares_out_among_its_own(team):
    curvature = made(4, 3, 2)
    _, *results = team.results(of_one_group)
    for found in results:
        for name, block in curvature.items():
            torch.testing.assert_close(found[name], block.diagonal())


def failing(rank, how):
    curvature = made(6, 5, 4, 3) if how != "another" or rank else made(6, 5, 3)

    def work(name, block):
        if how == "raises" and rank == 1:
            raise ValueError("no inverse today")
        return "words" if how == "words" and rank == 2 else block.diagonal()

    return ek.distributed.map_blocks(curvature, work)


@pytest.mark.parametrize(
    ("how", "who", "kind", "told"),
    [
        ("raises", 1, "ValueError", "no inverse today"),
        ("words", 2, "OptionError", "expected a function that returns a tensor"),
    ],
)
def test_who_fails_tells_the_others(team, how, who, kind, told):
    results = team.run(failing, how)
    assert all(isinstance(result, Failure) for result in results)
    for rank, result in enumerate(results):
        assert told in result.message
        assert result.kind == (kind if rank == who else "DistributedError")
    assert not any(isinstance(result, Failure) for result in team.run(failing, "not at all"))


def test_other_curvatures_are_refused_on_all(team):
    for result in team.run(failing, "another"):
        assert result.kind == "DistributedError"
        assert "curvature: expected the same on all ranks" in result.message


def test_alone_it_is_a_map_of_blocks():
    curvature = made(4, 3, 2)
    found = ek.distributed.map_blocks(curvature, lambda name, block: (block.diagonal(),))
    assert list(found) == list(curvature)
    for name, block in curvature.items():
        assert torch.equal(found[name][0], block.diagonal())
    for nothing in (None, [], "x", [1.0]):
        with pytest.raises(OptionError, match="layer '0': expected a function that returns"):
            ek.distributed.map_blocks(curvature, lambda name, block, value=nothing: value)


@given(
    costs=st.lists(st.floats(0.0, 1e12), max_size=30).map(
        lambda costs: {f"layer {i}": cost for i, cost in enumerate(costs)}
    ),
    count=st.integers(1, 8),
)
def test_no_rank_has_more_than_a_fair_share_and_one_thing(costs, count):
    makers = assigned(costs, count)
    assert list(makers) == list(costs)
    loads = [sum(costs[n] for n, maker in makers.items() if maker == k) for k in range(count)]
    most = sum(costs.values()) / count + max(costs.values(), default=0.0)
    assert max(loads) <= most * (1.0 + 1e-12)
    shuffled = dict(sorted(costs.items(), key=lambda item: hash(item)))
    assert assigned(shuffled, count) == makers
