"""SFTTrainer: TRL's, with this suite's checkpoints, and stopped by a loss or a gradient that is not finite."""

from typing import Any

import trl
from torch import Tensor, nn

from alignment.durable import DurableTrainer
from alignment.guards import GuardedSteps


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
