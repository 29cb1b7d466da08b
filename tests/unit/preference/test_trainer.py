"""SimPOTrainer against a plain loop: the same losses, gradients and metrics, however the pairs are batched."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    PreTrainedModel,
)

from alignment.data.prepare import to_tokens
from alignment.errors import TrainingStopped, UserError
from alignment.preference.collate import PaddedCollator
from alignment.run.guards import NonFiniteStep
from scripts.simpo_trainer import SimPOTrainer
from tests import reference
from tests.builders import VOCABULARY, bpe_tokenizer, text_rows, tiny_model, token_rows
from tests.unit.preference.conftest import LEARNING_RATE, LENGTHS, ROWS

LOSS = {"beta": 2.5, "gamma_beta_ratio": 0.4}
# Models compute their norms in float32, float64 weights or not, and a packed row rounds there in its own way.
ROUNDING = {"rtol": 0, "atol": 1e-6}
UNUSED_TOKEN = 3  # token_rows never draws it
SIDED_METRICS = ("rewards", "logps", "logits", "lengths")
PAIR_METRICS = {f"{kind}/{side}" for kind in SIDED_METRICS for side in ("chosen", "rejected")}
PAIR_METRICS |= {"rewards/accuracies", "rewards/margins"}
THROUGHPUT = {"tokens_per_second", "tokens_saved", "peak_memory_gb"}

both_layouts = pytest.mark.parametrize("layout", ["padded", "packed"])


@pytest.fixture
def build(build_of):
    return lambda *arguments, **settings: build_of("simpo", *arguments, **{**LOSS, **settings})


def plain_sgd(model: PreTrainedModel, steps: list[list[dict[str, Any]]], **loss: float) -> dict[str, Tensor]:
    """The weights after one step of gradient descent on each batch, by the reference loss."""
    for rows in steps:
        model.zero_grad()
        reference.simpo_step_loss(model, rows, **{**LOSS, **loss}).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
    return weights_of(model)


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def trained(trainer: SimPOTrainer) -> dict[str, Tensor]:
    trainer.train()
    return weights_of(trainer.model)


def training_records(trainer: SimPOTrainer) -> list[dict[str, float]]:
    return [record for record in trainer.state.log_history if "loss" in record]


def double(**settings: Any) -> PreTrainedModel:
    return tiny_model(dtype=torch.float64, **settings)


# ---- One step ----


@both_layouts
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (3, 3), (1, 8)])
@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
def test_a_step_of_8_pairs_is_the_plain_loops_however_it_is_split(build, layout, batch, accumulation, sft_weight):
    trainer = build(
        double(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        sft_weight=sft_weight,
        preprocessing="exact",
        pair_layout=layout,
    )
    expected = plain_sgd(double(), [ROWS], sft_weight=sft_weight)
    torch.testing.assert_close(trained(trainer), expected, **ROUNDING)
    loss = reference.simpo_step_loss(double(), ROWS, **LOSS, sft_weight=sft_weight).item()
    assert training_records(trainer)[0]["loss"] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("budget", "layout"), [(30, "packed"), (60, "packed"), (1000, "packed"), (60, "padded"), (150, "padded")]
)
@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
def test_a_step_divided_by_tokens_is_the_plain_loops_too(build, budget, layout, sft_weight):
    settings = {"max_tokens_per_micro_batch": budget, "sft_weight": sft_weight, "preprocessing": "exact", "pair_layout": layout}
    trainer = build(double(), per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    torch.testing.assert_close(trained(trainer), plain_sgd(double(), [ROWS], sft_weight=sft_weight), **ROUNDING)
    loss = reference.simpo_step_loss(double(), ROWS, **LOSS, sft_weight=sft_weight).item()
    assert training_records(trainer)[0]["loss"] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_tokens_per_micro_batch": 40},
    ],
    ids=["4 x 1", "2 x 2", "1 x 4", "by tokens"],
)
def test_pairs_of_the_last_incomplete_window_weigh_the_same(build, split):
    trainer = build(double(), ROWS[:6], **split)
    torch.testing.assert_close(trained(trainer), plain_sgd(double(), [ROWS[:4], ROWS[4:6]]), **ROUNDING)


@pytest.mark.parametrize("budget", [None, 40])
def test_what_drop_last_drops_is_a_micro_batch_however_the_step_is_divided(build, budget):
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_tokens_per_micro_batch": budget}
    trainer = build(double(), ROWS[:7], dataloader_drop_last=True, **split)
    torch.testing.assert_close(trained(trainer), plain_sgd(double(), [ROWS[:4], ROWS[4:6]]), **ROUNDING)


@pytest.mark.parametrize("budget", [None, 40])
def test_published_mode_averages_the_cross_entropy_of_each_micro_batch(build, budget):
    """Of those that the recipe counts in pairs, even where they are divided by tokens."""
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_tokens_per_micro_batch": budget}
    trainer = build(double(), **split, sft_weight=0.3)
    halves = [reference.simpo_step_loss(double(), rows, **LOSS, sft_weight=0.3).item() for rows in (ROWS[:4], ROWS[4:])]
    trainer.train()
    assert training_records(trainer)[0]["loss"] == pytest.approx(sum(halves) / 2, abs=1e-6)


# In their own words: the sizes of tests/builders.py would give each config fields that real ones lack.
NATURAL = [
    GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY),
    GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=VOCABULARY),
    GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=VOCABULARY),
    OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32, vocab_size=VOCABULARY
    ),
    BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY),
    FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY),
    MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=VOCABULARY),
    MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY),
]


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("config", NATURAL, ids=lambda config: config.model_type)
def test_an_architecture_that_names_its_sizes_otherwise_trains_all_the_same(build, config, layout):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    loss = reference.simpo_step_loss(model, ROWS, **LOSS).item()
    trainer = build(model, pair_layout=layout)
    trainer.train()
    assert training_records(trainer)[0]["loss"] == pytest.approx(loss, abs=1e-4)


def test_batches_are_copied_to_the_device_while_it_computes(build):
    """From pinned memory, which transformers switches off where a CPU is asked for."""
    loaders = {use_cpu: build(use_cpu=use_cpu).get_train_dataloader() for use_cpu in (True, False)}
    assert {use_cpu: (loader._non_blocking, loader.pin_memory) for use_cpu, loader in loaders.items()} == {
        True: (False, False),
        False: (True, True),
    }
    assert build(use_cpu=False, accelerator_config={"non_blocking": False}).get_train_dataloader()._non_blocking is False


def test_a_mixture_of_experts_adds_its_load_balancing_loss(build):
    """Padded, as the reference is: a packed row counts the routing of a shared prompt once."""
    model = tiny_model("mixtral")
    batch = PaddedCollator(pad_token_id=0)(ROWS)
    router_loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).aux_loss.item()
    loss = reference.simpo_step_loss(model, ROWS, **LOSS).item()
    trainer = build(tiny_model("mixtral"), pair_layout="padded")
    trainer.train()
    (record,) = training_records(trainer)
    assert record["router_loss"] == pytest.approx(router_loss, abs=1e-4)
    assert record["loss"] == pytest.approx(loss + 0.1 * router_loss, abs=1e-4)


@pytest.mark.parametrize(
    "settings", [{"loss_type": "hinge"}, {"label_smoothing": 0.2}, {"beta": 10.0, "gamma_beta_ratio": 0.3}]
)
def test_the_recipes_loss_settings_reach_the_loss(build, settings):
    trainer = build(double(), **settings)
    chosen, rejected = reference.mean_logps(double(), ROWS)
    scaled = trainer.args.beta * (chosen - rejected - trainer.args.gamma_beta_ratio)
    smoothing = trainer.args.label_smoothing
    expected = (
        (1 - scaled).clamp(min=0)
        if trainer.args.loss_type == "hinge"
        else (1 - smoothing) * (1 + (-scaled).exp()).log() + smoothing * (1 + scaled.exp()).log()
    )
    trainer.train()
    assert training_records(trainer)[0]["loss"] == pytest.approx(expected.mean().item(), abs=1e-6)


@both_layouts
@pytest.mark.parametrize("kind", ["mistral", "gemma2", "qwen2"])
def test_sliding_windows_and_soft_capping_keep_their_meaning(build, kind, layout):
    # float32: a float64 Gemma-2 is NaN where a window holds nothing but padding, because its softmax is float32.
    trainer = build(tiny_model(kind), pair_layout=layout)
    torch.testing.assert_close(trained(trainer), plain_sgd(tiny_model(kind), [ROWS]), rtol=0, atol=2e-5)


@both_layouts
def test_gradient_checkpointing_gives_the_same_weights(build, layout):
    trainer = build(double(), gradient_checkpointing=True, pair_layout=layout)
    torch.testing.assert_close(trained(trainer), plain_sgd(double(), [ROWS]), **ROUNDING)


@both_layouts
def test_bf16_autocast_trains_float32_weights_near_the_float32_run(build, layout):
    exact, rough = (build(pair_layout=layout, bf16=bf16) for bf16 in (False, True))
    expected, found = trained(exact), trained(rough)
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    first, rounded = training_records(exact)[0], training_records(rough)[0]
    # bf16 logits of a few nats are off by 2^-8 of that; a mean over tokens by less.
    assert rounded["logps/chosen"] == pytest.approx(first["logps/chosen"], abs=0.05)
    before = weights_of(tiny_model())
    for name, weight in expected.items():
        step = weight - before[name]
        assert (found[name] - weight).norm() < 0.2 * step.norm(), name


# ---- Data and model, in every form ----


def test_text_and_tokens_give_the_same_run(build, tokenizer):
    texts = Dataset.from_list(text_rows(4))
    from_text = build(rows=texts)
    from_tokens = build(rows=to_tokens(texts, tokenizer, from_text.args.length_rules, num_proc=None))
    torch.testing.assert_close(trained(from_text), trained(from_tokens), rtol=0, atol=0)


def test_a_path_and_a_module_give_the_same_run(build, tmp_path):
    tiny_model().save_pretrained(tmp_path / "policy")
    from_path, from_module = build(str(tmp_path / "policy")), build(tiny_model())
    torch.testing.assert_close(trained(from_path), trained(from_module), rtol=0, atol=0)


def test_a_bf16_checkpoint_given_as_a_path_is_trained_in_float32(build, tmp_path):
    """A step of 1e-6 rounds to nothing in bf16."""
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "policy")
    assert {p.dtype for p in build(str(tmp_path / "policy")).model.parameters()} == {torch.float32}


def test_model_init_kwargs_have_the_last_word(build, tmp_path):
    tiny_model().save_pretrained(tmp_path / "policy")
    trainer = build(str(tmp_path / "policy"), model_init_kwargs={"dtype": "float64"})
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float64}


def test_columns_it_cannot_use_are_refused_by_name(build):
    with pytest.raises(
        UserError, match=r"train_dataset has the columns \['chosen', 'question'\]; needed are prompt, chosen and rejected"
    ):
        build(rows=Dataset.from_list([{"question": "Why?", "chosen": "So."}]))


def test_a_token_budget_below_the_longest_pair_is_refused_with_its_length(build):
    """The pair of 4 + (20, 2) tokens."""
    with pytest.raises(UserError, match=r"max_tokens_per_micro_batch = 25: the longest pair has 26 tokens"):
        build(max_tokens_per_micro_batch=25)


def test_a_token_budget_below_the_longest_padded_pair_is_refused_with_its_length(build):
    """The pair of 4 + (20, 2) tokens, two rows of 24 where both are padded."""
    with pytest.raises(UserError, match=r"max_tokens_per_micro_batch = 47: the longest pair has 48 tokens"):
        build(max_tokens_per_micro_batch=47, pair_layout="padded")


def test_a_trainer_without_tokenizer_is_refused(build):
    with pytest.raises(UserError, match="processing_class = None"):
        build(processing_class=None)


def test_another_beta_tokenizes_nothing(build, monkeypatch):
    texts = text_rows(4, seed=5)
    build(rows=Dataset.from_list(texts), beta=2.0)

    def encode_texts(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr("alignment.data.tokenization.encode_texts", encode_texts)
    build(rows=Dataset.from_list(texts), beta=10.0)
    with pytest.raises(AssertionError, match="tokenized again"):
        build(rows=Dataset.from_list(texts), max_length=180)


def test_rows_can_be_grouped_by_length(build):
    trainer = build(per_device_train_batch_size=2, train_sampling_strategy="group_by_length")
    trainer.train()
    assert trainer.state.global_step == 4


# ---- Adapters and dropout ----


@both_layouts
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_training_changes_only_the_adapter(build, tmp_path, layout, checkpointing):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], lora_dropout=0.3)
    trainer = build(peft_config=lora, pair_layout=layout, gradient_checkpointing=checkpointing)
    before = weights_of(trainer.model)
    after = trained(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_B" in name for name in changed)  # after one step A has had no gradient yet: B was zero
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


def test_a_peft_model_that_is_given_trains_as_one_that_is_made_here(build):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    policies = tiny_model(), tiny_model()
    torch.manual_seed(1)
    given = trained(build(get_peft_model(policies[0], lora)))
    torch.manual_seed(1)
    torch.testing.assert_close(trained(build(policies[1], peft_config=lora)), given, rtol=0, atol=0)


def test_dropout_is_off_lora_dropout_included_and_a_line_says_so(build, caplog):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_dropout=0.3)
    with caplog.at_level(logging.INFO, "alignment"):
        trainer = build(tiny_model(attention_dropout=0.5), peft_config=lora)
    assert "self_attn.attention_dropout = 0.5" in caplog.text
    assert "q_proj.lora_dropout.default = 0.3" in caplog.text
    trainer.train()
    chosen, _ = reference.mean_logps(tiny_model(), ROWS)
    assert training_records(trainer)[0]["logps/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-5)


@pytest.mark.parametrize("layout", ["padded", "auto"])
def test_dropout_stays_on_where_the_recipe_says_so(build, layout):
    trainer = build(tiny_model(attention_dropout=0.5), disable_dropout=False, pair_layout=layout)
    trainer.train()
    chosen, _ = reference.mean_logps(tiny_model(), ROWS)
    assert training_records(trainer)[0]["logps/chosen"] != pytest.approx(chosen.mean().item(), abs=1e-3)


# ---- Metrics ----


def plain_metrics(model: PreTrainedModel, rows: list[dict[str, Any]], beta: float) -> dict[str, float]:
    chosen, rejected = reference.mean_logps(model, rows)
    return {
        "rewards/chosen": beta * chosen.mean().item(),
        "rewards/rejected": beta * rejected.mean().item(),
        "rewards/margins": beta * (chosen - rejected).mean().item(),
        "rewards/accuracies": (chosen > rejected).double().mean().item(),
        "logps/chosen": chosen.mean().item(),
        "logps/rejected": rejected.mean().item(),
        "lengths/chosen": sum(row["chosen_length"] for row in rows) / len(rows),
        "lengths/rejected": sum(row["rejected_length"] for row in rows) / len(rows),
    }


@both_layouts
def test_training_logs_the_published_metrics_as_means_over_all_pairs_of_the_step(build, layout):
    trainer = build(double(), per_device_train_batch_size=3, gradient_accumulation_steps=3, pair_layout=layout)
    trainer.train()
    (record,) = training_records(trainer)
    assert record.keys() - THROUGHPUT == PAIR_METRICS | {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    for name, value in plain_metrics(double(), ROWS, beta=2.5).items():
        assert record[name] == pytest.approx(value, abs=1e-6), name


@both_layouts
@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
def test_evaluation_gives_the_published_metrics_as_means_over_all_pairs(build, layout, sft_weight):
    trainer = build(double(), held_out=ROWS[:7], sft_weight=sft_weight, preprocessing="exact", pair_layout=layout)
    metrics = trainer.evaluate()
    names = {name.removeprefix("eval_") for name in metrics}
    assert names >= PAIR_METRICS | {"loss"}
    assert ("sft_loss" in names) == (sft_weight > 0)
    for name, value in plain_metrics(double(), ROWS[:7], beta=2.5).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-6), name
    expected = reference.simpo_step_loss(double(), ROWS[:7], **LOSS, sft_weight=sft_weight).item()
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-6)


def test_each_held_out_pair_is_recorded_once_with_an_uneven_last_batch(build):
    trainer = build(double(), held_out=ROWS[:7])
    trainer.evaluate()
    pairs = trainer.eval_pairs["eval"]
    chosen, rejected = reference.mean_logps(double(), ROWS[:7])
    assert pairs["index"].tolist() == list(range(7))
    assert pairs["chosen_reward"] == pytest.approx((2.5 * chosen).detach().numpy(), abs=1e-6)
    assert pairs["rejected_reward"] == pytest.approx((2.5 * rejected).detach().numpy(), abs=1e-6)
    assert pairs["chosen_tokens"].tolist() == [row["chosen_length"] for row in ROWS[:7]]
    assert pairs["rejected_tokens"].tolist() == [row["rejected_length"] for row in ROWS[:7]]


def test_several_held_out_sets_are_told_apart_by_name(build):
    sets = {"a": Dataset.from_list(ROWS[:3]), "b": Dataset.from_list(ROWS[3:5])}
    trainer = build(double(), held_out=sets)
    metrics = trainer.evaluate()
    for name, rows in (("a", ROWS[:3]), ("b", ROWS[3:5])):
        expected = reference.simpo_step_loss(double(), rows, **LOSS).item()
        assert metrics[f"eval_{name}_loss"] == pytest.approx(expected, abs=1e-6)
        assert len(trainer.eval_pairs[f"eval_{name}"]["index"]) == len(rows)


def test_evaluating_in_between_changes_no_training_record(build):
    settings = {"per_device_train_batch_size": 2, "logging_steps": 2}
    alone = build(**settings)
    watched = build(**settings, held_out=ROWS, eval_strategy="steps", eval_steps=1)
    torch.testing.assert_close(trained(alone), trained(watched), rtol=0, atol=0)
    for expected, record in zip(training_records(alone), training_records(watched), strict=True):
        assert {key: record[key] for key in record.keys() - THROUGHPUT} == {
            key: expected[key] for key in expected.keys() - THROUGHPUT
        }


def test_the_cross_entropy_is_logged_over_all_chosen_tokens_of_the_step(build):
    trainer = build(
        double(), per_device_train_batch_size=3, gradient_accumulation_steps=3, sft_weight=0.3, preprocessing="exact"
    )
    chosen, _ = reference.mean_logps(double(), ROWS)
    tokens = torch.tensor([row["chosen_length"] for row in ROWS])
    trainer.train()
    assert training_records(trainer)[0]["sft_loss"] == pytest.approx(-(chosen * tokens).sum().item() / tokens.sum().item())


# ---- Numbers that are none ----


def damaged_model() -> PreTrainedModel:
    """Not finite as soon as it reads UNUSED_TOKEN."""
    model = double()
    model.get_input_embeddings().weight.data[UNUSED_TOKEN] = math.nan
    return model


def rows_that_read_it(*numbers: int) -> list[dict[str, Any]]:
    rows = token_rows(LENGTHS)
    for number in numbers:
        rows[number]["rejected_input_ids"][0] = UNUSED_TOKEN
    return rows


@pytest.mark.parametrize("batches", [{"pair_layout": "padded"}, {"pair_layout": "packed"}, {"max_tokens_per_micro_batch": 40}])
def test_a_step_that_is_not_finite_is_not_taken_and_its_rows_are_named(build, batches):
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = build(damaged_model(), rows_that_read_it(4), **split, **batches)
    with pytest.raises(
        NonFiniteStep, match=r"step 2: the log-probabilities of training rows \[4\] \(rank 0\) are not finite"
    ) as error:
        trainer.train()
    kernel = "sdpa, as transformers has it" if batches.get("pair_layout") == "padded" else "sdpa, segment by segment"
    assert f"Attention was computed by {kernel}, on a cpu" in str(error.value)
    after_the_first = plain_sgd(damaged_model(), [ROWS[:4]])
    torch.testing.assert_close(weights_of(trainer.model), after_the_first, **ROUNDING, equal_nan=True)
    assert trainer.state.global_step == 1


def test_cudnns_attention_is_switched_off_by_a_trainer(build):
    """Behind a mask its gradients can be NaN in bf16."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    build()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_damaged_weights_stop_training_at_once(build):
    model = tiny_model()
    model.lm_head.weight.data[7, 0] = math.nan
    with pytest.raises(TrainingStopped, match=r"step 1: .* rows \[0, 1, 2, 3, 4, 5, 6, 7\] \(rank 0\) are not finite"):
        build(model).train()


def test_a_held_out_row_that_is_not_finite_stops_the_evaluation_and_is_named(build):
    trainer = build(damaged_model(), held_out=rows_that_read_it(1, 5))
    with pytest.raises(NonFiniteStep, match=r"step 0: the log-probabilities of eval rows \[1, 5\] are not finite"):
        trainer.evaluate()


# ---- What is written ----

SECRET = "hf_abcdefghijklmnopqrstuvwxyz123456"


def pickles(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}}


def files_with_the_secret(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_checkpoints_hold_safetensors_and_the_optimizers_state_and_no_secret(build, tmp_path):
    trainer = build(save_strategy="steps", save_steps=1, hub_token=SECRET, hub_model_id="me/policy")
    trainer.train()
    trainer.save_model()
    run = tmp_path / "run"
    for folder in (run, run / "checkpoint-1"):
        assert (folder / "model.safetensors").exists()
        assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044  # others may read it
    assert pickles(run) == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert files_with_the_secret(run) == []


class FakeHub:
    """Stands for the Hub: remembers the tokens it was shown, which pushed files held the secret, and every pickle."""

    def __init__(self):
        self.pushes, self.tokens, self.leaks, self.pickles = 0, set(), [], set()

    def create_repo(self, name: str, *, token: str | None, **_: Any) -> Any:
        self.tokens.add(token)
        return type("RepoUrl", (), {"repo_id": name})()

    def upload_folder(self, *, folder_path: str, token: str | None, **_: Any) -> Any:
        self.pushes += 1
        self.tokens.add(token)
        pushed = [path for path in Path(folder_path).iterdir() if path.is_file()]
        self.leaks += [path.name for path in pushed if SECRET.encode() in path.read_bytes()]
        self.pickles |= {path.name for path in pushed if path.suffix == ".bin"}
        return type("Future", (), {"is_done": lambda self: True, "result": lambda self: None, "done": lambda self: True})()


@pytest.fixture(params=["end", "every_save"])
def hub(request, build, monkeypatch) -> FakeHub:
    """After a run that pushed to it, by the strategy."""
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    settings = {"push_to_hub": True, "hub_strategy": request.param, "hub_token": SECRET, "hub_model_id": "me/policy"}
    trainer = build(save_strategy="steps", save_steps=1, **settings)
    trainer.train()
    trainer.push_to_hub()
    assert hub.pushes > 0
    return hub


def test_nothing_that_is_pushed_holds_the_token(hub):
    assert hub.leaks == []


def test_every_push_shows_the_token_of_the_recipe(hub):
    assert hub.tokens == {SECRET}


def test_no_pickle_is_pushed(hub):
    assert hub.pickles == set()


def test_the_saved_tokenizer_has_the_template_that_was_trained_on(build, tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = "{{ 'trained' }}"
    build(processing_class=tokenizer).save_model(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == "{{ 'trained' }}"


def test_the_card_tells_of_the_run(build, tmp_path):
    trainer = build(
        held_out=ROWS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        eval_strategy="epoch",
        hub_model_id="me/my-policy",
    )
    trainer.dataset_names = ["me/pairs"]
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    evaluated = next(record for record in trainer.state.log_history if "eval_loss" in record)
    for part in (
        "# my-policy",
        "trained on `me/pairs`",
        "| beta | 2.5 |",
        "| gamma_beta_ratio | 0.4 |",
        "| pairs per step | 8 |",
        "| steps | 1 |",
        "| max_length / max_prompt_length | 200 / 100 |",
        f"| Loss | {evaluated['eval_loss']:.4f} |",
        f"| Reward accuracy | {evaluated['eval_rewards/accuracies']:.4f} |",
    ):
        assert part in card


# ---- Published names ----


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_tokenize_row_gives_the_published_columns(build, tokenizer, mode):
    trainer = build(max_length=60, max_prompt_length=30, truncation_mode=mode)
    for row in text_rows(6):
        columns = trainer.tokenize_row(row)
        expected = reference.tokenize_row(row, tokenizer, trainer.args.length_rules)
        masks = {f"{key}_attention_mask": [1] * len(columns[f"{key}_input_ids"]) for key in ("prompt", "chosen", "rejected")}
        assert columns == {**expected, **masks}


def test_get_batch_logps_reads_unshifted_labels():
    """Two tokens of four are labelled, each predicted by the position in front of it, at odds of 3 to 1 and of 1 to 1."""
    logits = torch.zeros(1, 4, 2)
    logits[0, 1, 1] = math.log(3.0)
    labels = torch.tensor([[-100, -100, 1, 0]])
    expected = math.log(3 / 4) + math.log(1 / 2)
    assert SimPOTrainer.get_batch_logps(logits, labels).item() == pytest.approx(expected / 2)
    assert SimPOTrainer.get_batch_logps(logits, labels, average_log_prob=False).item() == pytest.approx(expected)
    padded = labels.masked_fill(labels == -100, -1)
    assert SimPOTrainer.get_batch_logps(logits, padded, label_pad_token_id=-1).item() == pytest.approx(expected / 2)


def test_simpo_loss_gives_losses_and_rewards_by_the_trainers_settings(build):
    """2.5 * (0.5 - 0.4) = 0.25, and log(1 + exp(-0.25)) = 0.575939; rewards are 2.5 * -1 and 2.5 * -1.5."""
    losses, chosen, rejected = build().simpo_loss(torch.tensor([-1.0]), torch.tensor([-1.5]))
    assert (losses.item(), chosen.item(), rejected.item()) == pytest.approx((0.575939, -2.5, -3.75), abs=1e-6)


@both_layouts
def test_concatenated_forward_scores_each_pair_of_a_batch(build, layout):
    trainer = build(double(), pair_layout=layout)
    scores = trainer.concatenated_forward(trainer.model, trainer.data_collator(ROWS))
    chosen, rejected = reference.mean_logps(double(), ROWS)
    torch.testing.assert_close(scores.chosen_mean_logp, chosen, **ROUNDING)
    torch.testing.assert_close(scores.rejected_mean_logp, rejected, **ROUNDING)
    assert scores.chosen_tokens.tolist() == [chosen for _, chosen, _ in LENGTHS]


def test_compute_loss_without_a_step_averages_its_own_batch(build):
    """As code outside of `train` calls it."""
    trainer = build(double())
    loss, scores = trainer.compute_loss(trainer.model, trainer.data_collator(ROWS[:3]), return_outputs=True)
    assert loss.item() == pytest.approx(reference.simpo_step_loss(double(), ROWS[:3], **LOSS).item(), abs=1e-6)
    assert len(scores.chosen_mean_logp) == 3


@pytest.mark.parametrize(("count", "layers"), [("auto", 2), ("all", 2), (0, 0), (1, 1), (2, 2), (9, 2)])
def test_layers_that_are_not_recomputed_change_no_number(build, count, layers):
    settings = {"gradient_checkpointing": True, "recompute_layers": count, "learning_rate": LEARNING_RATE}
    trainer = build(double(), **settings)
    torch.testing.assert_close(trained(trainer), plain_sgd(double(), [ROWS]), **ROUNDING)
    recomputed = [layer.gradient_checkpointing for layer in trainer.model.model.layers]
    assert recomputed == [True] * layers + [False] * (2 - layers)
