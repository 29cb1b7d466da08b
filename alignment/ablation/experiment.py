"""An experiment from its matrix to its decisions; started again it goes on, from whatever its cells' folders hold."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import huggingface_hub.constants
from filelock import FileLock, Timeout

from ..errors import UserError
from ..pipeline import Method
from ..recipe.values import expanded
from ..run.failures import report
from ..run.output import outlast_readers
from ..run.signals import RunInterrupted, StopSignals
from .cells import Cell, make_cells, recipe_text
from .checks import check_cells
from .deciding import State, compared_axes, decide, decisions_of, fallbacks_due, next_cells, stable_values
from .matrix import Matrix, read_matrix, refuse_unknown_methods
from .outcomes import FINISHED, Outcome, counts, outcome_of
from .page import write_pages
from .results import Result, read_result
from .running import ClusterLauncher, Launcher, LocalLauncher, Progress, shown_command

LOCK_FILE = "lock"


@dataclass
class Experiment:
    """What is run, by what, and what has come of it so far."""

    matrix: Matrix
    cells: Sequence[Cell]
    launcher: Launcher
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def state(self) -> State:
        return State(self.matrix, self.cells, self.outcomes, self.results)

    def carry_out(self) -> None:
        """Run what is left to be run: wave by wave, where the next cells hang on what the last ones showed."""
        for wave in self.waves():
            todo = [cell for cell in wave if not self.known(cell)]
            if not todo:
                continue
            progress = Progress(wave, self.outcomes)
            try:
                self.launcher.run(todo, lambda cell, outcome, progress=progress: self.take(cell, outcome, progress))
            finally:
                progress.bar.close()

    def waves(self) -> Iterator[list[Cell]]:
        state = self.state
        if not self.matrix.one_at_a_time:
            yield state.own
        else:
            yield from self.search()
        if due := fallbacks_due(state):
            print(f"Not stable: {', '.join(told(state))}. The fallback is run.", flush=True)
            yield due

    def search(self) -> Iterator[list[Cell]]:
        """Each axis in turn, the others at what was taken so far, or at their first value."""
        state = self.state
        taken = {axis.name: axis.values[0].name for axis in compared_axes(self.matrix)}
        for axis in compared_axes(self.matrix):
            cells = next_cells(state, taken, axis)
            yield cells
            if decision := decide(state, axis, cells):
                taken[axis.name] = decision.taken
                print(f"{decision.question}: {decision.taken} is taken.", flush=True)
            elif stable := stable_values(state, axis, cells):
                taken[axis.name] = stable[0]
                why = "the only value with a stable run" if len(stable) == 1 else "the first of those that cannot be compared"
                print(f"{axis.name}: {stable[0]} is taken, {why}.", flush=True)

    def known(self, cell: Cell) -> bool:
        """Whether the cell has been settled, by an earlier command or by this one; what it showed is read then."""
        outcome = outcome_of(cell)
        if outcome.is_settled:
            self.settle(cell, outcome)
        return outcome.is_settled

    def take(self, cell: Cell, outcome: Outcome | None, progress: Progress) -> None:
        if outcome is not None:
            self.settle(cell, outcome)
        progress.tell(cell, outcome)

    def settle(self, cell: Cell, outcome: Outcome) -> None:
        self.outcomes[cell.name] = outcome
        if outcome.state == FINISHED and cell.name not in self.results:
            self.results[cell.name] = read_result(cell)


def told(state: State) -> list[str]:
    return [f"{cell.name} ({what})" for cell in state.own if (what := state.instability(cell))]


# ---- The command ----


def main(methods: Mapping[str, Method], entry_points: Path, argv: Sequence[str] | None = None) -> None:
    """Exit with 2 for a mistake in the matrix, 75 if it was stopped and goes on, 1 if a cell has failed."""
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    outlast_readers()
    parser = argparse.ArgumentParser(description="Run a matrix of recipes, compare them and decide; started again it goes on.")
    parser.add_argument("matrix", help="MATRIX.yaml: base, axes, fallback, launch")
    parser.add_argument("--output_dir", help="instead of the matrix's, or of outputs/ablations/MATRIX")
    parser.add_argument("--check", action="store_true", help="check all recipes, say what would be run, and end there")
    options = parser.parse_args(argv)
    try:
        failed = run_matrix(options, methods, entry_points)
    except UserError as error:
        sys.exit(report(error, status=2))
    except RunInterrupted as error:
        sys.exit(report(error, status=75))
    sys.exit(1 if failed else 0)


def run_matrix(options: argparse.Namespace, methods: Mapping[str, Method], entry_points: Path) -> bool:
    """Whether a cell has failed. One that is not finite has not: that is what was to be found out."""
    matrix = read_matrix(options.matrix)
    if options.output_dir:
        matrix = replace(matrix, output_dir=Path(expanded(options.output_dir)))
    refuse_unknown_methods(matrix, methods)
    cells = make_cells(matrix, methods)
    texts = {cell.name: recipe_text(cell, shown_command(cell, matrix.launch, entry_points), matrix.path.stem) for cell in cells}
    for line in check_cells(matrix, cells, texts, methods):
        print(line)
    print(plan_of(matrix, cells), flush=True)
    stop = StopSignals()
    launcher = launcher_of(matrix, entry_points, stop)
    if options.check:
        return False
    with stop.listening(), stop.deferred(), only_experiment(matrix.output_dir):
        for cell in cells:
            write_once(cell.recipe_file, texts[cell.name])
        experiment = Experiment(matrix, cells, launcher)
        experiment.carry_out()
        state = experiment.state
        print(write_pages(state, decisions_of(state)), flush=True)
    return any(not outcome.is_settled for outcome in experiment.outcomes.values())


def write_once(path: Path, text: str) -> None:
    """A file that holds the text already stays as it is."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def plan_of(matrix: Matrix, cells: Sequence[Cell]) -> str:
    own = [cell for cell in cells if not cell.is_fallback]
    first = counts(outcome_of(cell) for cell in own)
    more = f"; {len(cells) - len(own)} of the fallback, where they are needed" if len(cells) > len(own) else ""
    turns = ", one axis at a time" if matrix.one_at_a_time else ""
    return f"{matrix.path.stem}: {len(own)} cells ({first}){turns}{more}; in {matrix.output_dir}"


def launcher_of(matrix: Matrix, entry_points: Path, stop: StopSignals) -> Launcher:
    """Raises UserError where the cluster, or submitit, refuses what the matrix asks for."""
    if matrix.launch.on == "local":
        if matrix.launch.more:
            print(f"launch: {', '.join(matrix.launch.more)} are for a cluster, and not read on this machine")
        return LocalLauncher(matrix.launch, entry_points, stop)
    launcher = ClusterLauncher(matrix.launch, entry_points, stop)
    launcher.check(matrix.output_dir / "jobs")
    return launcher


@contextmanager
def only_experiment(folder: Path) -> Iterator[None]:
    """Raises UserError if another command runs this experiment."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: another command runs this experiment; stop it, or choose another --output_dir") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --output_dir") from error
    try:
        yield
    finally:
        lock.release()
