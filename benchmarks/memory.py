"""Estimated against measured peak memory of a training step, on small random models.

    python benchmarks/memory.py [--device cuda] [--models llama gemma2 qwen3] [--strategies ddp fsdp2 zero2 zero3]

An AdamW step of two micro-batches is measured, once the optimizer has its states. On a CPU every storage is counted from its
first operation until it is freed; on a GPU torch's allocator is asked. FSDP 2 runs over a process group that sends nothing,
DDP and ZeRO in two processes over gloo (benchmarks/memory_processes.py), ZeRO with buckets of BUCKET elements.
"""

import argparse
import gc
import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig, Qwen3Config

from alignment.model.layers import recompute_first
from alignment.preference.collate import Batch
from alignment.preference.fake_step import Ledger, batch_of, build, micro_batch, shard, silent_processes, tokens_of
from alignment.preference.memory import ZERO_BUCKET, Lora, MemoryModel, Pair, Plan, estimates
from benchmarks.memory_processes import PROCESSES, Job, measure

MIB = 2**20
SIZES = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MODELS: dict[str, tuple[PreTrainedConfig, str]] = {
    "llama": (LlamaConfig(**SIZES, tie_word_embeddings=False), "sdpa"),
    "gemma2": (Gemma2Config(**SIZES, sliding_window=96), "eager"),
    "qwen3": (Qwen3Config(**SIZES, tie_word_embeddings=True), "sdpa"),
}
LORA = Lora(8, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
PAIR, PAIRS = Pair(40, 120, 128), 3
GPU_PAIRS = 64  # the small models are small for a GPU
BUCKET = 200_000  # DeepSpeed's default, 500 million elements, would hide a small model
IN_PROCESSES = ("ddp", "zero2", "zero3")
COLUMNS = ("model", "strategy", "trained", "recomputed", "measured MiB", "estimated MiB", "off by", "where")


class Measured(NamedTuple):
    """A row of the table: bytes."""

    recompute_layers: int
    measured: int
    estimated: int
    where: str


def small_plan(model: str, strategy: str, *, lora: bool = False, device: str = "cpu") -> Plan:
    """A float32 run; on a GPU under autocast, because its attention and its head have no float32 kernel."""
    config, attention = MODELS[model]
    on_gpu = device == "cuda"
    return Plan(
        config,
        compute_dtype=torch.bfloat16 if on_gpu else None,
        strategy=strategy,
        processes=4 if strategy.startswith("fsdp") else PROCESSES if strategy in IN_PROCESSES else 1,
        lora=LORA if lora else None,
        attention="flex_attention" if on_gpu and attention == "eager" else attention,
        pair=PAIR,
        device_type=device,
        zero_bucket=BUCKET if strategy.startswith("zero") else ZERO_BUCKET,
    )


def measured_peak(plan: Plan, pairs: int, recompute_layers: int) -> int:
    """Bytes at the highest point of the second step, with real tensors."""
    with silent_processes(plan), Ledger(plan.device_type) as ledger:
        model = build(plan, plan.config.num_hidden_layers, plan.device_type)
        recompute_first(model, recompute_layers)
        model = shard(model, plan) if plan.strategy.startswith("fsdp") else model
        batch = send_to_device(batch_of(plan, plan.pair, pairs), torch.device(plan.device_type))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        train_step(model, optimizer, batch, plan, micro_batches=1)
        restart(ledger)
        train_step(model, optimizer, batch, plan, micro_batches=2)
        return torch.cuda.max_memory_allocated() if plan.device_type == "cuda" else ledger.highest


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, plan: Plan, *, micro_batches: int) -> None:
    for _ in range(micro_batches):
        micro_batch(model, batch, plan)
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def restart(ledger: Ledger) -> None:
    gc.collect()
    ledger.highest = ledger.now
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def recomputed(layers: int) -> tuple[int, int, int]:
    """All layers, none, and half of them."""
    return layers, 0, layers // 2


def compare(model: MemoryModel, pairs: int, measured: dict[int, int] | None = None) -> Iterator[Measured]:
    """With so many layers recomputed. measured: what was found before, by that; None: measured here."""
    plan = model.plan
    batch = batch_of(plan, plan.pair, pairs)
    size = tokens_of(batch), batch["token_counts"].scored
    for count in recomputed(model.layers):
        peak = model.peak(*size, count)
        found = measured_peak(plan, pairs, count) if measured is None else measured[count]
        yield Measured(count, found, peak.total, peak.where)


def measured_in_processes(models: list[MemoryModel], pairs: int) -> dict[int, dict[int, int]]:
    """Number of the model -> layers recomputed -> bytes, of the strategies that need several processes; one start for all."""
    jobs = [
        (number, Job(model.plan, pairs, count))
        for number, model in enumerate(models)
        if model.plan.strategy in IN_PROCESSES
        for count in recomputed(model.layers)
    ]
    peaks = measure([job for _, job in jobs]) if jobs else []
    found: dict[int, dict[int, int]] = {}
    for (number, job), peak in zip(jobs, peaks, strict=True):
        found.setdefault(number, {})[job.recompute_layers] = peak
    return found


def main() -> None:
    args = parse_arguments()
    cases = list(itertools.product(args.models, args.strategies, (False, True)))
    plans = [small_plan(name, strategy, lora=lora, device=args.device) for name, strategy, lora in cases]
    started, pairs = time.time(), GPU_PAIRS if args.device == "cuda" else PAIRS
    models = estimates([replace(plan, layout=args.layout) for plan in plans])
    print(f"{len(plans)} estimates in {time.time() - started:.0f} s, imports included\n")
    in_processes = measured_in_processes(models, pairs)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    worst = 0.0
    for number, ((name, strategy, lora), model) in enumerate(zip(cases, models, strict=True)):
        for row in compare(model, pairs, in_processes.get(number)):
            off = row.estimated / row.measured - 1
            worst = max(worst, math.fabs(off))
            figures = f"{row.measured / MIB:.1f} | {row.estimated / MIB:.1f} | {off:+.1%} | {row.where}"
            print(f"| {name} | {strategy} | {'LoRA' if lora else 'whole'} | {row.recompute_layers} | {figures} |", flush=True)
    print(f"\nlargest error: {worst:.1%}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--strategies", nargs="+", choices=("single", "fsdp2", *IN_PROCESSES), help="default: all but single; on a GPU single"
    )
    parser.add_argument("--layout", choices=("packed", "padded"), default="packed")
    args = parser.parse_args()
    args.strategies = args.strategies or (["single"] if args.device == "cuda" else ["ddp", "fsdp2", "zero2", "zero3"])
    if args.device == "cuda" and set(args.strategies) & set(IN_PROCESSES):
        parser.error("DDP and ZeRO are measured on a CPU alone")
    return args


if __name__ == "__main__":
    main()
