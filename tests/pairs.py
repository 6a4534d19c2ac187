"""Of a product of many options, cases that have every pair of two choices, or every choice."""

from collections import Counter
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


def covering(cases: Sequence[Choices], together: int = 2) -> list[int]:
    """Return which cases are enough for what any of them has chosen of so many options together.

    The one that has most that is new comes next; of several, the one whose choices have been
    made least so far; of several of those, the first.
    """
    parts_of = [
        frozenset(combinations(sorted(case.items()), min(together, len(case)))) for case in cases
    ]
    missing = frozenset().union(*parts_of)
    chosen, made = [], Counter[tuple[str, Hashable]]()
    while missing:
        new = [len(parts & missing) for parts in parts_of]
        most = [i for i, count in enumerate(new) if count == max(new)]
        best = min(most, key=lambda i: sum(made[choice] for choice in cases[i].items()))
        missing -= parts_of[best]
        chosen.append(best)
        made.update(cases[best].items())
    # Later ones may together have all that an earlier one has.
    there = Counter(part for i in chosen for part in parts_of[i])
    for i in list(chosen):
        if all(there[part] > 1 for part in parts_of[i]):
            chosen.remove(i)
            there.subtract(parts_of[i])
    return sorted(chosen)
