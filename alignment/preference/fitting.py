"""Before the first step: how many tokens of a micro-batch, and how many recomputed layers, suit this device's memory."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from ..data.prepare import pair_tokens
from ..launch.strategy import strategy_of
from ..model.config_files import whole_model
from ..model.layers import recomputable_layers, recompute_first
from ..model.shared_prompt import NAME
from ..recipe.values import text
from ..run.guards import GuardedSteps
from .collate import PaddedCollator, on_device
from .configs import PairConfig
from .division import Division, Wish, fastest
from .memory import Lora, MemoryModel, Pair, Plan, estimate

logger = logging.getLogger(__name__)

DIVISION = "division.json"  # in checkpoints, and in _run where a step was too large
SPARE = 0.94  # of a GPU's memory: the allocator loses some between blocks
LESS = 0.85  # of the room that was thought to be there, after a micro-batch did not fit


class FittedSteps(GuardedSteps):
    """Knows how its steps are divided: as the recipe says, or on a GPU as memory and speed ask for.

    The subclass has `concatenated_forward`. `division` is None until it is known, at the beginning of training.
    """

    args: PairConfig
    resumed: Path | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.by_tokens, self.wish = asked_for(self.args, on_gpu=is_gpu(self.args.device))
        is_known = self.wish.recompute_layers is not None and (self.wish.max_tokens is not None or not self.by_tokens)
        self.division: Division | None = Division(*self.wish) if is_known else None
        # In front of all that computes at the beginning of training.
        self.callback_handler.callbacks.insert(0, FitFirst(self))

    @property
    def max_tokens(self) -> int | None:
        """Of a micro-batch; None: a fixed count of pairs."""
        return self.division.max_tokens if self.by_tokens and self.division is not None else None

    def fit(self) -> None:
        """Find the division where the recipe leaves it open, on all processes alike, and say what it is."""
        if self.division is None:
            self.division = self.fitting_division()
        layers = recomputable_layers(self.model)
        if self.args.gradient_checkpointing and layers:
            recompute_first(self.model, self.division.recompute_layers)
            count = min(self.division.recompute_layers, len(layers))
            logger.info("%d of %d layers are computed again in the backward pass.", count, len(layers))
        if self.by_tokens:
            logger.info("Steps are divided into micro-batches of at most %s tokens.", f"{self.division.max_tokens:,}")

    def fitting_division(self) -> Division:
        layers = max(len(recomputable_layers(self.model)), 1)
        tokens = self.tokens_of_pairs()
        longest = int(tokens.max())
        wish = self.wish_of_this_start(longest)
        smallest = Division(wish.max_tokens or longest, layers if wish.recompute_layers is None else wish.recompute_layers)
        try:
            memory = estimate(memory_plan(self))
        except (ValueError, OSError) as error:
            logger.warning("%s; micro-batches are as small as can be, and every layer is computed again.", error)
            return smallest
        room = -self.largest_of_all(-room_bytes(self.args.device))
        step_tokens = int(tokens.mean() * self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * 1.5)
        for _ in range(8):
            division = fastest(
                lambda count, room=room: memory.largest(room, count),
                wish,
                layers=layers,
                parameters=sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters()),
                longest=longest,
                step_tokens=step_tokens,
            )
            if division is None:
                break
            if self.fits(division, memory, room):
                return division
            room *= LESS
        logger.warning(
            "Not even the longest pair, %s tokens, should fit into %.1f GiB with every layer computed again; it is "
            "tried all the same.", f"{longest:,}", room / 2**30,
        )  # fmt: skip
        return smallest

    def wish_of_this_start(self, longest: int) -> Wish:
        """What the recipe says; where it leaves tokens open, a checkpoint's, so that a resumed run divides as it did."""
        if not self.by_tokens:
            return Wish(self.args.per_device_train_batch_size * longest, self.wish.recompute_layers)
        saved = read_division(Path(self.args.output_dir, "_run")) or read_division(self.resumed)
        return Wish(saved.max_tokens, None) if saved is not None and self.wish.max_tokens is None else self.wish

    def tokens_of_pairs(self, rows: Dataset | None = None) -> np.ndarray:
        """(rows,): what each pair has in a batch by itself; of the training pairs, or of others."""
        rows = self.train_dataset if rows is None else rows
        if isinstance(self.data_collator, PaddedCollator):
            return 2 * np.asarray(rows["length"][:])
        return pair_tokens(rows)

    def largest_of_all(self, value: float) -> float:
        """Over all processes."""
        values = torch.tensor([value], dtype=torch.float64, device=self.args.device)
        return float(self.accelerator.gather(values).max())

    # ---- One micro-batch, tried ----

    def fits(self, division: Division, memory: MemoryModel, room: float) -> bool:
        """Whether the largest micro-batch has room on all processes, beside optimizer states that do not exist yet.

        Not tried under DeepSpeed, whose engine would count it as part of a step.
        """
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return True
        start_measuring()
        try:
            self.try_out(division)
            states = memory.peak(division.max_tokens, recompute_layers=division.recompute_layers).optimizer
            is_over = most_bytes() + states > room
        except torch.OutOfMemoryError:
            is_over = True
        self.model.zero_grad()
        start_measuring()
        return not self.largest_of_all(is_over)

    def try_out(self, division: Division) -> None:
        """Forward and backward of the longest pairs that a micro-batch takes; nothing of it stays but gradients."""
        recompute_first(self.model, division.recompute_layers)
        model = self.model_wrapped
        model.train()
        rows = [self.train_dataset[number] for number in filling(self.tokens_of_pairs(), division.max_tokens)]
        batch = on_device(self.data_collator(rows), self.args.device)
        is_fsdp = self.accelerator.distributed_type == DistributedType.FSDP
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), nullcontext() if is_fsdp else self.accelerator.no_sync(model):
            with self.compute_loss_context_manager():
                scores = self.concatenated_forward(model, batch)
                loss = scores.chosen_logp.sum() - scores.rejected_logp.sum()
            self.accelerator.backward(loss)

    # ---- Too large after all ----

    def halve(self) -> bool:
        """After a micro-batch of a step did not fit: half the tokens, where the step can begin again; whether it can.

        Of several processes others would be left waiting: the next start takes the smaller size.
        """
        tokens = self.max_tokens
        longest = int(self.tokens_of_pairs().max())
        if tokens is None or self.wish.max_tokens is not None or tokens <= longest:
            return False
        smaller = Division(max(tokens // 2, longest), self.division.recompute_layers)
        if self.args.world_size > 1:
            write_division(Path(self.args.output_dir, "_run"), smaller)
            return False
        self.division = smaller
        return True

    # ---- Checkpoints ----

    def _save_rng_state(self, output_dir: str) -> None:
        """Also how steps are divided."""
        super()._save_rng_state(output_dir)
        if self.max_tokens is not None and self.args.should_save:
            write_division(Path(output_dir), self.division)


class FitFirst(TrainerCallback):
    """Fits when the model is divided among processes, and gradient checkpointing is on."""

    def __init__(self, trainer: FittedSteps):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.fit()


def asked_for(args: PairConfig, *, on_gpu: bool) -> tuple[bool, Wish]:
    """Whether steps are divided by tokens, and what the recipe says of how; on a CPU nothing is left open."""
    tokens, layers = args.max_tokens_per_micro_batch, args.recompute_layers
    if not on_gpu:
        tokens, layers = None if tokens == "auto" else tokens, "all" if layers == "auto" else layers
    count = {"auto": None, "all": 10**6}.get(layers, layers)
    if not args.gradient_checkpointing:
        count = 0
    return tokens is not None, Wish(None if tokens == "auto" else tokens, count)


# ---- The GPU ----


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def start_measuring() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def most_bytes() -> int:
    """Allocated at once, since `start_measuring`."""
    return torch.cuda.max_memory_allocated()


def room_bytes(device: torch.device) -> float:
    """What this process may allocate on its GPU, with what it has: all but what others, and CUDA itself, took."""
    free, total = torch.cuda.mem_get_info(device)
    return SPARE * (free + torch.cuda.memory_reserved(device)) if total else 0.0


# ---- The run ----


def filling(tokens: np.ndarray, budget: int) -> list[int]:
    """Numbers of the longest pairs that together have at most so many tokens, one at least."""
    order = np.argsort(-tokens, kind="stable")
    return order[: max(int((tokens[order].cumsum() <= budget).sum()), 1)].tolist()


def memory_plan(trainer: FittedSteps) -> Plan:
    """The run as the estimate asks for it."""
    args, model = trainer.args, trainer.model
    policy = whole_model(model)
    rows = trainer.train_dataset
    lengths = {side: float(np.median(rows[f"{side}_length"][:])) for side in ("chosen", "rejected")}
    pair = Pair(int(np.median(rows["chosen_prompt_length"][:])), *(max(int(length), 1) for length in lengths.values()))
    config = policy.config.get_text_config()
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return Plan(
        config=config,
        dtype=next(parameter.dtype for parameter in policy.parameters() if parameter.is_floating_point()),
        compute_dtype=autocast,
        strategy=strategy_of(trainer.accelerator),
        processes=args.world_size,
        lora=lora_of(model),
        quantised=bits_of(policy),
        optimizer=str(text(args.optim)),
        layout="padded" if isinstance(trainer.data_collator, PaddedCollator) else "packed",
        attention=config._attn_implementation.removeprefix(NAME),
        pair=pair,
        device_type=args.device.type,
        liger=bool(args.use_liger_kernel),
    )


def lora_of(model: nn.Module) -> Lora | None:
    if not isinstance(model, PeftModel):
        return None
    config = model.peft_config[model.active_adapter]
    return Lora(config.r, tuple(sorted(config.target_modules)), tuple(config.modules_to_save or ()))


def bits_of(policy: nn.Module) -> int | None:
    if not getattr(policy, "is_quantized", False):
        return None
    return 4 if getattr(policy, "is_loaded_in_4bit", False) else 8


def read_division(folder: Path | None) -> Division | None:
    path = folder and folder / DIVISION
    return Division(**json.loads(path.read_text(encoding="utf-8"))) if path and path.is_file() else None


def write_division(folder: Path, division: Division) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DIVISION).write_text(json.dumps(division._asdict()), encoding="utf-8")
