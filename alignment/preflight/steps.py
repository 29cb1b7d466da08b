"""How many optimizer steps a run takes, how many tokens they have, and how long that lasts."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..errors import UserError
from ..recipe.configs import RunArguments
from ..recipe.values import text

FORWARD_SHARE = 1 / 3  # of a training step's operations: what evaluating a token costs


class Schedule(NamedTuple):
    """A run's steps over all processes; rows are pairs or conversations."""

    processes: int
    per_device: int  # rows of a forward pass
    accumulation: int
    rows_per_step: int
    steps_per_epoch: int
    steps: int
    evaluations: int
    checkpoints: int

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch


def schedule_of(args: RunArguments, rows: int) -> Schedule:
    """As the Trainer counts, with batches that accelerate deals out among processes."""
    processes, size = args.planned_processes, args.per_device_train_batch_size
    batches = rows // size // processes if args.dataloader_drop_last else math.ceil(math.ceil(rows / size) / processes)
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    epochs = math.ceil(steps / per_epoch)
    return Schedule(
        processes, size, args.gradient_accumulation_steps, args.rows_per_forward * args.gradient_accumulation_steps, per_epoch,
        steps,
        # Also when all is trained and, where pairs are scored, before the first step.
        evaluations=times(args.eval_strategy, args.eval_steps, steps, epochs) + (1 + scores_first(args)) * bool(args.do_eval),
        checkpoints=times(args.save_strategy, args.save_steps, steps, epochs),
    )  # fmt: skip


def scores_first(args: RunArguments) -> bool:
    return bool(getattr(args, "score_step_0", False))


def times(strategy: str, every: float | None, steps: int, epochs: int) -> int:
    """How often something happens that is due every so many steps (below 1: a share of all) and at the last, or every epoch."""
    name = text(strategy)
    if name == "epoch":
        return epochs
    if name != "steps" or not every:
        return 0
    return math.ceil(steps / (math.ceil(steps * every) if every < 1 else int(every)))


# ---- Tokens ----


class StepTokens(NamedTuple):
    """Distinct tokens of the full steps of an epoch, over all processes."""

    least: int
    mean: float
    most: int
    deviation: float
    epoch: int  # of all rows


def step_tokens(args: RunArguments, tokens: np.ndarray, rows_per_step: int, lengths: np.ndarray | None = None) -> StepTokens:
    """tokens: of each row. lengths: what rows are grouped by under group_by_length; None: their tokens.

    The order is drawn as the run draws its own, with its seed but not with the state that the run's generator is in by then.
    """
    ordered = tokens[order_of(args, tokens if lengths is None else lengths)]
    full = ordered[: max(len(ordered) // rows_per_step, 1) * rows_per_step]
    sums = np.add.reduceat(full, np.arange(0, len(full), rows_per_step))
    return StepTokens(int(sums.min()), float(sums.mean()), int(sums.max()), float(sums.std()), int(tokens.sum()))


def order_of(args: RunArguments, lengths: np.ndarray) -> np.ndarray:
    kind = str(text(args.train_sampling_strategy))
    generator = torch.Generator().manual_seed(args.seed if args.data_seed is None else args.data_seed)
    if kind == "sequential":
        return np.arange(len(lengths))
    if kind == "group_by_length":
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return np.asarray(get_length_grouped_indices(lengths.tolist(), size, generator=generator))
    return torch.randperm(len(lengths), generator=generator).numpy()


# ---- Time ----


class Speed(NamedTuple):
    """Distinct tokens a second of all processes together, and how that is known."""

    tokens_per_second: float
    source: str


class Duration(NamedTuple):
    """Hours, and the price of all GPUs for them."""

    training: float
    scoring: float
    cost: float | None

    @property
    def hours(self) -> float:
        return self.training + self.scoring


def speed_of(args: RunArguments) -> Speed | None:
    """What the command line says; None if nothing. Raises UserError for a run that logged no speed."""
    if args.tokens_per_second is not None:
        return Speed(args.tokens_per_second, "as given")
    return None if args.speed_of is None else speed_of_run(Path(args.speed_of), args.planned_processes)


def speed_of_run(folder: Path, processes: int) -> Speed:
    """The median of what the run logged, per process, times the processes of this one."""
    place = f"speed_of = {str(folder)!r}"
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        speeds = [record["tokens_per_second"] for record in map(json.loads, lines) if "tokens_per_second" in record]
        then = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["processes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{place}: is not the folder of a run ({error}); give one with metrics.jsonl and environment.json"
        ) from error
    if not speeds:
        raise UserError(f"{place}: its metrics.jsonl has no tokens_per_second; give --tokens_per_second")
    median = float(np.median(speeds))
    return Speed(median / then * processes, f"{median:,.0f} tokens/s of {folder} on {then} processes")


def duration_of(speed: Speed, schedule: Schedule, epoch: int, scored: int, price: float | None) -> Duration:
    """epoch: tokens of all training rows; scored: of all evaluations and references. Loading and saving come on top."""
    training = epoch * schedule.epochs / speed.tokens_per_second / 3600
    scoring = scored * FORWARD_SHARE / speed.tokens_per_second / 3600
    cost = None if price is None else (training + scoring) * schedule.processes * price
    return Duration(training, scoring, cost)
