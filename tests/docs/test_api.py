"""Every public name has an entry in the API's pages, which mkdocstrings makes of its docstring."""

import pkgutil

import pytest

import ekfac_rs as ek
from ekfac_rs import distributed, errors, info, likelihood, metrics, scales
from pages import PAGES, entries_of

# What stands on libraries that are not there as a rule: its own tests look it up.
GUESTS = "ekfac_rs.integrations."
ENTRIES = [entry for page in PAGES for entry in entries_of(page) if not entry.startswith(GUESTS)]
OBJECTS = {entry: pkgutil.resolve_name(entry) for entry in ENTRIES}


@pytest.mark.parametrize("module", [ek, distributed, errors, scales, likelihood, metrics, info])
def test_every_public_name_has_an_entry(module):
    missing = [
        name
        for name in module.__all__
        if not any(entry is getattr(module, name) for entry in OBJECTS.values())
    ]
    assert not missing


def test_no_entry_is_there_twice():
    # Under two names neither: the second would take the first one's anchor.
    assert len({id(entry) for entry in OBJECTS.values()}) == len(ENTRIES)


@pytest.mark.parametrize("module", [errors, scales, likelihood, metrics, info])
def test_what_a_module_defines_under_a_name_that_is_not_private_is_public(module):
    defined = {
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    }
    assert defined == set(module.__all__)
