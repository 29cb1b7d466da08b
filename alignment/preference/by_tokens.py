"""An optimizer step whose rows are divided into micro-batches by their tokens, whatever the rows are: the same step."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..run.guards import GuardedSteps
from .collate import Batch, Row, on_device
from .division import read_division

logger = logging.getLogger(__name__)


class StepsByTokens(GuardedSteps):
    """A Trainer whose steps may come as the rows of all their micro-batches, which it then divides evenly.

    The subclass has `max_tokens`, says how rows are divided (`parts_of`), what a batch is that weighs nothing (`weightless`),
    and what becomes of the budget when a micro-batch does not fit (`halve`); its `get_batch_samples` gives a step's last
    sample `micro_batches`, lists of rows, and `rounds`, and the others empty `micro_batches`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reduces_each = self.accelerator.distributed_type == DistributedType.FSDP
        if self.reduces_each:
            # Gradients that wait for the step's last micro-batch are whole ones, on every GPU: 26 GB of them for 8B.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    def next_start(self) -> str:
        tokens = self.next_budget()
        return f"The next start takes micro-batches of at most {tokens:,} tokens, and goes on. " if tokens else ""

    def next_budget(self) -> int | None:
        """Tokens of a micro-batch that the next start takes, where they are fewer than this one's; none where a recipe says."""
        asked = self.args.max_tokens_per_micro_batch
        written = read_division(Path(self.args.output_dir, "_run")) if asked == "auto" else None
        if written is None or self.max_tokens is None or written.max_tokens >= self.max_tokens:
            return None
        return written.max_tokens

    def parts_of(self, rows: list[Row], at_least: int = 1) -> list[list[Row]]:
        """Micro-batches within the budget, at least so many where there are as many rows."""
        raise NotImplementedError

    def weightless(self, batch: Batch) -> Batch:
        """The batch again, without weight in loss, gradient and figures."""
        raise NotImplementedError

    @contextmanager
    def collating(self, collator: Callable[[list[Row]], Batch]) -> Iterator[None]:
        """Loaders that are made inside collate so."""
        own, self.data_collator = self.data_collator, collator
        try:
            yield
        finally:
            self.data_collator = own

    def divided_evenly(self, rows: list[Row]) -> tuple[list[list[Row]], int]:
        """This process's rows in micro-batches within the budget, and how many the process with the most makes: as many."""
        parts = self.parts_of(rows)
        if self.accelerator.num_processes == 1:
            return parts, len(parts)
        most = int(self.accelerator.gather(torch.tensor([len(parts)], device=self.args.device)).max())
        even = self.parts_of(rows, at_least=most)
        return even if len(even) <= most else parts, most

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch, or of all of a step where the step is divided by tokens."""
        if "micro_batches" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        if not inputs["micro_batches"]:
            return torch.zeros((), device=self.args.device)
        while True:
            try:
                return self.divided_step(model, inputs, num_items_in_batch)
            except torch.OutOfMemoryError:
                before = self.max_tokens
                if not self.halve():
                    raise
            logger.warning(
                "step %d: a micro-batch of %s tokens did not fit; from here on %s.",
                self.state.global_step + 1, f"{before:,}", f"{self.max_tokens:,}",
            )  # fmt: skip
            self.forget_step(model)
            parts, rounds = self.divided_evenly([row for part in inputs["micro_batches"] for row in part])
            inputs = {**inputs, "micro_batches": parts, "rounds": rounds}

    def forget_step(self, model: nn.Module) -> None:
        """Let the running step begin again: a step begins without gradients."""
        model.zero_grad()
        self.step_rows.clear()
        self.micro_batch = None
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()

    def divided_step(self, model: nn.Module, inputs: Batch, step: Any) -> Tensor:
        """The step's loss, after forward and backward of all its micro-batches."""
        parts, losses = inputs["micro_batches"], []
        for number in range(inputs["rounds"]):
            last = number == inputs["rounds"] - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last or self.reduces_each else self.accelerator.no_sync(model):
                # Made while the GPU computes the one before. A process that has fewer repeats its last one, without weight:
                # collectives come in equal numbers.
                batch = on_device(self.data_collator(parts[min(number, len(parts) - 1)]), self.args.device)
                batch = batch if number < len(parts) else self.weightless(batch)
                losses.append(super().training_step(model, batch, step))
        return torch.stack(losses).sum()


def smaller_budget(tokens: int, least: int) -> list[str]:
    """The setting that halves a micro-batch of so many tokens; none where it cannot be smaller than it is."""
    smaller = max(tokens // 2, least)
    return [f"max_tokens_per_micro_batch: {smaller}: the same steps, divided by tokens"] if smaller < tokens else []
