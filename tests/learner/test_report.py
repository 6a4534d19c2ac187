"""The page of a learner: whole in itself, and what it says is what there was."""

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import ekfac_rs as ek

pytest.importorskip("matplotlib")

# Elements that have no end.
ALONE = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """Checks that elements are closed in turn, and collects tables, pictures and links."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.pictures, self.links = [], [], 0, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ALONE:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.pictures += tag == "svg"
        self.links += [v for k, v in attributes if k in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def learnt(tasks, **options):
    torch.manual_seed(0)
    x = torch.randn(4, 16, 5)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    learner, rows = ek.ContinualLearner(model, **options), []
    loaders = [[(a, a[:, k : k + 3].argmax(1)) for a in x] for k in range(tasks)]
    for loader in loaders:
        learner.fit(loader)
        learner.consolidate(loader)
        rows.append(learner.evaluate(loaders))
    return learner, ek.AccuracyMatrix.from_rows(rows) if rows else None


@pytest.mark.parametrize("scale", [3.0, "auto", "halving"])
def test_it_tells_accuracies_scales_and_options(scale, tmp_path):
    learner, accuracy = learnt(2, scale=scale, damping=0.1)
    learner.report(tmp_path / "report.html", accuracy)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    cells = [f"{100 * value:.2f} %" for value in accuracy.values[1]]
    assert ["task 1", *cells] in page.rows
    assert ["scale", repr(scale)] in page.rows
    assert page.pictures == 2  # accuracies, and the one task under a penalty
    for attempt, _ in learner.selection[0].tries:
        assert any(row[0] == f"{attempt:g}" for row in page.rows)


def test_it_needs_nothing_from_elsewhere(tmp_path):
    learner, accuracy = learnt(2)
    learner.report(tmp_path / "report.html", accuracy)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(link.startswith("#") for link in Page(text).links)
    assert "<script" not in text
    assert "@import" not in text.replace("@import url()", "")


def test_a_learner_that_has_learnt_nothing_has_a_page_too(tmp_path):
    learner, _ = learnt(0, approximation=None)
    learner.report(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Tasks learnt: 0" in text
    assert Page(text).pictures == 0


def test_what_is_written_is_escaped(tmp_path):
    learner, _ = learnt(1, layers=["0", "3"])
    learner.layers = ("<b>&",)
    learner.report(tmp_path / "report.html")
    assert "<b>&" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_browser_shows_all_of_it(tmp_path):
    browsers = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    learner, accuracy = learnt(2, scale="auto")
    learner.report(tmp_path / "report.html", accuracy)
    with browsers.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch()
        except browsers.Error as error:
            pytest.skip(f"playwright has no browser to launch: {error}")
        page, said, asked = browser.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "report.html").as_uri())
        assert page.title() == "Continual learning"
        headings = page.locator("h2").all_inner_texts()
        boxes = [picture.bounding_box() for picture in page.locator("svg").all()]
        width = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        browser.close()
    assert said == []
    assert len(asked) == 1  # the page itself
    assert headings == ["Accuracy", "What is held on to", "How strongly", "Options"]
    assert len(boxes) == 2
    assert all(box["width"] > 100 and box["height"] > 100 for box in boxes)
    assert width <= 0  # nothing beyond the edge
