"""The memory estimate against what was measured: small models here, large ones on a GPU once."""

import copy
import itertools
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig

from alignment.preference.memory import GIB, Lora, MemoryModel, Pair, Plan, estimate, estimates, own_environment
from benchmarks.memory import MODELS, PAIRS, compare, small_plan

TOLERANCE = 0.15
# Each strategy and each kind of training with every model once; all twelve agree as well (benchmarks/memory.py).
CASES = [
    (name, strategy, trained)
    for (name, strategy), trained in zip(
        itertools.product(MODELS, ("single", "fsdp2")), itertools.cycle(("whole", "LoRA", "LoRA", "whole"))
    )
]

# ---- Small models, measured here ----


@pytest.fixture(scope="module")
def small_models() -> dict[tuple[str, str, str], MemoryModel]:
    plans = [small_plan(name, strategy, lora=trained == "LoRA") for name, strategy, trained in CASES]
    return dict(zip(CASES, estimates(plans), strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_cpu_step_peaks_where_the_estimate_says(case, small_models):
    for row in compare(small_models[case], PAIRS):
        assert row.estimated == pytest.approx(row.measured, rel=TOLERANCE), row


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=str)
def test_what_fsdp_gathers_ahead_counts_once_however_many_layers_there_are(precision):
    """A vocabulary so large, and layers so many, that counting it with every layer would add 39 %."""
    plan = small_plan("llama", "fsdp2")
    config = copy.deepcopy(plan.config)
    config.num_hidden_layers, config.vocab_size = 16, 16_000
    for row in compare(estimate(replace(plan, config=config, compute_dtype=precision)), 1):
        assert row.estimated == pytest.approx(row.measured, rel=0.02), row


def test_an_estimate_leaves_no_trace(small_models):
    assert not torch.distributed.is_initialized()
    assert "resize_" not in vars(torch.UntypedStorage)
    assert torch.nn.Module._apply.__module__ == "torch.nn.modules.module"


def test_an_estimate_knows_nothing_of_the_launch(monkeypatch):
    launch = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "TORCHELASTIC_RUN_ID")
    for name in launch:
        monkeypatch.setenv(name, "1")
    assert not set(launch) & set(own_environment())
    assert own_environment()["CUDA_VISIBLE_DEVICES"] == ""


# ---- Large models, measured on one H200 with torch 2.11 ----

PLAIN = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 8192}
LLAMA = {**PLAIN, "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
LLAMA_8B = LlamaConfig(**LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
LLAMA_1B = LlamaConfig(**LLAMA, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64)
GEMMA_9B = Gemma2Config(
    **PLAIN, vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
    num_key_value_heads=8, head_dim=256, tie_word_embeddings=True,
)  # fmt: skip
# bf16 weights and gradients, no optimizer, prompts and responses of the lengths that were trained on.
FORWARD_BACKWARD = Plan(LLAMA_8B, dtype=torch.bfloat16, optimizer=None, pair=Pair(32, 330, 330))
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLANS = {
    "8B": FORWARD_BACKWARD,
    "1B": replace(FORWARD_BACKWARD, config=LLAMA_1B),
    "1B Liger": replace(FORWARD_BACKWARD, config=LLAMA_1B, liger=True),
    "Gemma-2-9B": replace(FORWARD_BACKWARD, config=GEMMA_9B, attention="flex_attention"),
    "8B LoRA": replace(
        FORWARD_BACKWARD, compute_dtype=torch.bfloat16, lora=Lora(64, PROJECTIONS), pair=Pair(16, 2032, 2032)
    ),
}  # fmt: skip


class Measured(NamedTuple):
    """A measurement: the (tokens, scored) of a step's micro-batches, in order, and torch's max_memory_allocated."""

    plan: str
    recompute_layers: int
    gib: float
    micro_batches: tuple[tuple[int, int], ...]


STEP_8B = ((16268, 15503), (3261, 2869))
SMALLER_8B = ((8189, 7978), (8079, 7525), (3261, 2869))
STEP_1B = ((16377, 15621), (16313, 15693), (11387, 10360))
SMALLER_1B = ((8174, 7965), (8190, 7678), (8171, 7818), (8137, 7807), (8136, 7595), (3269, 2811))
STEP_9B = ((8075, 7717), (1858, 1608))
ON_H200 = [
    Measured("8B", 32, 34.06, STEP_8B),
    Measured("8B", 0, 116.69, STEP_8B),
    Measured("8B", 0, 82.15, SMALLER_8B),
    Measured("8B", 32, 31.3, ((9933, 9325),)),
    Measured("8B", 32, 30.2, ((5627, 5326),)),
    Measured("1B", 16, 8.87, STEP_1B),
    Measured("1B", 0, 34.3, STEP_1B),
    Measured("1B", 0, 20.89, SMALLER_1B),
    Measured("1B", 16, 6.8, ((9933, 9325),)),
    Measured("1B Liger", 16, 8.68, STEP_1B),
    Measured("1B Liger", 8, 17.43, STEP_1B),
    Measured("1B Liger", 0, 26.19, STEP_1B),
    Measured("1B Liger", 0, 16.82, SMALLER_1B),
    Measured("Gemma-2-9B", 42, 40.35, STEP_9B),
    Measured("Gemma-2-9B", 0, 107.93, STEP_9B),
    Measured("8B LoRA", 32, 52.6, ((65264, 65024),)),
]


class Large(NamedTuple):
    """Of one plan, with and without gradients that are there already."""

    first: MemoryModel
    later: MemoryModel

    def peak(self, run: Measured) -> float:
        first, *later = run.micro_batches
        peaks = [self.first.peak(*first, run.recompute_layers)]
        return max(peak.total for peak in peaks + [self.later.peak(*size, run.recompute_layers) for size in later])


@pytest.fixture(scope="module")
def large_models() -> dict[str, Large]:
    first, later = (
        estimates([replace(plan, accumulates=accumulates) for plan in PLANS.values()]) for accumulates in (False, True)
    )
    return {name: Large(*pair) for name, *pair in zip(PLANS, first, later, strict=True)}


@pytest.mark.parametrize("run", ON_H200, ids=lambda run: f"{run.plan}-{run.recompute_layers}-{run.micro_batches[0][0]}")
def test_what_an_h200_held_was_foreseen(run, large_models):
    assert large_models[run.plan].peak(run) / GIB == pytest.approx(run.gib, rel=TOLERANCE)


def test_a_layer_more_costs_what_a_layer_costs(large_models):
    """32 layers from six: the eighth, say, keeps as much as the thirtieth."""
    kept = [large_models["8B"].first.peak(8192, None, recompute_layers).total for recompute_layers in range(33)]
    steps = {round((more - less) / 2**20) for more, less in itertools.pairwise(kept[:16])}
    assert max(steps) - min(steps) <= 1


def test_the_most_tokens_that_fit_fit_and_one_more_does_not(large_models):
    model = large_models["8B"].later
    for recompute_layers in (0, 16, 32):
        tokens = model.largest(80 * GIB, recompute_layers)
        assert model.peak(tokens, None, recompute_layers).total <= 80 * GIB
        assert model.peak(tokens + 1, None, recompute_layers).total > 80 * GIB
    assert model.largest(16 * GIB) == 0


def test_categories_add_up_to_the_peak(large_models):
    peak = large_models["8B"].later.peak(8192)
    assert peak.total == sum(peak[2:])
    assert peak.parameters == pytest.approx(2 * 8_030_261_248, rel=1e-3)


# ---- Strategies, by arithmetic that a reader can redo ----


@pytest.fixture(scope="module")
def strategies() -> dict[str, MemoryModel]:
    plan = Plan(LLAMA_8B, compute_dtype=torch.bfloat16, processes=4)
    names = ("single", "ddp", "zero2", "zero3", "fsdp1", "fsdp2")
    plans = [replace(plan, strategy=name, processes=1 if name == "single" else 4) for name in names]
    return dict(zip(names, estimates(plans), strict=True))


def test_what_is_sharded_is_held_in_parts(strategies):
    """8.03e9 parameters on 4 devices. float32: 4 bytes each; ZeRO: 2 in bf16, and 12 of master and moments in parts."""
    parameters = {name: model.peak(2048).parameters / 8_030_261_248 for name, model in strategies.items()}
    optimizer = {name: model.peak(2048).optimizer / 8_030_261_248 for name, model in strategies.items()}
    assert parameters == pytest.approx({"single": 4, "ddp": 4, "zero2": 2, "zero3": 0.5, "fsdp1": 1, "fsdp2": 1}, rel=1e-3)
    assert optimizer == pytest.approx({"single": 8, "ddp": 8, "zero2": 3, "zero3": 3, "fsdp1": 2, "fsdp2": 2}, rel=1e-3)


def test_a_tower_that_no_text_passes_is_held_whole_or_in_parts(strategies):
    """1e9 elements: float32, or bf16 with ZeRO; FSDP gathers them in bf16 besides."""
    held = {}
    for name, model in strategies.items():
        with_tower = replace(model, plan=replace(model.plan, outside=10**9))
        held[name] = (with_tower.peak(2048).total - model.peak(2048).total) / 1e9
    wanted = {"single": 4, "ddp": 4, "zero2": 2, "zero3": 0.5, "fsdp1": 1 + 2, "fsdp2": 1 + 2}
    assert held == pytest.approx(wanted)


def test_gradients_kept_whole_between_micro_batches_cost_what_sharding_saved():
    plan = Plan(LLAMA_8B, compute_dtype=torch.bfloat16, strategy="fsdp2", processes=4, optimizer="adamw_torch_fused")
    sharded, whole = (model.peak(8192).total / GIB for model in estimates([plan, replace(plan, whole_gradients=True)]))
    # 4 bytes for each of 8.03e9 parameters instead of 1, while nothing else changes.
    assert whole - sharded == pytest.approx(3 * 8_030_261_248 / GIB, rel=0.1)


def test_fewer_bits_of_the_base_are_fewer_bytes():
    plan = Plan(LLAMA_8B, torch.bfloat16, torch.bfloat16, lora=Lora(64, PROJECTIONS))
    plain, eight, four = (m.peak(2048).parameters for m in estimates([replace(plan, quantised=b) for b in (None, 8, 4)]))
    layers = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # weights of the linear layers
    widened = 2 * 2 * 128256 * 4096  # embedding and head, from bf16 to float32
    assert plain - eight + widened == pytest.approx(layers, rel=0.01)
    assert plain - four + widened == pytest.approx(1.5 * layers - layers / 16, rel=0.01)


def test_a_plan_refuses_nonsense_all_at_once():
    with pytest.raises(ValueError, match=r"(?s)strategy = 'zero9'.*quantised = 3.*device_type = 'tpu'"):
        Plan(LLAMA_1B, strategy="zero9", quantised=3, device_type="tpu")


def test_what_cannot_be_estimated_says_why():
    with pytest.raises(ValueError, match=r"cannot be estimated: .*attention"):
        estimate(Plan(LLAMA_1B, attention="no_such_attention"))
