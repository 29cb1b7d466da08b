"""Which decision is due for which cells: from results to the rules of decisions.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .cells import Cell
from .decisions import Decision, decide_fallback, decide_most, decide_objective, decide_rank
from .matrix import METHOD, Axis, Matrix
from .outcomes import Outcome
from .results import Result, by_value, figures_of, instability, paired

RANK, SEEDS = "lora_r", ("seed", "data_seed")


@dataclass(frozen=True)
class State:
    """All that is known of an experiment's cells, by name."""

    matrix: Matrix
    cells: Sequence[Cell]
    outcomes: Mapping[str, Outcome]
    results: Mapping[str, Result]

    def instability(self, cell: Cell) -> str | None:
        return instability(self.outcomes[cell.name], self.results.get(cell.name)) if cell.name in self.outcomes else None

    @property
    def own(self) -> list[Cell]:
        """Without the fallback's."""
        return [cell for cell in self.cells if not cell.is_fallback]

    @property
    def fallbacks(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.is_fallback]


def is_of_seeds(axis: Axis) -> bool:
    """Whether the axis repeats its runs and compares nothing."""
    return all(set(value.keys) <= set(SEEDS) for value in axis.values)


def compared_axes(matrix: Matrix) -> list[Axis]:
    return [axis for axis in matrix.axes if not is_of_seeds(axis) and len(axis.values) > 1]


def decisions_of(state: State) -> list[Decision]:
    """For each axis that compares anything, one for every combination of the others; then the fallback's."""
    found = [
        decision
        for axis in compared_axes(state.matrix)
        for group in groups(state.matrix, axis, state.own)
        if (decision := decide(state, axis, group))
    ]
    return [*found, *fallback_decisions(state)]


def groups(matrix: Matrix, axis: Axis, cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that differ in the axis and in their seeds alone."""
    seeds = [other.name for other in matrix.axes if is_of_seeds(other)]
    found: dict[tuple, list[Cell]] = {}
    for cell in cells:
        others = tuple((name, value) for name, value in cell.beside(axis.name) if name not in seeds)
        found.setdefault(others, []).append(cell)
    return list(found.values())


def decide(state: State, axis: Axis, group: Sequence[Cell]) -> Decision | None:
    """By the rule of what the axis varies; None where fewer than two of its values have a stable run to show."""
    stable = [cell for cell in group if state.instability(cell) is None]
    found = by_value(axis.name, state.results, stable)
    order = [value.name for value in ranked(axis)]
    names = [name for name in order if name in found]
    if len(names) < 2:
        return None
    figures = [figures_of(name, found[name]) for name in names]
    question = question_of(state.matrix, axis, group[0])
    if axis.asks_for(RANK):
        couples = [(high, low) for place, high in enumerate(names) for low in names[:place]]
        changes = {couple: change for couple in couples if (change := paired(found[couple[1]], found[couple[0]]))}
        return decide_rank(question, figures, changes)
    first = names[0]
    from_first = {name: change for name in names[1:] if (change := paired(found[name], found[first]))}
    return (decide_objective if axis.asks_for(METHOD) else decide_most)(question, figures, from_first)


def stable_values(state: State, axis: Axis, group: Sequence[Cell]) -> list[str]:
    """The values of the axis with a run that has finished and is stable, in their order."""
    stable = (cell for cell in group if cell.name in state.results and state.instability(cell) is None)
    return list(dict.fromkeys(cell.values[axis.name] for cell in stable))


def ranked(axis: Axis) -> Sequence:
    """The values of an axis in their order; ranks from the lowest up."""
    return sorted(axis.values, key=lambda value: int(value.keys[RANK])) if axis.asks_for(RANK) else axis.values


def question_of(matrix: Matrix, axis: Axis, cell: Cell) -> str:
    seeds = [other.name for other in matrix.axes if is_of_seeds(other)]
    others = [value for name, value in cell.beside(axis.name) if name not in seeds]
    return f"{axis.name} at {', '.join(others)}" if others else axis.name


# ---- The fallback ----


def fallbacks_due(state: State) -> list[Cell]:
    """The fallback's cells beside which a run is not stable."""
    axis = state.matrix.about(METHOD)
    unstable = {cell.beside(axis.name) for cell in state.own if state.instability(cell)} if axis else set()
    return [cell for cell in state.fallbacks if cell.beside(axis.name) in unstable]


def fallback_decisions(state: State) -> list[Decision]:
    axis = state.matrix.about(METHOD)
    if axis is None or not state.matrix.fallback:
        return []
    found = []
    for group in groups(state.matrix, axis, state.cells):
        unstable = {cell.name: what for cell in group if not cell.is_fallback and (what := state.instability(cell))}
        runs = [cell for cell in group if cell.is_fallback and cell in fallbacks_due(state)]
        if not unstable or not runs:
            continue
        done = all(cell.name in state.outcomes and state.outcomes[cell.name].is_settled for cell in runs)
        is_stable = all(state.instability(cell) is None for cell in runs) if done else None
        question = question_of(state.matrix, axis, group[0])
        found.append(decide_fallback(question, state.matrix.fallback[0].name, unstable, is_stable))
    return found


# ---- One axis at a time ----


def next_cells(state: State, taken: Mapping[str, str], axis: Axis) -> list[Cell]:
    """The cells that a search looks at next: every value of one axis, the others as they were taken; all seeds."""
    fixed = {other.name: taken[other.name] for other in compared_axes(state.matrix) if other is not axis}
    return [cell for cell in state.own if all(cell.values[name] == value for name, value in fixed.items())]
