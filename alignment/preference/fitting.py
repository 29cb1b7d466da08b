"""Before the first step: how many tokens of a micro-batch, and how many recomputed layers, suit this device's memory."""

import logging
import math
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ..data.prepare import pair_tokens
from ..launch.strategy import strategy_of
from ..model.config_files import whole_model
from ..model.layers import recomputable_layers, recompute_first
from ..model.shared_prompt import asked_attention
from ..model.text_part import other_parts
from ..recipe.values import text
from ..run.guards import GuardedSteps
from .collate import PaddedCollator, on_device
from .configs import PairConfig
from .division import Division, Wish, fastest, read_division, write_division
from .memory import Lora, MemoryModel, Pair, Plan, estimate

logger = logging.getLogger(__name__)

GATHERING = ("zero3", "fsdp1", "fsdp2")  # strategies that gather a layer's weights whenever it computes
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
        # Before any of them is divided among processes.
        self.parameters, self.outside = sum(map(elements_of, self.model.parameters())), outside_text(whole_model(self.model))
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
            logger.info("%s", self.described())

    def described(self) -> str:
        """How this process's steps are divided, on average, and what that costs where weights are gathered for it."""
        most, tokens = self.division.max_tokens, self.step_tokens()
        count = math.ceil(tokens / most)
        what = f"Steps of about {tokens:,.0f} tokens are divided into micro-batches of at most {most:,}: {count} a step."
        if strategy_of(self.accelerator) not in GATHERING:
            return what
        return f"{what} Each gathers the weights twice, for its forward and its backward: {2 * count} times a step."

    def step_tokens(self) -> float:
        """Of this process's pairs of a step, on average."""
        pairs = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return float(self.tokens_of_pairs().mean()) * pairs

    def fitting_division(self) -> Division:
        layers = max(len(recomputable_layers(self.model)), 1)
        longest = int(self.tokens_of_pairs().max())
        wish, least = self.wish_of_this_start(longest)
        smallest = Division(wish.max_tokens or longest, layers if wish.recompute_layers is None else wish.recompute_layers)
        memory = self.estimate_of_all()
        if isinstance(memory, str):
            logger.warning("%s; micro-batches are as small as can be, and every layer is computed again.", memory)
            return smallest
        room = -self.largest_of_all(-room_bytes(self.args.device))
        step_tokens = int(1.5 * self.step_tokens())
        for _ in range(8):
            division = fastest(
                lambda count, room=room: memory.largest(room, count) if count >= least else 0,
                wish,
                layers=layers,
                parameters=self.parameters,
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

    def wish_of_this_start(self, longest: int) -> tuple[Wish, int]:
        """What the recipe says; where it leaves tokens open, a checkpoint's, so that a resumed run divides as it did.

        And the fewest layers that may be computed again: as many as before, or memory that a halving freed would be filled.
        """
        layers = self.wish.recompute_layers
        if not self.by_tokens:
            return Wish(self.args.per_device_train_batch_size * longest, layers), 0
        saved = read_division(Path(self.args.output_dir, "_run")) or read_division(self.resumed)
        if saved is None or self.wish.max_tokens is not None:
            return self.wish, 0
        return Wish(saved.max_tokens, layers), saved.recompute_layers if layers is None else 0

    def estimate_of_all(self) -> MemoryModel | str:
        """The first process's, which all go by; or why there is none."""
        outcome: list[MemoryModel | str | None] = [None]
        if self.args.process_index == 0:
            try:
                outcome = [estimate(memory_plan(self))]
            except (ValueError, OSError, subprocess.SubprocessError) as error:
                outcome = [str(error)]
        return broadcast_object_list(outcome)[0]

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
        """Whether the largest micro-batch has room on all processes, beside gradients and the optimizer's states.

        Not tried under DeepSpeed, whose engine would count it as part of a step. Raises torch.OutOfMemoryError under FSDP,
        where others are left waiting for this process's share of a layer; the next start takes half.
        """
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return True
        start_measuring()
        try:
            for _ in range(2 if has_earlier_gradients(self.args, by_tokens=self.by_tokens) else 1):
                self.try_out(division)
            states = memory.peak(division.max_tokens, recompute_layers=division.recompute_layers).optimizer
            is_over = most_bytes() + (0 if any(self.optimizer.state.values()) else states) > room
        except torch.OutOfMemoryError:
            if self.accelerator.distributed_type == DistributedType.FSDP and self.args.world_size > 1:
                self.division = division
                self.halve()
                raise
            is_over = True
        self.micro_batch = None
        self.model.zero_grad()
        start_measuring()
        return not self.largest_of_all(is_over)

    def try_out(self, division: Division) -> None:
        """Forward and backward of the longest pairs that a micro-batch takes; nothing of it stays but gradients."""
        recompute_first(self.model, division.recompute_layers)
        model = self.model_wrapped
        model.train()
        is_padded = isinstance(self.data_collator, PaddedCollator)
        numbers = filling(self.tokens_of_pairs(), division.max_tokens, is_padded=is_padded)
        batch = on_device(self.data_collator([self.train_dataset[number] for number in numbers]), self.args.device)
        self.micro_batch = batch
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


def filling(tokens: np.ndarray, budget: int, *, is_padded: bool) -> list[int]:
    """Numbers of the longest pairs that together have at most so many tokens, one at least. Padded, all are as long as one."""
    order = np.argsort(-tokens, kind="stable")
    together = tokens[order[0]] * np.arange(1, len(order) + 1) if is_padded else tokens[order].cumsum()
    return order[: max(int((together <= budget).sum()), 1)].tolist()


def memory_plan(trainer: FittedSteps) -> Plan:
    """The run as the estimate asks for it."""
    args, model = trainer.args, trainer.model
    policy = whole_model(model)
    rows = trainer.train_dataset
    lengths = {side: float(np.median(rows[f"{side}_length"][:])) for side in ("chosen", "rejected")}
    pair = Pair(int(np.median(rows["chosen_prompt_length"][:])), *(max(int(length), 1) for length in lengths.values()))
    config, on_gpu = policy.config.get_text_config(), args.device.type == "cuda"
    is_packed = not isinstance(trainer.data_collator, PaddedCollator)
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
        accumulates=has_earlier_gradients(args, by_tokens=trainer.by_tokens),
        layout="packed" if is_packed else "padded",
        attention=attention_held(asked_attention(config), args.pair_layout, is_packed=is_packed, on_gpu=on_gpu),
        pair=pair,
        device_type=args.device.type,
        liger=bool(args.use_liger_kernel),
        outside=trainer.outside,
    )


def has_earlier_gradients(args: PairConfig, *, by_tokens: bool) -> bool:
    """Whether a micro-batch may find those of another of its step."""
    return args.gradient_accumulation_steps > 1 or by_tokens


def attention_held(asked: str, pair_layout: str, *, is_packed: bool, on_gpu: bool) -> str:
    """An attention that any machine can build, and that holds in memory what the one that will run does."""
    if "flash" in asked:
        return "sdpa"
    computed_by_flex = asked == "eager" and on_gpu and is_packed and pair_layout != "packed"
    return "flex_attention" if computed_by_flex else asked


def elements_of(parameter: nn.Parameter) -> int:
    """Of the whole parameter: ZeRO-3 keeps a share here, and 4-bit weights are packed."""
    if type(parameter).__name__ == "Params4bit":
        return 2 * parameter.nbytes
    return getattr(parameter, "ds_numel", parameter.numel())


def outside_text(policy: PreTrainedModel) -> int:
    """Elements that no text passes."""
    modules = map(policy.get_submodule, other_parts(policy))
    return sum(elements_of(parameter) for module in modules for parameter in module.parameters())


def lora_of(model: nn.Module) -> Lora | None:
    if not isinstance(model, PeftModel):
        return None
    config = model.peft_config[model.active_adapter]
    return Lora(config.r, tuple(sorted(config.target_modules)), tuple(config.modules_to_save or ()))


def bits_of(policy: nn.Module) -> int | None:
    if not getattr(policy, "is_quantized", False):
        return None
    return 4 if getattr(policy, "is_loaded_in_4bit", False) else 8
