"""Did a run generalize? `python scripts/review_run.py RUN [RUN ...]` says so, and writes review.md and report.html."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from alignment.errors import UserError
from alignment.report.review.conventions import DELTA
from alignment.report.review.page import in_words, page_of, review, write
from alignment.report.review.reading import read_runs


def main(argv: Sequence[str] | None = None) -> None:
    """Exits with 2, and one message, for a user's mistake."""
    args = parser().parse_args(argv)
    try:
        found = review(read_runs(args.runs, args.eval_log), args.delta)
        paths = write(page_of(found), args.output or default_output(args.runs))
    except UserError as error:
        sys.exit(report(error))
    except OSError as error:
        sys.exit(report(f"{error.filename}: cannot be written ({error.strerror}); --output names another folder"))
    print(in_words(found))
    print("\n" + "\n".join(str(path) for path in paths))


def report(error: object) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, a trainer_state.json or a JSONL log")
    given.add_argument("--eval_log", type=Path, help="a separate log of held-out figures, of a single RUN")
    given.add_argument("--delta", type=share, default=DELTA, help=f"change of accuracy that matters (default {DELTA})")
    given.add_argument("--output", type=Path, help="folder of review.md and report.html (default: RUN; of several, review/)")
    return given


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 0.5:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and below 0.5, as 0.03 for 3 points")
    return value


def default_output(runs: Sequence[Path]) -> Path:
    """A run's own folder; beside a log; of several runs, where the command was given."""
    if len(runs) > 1:
        return Path("review")
    return runs[0] if runs[0].is_dir() else runs[0].parent


if __name__ == "__main__":
    main()
