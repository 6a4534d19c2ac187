"""Cases left of a product of options still have every pair of two."""

from collections import Counter
from itertools import combinations, product

from hypothesis import given, settings
from hypothesis import strategies as st

from pairs import choices_of, covering


def pairs(case):
    return set(combinations(sorted(case.items()), 2))


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_every_pair_is_there_and_no_case_without_one_of_its_own(sizes):
    cases = [dict(enumerate(row)) for row in product(*map(range, sizes))]
    chosen = covering(cases)
    assert chosen == sorted(set(chosen))
    found = set().union(*(pairs(cases[i]) for i in chosen))
    assert found == set().union(*map(pairs, cases))
    # At least the product of the two longest; not far more than that.
    *_, second, first = sorted(sizes)
    assert first * second <= len(chosen) <= 2 * first * second


def test_of_one_option_or_two_every_case_is_there():
    assert covering([{"x": i} for i in range(20)]) == list(range(20))
    cases = [{"x": i, "y": j} for i, j in product(range(4), range(5))]
    assert covering(cases) == list(range(20))


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=3))
def test_every_choice_is_there_and_made_about_as_often_as_the_options_others(sizes):
    cases = [dict(enumerate(row)) for row in product(*map(range, sizes))]
    chosen = covering(cases, together=1)
    assert len(chosen) == max(sizes)
    for option, size in enumerate(sizes):
        made = Counter(cases[i][option] for i in chosen)
        assert len(made) == size
        assert max(made.values()) <= min(made.values()) + 1


def test_a_case_that_adds_no_pair_is_left_out():
    enough = [dict(zip("xyz", row, strict=True)) for row in ("aab", "abc", "bac", "bbb")]
    assert covering([*enough, {"x": "b", "y": "b", "z": "c"}]) == [0, 1, 2, 3]
    assert covering([*enough, {"x": "b", "y": "b", "z": "d"}]) == [0, 1, 2, 3, 4]


def test_a_dictionary_of_options_is_several_and_objects_are_told_apart():
    first, second = object(), object()
    given_ = {"modes": {"coordinates": "raw", "statistics": "batch"}, "of": first, "n": None}
    choices = choices_of(given_)
    assert choices["modes.coordinates"] == "raw"
    assert choices["modes.statistics"] == "batch"
    assert choices["n"] is None
    assert choices["of"] == choices_of({"of": first})["of"] != choices_of({"of": second})["of"]
