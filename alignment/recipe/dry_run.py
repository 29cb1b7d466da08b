"""What a recipe's dry run is told: `--dry_run`, and what to reckon with."""

from dataclasses import dataclass, field
from typing import Any

from ..errors import Problem

# What says nothing without dry_run.
READ_ALONE = ("show_row", "gpu_memory", "tokens_per_second", "speed_of", "gpu_price")


@dataclass
class DryRunArguments:
    """Fields of a dry run, which shows what a run would be and trains nothing."""

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Show what would be trained, on how much memory and for how long, and end there: no launcher, GPU or "
            "weights needed, nothing written into output_dir. strategy and num_processes say what to reckon with. Status 0: "
            "it would start; 1: it will not fit gpu_memory; 2: recipe, data or model would be refused."
        },
    )
    show_row: int | None = field(
        default=None, metadata={"help": "With dry_run: this row of the training split instead of three, whole, token by token."}
    )
    gpu_memory: float | None = field(
        default=None, metadata={"help": "With dry_run: GiB of each GPU (80 for an 80 GB card) that the run has to fit."}
    )
    tokens_per_second: float | None = field(
        default=None,
        metadata={
            "help": "With dry_run: distinct tokens a second of all processes, as a run logs them, to reckon the time with."
        },
    )
    speed_of: str | None = field(
        default=None, metadata={"help": "With dry_run: folder of an earlier run, to take the speed from its metrics.jsonl."}
    )
    gpu_price: float | None = field(
        default=None,
        metadata={"help": "With dry_run: price of one GPU for an hour, in whatever currency, to reckon the cost with."},
    )

    def dry_run_problems(self) -> list[Problem]:
        given = {key: getattr(self, key) for key in READ_ALONE if getattr(self, key) is not None}
        if not self.dry_run:
            return [
                Problem(key, value, "is read by a dry run alone; add --dry_run, or remove it") for key, value in given.items()
            ]
        problems = [Problem(key, value, "must be positive") for key, value in given.items() if not is_usable(key, value)]
        if getattr(self, "prepare_only", False):
            problems.append(Problem("prepare_only", True, "cannot be combined with dry_run, which prepares the data too"))
        if self.tokens_per_second is not None and self.speed_of is not None:
            problems.append(Problem("speed_of", self.speed_of, "cannot be combined with tokens_per_second; choose one"))
        if self.gpu_price is not None and self.tokens_per_second is None and self.speed_of is None:
            problems.append(Problem("gpu_price", self.gpu_price, "needs a speed; add --tokens_per_second or --speed_of"))
        return problems


def is_usable(key: str, value: Any) -> bool:
    return isinstance(value, str) or (value >= 0 if key == "show_row" else value > 0)
