"""What an experiment ends with: a table and decisions on the terminal, ablation.md, and ablation.html as of a review."""

import itertools
import textwrap
from collections.abc import Sequence

from ..report.review.figures import NONE, Table
from ..report.review.page import Page, Section, page_of, review, write
from .cells import Cell
from .deciding import State, compared_axes
from .decisions import Decision
from .outcomes import FINISHED

WIDTH = 120  # columns of the terminal's text
HEADER = (
    "cell", "verdict", "right by own reward", "probe - held-out, mean d (nats per token)", "late training margin (own reward)",
    "held-out loss",
)  # fmt: skip
SHORT = ("cell", "verdict", "right", "gap", "train margin", "held-out loss")
NOTE = (
    "Right: held-out pairs whose chosen response has the higher reward, the run's own, at the last step. d: chosen minus "
    "rejected mean log-probability per token; its mean over the training probe minus that over the held-out pairs is the gap. "
    "Late training margin: mean of the second half of the log, in the run's own units of reward."
)


def write_pages(state: State, decisions: Sequence[Decision]) -> str:
    """ablation.md and ablation.html in the experiment's folder, each whole or not there. Returns what the terminal shows."""
    page = page_of_experiment(state, decisions)
    paths = write(page, state.matrix.output_dir, ("ablation.md", "ablation.html"))
    return "\n".join([aligned([SHORT, *rows_of(state)]), "", *in_words(decisions), "", *map(str, paths)])


def page_of_experiment(state: State, decisions: Sequence[Decision]) -> Page:
    """The decisions and the cells, then what a review says of the runs."""
    title = f"{state.matrix.path.stem}: {len(shown(state))} cells"
    sections = [decision_section(decision) for decision in decisions]
    sections.append(Section("Cells", reasons(state), tables=[Table("What became of each", HEADER, rows_of(state), NOTE)]))
    found = [state.results[cell.name] for cell in shown(state) if cell.name in state.results]
    of_pairs = [result for result in found if result.is_of_pairs]
    if of_pairs:
        couples = comparable(state, [result.cell for result in of_pairs])
        sections += page_of(review([result.reading for result in of_pairs], couples=couples)).sections
    lead = [f"{decision.question}: {decision.taken or 'nothing is decided'}" for decision in decisions]
    return Page(title, lead or ["Nothing is decided: fewer than two values of any axis have a stable run to show."], sections)


def decision_section(decision: Decision) -> Section:
    lines = [f"Rule: {decision.rule}", f"Figures: {decision.because}."]
    lines += [f"Chance: {decision.chance}."] if decision.chance else []
    return Section(f"{decision.question}: {decision.taken or 'undecided'}", lines)


def shown(state: State) -> list[Cell]:
    """The cells that were begun: a search leaves some out, and so does a fallback that is not needed."""
    return [cell for cell in state.cells if cell.name in state.outcomes]


def comparable(state: State, cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """Names of cells that differ in one axis, which is compared, and in nothing else."""
    compared = [axis.name for axis in compared_axes(state.matrix)]
    return [
        (one.name, other.name)
        for one, other in itertools.combinations(cells, 2)
        if len(differing := [name for name in one.values if one.values[name] != other.values[name]]) == 1
        and differing[0] in compared
    ]


# ---- The table ----


def rows_of(state: State) -> list[tuple[str, ...]]:
    return [row_of(state, cell) for cell in shown(state)]


def row_of(state: State, cell: Cell) -> tuple[str, ...]:
    result = state.results.get(cell.name)
    if result is None:
        return (cell.name, state.outcomes[cell.name].state, *[NONE] * 4)
    unstable = state.instability(cell)
    verdict = str(result.verdict) + (f" ({unstable})" if unstable else "")
    loss = NONE if result.held_out_loss is None else f"{result.held_out_loss:.4f}"
    if not result.is_of_pairs:
        return (cell.name, "finished; no pairs", NONE, NONE, NONE, loss)
    n = len(result.reading.held_out)
    gap = NONE if result.gap is None else f"{result.gap:+.4f} ({len(result.reading.probe)} - {n} pairs)"
    late = result.signals.log and result.signals.log.late_margin
    margin = f"{late.mean:.3f} ({late.n} records)" if late else NONE
    return (cell.name, verdict, f"{result.right} of {n} ({result.right / n:.1%})", gap, margin, loss)


def reasons(state: State) -> list[str]:
    """Why cells are not finished."""
    unfinished = [(cell, state.outcomes[cell.name]) for cell in shown(state) if state.outcomes[cell.name].state != FINISHED]
    return [f"{cell.name}: {outcome.state}. {outcome.reason}" for cell, outcome in unfinished]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def in_words(decisions: Sequence[Decision]) -> list[str]:
    """For the terminal: each decision with its rule, figures, and what chance has to say."""
    lines = []
    for decision in decisions:
        section = decision_section(decision)
        lines += [
            section.title,
            *(textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="    ") for line in section.lines),
        ]
    return lines or ["Nothing is decided: fewer than two values of any axis have a stable run to show."]
