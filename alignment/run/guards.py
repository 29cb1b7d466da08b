"""Steps that go wrong: numbers that are not finite, before the optimizer moves a weight with them; and too little memory."""

import json
import logging
import math
import resource
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import AttentionInterface, Trainer
from transformers.trainer_utils import TrainOutput

from ..errors import TrainingStopped
from ..model.config_files import whole_model
from ..model.shared_prompt import describe_kernel, flex_in_one_type

logger = logging.getLogger(__name__)

NONFINITE_ROWS = "nonfinite_rows.jsonl"
MANY_ROWS = 16
SKIPPED = "skipped_steps"  # in the log: how many so far

Rows = dict[str, Tensor]  # "finite" and figures, each (B,)


class NonFiniteStep(TrainingStopped):
    """A loss or a gradient became NaN or infinite."""


class OutOfMemory(TrainingStopped):
    """The device has no room for a step."""


class GuardedSteps(Trainer):
    """A Trainer that stops on all processes, or skips a step, before a number that is not finite reaches a weight.

    A subclass calls `note_rows` for every micro-batch, inside compute_loss.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.step_rows: list[Rows] = []  # of the running step, micro-batch by micro-batch
        self.checked_rows: Rows = {}  # of the whole step, once their losses have been found finite
        self.loss_before_step: Tensor | None = None
        self.is_skipping = False
        self.micro_batch: dict[str, Any] | None = None  # while it is computed
        self.loss_is_whole = False  # the sum of losses goes back to the run's first step, though this attempt does not
        super().__init__(*args, **kwargs)
        keep_off_cudnn_attention()
        AttentionInterface.register("flex_attention", flex_in_one_type)

    # ---- Numbers that are not finite ----

    def note_rows(self, finite: Tensor, loss: Tensor, /, **figures: Tensor) -> None:
        """Remember a micro-batch; with the step's last one, in front of its backward, check the step on all processes.

        finite: (B,), whether each row's own numbers are; loss: (), theirs together; figures: (B,), for the record.
        Raises NonFiniteStep if a row of any process is not finite and no more steps may be skipped.
        """
        finite = finite & (torch.isfinite(loss) | ~finite.all())  # what no row explains concerns them all
        self.step_rows.append({"finite": finite, **figures})
        if not self.accelerator.sync_gradients:
            return
        self.checked_rows = {name: torch.cat([rows[name] for rows in self.step_rows]).detach() for name in self.step_rows[0]}
        self.step_rows.clear()
        broken = ~self.checked_rows["finite"]
        # A wait for the device; once a step, not once a micro-batch.
        if self.accelerator.reduce(broken.sum(), reduction="sum") > 0:
            self.break_step("loss", broken)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """In front of the optimizer's step. Raises NonFiniteStep on every process if the gradient is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        # fp16 overflows now and then; its loss scaler skips those steps.
        if not self.is_skipping and norm is not None and not self.args.fp16 and not math.isfinite(norm):
            self.break_step("gradient", torch.ones_like(self.checked_rows["finite"]))
        if not self.is_skipping:
            return norm
        self.optimizer.zero_grad()  # to None: a parameter without a gradient keeps its value, and its optimizer state
        if self.loss_before_step is not None:
            self._tr_loss.copy_(self.loss_before_step)
        return None

    def break_step(self, cause: str, broken: Tensor) -> None:
        """Write down the broken rows of all processes; then skip the step, or raise NonFiniteStep. On all processes."""
        step, rank = self.state.global_step + 1, self.accelerator.process_index
        skipped = skipped_steps(self.state.log_history)
        self.is_skipping = skipped < self.args.skip_nonfinite
        about = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, "rank": rank, "cause": cause,
            "skipped": self.is_skipping,
        }  # fmt: skip
        columns = {name: column[broken].tolist() for name, column in self.checked_rows.items() if name != "finite"}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        everywhere = gather_object([about | row for row in rows])
        path = Path(self.args.output_dir, NONFINITE_ROWS)
        if self.is_world_process_zero():
            append(path, everywhere)
        what = f"step {step}: {self.describe_broken(cause, everywhere)}"
        if self.is_skipping:
            logger.warning("%s. The step is skipped, %d of %d (%s).", what, skipped + 1, self.args.skip_nonfinite, path)
            return
        allowed = f"; skip_nonfinite = {skipped} steps were skipped before" if skipped else ""
        raise NonFiniteStep(
            f"{what}{allowed}. {self.fate_of_step(cause)} Rows and figures: {path}. Usual causes: a learning rate that is too "
            f"high, fp16, damaged weights. Attention was computed by {self.attention_kernel()}, on a {self.args.device.type}."
        )

    def attention_kernel(self, layout: str = "padded") -> str:
        """What computes attention, and why."""
        policy = whole_model(self.model)
        half = self.args.bf16 or self.args.fp16 or policy.dtype in (torch.bfloat16, torch.float16)
        return describe_kernel(policy, self.args.device, layout=layout, half=half)

    def describe_broken(self, cause: str, rows: list[dict[str, Any]]) -> str:
        places = places_of(rows)
        if cause == "gradient":
            return f"the gradient of training rows {places} is not finite although their losses are"
        return f"the log-probabilities of training rows {places} are not finite"

    def fate_of_step(self, cause: str) -> str:
        """What became of the step. ZeRO discards one whose gradient norm is not finite, where its configuration lets it."""
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if cause == "gradient" and deepspeed and self.accelerator.deepspeed_engine_wrapped.engine.was_step_applied():
            return "DeepSpeed took the step before anything could look at its gradient: only checkpoints are good."
        return "No step was taken with them; checkpoints are as they were."

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.is_skipping:  # in the log at once, so that a checkpoint of this step knows of it
            self.is_skipping = False
            log_is_due = self.control.should_log
            self.log({SKIPPED: skipped_steps(self.state.log_history) + 1})
            self.control.should_log = log_is_due
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A loss is the mean of the steps that were taken; there is none where all were skipped."""
        history, step = self.state.log_history, self.state.global_step
        if "loss" in logs and (skipped := skipped_since(begin := last_loss_step(history), history)):
            loss = logs.pop("loss")
            if step - begin > skipped:
                logs["loss"] = loss * (step - begin) / (step - begin - skipped)
        if "train_loss" in logs:
            if any("train_loss" in record and record["step"] == step for record in history):
                return  # an attempt that was stopped after training has logged it
            begin = 0 if self.loss_is_whole else self._initial_global_step
            del logs["train_loss"]
            if taken := step - begin - skipped_since(begin, history):
                logs["train_loss"] = self._total_loss_scalar / taken
        super().log(logs, start_time)

    # ---- Memory ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if not self.step_rows and self.is_in_train:
            self.loss_before_step = self._tr_loss.clone()
        self.micro_batch = inputs
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.micro_batch = None
        return loss

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Raises OutOfMemory, with what was computed and what would need less, where torch runs out of memory."""
        try:
            output = super().train(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(self.out_of_memory()) from error
        if self.state.global_step == 0:
            raise TrainingStopped(f"no step was trained: the {len(self.train_dataset)} training rows gave no whole batch.")
        return output

    def out_of_memory(self) -> str:
        device = self.args.device
        peak = peak_memory_gb(device)
        total = f" of {torch.cuda.mem_get_info(device)[1] / 2**30:.1f}" if device.type == "cuda" else ""
        what = (
            f"a micro-batch of {self.describe_batch(self.micro_batch)}"
            if self.micro_batch is not None
            else "the optimizer's step or an evaluation"
        )
        settings = settings_that_help(
            self.smaller_batches(),
            states_first=self.micro_batch is None or self.state_gb() > peak / 2,
            gradient_checkpointing=bool(self.args.gradient_checkpointing),
            half_precision=self.args.bf16 or self.args.fp16,
            divided=self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED),
            processes=self.args.world_size,
            adapter=getattr(self.model, "peft_config", None) is not None,
            quantised=getattr(self.model, "is_quantized", False),
            optimizer=str(self.args.optim),
        )
        return "\n".join(
            [
                f"step {self.state.global_step + 1}, rank {self.args.process_index}: out of memory in {what}; peak "
                f"{peak:.1f}{total} GB. {self.next_start()}What helps most here:",
                *(f"  {setting}" for setting in settings),
            ]
        )

    def state_gb(self) -> float:
        """Of parameters, gradients and the two float32 moments of AdamW, as far as this process holds them."""
        local = ((p.numel(), p.element_size(), p.requires_grad) for p in self.model.parameters())
        return sum(count * (size + trained * (size + 8)) for count, size, trained in local) / 2**30

    def describe_batch(self, inputs: dict[str, Any]) -> str:
        rows, length = inputs["input_ids"].shape
        return f"{rows} x {length} tokens"

    def next_start(self) -> str:
        """What the next start does about too little memory by itself, as the beginning of a sentence about what else helps."""
        return ""

    def smaller_batches(self) -> list[str]:
        """Settings that make a micro-batch smaller and the step no other, best first."""
        rows = self.args.per_device_train_batch_size
        if rows == 1:
            return []
        total = rows * self.args.gradient_accumulation_steps * self.args.world_size
        return [f"per_device_train_batch_size: {rows // 2} with total_train_batch_size: {total}: the same steps"]


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has held so far: on the GPU, or in all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def keep_off_cudnn_attention() -> None:
    """Let torch choose among its other attention kernels.

    cuDNN's, with a mask and a length that leaves 64 when divided by 128, has NaN gradients in bf16 (torch 2.11 to 2.13,
    https://github.com/pytorch/pytorch/issues/196678); which lengths meet, only the data knows.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def settings_that_help(
    smaller_batches: list[str],
    *,
    states_first: bool,
    gradient_checkpointing: bool,
    half_precision: bool,
    divided: bool,
    processes: int,
    adapter: bool,
    quantised: bool,
    optimizer: str,
) -> list[str]:
    """The three settings that save most, of those that are not on; what fills the memory, states or activations, first."""
    states = [
        (
            processes > 1 and not divided,
            "--config_file accelerate_configs/deepspeed_zero3.yaml: every GPU holds a share of weights and optimizer",
        ),
        (not adapter, "use_peft: true (LoRA): gradients and optimizer state of an adapter only"),
        (adapter and not quantised, "load_in_4bit: true (QLoRA): the frozen weights in a quarter of bf16's memory"),
        (not adapter and "8bit" not in optimizer, "optim: adamw_8bit: the optimizer's state in a quarter of its memory"),
    ]
    activations = [
        (not gradient_checkpointing, "gradient_checkpointing: true: activations are computed again in the backward pass"),
        (not half_precision, "bf16: true: activations in half the memory"),
        *((True, setting) for setting in smaller_batches),
    ]
    ordered = [*states, *activations] if states_first else [*activations, *states]
    return [setting for is_off, setting in [*ordered, (True, "max_length: shorter")] if is_off][:3]


def places_of(rows: list[dict[str, Any]]) -> str:
    """Row indices by rank, the first few of each: [4, 9] (rank 0), [3] (rank 2)."""
    by_rank: dict[int, list[int]] = {}
    for row in rows:
        by_rank.setdefault(row["rank"], []).append(row["index"])
    return ", ".join(f"{few(indices)} (rank {rank})" for rank, indices in by_rank.items())


def few(indices: list[int]) -> str:
    if len(indices) <= MANY_ROWS:
        return str(indices)
    return f"[{', '.join(map(str, indices[:MANY_ROWS]))}, ... {len(indices)} in all]"


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """One JSON line each; NaN and infinities, which JSON has not, as text."""
    lines = [json.dumps({key: written(value) for key, value in record.items()}) + "\n" for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def written(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# ---- The log of a run, which its checkpoints hold ----


def skipped_steps(log: list[dict[str, Any]]) -> int:
    """Over the whole run, whatever it was resumed from."""
    return max((record[SKIPPED] for record in log if SKIPPED in record), default=0)


def last_loss_step(log: list[dict[str, Any]]) -> int:
    return max((record["step"] for record in log if "learning_rate" in record), default=0)


def skipped_since(step: int, log: list[dict[str, Any]]) -> int:
    return sum(SKIPPED in record and record["step"] > step for record in log)
