"""The page: whole in itself, and every figure with its unit and its sample."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from alignment.report.review.figures import decimals, flips, nats, points, share
from alignment.report.review.page import html, in_words, markdown, page_of, review, write
from alignment.report.review.reading import Reading, read_run
from alignment.report.review.signals import Replies
from alignment.report.review.statistics import Estimate, ShareChange, mean_of
from tests.review_records import columns, save_run

VOID = ("meta", "br", "img", "path", "use", "rect", "image")
RNG = np.random.default_rng(2)
BEFORE = RNG.normal(0.1, 1, 300)
LENGTHS = tuple(RNG.integers(20, 90, (2, 300)).astype(float))


def runs_of(folder: Path, count: int) -> list[Reading]:
    found = []
    for number in range(count):
        after = BEFORE + RNG.normal(0.4 / (number + 1), 0.4, 300)
        pairs = columns(BEFORE, after, chosen_change=-0.2, lengths=LENGTHS)
        path = save_run(
            folder / f"run-{number}", pairs, pairs, objective=f"objective {number % 2}", seed=number, rate=number % 2
        )
        found.append(read_run(path))
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Reading:
    return runs_of(tmp_path_factory.mktemp("one"), 1)[0]


@pytest.fixture(scope="module")
def page(one) -> str:
    return html(page_of(review([one])))


class Tags(HTMLParser):
    """Which tags stand where, and whether each is closed by its own end."""

    def __init__(self, text: str):
        super().__init__()
        self.opened: list[str] = []
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        if tag not in VOID:
            self.opened.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.opened.pop() == tag


def test_the_page_is_whole_in_itself(page):
    tags = Tags(page)
    assert tags.opened == []
    assert not {"script", "link", "iframe", "img"} & set(tags.found)
    assert "@import" not in page
    links = set(re.findall(r"(?:https?:)?//[\w./-]+", page)) - {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert {link for link in links if not link.startswith("//www.w3.org") and "w3.org" not in link} == set()
    assert tags.found.count("svg") == 5


def test_plots_take_their_colours_from_the_page(page):
    svg = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert set(re.findall(r"var\(--(\w+)\)", svg)) >= {"ink", "muted", "blue", "green", "band"}
    assert re.findall(r"#[0-9a-f]{6}", svg.replace("#ffffff", "")) == []
    assert "prefers-color-scheme: dark" in page


def test_a_page_of_the_same_runs_is_the_same_page(one, page):
    assert html(page_of(review([one]))) == page


def test_names_are_text_and_never_markup(one):
    text = html(page_of(review([replace(one, name="<script>alert(1)</script> & more")])))
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_every_figure_has_its_sample_and_its_unit(one):
    for table in (table for section in page_of(review([one])).sections for table in section.tables):
        if table.title == "Conventions":
            continue
        for _, *cells in table.rows:
            for cell in cells:
                assert cell == "-" or re.search(r"pairs?|prompts?|records?", cell), cell
                assert cell == "-" or re.search(r"%|points|nats|reward|right|sd|x |\(|tokens", cell), cell


def test_several_runs_stand_side_by_side_with_their_differences_and_seeds(tmp_path):
    found = review(runs_of(tmp_path, 4))
    text = markdown(page_of(found))
    assert len(found.comparisons) == 4  # two recipes of two seeds
    for title in ("The runs", "Paired differences", "Seeds", "Conventions"):
        assert f"### {title}" in text
    assert "run-0 minus run-1" in text
    assert "p by Holm, over 4 comparisons" in text
    assert html(page_of(found)).count("<svg") == 2 + 4 * 5


def test_the_terminal_says_verdict_reasons_and_figures(one):
    text = in_words(review([one]))
    assert text.startswith("run-0: generalizing")
    for figure in (
        "D, its change",
        "H, change of d, held-out",
        "P, change of d, probe",
        "C, change of the chosen",
        "K = H - P/2",
    ):
        assert figure in text


def test_a_bare_log_has_a_page_too(tmp_path, one):
    found = review([read_run(one.path / "metrics.jsonl")])
    text = markdown(page_of(found))
    assert "not decidable" in text
    assert "| training margin, second half | 1.6 units of reward (5 records) |" in text
    assert html(page_of(found)).count("<svg") == 1


def test_replies_are_shown_where_there_are_any(one):
    change = mean_of(RNG.normal(-0.05, 0.1, 30), np.arange(30))
    replies = Replies(100.0, 140.0, "tokens", 40, change)
    text = markdown(page_of(review([replace(one, replies=replies)])))
    assert "| length, after | 140.0 tokens (mean, 40 prompts) |" in text
    assert "30 prompts" in text


def test_the_files_replace_those_of_an_earlier_review(one, tmp_path):
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        paths = write(page_of(review([one])), folder)
    assert [path.name for path in paths] == ["review.md", "report.html"]
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "review.md"]


# ---- Figures as they are read ----


def test_figures_are_written_with_interval_unit_and_sample():
    estimate = Estimate(0.0412, 0.0012, 0.0812, 0.04, 250, 250)
    assert points(estimate) == "+4.1 points (+0.1 to +8.1; 250 pairs)"
    assert share(estimate._replace(n=1, prompts=1)) == "4.1 % (0.1 to 8.1; 1 pair)"
    assert nats(estimate._replace(prompts=60)) == "+0.041 nats per token (+0.001 to +0.081; 250 pairs of 60 prompts)"
    assert nats(None) == "-"
    assert "no interval" in nats(estimate._replace(low=-np.inf, high=np.inf))
    assert decimals(Estimate(0, -1e-5, 1e-5, 1, 9, 9)) == 6
    assert flips(ShareChange(estimate, 12, 3, 2.5)) == "12 turned right, 3 wrong, of 250 pairs; e = 2.50"
