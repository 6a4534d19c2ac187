"""The pages' Python runs as it stands, and every link leads somewhere."""

import re
from contextlib import nullcontext

import pytest
import torch

from extras import importing
from pages import DOCS, EVERYWHERE, PAGES, ROOT, anchors_of, blocks_of, links_of, name_of

# Pages that need libraries that are not there as a rule.
NEEDS = {"docs/integrations.md": ("avalanche", "lightning")}

# Text and commands; nothing else, so that no code is left out by how its language is spelt.
LANGUAGES = {"python", "sh", "toml", "text"}


@pytest.mark.parametrize(
    "page",
    [page for page in EVERYWHERE if any(b.language == "python" for b in blocks_of(page))],
    ids=name_of,
)
def test_the_python_of_a_page_runs_from_its_top_to_its_end(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    needed = NEEDS.get(name_of(page), ())
    with torch.random.fork_rng(), importing(*needed) if needed else nullcontext():
        for block in blocks_of(page):
            if block.language == "python":
                # Lines are those of the page, for tracebacks.
                text = "\n" * (block.line - 1) + block.text
                exec(compile(text, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", EVERYWHERE, ids=name_of)
def test_every_block_says_what_it_is(page):
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"line {block.line}: {block.language or 'no language'}"


def test_the_readme_and_every_guide_have_examples():
    with_python = {
        name_of(p) for p in EVERYWHERE if any(b.language == "python" for b in blocks_of(p))
    }
    guides = (
        "first-run",
        "merged-weights",
        "approximations",
        "scale",
        "heads",
        "cuda",
        "many-machines",
        "integrations",
    )
    assert with_python >= {"README.md", *(f"docs/{guide}.md" for guide in guides)}


@pytest.mark.parametrize("page", EVERYWHERE, ids=name_of)
def test_every_link_leads_somewhere(page):
    for target in links_of(page):
        path, _, anchor = target.partition("#")
        led_to = (page.parent / path).resolve() if path else page
        assert led_to.exists(), target
        if anchor:
            assert anchor in anchors_of(led_to), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_the_site_stay_within_it(page):
    for target in links_of(page):
        led_to = (page.parent / target.partition("#")[0]).resolve()
        assert led_to.is_relative_to(DOCS), target


def test_every_page_is_in_the_navigation_or_a_table_that_results_link_to():
    navigation = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [page.relative_to(DOCS).as_posix() for page in PAGES]
    assert len(navigation) == len(set(navigation))
    assert set(navigation) <= set(pages)
    linked = {f"results/{target}" for target in links_of(DOCS / "results" / "README.md")}
    assert set(pages) - set(navigation) <= linked
