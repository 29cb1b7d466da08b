"""Every objective on PairTrainer: what is claimed of SimPO's batches, steps and records holds for DPO and ORPO too."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from tests import reference
from tests.builders import tiny_model
from tests.unit.preference.conftest import LEARNING_RATE, ROWS

BETA = {"simpo": 2.5, "dpo": 0.3, "orpo": 0.4}
# Models compute their norms in float32, float64 weights or not, and a packed row rounds there in its own way.
ROUNDING = {"rtol": 0, "atol": 1e-6}
HALVES = [ROWS[:4], ROWS[4:]]

every_method = pytest.mark.parametrize("method", ["simpo", "dpo", "orpo"])
every_layout = pytest.mark.parametrize(
    "layout", [{"pair_layout": "padded"}, {"pair_layout": "packed"}, {"max_tokens_per_micro_batch": 40}], ids=str
)


def double(**settings: Any) -> PreTrainedModel:
    return tiny_model(dtype=torch.float64, **settings)


def step_loss(method: str, model: PreTrainedModel, start: PreTrainedModel, rows: list[dict]) -> Tensor:
    """By the plain spellings; start: the model before its first step."""
    if method == "dpo":
        return reference.dpo_step_loss(model, start, rows, beta=BETA["dpo"])
    if method == "orpo":
        return reference.orpo_step_loss(model, rows, beta=BETA["orpo"])
    return reference.simpo_step_loss(model, rows, beta=BETA["simpo"], gamma_beta_ratio=0.25)


def plain_sgd(method: str, steps: list[list[dict]]) -> tuple[dict[str, Tensor], list[float]]:
    """Weights after a step on each batch, and the losses on the way."""
    model, start, losses = double(), double(), []
    for rows in steps:
        model.zero_grad()
        loss = step_loss(method, model, start, rows)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
    return {name: value.clone() for name, value in model.state_dict().items()}, losses


@pytest.fixture
def build(build_of) -> Callable[..., Any]:
    def build(method: str, *arguments: Any, **settings: Any) -> Any:
        return build_of(method, *arguments, **{"beta": BETA[method], "preprocessing": "exact", **settings})

    return build


def losses_of(trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


# ---- Steps ----


@every_method
@every_layout
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_two_steps_are_the_plain_loops_however_they_are_split(build, method, layout, batch, accumulation):
    split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = build(method, double(), **split, **layout)
    trainer.train()
    weights, losses = plain_sgd(method, HALVES)
    torch.testing.assert_close(dict(trainer.model.state_dict()), weights, **ROUNDING)
    assert losses_of(trainer) == pytest.approx(losses, abs=1e-6)


@every_method
@every_layout
def test_pairs_of_an_incomplete_last_step_weigh_the_same(build, method, layout):
    trainer = build(method, double(), ROWS[:6], per_device_train_batch_size=2, gradient_accumulation_steps=2, **layout)
    trainer.train()
    weights, _ = plain_sgd(method, [ROWS[:4], ROWS[4:6]])
    torch.testing.assert_close(dict(trainer.model.state_dict()), weights, **ROUNDING)


@pytest.mark.parametrize("budget", [None, 40])
def test_published_orpo_averages_the_cross_entropy_of_each_micro_batch(build, budget):
    """Of those that the recipe counts in pairs, even where they are divided by tokens."""
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_tokens_per_micro_batch": budget}
    trainer = build("orpo", double(), **split, preprocessing="published")
    trainer.train()
    halves = [reference.orpo_step_loss(double(), rows, beta=BETA["orpo"]).item() for rows in HALVES]
    assert losses_of(trainer) == pytest.approx([sum(halves) / 2], abs=1e-6)


@every_method
@pytest.mark.parametrize("kind", ["mistral", "gemma2", "qwen2"])
def test_sliding_windows_and_soft_capping_keep_their_meaning(build, method, kind):
    padded, packed = (build(method, tiny_model(kind), pair_layout=layout) for layout in ("padded", "packed"))
    for trainer in (padded, packed):
        trainer.train()
    assert losses_of(packed) == pytest.approx(losses_of(padded), abs=1e-5)
    torch.testing.assert_close(packed.model.state_dict(), padded.model.state_dict(), rtol=0, atol=2e-5)


@every_method
def test_the_cross_entropy_of_the_chosen_responses_serves_every_objective(build, method):
    trainer = build(method, double(), sft_weight=0.3)
    trainer.train()
    chosen, _ = reference.summed_logps(double(), ROWS)
    nats_per_token = -chosen.sum().item() / sum(row["chosen_length"] for row in ROWS)
    (record,) = [record for record in trainer.state.log_history if "loss" in record]
    assert record["sft_loss"] == pytest.approx(nats_per_token, abs=1e-6)
    plain = step_loss(method, double(), double(), ROWS).item()
    assert record["loss"] == pytest.approx(plain + 0.3 * nats_per_token, abs=1e-6)


@pytest.mark.parametrize("settings", [{}, {"loss_type": "hinge"}, {"loss_type": "robust", "label_smoothing": 0.2}], ids=str)
def test_length_normalized_dpo_compares_log_ratios_per_token(build, settings):
    trainer = build("dpo", double(), length_normalized=True, beta=3.0, per_device_train_batch_size=4, **settings)
    trainer.train()
    first, second = (record for record in trainer.state.log_history if "loss" in record)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    chosen, _ = reference.mean_logps(double(), ROWS[:4])
    assert first["logps/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-6)
    if not settings:
        model = double()
        frozen = copy.deepcopy(model)
        loss = reference.dpo_step_loss(model, frozen, ROWS[:4], beta=3.0, per_token=True)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
        expected = reference.dpo_step_loss(model, frozen, ROWS[4:], beta=3.0, per_token=True).item()
        assert second["loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["alphapo", "simper"])
def test_simpos_kin_log_the_rewards_that_they_train(build, loss_type):
    """(1 - exp(-x / 2)) * 2 * 2.5 of the mean log-probability x, or exp(x)."""
    settings = {"alpha": 0.5} if loss_type == "alphapo" else {"beta": 2.0}
    trainer = build("simpo", double(), loss_type=loss_type, **settings)
    trainer.train()
    chosen, rejected = reference.mean_logps(double(), ROWS)
    (record,) = [record for record in trainer.state.log_history if "loss" in record]
    if loss_type == "simper":
        rewards = [logps.exp() for logps in (chosen, rejected)]
        loss = (rewards[1] - rewards[0]).mean()
    else:
        rewards = [2.5 * (1 - (-logps / 2).exp()) * 2 for logps in (chosen, rejected)]
        loss = -torch.nn.functional.logsigmoid(rewards[0] - rewards[1] - 2.5 * 0.25).mean()
    assert record["rewards/chosen"] == pytest.approx(rewards[0].mean().item(), rel=1e-6)
    assert record["rewards/rejected"] == pytest.approx(rewards[1].mean().item(), rel=1e-6)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)


# ---- Evaluation ----


@every_method
@every_layout
def test_evaluation_gives_the_loss_of_all_held_out_pairs_and_the_probes_figures_beside_it(build, method, layout):
    trainer = build(method, double(), held_out=ROWS[:7], per_device_train_batch_size=4, **layout)
    trainer.train()
    metrics = trainer.evaluate()
    trained = copy.deepcopy(trainer.model)
    expected = step_loss(method, trained, double(), ROWS[:7]).item()
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert metrics["probe_rewards/margins"] == pytest.approx(probe_margin(method, trained, trainer.args.seed), abs=1e-6)


def probe_margin(method: str, model: PreTrainedModel, seed: int) -> float:
    """Of 7 training pairs, as many as are held out, drawn with the seed."""
    rows = [ROWS[number] for number in probe_numbers(seed, 7)]
    logps = reference.summed_logps if method == "dpo" else reference.mean_logps
    chosen, rejected = logps(model, rows)
    if method == "dpo":
        reference_chosen, reference_rejected = logps(double(), rows)
        chosen, rejected = chosen - reference_chosen, rejected - reference_rejected
    return BETA[method] * (chosen - rejected).mean().item()


def probe_numbers(seed: int, count: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(len(ROWS)), count))


@every_method
def test_every_pair_of_the_probe_has_a_row_before_the_first_step_and_one_at_the_end(build, method):
    trainer = build(method, double(), held_out=ROWS[:5], per_device_train_batch_size=4)
    trainer.train()
    trainer.evaluate()
    rows, numbers = trainer.pair_records("probe"), probe_numbers(trainer.args.seed, 5)
    assert [(row["step"], row["index"]) for row in rows] == [(step, number) for step in (0, 2) for number in numbers]
    assert set(rows[0]) == set(trainer.pair_records()[0])
    for step, model in ((0, double()), (2, trainer.model)):
        chosen, _ = reference.summed_logps(model, [ROWS[number] for number in numbers])
        assert [row["chosen_logp"] for row in rows if row["step"] == step] == pytest.approx(chosen.tolist(), abs=1e-5)


@every_method
def test_every_held_out_pair_has_a_row_before_the_first_step_and_one_at_the_end(build, method):
    trainer = build(method, double(), held_out=ROWS[:5], per_device_train_batch_size=4)
    trainer.train()
    trainer.evaluate()
    rows = trainer.pair_records()
    assert [(row["step"], row["index"]) for row in rows] == [(step, index) for step in (0, 2) for index in range(5)]
    for step, model in ((0, double()), (2, trainer.model)):
        chosen, rejected = reference.summed_logps(model, ROWS[:5])
        own = [row for row in rows if row["step"] == step]
        assert [row["chosen_logp"] for row in own] == pytest.approx(chosen.tolist(), abs=1e-5)
        assert [row["rejected_logp"] for row in own] == pytest.approx(rejected.tolist(), abs=1e-5)
        assert [row["chosen_mean_logp"] * row["chosen_tokens"] for row in own] == pytest.approx(chosen.tolist(), abs=1e-5)
    assert ("reference_chosen_logp" in rows[0]) == (method == "dpo")
    if method == "dpo":
        assert {row["chosen_reward"] for row in rows if row["step"] == 0} == {0.0}
        assert [row["reference_chosen_logp"] for row in rows[5:]] == [row["chosen_logp"] for row in rows[:5]]


@every_method
def test_step_0_is_left_out_where_the_recipe_says_so(build, method):
    trainer = build(method, held_out=ROWS[:5], score_step_0=False)
    trainer.train()
    trainer.evaluate()
    assert {row["step"] for row in trainer.pair_records()} == {1}


@every_method
def test_scoring_before_the_first_step_changes_no_training_record(build, method):
    """With dropout on: the random numbers of training are left where they were."""
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_dropout=0.3)
    settings = {"peft_config": lora, "disable_dropout": False, "per_device_train_batch_size": 2, "held_out": ROWS[:5]}
    losses = []
    for scoring in ({}, {"score_step_0": False, "train_probe": 0}):
        torch.manual_seed(1)
        trainer = build(method, **settings, **scoring)
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == losses[1]


# ---- What it says of itself ----


@every_method
def test_the_card_names_the_objective_its_loss_and_whether_it_has_a_reference(build, method, tmp_path):
    trainer = build(method)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "run/README.md").read_text()
    objective = trainer.objective
    reference_row = "the policy itself before its first step" if method == "dpo" else "none"
    for part in (f"[{objective.name}]({objective.paper.url})", f"`{objective.formula}`", f"| reference | {reference_row} |"):
        assert part in card
    assert f"| beta | {BETA[method]} |" in card


@every_method
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("preprocessing", ["published", "exact"])
def test_held_out_pairs_are_evaluated_within_the_token_budget_to_the_same_figures(
    build, method, layout, preprocessing, monkeypatch
):
    """Also the cross-entropies of the published rules, which go by an evaluation's batches of so many pairs."""
    settings = {"pair_layout": layout, "preprocessing": preprocessing, "sft_weight": 0.5, "per_device_eval_batch_size": 2}
    fixed, by_tokens = (
        build(method, double(), held_out=ROWS[:7], max_tokens_per_micro_batch=budget, **settings) for budget in (None, 100)
    )
    seen = []
    score = type(by_tokens).concatenated_forward
    monkeypatch.setattr(
        type(by_tokens), "concatenated_forward", lambda self, model, batch: seen.append(batch) or score(self, model, batch)
    )
    wanted, fixed_batches = figures(fixed.evaluate()), len(seen)
    seen.clear()
    assert figures(by_tokens.evaluate()) == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert len(seen) < fixed_batches
    counts = [batch["token_counts"] for batch in seen]
    assert max(count.padded if layout == "padded" else count.distinct for count in counts) <= 100
    ours, theirs = (trainer.eval_pairs["eval"] for trainer in (fixed, by_tokens))
    assert list(ours["index"]) == list(theirs["index"])


def figures(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not any(word in name for word in ("second", "time", "memory"))}
