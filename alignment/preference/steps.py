"""How an optimizer step is divided into micro-batches, by a fixed count of pairs or by tokens: the same step either way."""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from ..data.prepare import longest_pair
from ..errors import UserError
from .by_tokens import StepsByTokens
from .collate import Batch, PackedCollator, PaddedCollator, Row, RowCollator, TokenCounts, divided, on_device, token_counts
from .fitting import FittedSteps
from .metrics import RunningMeans
from .throughput import Throughput

logger = logging.getLogger(__name__)

BUDGETS = 4  # of tokens, that held-out pairs are read by: few are lost where a batch is divided


class StepSize(NamedTuple):
    """What one optimizer step averages over, on all processes: numbers, or scalar tensors where others have a share."""

    pairs: float | Tensor
    chosen_tokens: float | Tensor
    whole_chosen_tokens: float | Tensor  # of prompt and response


class DividedSteps(StepsByTokens, FittedSteps):
    """A Trainer whose optimizer steps are divided into micro-batches of pairs; a subclass says what a micro-batch's loss is.

    The subclass has `throughput`, and appends to `step_sums` what it measures of each micro-batch: name -> sum and count.
    """

    throughput: Throughput

    def __init__(self, *args: Any, **kwargs: Any):
        self.train_means = RunningMeans()
        self.step_sums: list[dict[str, tuple[Tensor, Tensor | int]]] = []  # of the running step's micro-batches
        super().__init__(*args, **kwargs)

    def _get_dataloader(self, dataset: Dataset, description: str, batch_size: int, *args: Any, **kwargs: Any) -> DataLoader:
        """Batches of a fixed number of pairs; divided by tokens their rows, which `get_batch_samples` divides.

        Held-out rows come by several budgets at once, so that `in_parts` has something to divide.
        """
        is_training = description == "Training"
        if not self.by_tokens or not (is_training or self.max_tokens is not None):
            return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        many = 1 if is_training else self.batches_at_once(dataset, batch_size)
        with self.collating(RowCollator(batch_size)):
            return super()._get_dataloader(dataset, description, batch_size * many, *args, **kwargs)

    def batches_at_once(self, rows: Dataset, size: int) -> int:
        """How many batches of `size` held-out pairs have about BUDGETS budgets of tokens, and not more than a process has."""
        tokens = float(self.tokens_of_pairs(rows).mean()) * size
        return max(1, min(round(BUDGETS * self.max_tokens / tokens), len(rows) // (size * self.args.world_size)))

    def in_parts(self, batch: Batch) -> Iterator[tuple[Batch, list[int]]]:
        """A held-out batch as it is evaluated: its pairs within the token budget, and where each stood in the batch.

        Collectives come in equal numbers: a process with fewer parts repeats its last one, whose places are then none.
        """
        if "rows" not in batch:
            yield batch, list(range(len(batch["index"])))
            return
        rows = [{**row, "place": place} for place, row in enumerate(batch["rows"].rows)]
        parts, rounds = self.divided_evenly(rows)
        for number in range(rounds):
            part = parts[min(number, len(parts) - 1)]
            collated = on_device(self.data_collator(part), self.args.device)
            yield collated, [row["place"] for row in part] if number < len(parts) else []

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device) -> tuple[list, StepSize | None]:
        """The micro-batches of one optimizer step, and how many pairs they are on all processes.

        Divided by tokens, the last sample has the rows of all of them in `micro_batches`; the others, which the Trainer
        counts, have none.
        """
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_sums.clear()
        self.throughput.start_step()
        if not samples:
            return samples, None
        if not self.by_tokens:
            counts = [sample["token_counts"] for sample in samples]
        else:
            parts, rounds = self.divided_evenly([row for sample in samples for row in sample["rows"].rows])
            counts = [token_counts(part, scores_prompt=self.data_collator.scores_prompt) for part in parts]
            whole = {"micro_batches": parts, "token_counts": counts, "rounds": rounds}
            samples = [*({"micro_batches": [], "token_counts": []} for _ in samples[1:]), whole]
        self.throughput.counts += counts
        return samples, self.step_size(counts)

    def parts_of(self, rows: list[Row], at_least: int = 1) -> list[list[Row]]:
        return divided(rows, self.data_collator, self.max_tokens, at_least=at_least)

    def weightless(self, batch: Batch) -> Batch:
        return {**batch, "repeated": True}

    def step_size(self, counts: list[TokenCounts]) -> StepSize:
        sums = [float(sum(getattr(count, name) for count in counts)) for name in ("pairs", "chosen", "whole_chosen")]
        if self.accelerator.num_processes == 1:
            return StepSize(*sums)
        return StepSize(*self.accelerator.reduce(torch.tensor(sums, device=self.args.device), reduction="sum"))

    def forget_step(self, model: nn.Module) -> None:
        super().forget_step(model)
        self.step_sums.clear()

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """As the Trainer, of batches that may be packed, or divided further."""
        if self.args.include_num_input_tokens_seen == "no":
            return
        kind = self.args.include_num_input_tokens_seen
        count = sum(input_tokens(counts, kind, self.data_collator) for counts in counts_of(inputs))
        counts = torch.as_tensor(count, device=self.args.device, dtype=torch.int64)
        self.state.num_input_tokens_seen += self.accelerator.gather(counts).sum().item()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Behind every step. The means are those of the steps that were taken."""
        for sums in self.step_sums if not self.is_skipping else ():
            for name, (total, count) in sums.items():
                self.train_means.add(name, total, count)
        self.step_sums.clear()
        super()._maybe_log_save_evaluate(*args, **kwargs)


class StepClock(TrainerCallback):
    """Tells the throughput where a step ends, so that evaluation and saving are not counted."""

    def __init__(self, throughput: Throughput):
        self.throughput = throughput

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.throughput.end_step()


def counts_of(sample: Batch) -> list[TokenCounts]:
    """Of the micro-batches that a sample of the Trainer's stands for."""
    counts = sample["token_counts"]
    return counts if isinstance(counts, list) else [counts]


def input_tokens(counts: TokenCounts, kind: str, collator: PaddedCollator | PackedCollator) -> int:
    """Of all rows, padding included or (non_padding) not; a packed row has none."""
    if isinstance(collator, PackedCollator):
        return counts.distinct
    return counts.unpadded if kind == "non_padding" else counts.padded


def check_token_budget(budget: int, collator: PaddedCollator | PackedCollator, rows: Dataset | None) -> None:
    """Raises UserError if the longest pair alone is over the budget."""
    is_padded = isinstance(collator, PaddedCollator)
    longest = 0 if rows is None else 2 * max(rows["length"][:]) if is_padded else longest_pair(rows)
    if longest > budget:
        key = f"max_tokens_per_micro_batch = {budget}"
        raise UserError(f"{key}: the longest pair has {longest} tokens; give at least that, or lower max_length")
