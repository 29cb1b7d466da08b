"""The plan that a recipe is estimated by is the one that its trainer would make, and the run's own rule divides its steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

from alignment.model.adapters import lora_config
from alignment.model.loading import check_model_path
from alignment.model.shared_prompt import asked_attention, use_shared_prompts
from alignment.preference.fitting import attention_held, memory_plan
from alignment.preference.memory import GIB, Pair, Peak, Plan, estimates
from alignment.preflight.dry_run import WillNotFit, conclude
from alignment.preflight.memory import Memory, MicroBatch, Sizes, memory_of, plan_of, sizes_of
from alignment.preflight.model import skeleton_of
from alignment.preflight.report import Report, new_console
from alignment.recipe.configs import ModelArguments
from scripts.orpo_config import ORPOConfig
from scripts.orpo_trainer import ORPOTrainer
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests.builders import SIZES, tiny_model, token_rows

ROWS = Dataset.from_list(token_rows([(5, 30, 9), (2, 12, 40), (1, 10, 10), (9, 60, 6), (4, 20, 2), (3, 2, 15)] * 4))
MEANT = {"use_cpu": True, "use_liger_kernel": None, "deepspeed": None, "fsdp": None}
LAYERS = 2
SHAPES = {*SIZES, "n_embd", "n_head", "n_layer", "n_inner", "tie_word_embeddings", "model_type"}


def arguments(folder, config=SimPOConfig, **settings):
    keys = {
        "output_dir": str(folder / "run"),
        "report_to": "none",
        "max_length": 200,
        "max_prompt_length": 100,
        "use_cpu": True,
    }
    return config(**keys | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4} | settings)


@pytest.mark.parametrize(
    ("kind", "model", "settings"),
    [
        ("llama", {}, {}),
        ("llama", {"torch_dtype": "bfloat16"}, {"bf16": True, "gradient_checkpointing": True}),
        ("llama", {}, {"pair_layout": "padded", "optim": "adafactor"}),
        ("gpt2", {"attn_implementation": "eager"}, {}),
        ("llama", {"attn_implementation": "eager"}, {"pair_layout": "packed"}),
        ("qwen2", {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "up_proj"]}, {}),
        ("llama", {"use_peft": True, "lora_r": 8}, {}),  # peft's usual layers
    ],
)
def test_the_plan_of_a_recipe_is_the_plan_of_its_trainer(kind, model, settings, tmp_path, tokenizer):
    tiny_model(kind).save_pretrained(tmp_path / "model")
    model_args = ModelArguments(model_name_or_path=str(tmp_path / "model"), **model)
    args = arguments(tmp_path, **settings)
    config = check_model_path(model_args)
    skeleton = skeleton_of(model_args, args, config)
    foreseen = plan_of(args, model_args, skeleton, MEANT, "single", ROWS)

    args.model_init_kwargs = {
        "dtype": model.get("torch_dtype", "float32"),
        **({"attn_implementation": model["attn_implementation"]} if "attn_implementation" in model else {}),
    }
    trainer = SimPOTrainer(
        str(tmp_path / "model"), args, ROWS, processing_class=tokenizer, peft_config=lora_config(model_args, config)
    )
    made = memory_plan(trainer)
    shapes = [{key: value for key, value in plan.config.to_dict().items() if key in SHAPES} for plan in (foreseen, made)]
    assert shapes[0] == shapes[1]
    if foreseen.lora is not None:
        assert set(foreseen.lora.targets) == set(made.lora.targets)
        foreseen, made = (replace(plan, lora=plan.lora._replace(targets=())) for plan in (foreseen, made))
    assert replace(foreseen, config=None) == replace(made, config=None)
    assert skeleton.parameters == sum(p.numel() for p in tiny_model(kind).parameters())
    assert skeleton.trained == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


def test_a_recipe_for_a_gpu_is_estimated_for_one(tmp_path):
    """Whatever this machine has: the fused optimizer, flash attention as sdpa holds as much, eager as flex computes it."""
    tiny_model().save_pretrained(tmp_path / "model")
    plans = {}
    for attention in ("flash_attention_2", "eager"):
        model_args = ModelArguments(model_name_or_path=str(tmp_path / "model"), attn_implementation=attention)
        args = arguments(tmp_path, dry_run=True, bf16=True, num_processes=4, optim="adamw_torch")
        skeleton = skeleton_of(model_args, args, check_model_path(model_args))
        plans[attention] = plan_of(args, model_args, skeleton, MEANT | {"use_cpu": False}, "fsdp2", ROWS)
    flash = plans["flash_attention_2"]
    assert (flash.device_type, flash.strategy, flash.processes, flash.attention) == ("cuda", "fsdp2", 4, "sdpa")
    assert (flash.dtype, flash.compute_dtype, flash.optimizer) == (torch.float32, torch.bfloat16, "adamw_torch_fused")
    assert plans["eager"].attention == "flex_attention"


@pytest.mark.parametrize("layout", ["auto", "packed", "padded"])
@pytest.mark.parametrize("asked", ["flash_attention_2", "kernels-community/flash-attn3", "eager", "sdpa", "flex_attention"])
def test_a_prepared_model_is_estimated_by_an_attention_that_any_machine_can_build(asked, layout):
    model = tiny_model()
    model.config._attn_implementation_internal = asked
    if layout != "padded":
        use_shared_prompts(model, keeps_eager=layout == "packed")
        assert model.config._attn_implementation.startswith("shared_prompt_")
    assert asked_attention(model.config) == asked
    held = attention_held(asked_attention(model.config), layout, is_packed=layout != "padded", on_gpu=True)
    wanted = "sdpa" if "flash" in asked else "flex_attention" if (asked, layout) == ("eager", "auto") else asked
    assert held == wanted


def test_eager_attention_that_is_kept_holds_its_scores_by_whole_segments_on_a_gpu():
    plan = Plan(tiny_model().config, attention="eager", pair=Pair(40, 300, 300))
    kept, flex = estimates([plan, replace(plan, attention="flex_attention")])
    tokens, heads = 640, plan.config.num_attention_heads
    scores = heads * 4 * (39**2 + 2 * 301 * 340)  # float32, of a layer
    more = kept.peak(tokens, recompute_layers=0).activations - flex.peak(tokens, recompute_layers=0).activations
    assert more > LAYERS * scores


# ---- Micro-batches ----


class Linear:
    """A model of memory by hand: 1 GiB held, and for a token 1 MiB, twice that in a layer that is not recomputed."""

    layers = LAYERS

    def __init__(self, plan: Plan):
        self.plan = plan

    def bytes_of(self, tokens: int, recomputed: int) -> int:
        return GIB + tokens * 2**20 * (recomputed + 2 * (LAYERS - recomputed))

    def peak(self, tokens: int, scored: int, recompute_layers: int) -> Peak:
        return Peak(self.bytes_of(tokens, recompute_layers), "head backward", GIB, *[0] * 7)

    def largest(self, available: float, recompute_layers: int, *, scored_share: float, most: int) -> int:
        return max(min(int((available - GIB) / (self.bytes_of(1, recompute_layers) - GIB)), most), 0)


def memory(tmp_path, sizes: list[int], gpu_memory: float | None, *, device: str = "cuda", layout: str = "packed", **settings):
    args = arguments(tmp_path, gradient_checkpointing=True, **settings)
    plan = Plan(tiny_model().config, layout=layout, device_type=device)
    tokens = np.array(sizes)
    return memory_of(Linear(plan), args, Sizes(tokens, tokens // 2), 10**5, gpu_memory)


SIZES = [100, 200, 300, 1000]  # tokens of the pairs


def test_a_fixed_count_is_of_the_longest_pairs_and_of_usual_ones(tmp_path):
    found = memory(tmp_path, SIZES, None, device="cpu")
    assert (found.longest.tokens, found.usual.tokens) == (1300, 800)
    assert found.longest.scored == 650
    assert (found.reason, found.division.recompute_layers, found.context) == ("given", LAYERS, (0, 0))
    padded = memory(tmp_path, SIZES, None, device="cpu", layout="padded")
    assert padded.longest.tokens == 2000
    assert 800 < padded.usual.tokens < 2000


def test_a_gpu_takes_what_fits_beside_its_own_libraries(tmp_path):
    """20 GiB less 8 less 1: 11 GiB are 5,632 tokens with both layers recomputed, and no pair needs fewer than 1,000."""
    found = memory(tmp_path, SIZES, 20)
    (fit,) = [fit for fit in found.fits if fit.gib == 20]
    assert fit.largest == 5632
    assert found.reason == "chosen"
    assert found.longest.peak.total <= (20 - 8) * GIB
    assert [fit.gib for fit in found.fits] == [20, 24, 48, 80, 141]


def test_a_gpu_that_is_too_small_is_judged_by_the_smallest_division(tmp_path):
    found = memory(tmp_path, SIZES, 9.5)
    assert found.reason == "least"
    assert (found.division.max_tokens, found.division.recompute_layers) == (1000, LAYERS)
    assert next(fit for fit in found.fits if fit.gib == 9.5).division is None


def test_a_budget_of_the_recipe_is_the_longest_step(tmp_path):
    found = memory(tmp_path, SIZES, None, max_tokens_per_micro_batch=1500, recompute_layers="all")
    assert (found.reason, found.longest.tokens) == ("given", 1500)
    assert found.usual.tokens == round(8 * 400 / 3)  # 8 pairs of 400 tokens, in three parts


def verdict(peak: float, gpu_memory: float | None, capsys) -> str:
    batch = MicroBatch(1, 1, Peak(round(peak * GIB), "head backward", *[0] * 8))
    conclude(Report(new_console()), Memory(None, 2, None, "given", batch, batch, [], (5, 8)), gpu_memory)
    return capsys.readouterr().out


def test_the_verdict_knows_that_what_cuda_takes_is_a_guess(capsys):
    assert "It would start.\n" in verdict(70, None, capsys)
    assert "It should fit: 70.0 GiB and 5 to 8 of 80" in verdict(70, 80, capsys)
    assert "It may not fit: 74.0 GiB" in verdict(74, 80, capsys)
    with pytest.raises(WillNotFit, match=r"will not fit 80 GiB: its largest micro-batch needs 76.0"):
        verdict(76, 80, capsys)


def test_orpo_scores_the_chosen_prompt_too(tmp_path, tokenizer):
    args = arguments(tmp_path, ORPOConfig)
    plan = Plan(tiny_model().config)
    without, with_prompt = (sizes_of(ROWS, plan, scores_prompt=scores) for scores in (False, True))
    assert args.objective.scores_prompt
    trainer = ORPOTrainer(tiny_model(), args, ROWS, processing_class=tokenizer)
    counts = trainer.data_collator([ROWS[0]])["token_counts"]
    assert (without.tokens[0], with_prompt.scored[0]) == (5 + 30 + 9, 5 + 30 + 9)
    assert counts.scored == with_prompt.scored[0] - 1  # nothing predicts the first token
