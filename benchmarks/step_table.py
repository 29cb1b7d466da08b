"""The table of a step's costs that benchmarks/train_step.py prints, and what it is made of."""

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import get_peak_flops

from alignment.preference.collate import PackedCollator, Row, token_counts
from alignment.preference.throughput import dense_flops
from benchmarks.tokenization import machine, ratio

WIDTHS = (20, 30, 20, 14, 24, 24, 12, 8)


class MicroBatch(NamedTuple):
    """One forward and backward: milliseconds by the clock and in kernels, which on a GPU are launched so often."""

    wall_ms: float
    kernel_ms: float
    launches: int


@dataclass
class Measured:
    """Of one contender, repeat by repeat: seconds, and the mean loss."""

    seconds: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    peak_gb: float = 0.0
    micro_batch: MicroBatch | None = None


class Table:
    """What is printed: of the pairs first, then a line of each contender's, in the order in which they are added."""

    def __init__(self, args: argparse.Namespace, model: PreTrainedModel, rows: list[Row]):
        self.args, self.rows, self.seconds = args, rows, dict[str, list[float]]()
        pairs = args.pairs_per_micro_batch
        counts = [token_counts(rows[i : i + pairs]) for i in range(0, len(rows), pairs)]
        distinct, padded, scored = (sum(getattr(count, name) for count in counts) for name in ("distinct", "padded", "scored"))
        body, head = dense_flops(model, trainable_share=1.0)
        self.distinct, self.flops = distinct, body * distinct + head * scored
        self.rate = matmul_rate(model.device, model.dtype)
        name = torch.cuda.get_device_name(model.device) if args.device == "cuda" else ""
        self.peak_flops = get_peak_flops(name, str(model.dtype).removeprefix("torch."))
        self.lines: list[dict[str, Any]] = []
        compiled = ", compiled" if args.compiled_layers else ""
        print(
            f"{args.method}: {args.model_type}, {model.num_parameters() / 1e6:,.0f}M parameters, vocabulary {args.vocab:,}, "
            f"{args.dtype}, attention {args.attn}, gradient checkpointing {'on' if args.gradient_checkpointing else 'off'}, "
            f"layers recomputed by this suite: {'all' if args.recompute_layers is None else args.recompute_layers}{compiled}; "
            f"{args.repeats} repeats of {len(rows)} pairs, {pairs} a micro-batch where a name says nothing else"
        )
        prompt, response = mean_lengths(rows)
        print(
            f"tokens padded : distinct = {padded:,} : {distinct:,} = {padded / distinct:.2f} in micro-batches of {pairs}; on "
            f"average {prompt:.0f} of a prompt and {response:.0f} of a response"
        )
        print(
            f"floor: {self.flops / self.rate / len(rows):.5f} s per pair, the FLOPs of the distinct tokens at the "
            f"{self.rate:.3g} FLOP/s of a matrix product here, nothing computed twice"
        )
        unit = "CPU s" if args.device == "cpu" else "GPU s"
        titles = ("", f"{unit} per pair", "distinct tokens/s", "peak memory", "published / it", "trl / it", "it / floor", "MFU")
        self.print(titles)

    def print(self, cells: tuple[str, ...]) -> None:
        print("".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)), flush=True)

    def add(self, contender: str, found: Measured) -> None:
        """Ratios are to peers that were added before, or are added now."""
        self.seconds[contender] = own = found.seconds
        count, middle = len(self.rows), statistics.median(own)
        low, per_pair, high = (value / count for value in (min(own), middle, max(own)))
        peers = {
            peer: next((other for other in self.seconds if other.partition("@")[0] == peer), None)
            for peer in ("published", "trl")
        }
        mfu = None if self.peak_flops is None else self.flops / middle / self.peak_flops
        cells = (
            contender,
            f"{per_pair:.4f} ({low:.4f} to {high:.4f})",
            f"{self.distinct / middle:,.0f}",
            f"{found.peak_gb:.2f} GB",
            *(ratio(self.seconds[peer], own) if peer else "" for peer in peers.values()),
            f"{middle * self.rate / self.flops:.2f}",
            "" if mfu is None else f"{mfu:.3f}",
        )
        self.print(cells)
        if (one := found.micro_batch) is not None:
            print(
                f"{'':>{WIDTHS[0]}}  its first micro-batch: {one.wall_ms:,.1f} ms, of which {one.kernel_ms:,.1f} in "
                f"{one.launches:,} kernels", flush=True,
            )  # fmt: skip
        self.lines.append(
            {
                "contender": contender,
                "seconds_per_pair": per_pair,
                "peak_gb": found.peak_gb,
                **{f"{peer} / it": statistics.median(self.seconds[name]) / middle for peer, name in peers.items() if name},
                "it / floor": middle * self.rate / self.flops,
                "mfu": mfu,
                **(one._asdict() if one else {}),
            }
        )
        if self.args.json is not None:
            self.args.json.write_text(json.dumps(self.lines, indent=2), encoding="utf-8")

    def end(self) -> None:
        print("equal losses")
        if (
            packed := next((own for contender, own in self.seconds.items() if contender.startswith("packed")), None)
        ) is not None:
            pairs = self.args.pairs_per_micro_batch
            micro_batches = [self.rows[i : i + pairs] for i in range(0, len(self.rows), pairs)]
            share = collator_seconds(micro_batches) / statistics.median(packed)
            print(
                f"packed collator and layout: {share:.2%} of a step{'' if share < 0.02 else ', more than the 2 % it may take'}"
            )
        print(f"{machine()}, {torch.get_num_threads()} threads, {versions()}")


# ---- Figures ----


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of all cores, or the GPU's seconds between two events; and what the work returned."""
    if device.type == "cpu":
        start = time.process_time()
        result = work()
        return time.process_time() - start, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, result


def matmul_rate(device: torch.device, dtype: torch.dtype, times: int = 20) -> float:
    """Floating-point operations per second of a large matrix product; per CPU second on a CPU."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b  # warms up
    passed, _ = timed(device, lambda: [a @ b for _ in range(times)])
    return 2 * size**3 * times / passed


def collator_seconds(micro_batches: list[list[Row]], times: int = 20) -> float:
    collate = PackedCollator()
    passed, _ = timed(torch.device("cpu"), lambda: [collate(rows) for rows in micro_batches * times])
    return passed / times


def mean_lengths(rows: list[Row]) -> tuple[float, float]:
    """Mean tokens of a prompt and of a response."""
    prompt = statistics.mean(row["chosen_prompt_length"] for row in rows)
    return prompt, statistics.mean(row[f"{side}_length"] for row in rows for side in ("chosen", "rejected"))


def versions() -> str:
    packages = [name for name in ("torch", "trl", "liger_kernel") if importlib.util.find_spec(name)]
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join([*gpu, *(f"{name} {importlib.metadata.version(name)}" for name in packages)])
