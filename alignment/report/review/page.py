"""review.md and one self-contained report.html: no script, nothing from a network."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from . import plots, wording
from .comparison import Cell, Comparison, cells_of, compare_all
from .conventions import DELTA
from .figures import Table
from .logs import Log
from .reading import Reading
from .signals import Signals, lengths_of
from .verdict import Verdict, verdict_of

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


class Plot(NamedTuple):
    """An SVG element, and what it shows."""

    svg: Markup
    caption: str


class Section(NamedTuple):
    """Of a page: lines of text, plots side by side, tables."""

    title: str
    lines: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()


class Page(NamedTuple):
    """What is written: a title, the verdict or decision in a sentence, sections."""

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]


class Review(NamedTuple):
    """All that is said of some runs: one of each for each run, and their comparisons."""

    runs: Sequence[Reading]
    signals: Sequence[Signals]
    verdicts: Sequence[Verdict]
    comparisons: Sequence[Comparison]
    cells: Sequence[Cell]
    delta: float


def review(runs: Sequence[Reading], delta: float = DELTA, couples: Collection[tuple[str, str]] | None = None) -> Review:
    """couples: names of the runs that are compared with each other; None: every two."""
    signals = [run.signals() for run in runs]
    verdicts = [verdict_of(each, delta) for each in signals]
    return Review(runs, signals, verdicts, compare_all(runs, couples), cells_of(runs), delta)


def in_words(found: Review) -> str:
    """For the terminal."""
    parts = [
        wording.summary(run, signals, verdict, found.delta)
        for run, signals, verdict in zip(found.runs, found.signals, found.verdicts, strict=True)
    ]
    if found.comparisons:
        parts.append(plain(wording.comparison_table(found.comparisons)))
    return "\n\n".join(parts)


def page_of(found: Review) -> Page:
    several = len(found.runs) > 1
    title = "Review of " + (f"{len(found.runs)} runs" if several else found.runs[0].name)
    lead = [
        (f"{run.name}: " if several else "") + wording.headline(verdict)
        for run, verdict in zip(found.runs, found.verdicts, strict=True)
    ]
    spread = next((each.held_out.spread for each in found.signals if each.held_out), None) if not several else None
    return Page(title, lead, [
        *([overview(found)] if several else []),
        *(section for of_run in zip(found.runs, found.signals, found.verdicts, strict=True)
          for section in run_sections(*of_run, found.delta, several=several)),
        Section("What the thresholds are", tables=[wording.convention_table(found.delta, spread)]),
    ])  # fmt: skip


def overview(found: Review) -> Section:
    scored = [
        (run.name, each.held_out.accuracy_after) for run, each in zip(found.runs, found.signals, strict=True) if each.held_out
    ]
    shown, tables = [], [wording.overview_table(found.runs, found.signals, found.verdicts)]
    if scored:
        shown.append(
            Plot(
                Markup(plots.run_accuracies(*zip(*scored, strict=True))), "Held-out accuracy at the last step, 95 % intervals."
            )
        )
    if found.comparisons:
        names = [f"{plots.shortened(each.first)}\n- {plots.shortened(each.second)}" for each in found.comparisons]
        estimates = [each.by_d.change for each in found.comparisons]
        svg = plots.paired_differences(names, estimates, found.delta)
        shown.append(Plot(Markup(svg), "Paired differences on shared held-out pairs, 95 % intervals, not adjusted."))
        tables.append(wording.comparison_table(found.comparisons))
    if any(len(cell.runs) > 1 for cell in found.cells):
        tables.append(wording.seed_table(found.cells))
    lines = (
        []
        if found.comparisons
        else ["These runs share no held-out pairs that could be matched: nothing is compared pair by pair."]
    )
    return Section("Side by side", lines, shown, tables)


def run_sections(run: Reading, signals: Signals, verdict: Verdict, delta: float, *, several: bool) -> list[Section]:
    """One run's: its verdict with the plots that show why, then what else is known."""
    held_out = signals.held_out
    name = f"{run.name}: " if several else ""
    lines = [*run.notes, *wording.remarks(verdict, held_out and held_out.n, delta)]
    if run.objective:
        lines.insert(0, f"Objective: {run.objective}; seed {run.seed}; recipe and versions stand in {run.path.name}/.")
    shown, tables = [], []
    if held_out is not None:
        if held_out.d_change is not None:
            shown += pair_plots(run, signals, delta)
        lengths = lengths_of(run.held_out)
        shown.append(Plot(Markup(plots.by_length(lengths)), "Accuracy by d on held-out pairs, by length, 95 % intervals."))
        tables += [wording.pair_table(signals), wording.length_table(held_out, lengths)]
    if signals.replies is not None:
        tables.append(wording.reply_table(signals.replies))
    if signals.log is not None:
        if curves := plots.log_curves(run.log or Log(()), run.held_out_log):
            shown.append(Plot(Markup(curves), "As logged, by the run's own reward."))
        tables.append(wording.log_table(signals.log))
    return [Section(f"{name}{verdict}", lines, shown, tables)]


def pair_plots(run: Reading, signals: Signals, delta: float) -> list[Plot]:
    n = len(run.held_out)
    return [
        Plot(Markup(plots.changes(signals, delta)), "What the verdict is made of, 95 % intervals."),
        Plot(
            Markup(plots.pair_by_pair(run.held_out)), f"Each of {n:,} held-out pairs; green and red ones changed the accuracy."
        ),
        Plot(Markup(plots.distributions(run.held_out, run.probe)), "d before and after."),
    ]


# ---- Files ----


def write(page: Page, folder: Path, names: tuple[str, str] = ("review.md", "report.html")) -> tuple[Path, Path]:
    """folder/review.md and folder/report.html, or others of these kinds, each whole or not there. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name, text in zip(names, (markdown(page), html(page)), strict=True):
        path, staged = folder / name, folder / f".{name}.new"
        staged.write_text(text, encoding="utf-8", errors="backslashreplace")  # records hold halves of characters at times
        staged.replace(path)
        found.append(path)
    return found[0], found[1]


def html(page: Page) -> str:
    return TEMPLATES.get_template("report.html.jinja").render(page=page)


def markdown(page: Page) -> str:
    """The page without its plots."""
    parts = [f"# {page.title}", *(f"**{line}**" for line in page.lead)]
    for section in page.sections:
        parts.append(f"## {section.title}")
        if section.lines:
            parts.append("\n".join(f"- {line}" for line in section.lines))
        for table in section.tables:
            cells = [table.header, ("---",) * len(table.header), *table.rows]
            rows = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells]
            parts += [f"### {table.title}", "\n".join(rows), *([table.note] if table.note else [])]
    return "\n\n".join(parts) + "\n"


def plain(table: Table) -> str:
    """For the terminal: what each row says, a line each."""
    lines = [f"{table.title}:"]
    for first, *rest in table.rows:
        lines.append(f"  {first}")
        lines += [f"    {name:28} {value}" for name, value in zip(table.header[1:], rest, strict=True)]
    return "\n".join([*lines, f"  {table.note}"])
