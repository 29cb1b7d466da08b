"""How an optimizer step is divided into micro-batches, by a fixed count of pairs or by tokens: the same step either way."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from ..data.prepare import longest_pair
from ..errors import UserError
from ..run.guards import GuardedSteps
from .collate import Batch, PackedCollator, PaddedCollator, RowCollator, token_bounded
from .metrics import RunningMeans
from .throughput import Throughput


class StepSize(NamedTuple):
    """What one optimizer step averages over, on all processes; scalar tensors."""

    pairs: Tensor
    chosen_tokens: Tensor


class DividedSteps(GuardedSteps):
    """A Trainer whose optimizer steps are divided into micro-batches of pairs; a subclass says what a micro-batch's loss is.

    The subclass has `throughput`, and appends to `step_sums` what it measures of each micro-batch: name -> sum and count.
    """

    throughput: Throughput

    def __init__(self, *args: Any, **kwargs: Any):
        self.train_means = RunningMeans()
        self.step_sums: list[dict[str, tuple[Tensor, Tensor | int]]] = []  # of the running step's micro-batches
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of a fixed number of pairs; with max_tokens_per_micro_batch their rows, which `get_batch_samples` divides."""
        collator = self.data_collator
        if self.args.max_tokens_per_micro_batch is not None:
            self.data_collator = RowCollator()
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device) -> tuple[list, StepSize | None]:
        """The micro-batches of one optimizer step, and how many pairs they are on all processes.

        Divided by tokens, the last sample has them all in `micro_batches`; the others, which the Trainer counts, have none.
        """
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_sums.clear()
        self.throughput.start_step()
        if samples and self.args.max_tokens_per_micro_batch is not None:
            rows = [row for sample in samples for row in sample["rows"].rows]
            divided = token_bounded(rows, self.args.max_tokens_per_micro_batch)
            empty: list[Batch] = [{"micro_batches": []} for _ in samples[1:]]
            samples = [*empty, {"micro_batches": send_to_device(divided, device)}]
        batches = [batch for sample in samples for batch in micro_batches(sample)]
        self.throughput.counts += [batch["token_counts"] for batch in batches]
        return samples, self.step_size(batches) if batches else None

    def step_size(self, batches: list[Batch]) -> StepSize:
        pairs = sum(len(batch["index"]) for batch in batches)
        chosen = sum(batch["is_response"].chunk(2)[0].sum() for batch in batches)
        counts = torch.stack([torch.as_tensor(pairs, device=chosen.device), chosen]).to(self.args.device)
        return StepSize(*self.accelerator.reduce(counts, reduction="sum"))

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: StepSize | None = None) -> Tensor:
        """Forward and backward of a micro-batch, or of all of a step where the step is divided by tokens."""
        if "micro_batches" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        batches = inputs["micro_batches"]
        if not batches:
            return torch.zeros((), device=self.args.device)
        # A process with fewer micro-batches repeats its last one without weight: collectives come in equal numbers.
        rounds = int(self.accelerator.gather(torch.tensor([len(batches)], device=self.args.device)).max())
        losses = []
        for number in range(rounds):
            last = number == rounds - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(model):
                batch = batches[number] if number < len(batches) else {**batches[-1], "repeated": True}
                losses.append(super().training_step(model, batch, num_items_in_batch))
        return torch.stack(losses).sum()

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """As the Trainer, of batches that may be packed, or divided further."""
        if self.args.include_num_input_tokens_seen == "no":
            return
        count = sum(input_tokens(batch, self.args.include_num_input_tokens_seen) for batch in micro_batches(inputs))
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


def micro_batches(sample: Batch) -> list[Batch]:
    return sample.get("micro_batches", [sample])


def input_tokens(batch: Batch, kind: str) -> int | Tensor:
    """Of all rows, padding included or (non_padding) not. A packed row has none, and no mask of one entry a token."""
    mask = batch["attention_mask"]
    return mask.sum() if kind == "non_padding" and mask.dim() == 2 else batch["input_ids"].numel()


def check_token_budget(budget: int, collator: PaddedCollator | PackedCollator, rows: Dataset | None) -> None:
    """Raises UserError if batches are not packed, or the longest pair alone is over the budget."""
    key = f"max_tokens_per_micro_batch = {budget}"
    if not isinstance(collator, PackedCollator):
        raise UserError(f"{key}: only packed batches are divided by tokens; remove it, or see pair_layout")
    longest = 0 if rows is None else longest_pair(rows)
    if longest > budget:
        raise UserError(f"{key}: the longest pair has {longest} tokens; give at least that, or lower max_length")
