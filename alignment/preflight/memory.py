"""Memory of each device: a recipe as the estimate asks for it, its largest and its usual micro-batch, and what would fit."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from ..data.prepare import pair_tokens
from ..model.adapter_checks import bits_of
from ..model.config_files import whole_model
from ..model.layers import optimizer_used, uses_liger
from ..preference.configs import PairConfig
from ..preference.division import Division, Wish, fastest
from ..preference.fitting import asked_for, attention_held, has_earlier_gradients, lora_of, outside_text
from ..preference.memory import CONTEXT_GIB, GIB, MemoryModel, Pair, Peak, Plan
from ..recipe.configs import ModelArguments
from ..recipe.values import text
from .model import Skeleton

CARDS = (24, 48, 80, 141)  # GiB of the GPUs that are in use
MOST_TOKENS = 2**20  # of a micro-batch that are asked about


class MicroBatch(NamedTuple):
    """Of one device: tokens that are computed, padding included, those that are scored, and the peak."""

    tokens: int
    scored: int
    peak: Peak


class Fit(NamedTuple):
    """On a card of so many GiB: the division that a run would choose or the recipe names, None if it does not fit there."""

    gib: float
    division: Division | None
    largest: int  # tokens of the largest micro-batch that should fit, every layer recomputed where the recipe allows it
    peak: Peak | None


class Memory(NamedTuple):
    """What a run needs on each device. context: GiB, from and to, that the GPU's own libraries take: a guess."""

    plan: Plan
    layers: int
    division: Division
    reason: str  # "chosen" by the run for its GPU; the "least" of all, where none is known or nothing fits; or "given"
    longest: MicroBatch
    usual: MicroBatch
    fits: list[Fit]
    context: tuple[float, float]


class Sizes(NamedTuple):
    """Tokens of every training pair as its layout computes them, and of these the scored ones; both (rows,)."""

    tokens: np.ndarray
    scored: np.ndarray

    @property
    def scored_share(self) -> float:
        return float(self.scored.sum() / self.tokens.sum())


def plan_of(
    args: PairConfig, model_args: ModelArguments, skeleton: Skeleton, meant: Mapping[str, Any], strategy: str, rows: Dataset
) -> Plan:
    """The run as the estimate asks for it, without its weights."""
    on_gpu, packed = not meant["use_cpu"], skeleton.why_padded is None
    by_tokens, _ = asked_for(args, on_gpu=on_gpu)
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    middle = {name: int(np.median(rows[name])) for name in ("chosen_prompt_length", "chosen_length", "rejected_length")}
    return Plan(
        config=skeleton.config.get_text_config(),
        dtype=skeleton.dtype,
        compute_dtype=compute,
        strategy=strategy,
        processes=args.planned_processes,
        lora=lora_of(skeleton.model),
        quantised=bits_of(model_args, skeleton.config),
        optimizer=str(text(optimizer_used(args.optim, on_gpu=on_gpu))),
        accumulates=has_earlier_gradients(args, by_tokens=by_tokens),
        layout="packed" if packed else "padded",
        attention=attention_held(skeleton.attention, args.pair_layout, is_packed=packed, on_gpu=on_gpu),
        pair=Pair(*(max(length, 1) for length in middle.values())),
        device_type="cuda" if on_gpu else "cpu",
        liger=uses_liger(meant["use_liger_kernel"], on_gpu=on_gpu),
        outside=outside_text(whole_model(skeleton.model)),
    )


def sizes_of(rows: Dataset, plan: Plan, *, scores_prompt: bool) -> Sizes:
    names = ["chosen_prompt_length", "chosen_length", "rejected_length", "length"]
    table = rows.select_columns(names).with_format("numpy")[:]
    scored = table["chosen_length"] + table["rejected_length"] + scores_prompt * table["chosen_prompt_length"]
    return Sizes(pair_tokens(rows) if plan.layout == "packed" else 2 * table["length"], scored)


def memory_of(model: MemoryModel, args: PairConfig, sizes: Sizes, parameters: int, gpu_memory: float | None) -> Memory:
    """The run's micro-batches on `gpu_memory` GiB, and what would fit on that and on other cards.

    Without gpu_memory, and where nothing fits, the smallest division: the longest pair alone, every layer recomputed.
    """
    plan, layers = model.plan, model.layers
    by_tokens, wish = asked_for(args, on_gpu=plan.device_type == "cuda")
    context = CONTEXT_GIB if plan.device_type == "cuda" else (0, 0)
    rows, longest = args.per_device_train_batch_size * args.gradient_accumulation_steps, int(sizes.tokens.max())
    mean_step = float(sizes.tokens.mean()) * rows
    recomputed = layers if wish.recompute_layers is None else min(wish.recompute_layers, layers)
    smallest = Division(wish.max_tokens or longest if by_tokens else batch_tokens(sizes, args, plan), recomputed)
    choose = partial(
        fastest,
        wish=wish if by_tokens else Wish(smallest.max_tokens, wish.recompute_layers),
        layers=layers, parameters=parameters, longest=longest, step_tokens=int(mean_step * 1.5),
    )  # fmt: skip

    def micro_batch(tokens: int, division: Division) -> MicroBatch:
        scored = round(tokens * sizes.scored_share)
        return MicroBatch(tokens, scored, model.peak(tokens, scored, division.recompute_layers))

    def fit_on(gib: float) -> Fit:
        largest = partial(model.largest, (gib - context[1]) * GIB, scored_share=sizes.scored_share, most=MOST_TOKENS)
        division = choose(largest)
        peak = None if division is None else micro_batch(division.max_tokens, division).peak
        return Fit(gib, division, largest(recomputed), peak)

    cards = {*(CARDS if plan.device_type == "cuda" else ()), *([] if gpu_memory is None else [gpu_memory])}
    fits = [fit_on(gib) for gib in sorted(cards)]
    chosen = next((fit.division for fit in fits if fit.gib == gpu_memory), None)
    division = chosen or smallest
    usual = round(mean_step / math.ceil(mean_step / division.max_tokens)) if by_tokens else usual_batch(sizes, args, plan)
    most = int(np.sort(sizes.tokens)[-rows:].sum()) if by_tokens else division.max_tokens
    is_open = wish.recompute_layers is None or (by_tokens and wish.max_tokens is None)
    return Memory(
        plan, layers, division, "given" if not is_open else "least" if chosen is None else "chosen",
        micro_batch(min(division.max_tokens, most), division), micro_batch(usual, division), fits, context,
    )  # fmt: skip


def batch_tokens(sizes: Sizes, args: PairConfig, plan: Plan) -> int:
    """Of a fixed count of the longest pairs; padded ones are all as long as the longest."""
    longest = np.sort(sizes.tokens)[-args.per_device_train_batch_size :]
    return int(longest.sum() if plan.layout == "packed" else len(longest) * longest.max())


def usual_batch(sizes: Sizes, args: PairConfig, plan: Plan) -> int:
    """Of a fixed count of pairs, by chance: packed, their mean; padded, the mean of the longest of so many."""
    count = args.per_device_train_batch_size
    if plan.layout == "packed":
        return round(count * float(sizes.tokens.mean()))
    drawn = np.random.default_rng(0).choice(sizes.tokens, (1000, count))
    return round(count * float(drawn.max(axis=1).mean()))
