"""SFTTrainer: TRL's, with this suite's steps by tokens, checkpoints, guards against numbers not finite, and evaluation."""

import logging
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import trl
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from alignment.errors import UserError
from alignment.model.layers import use_fused_kernels
from alignment.preference.by_tokens import StepsByTokens, smaller_budget
from alignment.preference.collate import Batch, Row, Rows, parts_by_tokens
from alignment.preference.division import Division, read_division, write_division
from alignment.preference.fitting import is_gpu
from alignment.preference.metrics import RunningMeans
from alignment.run.card import write_card
from alignment.run.durable import DurableTrainer

logger = logging.getLogger(__name__)

BATCH_MEANS = ("entropy", "mean_token_accuracy")  # TRL's, over the tokens of a batch of all processes


class SFTTrainer(StepsByTokens, DurableTrainer, trl.SFTTrainer):
    """Supervised fine-tuning on tokenized conversations; see trl.SFTTrainer.

    Raises UserError for steps by tokens of a mixture of experts whose router loss is trained, and NonFiniteStep as the
    trainers of pairs do.
    """

    max_tokens: int | None = None  # of a micro-batch; None: a fixed count of conversations

    def __init__(self, *args: Any, **kwargs: Any):
        # For the model card; the pipeline knows them.
        self.base_model_name: str | None = None
        self.dataset_names: list[str] = []
        self.template_settings: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)
        # Behind TRL's constructor, which calls the setting deprecated; the Trainer reads both when training begins.
        use_fused_kernels(self.args)
        logger.info("Attention: %s.", self.attention_kernel())
        self.max_tokens = self.asked_tokens()
        if self.max_tokens is not None:
            logger.info("Steps are divided into micro-batches of at most %s tokens.", f"{self.max_tokens:,}")

    def asked_tokens(self) -> int | None:
        """What the recipe says; left open, what a micro-batch of its count takes at most, on a GPU."""
        asked = self.args.max_tokens_per_micro_batch
        if asked == "auto":
            tokens = self.tokens_of_count() if is_gpu(self.args.device) else None
            written = read_division(Path(self.args.output_dir, "_run"))  # by a start that ran out of memory
            return tokens if tokens is None or written is None else min(written.max_tokens, tokens)
        if asked is not None and self.aux_loss_enabled:
            raise UserError(
                f"max_tokens_per_micro_batch = {asked}: this model's router loss is a mean over a micro-batch, and would be "
                "another one; give null, or router_aux_loss_coef: 0"
            )
        return asked

    def tokens_of_count(self) -> int | None:
        """What a fixed count of conversations takes at most; None where they cannot be divided by tokens, or have no limit."""
        length = self.args.max_length
        is_whole = self.args.packing or length is None or self.aux_loss_enabled
        return None if is_whole else self.args.per_device_train_batch_size * length

    # ---- Steps by tokens ----

    def parts_of(self, rows: list[Row], at_least: int = 1) -> list[list[Row]]:
        sizes = [len(row["input_ids"]) for row in rows]
        parts = parts_by_tokens(sizes, self.max_tokens, at_least, is_padded=not self.data_collator.padding_free)
        return [[rows[number] for number in part] for part in parts]

    def weightless(self, batch: Batch) -> Batch:
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of a step, and its labels on all processes; by tokens, the last sample has all of them."""
        samples, labels = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples or "rows" not in samples[0]:
            return samples, labels
        rows = [row for sample in samples for row in sample["rows"].rows]
        parts, rounds = self.divided_evenly(rows)
        _, labels = super().get_batch_samples(({"labels": torch.tensor(labels_of(row))} for row in rows), len(rows), device)
        whole = {"micro_batches": parts, "rounds": rounds}
        return [*({"micro_batches": []} for _ in samples[1:]), whole], labels

    def divided_step(self, model: nn.Module, inputs: Batch, step: Any) -> Tensor:
        """TRL's figures are means of micro-batches of one size; of these, means over their tokens."""
        figures = self._metrics["train"]
        begin, tokens = {name: len(figures[name]) for name in BATCH_MEANS}, self._total_train_tokens
        try:
            loss = super().divided_step(model, inputs, step)
            parts, rounds = inputs["micro_batches"], inputs["rounds"]
            counts = [sum(labelled(row) for row in part) for part in parts] + [0] * (rounds - len(parts))
            counts.append(sum(len(row["input_ids"]) for part in parts for row in part))
            *counts, seen = self.accelerator.reduce(torch.tensor(counts, device=self.args.device), reduction="sum").tolist()
            means = {name: fmean(figures[name][start:], counts) if any(counts) else 0.0 for name, start in begin.items()}
        finally:  # also where the step begins again
            for name, start in begin.items():
                del figures[name][start:]
            self._total_train_tokens = tokens
        self._total_train_tokens += seen
        figures["num_tokens"] = [self._total_train_tokens]
        for name, mean in means.items():
            figures[name].append(mean)
        return loss

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """As the Trainer, of the micro-batches of a step."""
        kind = self.args.include_num_input_tokens_seen
        if kind == "no" or "micro_batches" not in inputs:
            super()._track_num_input_tokens(inputs)
            return
        lengths = [[len(row["input_ids"]) for row in part] for part in inputs["micro_batches"]]
        is_padded = kind == "all" and not self.data_collator.padding_free
        count = sum(len(part) * max(part) if is_padded else sum(part) for part in lengths)
        self.state.num_input_tokens_seen += self.accelerator.gather(torch.tensor(count, device=self.args.device)).sum().item()

    def halve(self) -> bool:
        """After a micro-batch did not fit: half the tokens; whether so. Where others would wait, at the next start."""
        least = self.args.max_length or 1
        if self.args.max_tokens_per_micro_batch != "auto" or self.max_tokens <= least:
            return False
        smaller = max(self.max_tokens // 2, least)
        if self.args.world_size > 1:
            write_division(Path(self.args.output_dir, "_run"), Division(smaller, None))
            return False
        self.max_tokens = smaller
        return True

    def _save_rng_state(self, output_dir: str) -> None:
        """Also how steps are divided."""
        super()._save_rng_state(output_dir)
        if self.max_tokens is not None and self.args.should_save:
            write_division(Path(output_dir), Division(self.max_tokens, None))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """And divide them as they were, where the recipe leaves it open."""
        super()._load_rng_state(checkpoint)
        saved = read_division(Path(checkpoint)) if checkpoint and self.max_tokens is not None else None
        if saved is not None and self.args.max_tokens_per_micro_batch == "auto":
            self.max_tokens = min(saved.max_tokens, self.max_tokens)

    def smaller_batches(self) -> list[str]:
        if self.next_budget() is not None:
            return []
        tokens = self.max_tokens or self.tokens_of_count()
        return super().smaller_batches() if tokens is None else smaller_budget(tokens, self.args.max_length or 1)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            loss = (result[0] if return_outputs else result).detach()
            # TRL's batches do not know which rows they hold.
            tokens = (inputs["labels"] != -100).sum()
            self.note_rows(loss.isfinite()[None], loss, loss=loss[None], tokens=tokens[None])
        return result

    def describe_broken(self, cause: str, rows: list[dict[str, Any]]) -> str:
        places = ", ".join(f"{row['tokens']} tokens (rank {row['rank']})" for row in rows)
        return f"the {cause} of micro-batches of {places} is not finite"

    # ---- Evaluation: means over the tokens of all held-out rows, each row once on any number of processes ----

    def _get_dataloader(self, dataset: Dataset, description: str, *args: Any, **kwargs: Any) -> DataLoader:
        if description == "Training" and self.max_tokens is not None:
            with self.collating(undivided):
                return super()._get_dataloader(dataset, description, *args, **kwargs)
        if description == "Evaluation" and self.args.world_size > 1:
            dataset = filled_up(dataset, self.args.eval_batch_size * self.args.world_size)
        return super()._get_dataloader(dataset, description, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.eval_means = RunningMeans()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self.eval_means.flush(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = (inputs["labels"][:, 1:] != -100).sum().to(result[0].device)
        means = {name: self._metrics["eval"].pop(name)[-1] for name in BATCH_MEANS}
        for name, mean in {"loss": result[0], **means}.items():
            self.eval_means.add(name, torch.where(tokens > 0, mean * tokens, 0), tokens)
        return result

    # ---- Saving ----

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md: settings, data, held-out figures. TRL's names no model that is a folder, and no data."""
        settings = {
            f"{'packed rows' if self.args.packing else 'conversations'} per step": self.get_total_train_batch_size(self.args),
            "max_length": self.args.max_length,
            **({"chat template settings": f"`{self.template_settings}`"} if self.template_settings else {}),
        }
        about = {"base_model": self.base_model_name, "datasets": self.dataset_names}
        write_card(self, self.args.objective, **about, settings=settings)

    def sums_since_log(self) -> dict[str, Any]:
        return {"metrics": self._metrics["train"], "num_tokens": self._total_train_tokens}

    def restore_sums(self, sums: dict[str, Any]) -> None:
        self._metrics["train"].update(sums["metrics"])
        self._total_train_tokens = sums["num_tokens"]


def undivided(rows: list[Row]) -> Batch:
    """As they are, to be divided by tokens."""
    return {"rows": Rows(rows)}


def labels_of(row: Row) -> list[int]:
    return row.get("labels", row["input_ids"])


def labelled(row: Row) -> int:
    """Tokens of a row that are predicted and count."""
    return sum(label != -100 for label in labels_of(row)[1:])


def filled_up(rows: Dataset, multiple: int) -> Dataset:
    """With further rows up to a multiple, which have no labels and so do not count; else accelerate would repeat rows."""
    row = {**rows[0], "labels": [-100] * len(rows[0]["labels"])}
    missing = -len(rows) % multiple
    return concatenate_datasets([rows, Dataset.from_list([row] * missing, features=rows.features)]) if missing else rows
