"""The documentation as text: its pages, and what is in them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# What the site is made of, and what only the code host shows.
PAGES = sorted(DOCS.rglob("*.md"))
EVERYWHERE = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]

_FENCE = re.compile(r"^ *(`{3,}|~{3,}) *(\S*) *$")
# Of the API: rendered from a docstring, under a heading that has the object's path as its anchor.
_ENTRY = re.compile(r"^::: (\S+)$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]+)\)")


class Block(NamedTuple):
    """Fenced code, from its first line on (counted from 1)."""

    language: str
    line: int
    text: str


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    return _split(page)[1]


def prose_of(page: Path) -> str:
    return _split(page)[0]


def entries_of(page: Path) -> list[str]:
    return _ENTRY.findall(prose_of(page))


def links_of(page: Path) -> list[str]:
    """Targets of links and pictures that are no addresses of other hosts."""
    targets = _LINK.findall(re.sub(r"`[^`\n]+`", "", prose_of(page)))
    return [target for target in targets if not target.startswith(("http://", "https://"))]


def anchors_of(page: Path) -> set[str]:
    """Return what a link may name after '#': headings, and entries of the API."""
    headings = re.findall(r"^#{1,6} (.+)$", prose_of(page), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-") for text in headings}
    return slugs | set(entries_of(page))


def _split(page: Path) -> tuple[str, list[Block]]:
    """Return a page's text outside of fenced code, and that code."""
    prose: list[str] = []
    blocks: list[Block] = []
    fence, language, begun, code = "", "", 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        found = _FENCE.match(line)
        if not fence and found:
            (fence, language), begun, code = found.groups(), number + 1, []
        elif fence and found and found[1].startswith(fence) and not found[2]:
            blocks.append(Block(language, begun, "\n".join(code)))
            fence = ""
        else:
            (code if fence else prose).append(line)
    assert not fence, f"{name_of(page)}: a fence is not closed"
    return "\n".join(prose), blocks
