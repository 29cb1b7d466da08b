"""Peak memory per device of a training step, known before anything is loaded. T tokens of a micro-batch, L layers.

`estimate(plan)` runs the step of a model of nine layers on tensors without data (see fake_step) and keeps what
each stretch of a micro-batch did to memory: embedding, a layer that is recomputed, a layer that is not, head, and the same
backwards. `MemoryModel.peak` puts the stretches together again for any number of layers and tokens, and finds the highest
point; no tensor is involved.

Assumed: layers are alike, or alternate in pairs; a stretch is linear in tokens between and beyond those that were tried, for
pairs of the plan's lengths; the optimizer's states and ZeRO's partitions are arithmetic. Not counted: what CUDA and NCCL
take for themselves (CONTEXT_GIB), and what the allocator loses between blocks.
"""

import os
import pickle
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from ..launch.launch import STRATEGIES

GIB = 2**30
CONTEXT_GIB = (5, 8)  # of CUDA, NCCL and cuBLAS on each device: a guess, and its range, until it is measured
ZERO_BUCKET = 500_000_000  # elements of DeepSpeed's buffer in which gradients are reduced
ZERO3_LIVE = 1_000_000_000  # elements that ZeRO-3 keeps gathered
FULL_PRECISION = 4  # bytes of a float32

# Bytes of optimizer state for one trained element; Adam's two moments have the type of their parameter where not named here.
STATE_BYTES = {
    "sgd": 0.0, "adafactor": 0.0, "lion_32bit": 4.0, "paged_lion_32bit": 4.0, "paged_adamw_32bit": 8.0,
    # One byte a moment, and a float32 for each block of 256.
    "lion_8bit": 1 + 4 / 256, "paged_lion_8bit": 1 + 4 / 256,
    "adamw_8bit": 2 + 8 / 256, "adamw_bnb_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256, "adamw_torch_8bit": 2 + 8 / 256,
}  # fmt: skip
IN_PLACE = {*STATE_BYTES, "adamw_torch_fused"}  # steps of these allocate next to nothing


class Lora(NamedTuple):
    """An adapter: float32 matrices of this rank beside the layers named in `targets`; `saved` are trained whole."""

    rank: int
    targets: tuple[str, ...]
    saved: tuple[str, ...] = ()


class Pair(NamedTuple):
    """Tokens of the pair that micro-batches are made of."""

    prompt: int = 128
    chosen: int = 384
    rejected: int = 384


@dataclass(frozen=True)
class Plan:
    """A training run, as far as its memory depends on it.

    dtype: of the parameters as they are loaded; compute_dtype: what autocast makes of them, None without it.
    quantised: bits of the frozen base's linear layers, 4 or 8, or None.
    accumulates: whether gradients of an earlier micro-batch are there when one begins.
    whole_gradients: FSDP keeps gradients unsharded until the last micro-batch of a step (`no_sync`).
    device_type: "cuda" (TRL's head, attention by a fused kernel) or "cpu" (the head in tiles, attention segment by segment).
    outside: elements of towers for images and sound, which text does not pass and nothing trains.
    zero_bucket, zero_live: DeepSpeed's reduce_bucket_size and stage3_max_live_parameters, in elements.
    """

    config: PreTrainedConfig
    dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype | None = None
    strategy: str = "single"
    processes: int = 1
    lora: Lora | None = None
    quantised: int | None = None
    optimizer: str | None = "adamw_torch"  # None: forward and backward alone
    accumulates: bool = True
    whole_gradients: bool = False
    layout: str = "packed"
    attention: str = "sdpa"
    pair: Pair = field(default_factory=Pair)
    device_type: str = "cuda"
    liger: bool = False
    outside: int = 0
    zero_bucket: int = ZERO_BUCKET
    zero_live: int = ZERO3_LIVE

    def __post_init__(self) -> None:
        problems = []
        if self.strategy not in STRATEGIES:
            problems.append(f"strategy = {self.strategy!r}: one of {', '.join(STRATEGIES)}")
        if self.quantised is not None and (self.lora is None or self.quantised not in (4, 8)):
            problems.append(f"quantised = {self.quantised}: 4 or 8 bits, below an adapter")
        if self.device_type not in ("cuda", "cpu"):
            problems.append(f"device_type = {self.device_type!r}: cuda or cpu")
        if problems:
            raise ValueError("Plan:\n  " + "\n  ".join(problems))


class Window(NamedTuple):
    """What one stretch did to memory, in bytes over its start: held at its end, most while it ran; of both what is gathered."""

    held: float
    most: float
    gathered: float = 0.0
    most_gathered: float = 0.0


class Sample(NamedTuple):
    """A micro-batch that was tried, and its windows by stretch."""

    tokens: int
    scored: int
    inputs: float  # bytes of batch and buffers
    windows: dict[str, Window]


class Weights(NamedTuple):
    """What a process holds of some modules."""

    parameters: float  # bytes
    trained: float  # bytes of those that get a gradient
    elements: float  # of the trained ones
    whole_elements: float  # of all, before any sharding
    whole_trained: float  # of the trained ones, before any sharding
    largest: float = 0.0  # bytes of the largest trained parameter


class Peak(NamedTuple):
    """Bytes at the highest point of an optimizer step, on each device, and where that is."""

    total: int
    where: str  # a stretch, forward or backward, or "optimizer step"
    parameters: int
    gradients: int
    optimizer: int
    activations: int  # kept from forward to backward, and the batch
    layer: int  # running, or recomputed for its backward
    head: int  # or the embedding
    gathered: int  # weights whole for a moment, and buffers of communication
    step: int  # temporaries of the optimizer


@dataclass(frozen=True)
class MemoryModel:
    """Peak memory of a plan as a function of the micro-batch. What it is made of: see `alignment.preference.fake_step.probe`.

    samples: of growing size, the same pair again and again; longer: the first one's pairs with longer prompts.
    """

    plan: Plan
    layers: int
    layer: Weights
    rest: Weights
    samples: tuple[Sample, ...]
    longer: Sample

    def peak(self, tokens: int, scored: int | None = None, recompute_layers: int | None = None) -> Peak:
        """The highest point of an optimizer step that is not the first, with micro-batches of this size.

        tokens: of a packed row, or of all padded rows with their padding. scored: those that the head computes; None: as
        many as in the plan's pairs. recompute_layers: the first so many layers are recomputed in backward; None: all.
        """
        recomputed = self.layers if recompute_layers is None else min(recompute_layers, self.layers)
        share = self.samples[-1].scored / self.samples[-1].tokens
        size = (tokens, round(tokens * share) if scored is None else scored)
        return max(self._points(*size, recomputed), key=lambda point: point.total)

    def largest(
        self, available: float, recompute_layers: int | None = None, *, scored_share: float | None = None, most: int = 2**20
    ) -> int:
        """Most tokens of a micro-batch whose peak is at most `available` bytes, up to `most`; 0: not even one fits."""

        def fits(tokens: int) -> bool:
            scored = None if scored_share is None else round(tokens * scored_share)
            return self.peak(tokens, scored, recompute_layers).total <= available

        return bisect_left(range(1, most + 1), True, key=lambda tokens: not fits(tokens))

    def _points(self, tokens: int, scored: int, recomputed: int) -> Iterator[Peak]:
        """The highest point of every stretch of a step, in order."""
        held = held_bytes(self.plan, self.layer, self.rest, self.layers)
        windows, inputs = self._windows(tokens, scored)
        layers = ["recomputed"] * recomputed + ["kept"] * (self.layers - recomputed)
        forward = [("embedding", ()), *zip(layers, edges(self.layers), strict=True), ("head", ())]
        level, gathered = inputs, 0.0  # over what is held all the time; the gathered weights apart
        gradients = 0.0  # of the level: those that this micro-batch was the first to make

        def window_of(stretch: str, way: str, edge: tuple[str, ...]) -> Window:
            return reduce(plus, [windows[f"{name} {way}"] for name in (stretch, *edge)])

        def point(stretch: str, way: str, window: Window) -> Peak:
            return peak_of(
                held, f"{stretch} {way}",
                gradients=held.earlier + gradients,
                activations=level - gradients,
                gathered=held.communication + gathered + window.most_gathered,
                **{"head" if stretch in ("embedding", "head") else "layer": window.most - window.most_gathered},
            )  # fmt: skip

        for stretch, edge in forward:
            window = window_of(stretch, "forward", edge)
            yield point(stretch, "forward", window)
            level, gathered = level + window.held - window.gathered, gathered + window.gathered
        for stretch, edge in reversed(forward):
            window = window_of(stretch, "backward", edge)
            yield point(stretch, "backward", window)
            made = self._first_gradients(stretch, window, windows[f"{stretch} forward"])
            level += window.held - window.gathered - made * (1 - held.gradient_share)
            gradients, gathered = gradients + made * held.gradient_share, gathered + window.gathered
        yield peak_of(held, "optimizer step", gradients=held.gradients, gathered=held.communication, step=held.step)

    def _first_gradients(self, stretch: str, backward: Window, forward: Window) -> float:
        """Bytes of gradients that a stretch leaves where there were none: what its backward does not free of its forward."""
        if self.plan.accumulates:
            return 0.0
        if stretch in ("recomputed", "kept"):
            return self.layer.trained
        left = backward.held - backward.gathered + forward.held - forward.gathered
        return min(max(left, 0.0), self.rest.trained)

    def _windows(self, tokens: int, scored: int) -> tuple[dict[str, Window], float]:
        """Windows of a micro-batch of this size, and the bytes of its inputs.

        Layers follow the tokens. The head follows what it scores, and for every token more or less than the tried pairs
        have beside those, what a longer prompt cost.
        """
        first, longer = self.samples[0], self.longer
        extra = (tokens - scored * first.tokens / first.scored) / (longer.tokens - first.tokens)
        windows = {}
        for name in first.windows:
            if name.startswith("head"):
                more = plus(longer.windows[name], first.windows[name], -1)
                windows[name] = plus(interpolated(self.samples, name, scored, by_scored=True), more, extra)
            else:
                windows[name] = interpolated(self.samples, name, tokens)
        return windows, first.inputs * tokens / first.tokens


def plus(window: Window, other: Window, times: float = 1) -> Window:
    return Window(*(a + times * b for a, b in zip(window, other, strict=True)))


def edges(layers: int) -> list[tuple[str, ...]]:
    """What each layer is besides: the first, the last, both or neither."""
    return [("first",) * (number == 0) + ("last",) * (number == layers - 1) for number in range(layers)]


def interpolated(samples: tuple[Sample, ...], name: str, at: float, *, by_scored: bool = False) -> Window:
    """The window at a size between two samples, or beyond them on the line of the nearest two."""
    sizes = [sample.scored if by_scored else sample.tokens for sample in samples]
    upper = min(max(bisect_left(sizes, at), 1), len(samples) - 1)
    share = (at - sizes[upper - 1]) / (sizes[upper] - sizes[upper - 1])
    low, high = samples[upper - 1].windows[name], samples[upper].windows[name]
    return Window(*(a + share * (b - a) for a, b in zip(low, high, strict=True)))


# ---- What is held whatever the batch: arithmetic ----


class Held(NamedTuple):
    """Bytes on each device between two steps, and while the optimizer takes one."""

    parameters: float
    gradients: float  # when the optimizer takes its step
    earlier: float  # gradients when a micro-batch begins
    optimizer: float
    communication: float  # buffers
    step: float  # temporaries of an optimizer step
    gradient_share: float  # of the gradients that backward makes, what stays on this process


def held_bytes(plan: Plan, layer: Weights, rest: Weights, layers: int) -> Held:
    total = Weights(*(own + layers * each for own, each in zip(rest, layer, strict=True)))
    total = total._replace(largest=max(rest.largest, layer.largest))
    if plan.strategy.startswith("zero"):
        held = zero_bytes(plan, total)
    else:
        states, step = (0.0, 0.0) if plan.optimizer is None else optimizer_bytes(plan, total)
        parts = (earlier_bytes(plan, total), states, communication_bytes(plan, total), step, 1.0)
        held = Held(total.parameters, total.trained, *parts)
    return held._replace(parameters=held.parameters + outside_bytes(plan))


def outside_bytes(plan: Plan) -> float:
    """What text does not pass: whole, or each process's share; FSDP gathers it with the embedding."""
    compute = (plan.compute_dtype or plan.dtype).itemsize
    width = plan.quantised / 8 if plan.quantised else compute if plan.strategy.startswith("zero") else plan.dtype.itemsize
    if plan.strategy in ("single", "ddp", "zero2"):
        return plan.outside * width
    gathered = compute if plan.strategy.startswith("fsdp") else 0
    return plan.outside * (width / plan.processes + gathered)


def earlier_bytes(plan: Plan, weights: Weights) -> float:
    """Gradients of the micro-batches before; whole ones are in the precision that FSDP reduces in."""
    if not plan.accumulates:
        return 0.0
    whole = plan.whole_gradients and plan.strategy.startswith("fsdp")
    return FULL_PRECISION * weights.whole_trained if whole else weights.trained


def communication_bytes(plan: Plan, weights: Weights) -> float:
    if plan.strategy == "ddp":  # it reduces in buckets, which are as large as all gradients together
        return weights.trained
    text = plan.config.get_text_config()
    if plan.strategy == "fsdp1" and not text.tie_word_embeddings:  # it gathers the embedding with the head, and keeps both
        return text.vocab_size * text.hidden_size * (plan.compute_dtype or plan.dtype).itemsize
    return 0.0


def optimizer_bytes(plan: Plan, weights: Weights) -> tuple[float, float]:
    """States, and temporaries of a step. Optimizers that are not known here count as AdamW."""
    states = STATE_BYTES[plan.optimizer] * weights.elements if plan.optimizer in STATE_BYTES else 2 * weights.trained
    if plan.optimizer in IN_PLACE:
        return states, 0.0
    # torch's AdamW takes the roots of all second moments at once on a GPU, of one parameter after the other on a CPU.
    return states, weights.trained if plan.device_type == "cuda" else 2 * weights.largest


def zero_bytes(plan: Plan, weights: Weights) -> Held:
    """DeepSpeed's partitions: the model in the precision it computes in, float32 masters and moments beside it.

    weights: of the unsharded model in that precision.
    """
    third = plan.strategy == "zero3"
    width = weights.trained / max(weights.elements, 1)  # bytes of a trained parameter
    own = weights.elements / plan.processes
    states = 0.0 if plan.optimizer is None else own * (FULL_PRECISION + STATE_BYTES.get(plan.optimizer, 2 * FULL_PRECISION))
    live = min(plan.zero_live, weights.whole_elements) * weights.parameters / weights.whole_elements if third else 0.0
    return Held(
        parameters=weights.parameters / (plan.processes if third else 1),
        gradients=width * own,
        earlier=width * own if plan.accumulates else 0.0,
        optimizer=states,
        communication=plan.zero_bucket * width + live,
        # The partition's gradients in float32, and the roots of its second moments.
        step=FULL_PRECISION * own * (1 if plan.optimizer in IN_PLACE else 2),
        gradient_share=1 / plan.processes,
    )


def peak_of(held: Held, where: str, **parts: float) -> Peak:
    own = {"parameters": held.parameters, "optimizer": held.optimizer, **parts}
    sizes = {name: round(own.get(name, 0.0)) for name in Peak._fields[2:]}
    return Peak(sum(sizes.values()), where, **sizes)


# ---- The estimate ----


def estimate(plan: Plan) -> MemoryModel:
    """Try the plan's step without data, and return what follows for any micro-batch. Raises ValueError if that fails."""
    return estimates([plan])[0]


def estimates(plans: list[Plan], *, timeout: float = 600) -> list[MemoryModel]:
    """`estimate` of several plans, which share the seconds that imports take.

    In an interpreter of its own: a fake process group cannot stand beside a real one, a trainer's threads would see the
    patches, and what torch and transformers remember of the fake model would stay. It sees no GPU and no launcher.
    """
    command = [sys.executable, "-c", f"from {__package__}.fake_step import answer; answer()"]
    done = subprocess.run(
        command, input=pickle.dumps(plans), capture_output=True, timeout=timeout, env=own_environment(), check=False
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        raise ValueError(f"the memory of this run cannot be estimated: {lines[-1]}")
    return pickle.loads(done.stdout)


def own_environment() -> dict[str, str]:
    """This process's environment, for one that is alone, on a CPU, and imports what this one does."""
    launchers = ("ACCELERATE_", "FSDP_", "DEEPSPEED_", "TORCHELASTIC_")
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in ranks and not name.startswith(launchers)}
    path = os.pathsep.join(str(Path(folder).resolve()) for folder in sys.path)
    return {**kept, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
