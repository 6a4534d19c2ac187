"""Of a product of many options, cases in which every pair of two options occurs."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

Choices = Mapping[str, Hashable]


def choices_of(parameters: Mapping[str, Any]) -> Choices:
    """Return what a case has chosen of each option; a dictionary is several options."""
    choices: dict[str, Hashable] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            choices |= {f"{name}.{key}": _told_apart(chosen) for key, chosen in value.items()}
        else:
            choices[name] = _told_apart(value)
    return choices


def _told_apart(value: Any) -> Hashable:
    """Return the value, or which object it is: cases share it."""
    return value if isinstance(value, str | int | float | None) else id(value)


def covering(cases: Sequence[Choices]) -> list[int]:
    """Return which cases are enough for every pair of two options' choices that any of them has.

    The one that has most new pairs comes next, the first of several.
    """
    pairs_of = [frozenset(combinations(sorted(case.items()), min(2, len(case)))) for case in cases]
    missing = frozenset().union(*pairs_of)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs_of[i] & missing))
        missing -= pairs_of[best]
        chosen.append(best)
    return sorted(chosen)
