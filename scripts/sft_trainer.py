"""SFTTrainer: TRL's, with this suite's checkpoints, its guards against numbers that are not finite, and its evaluation."""

from typing import Any

import torch
import trl
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from alignment.preference.metrics import RunningMeans
from alignment.run.durable import DurableTrainer
from alignment.run.guards import GuardedSteps

BATCH_MEANS = ("entropy", "mean_token_accuracy")  # TRL's, over the tokens of a batch of all processes


class SFTTrainer(GuardedSteps, DurableTrainer, trl.SFTTrainer):
    """Supervised fine-tuning on tokenized conversations; see trl.SFTTrainer."""

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

    def sums_since_log(self) -> dict[str, Any]:
        return {"metrics": self._metrics["train"], "num_tokens": self._total_train_tokens}

    def restore_sums(self, sums: dict[str, Any]) -> None:
        self._metrics["train"].update(sums["metrics"])
        self._total_train_tokens = sums["num_tokens"]


def filled_up(rows: Dataset, multiple: int) -> Dataset:
    """With further rows up to a multiple, which have no labels and so do not count; else accelerate would repeat rows."""
    row = {**rows[0], "labels": [-100] * len(rows[0]["labels"])}
    missing = -len(rows) % multiple
    return concatenate_datasets([rows, Dataset.from_list([row] * missing, features=rows.features)]) if missing else rows
