"""SFTConfig: everything that a supervised fine-tuning recipe says about training."""

from dataclasses import dataclass, field

import trl

from alignment.recipe.configs import RunArguments
from alignment.report.objective import Objective


@dataclass
class SFTConfig(RunArguments, trl.SFTConfig):
    """TRL's SFTConfig, with the Trainer's own defaults where TRL's surprise: no bf16, which a CPU may lack."""

    bf16: bool = field(default=False, metadata={"help": "Compute in bf16."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass, to save memory."}
    )

    @property
    def objective(self) -> Objective:
        return Objective("SFT", "Supervised fine-tuning", "-log p(token), mean over tokens", {})
