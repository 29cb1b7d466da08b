"""What the policy said before its first step: scored once, kept, tied to what it was scored from, and never made up."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from alignment.errors import UserError
from alignment.preference.reference import digest, load_step_zero, scoring_batches
from alignment.run.checkpoints import Identity, read_facts
from tests import reference
from tests.builders import tiny_model
from tests.unit.preference.conftest import ROWS

BETA = 0.3
SAVING = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4, "max_steps": 2}
LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])


@pytest.fixture
def build(build_of):
    return lambda *arguments, **settings: build_of("dpo", *arguments, **{"beta": BETA, **settings})


def folder_of(trainer: Any) -> Path:
    return Path(trainer.args.output_dir, "_run/reference")


def counted(trainer: Any) -> list[int]:
    """How many forwards the trainer has made so far, outside of training."""
    calls, forward = [0], trainer.concatenated_forward

    def concatenated_forward(model: Any, batch: Any) -> Any:
        calls[0] += not model.training
        return forward(model, batch)

    trainer.concatenated_forward = concatenated_forward
    return calls


# ---- Scored ----


@pytest.mark.parametrize(
    "settings",
    [{}, {"pair_layout": "padded"}, {"max_tokens_per_micro_batch": 40}, {"per_device_eval_batch_size": 1}],
    ids=str,
)
def test_every_pair_is_scored_once_by_the_policy_of_step_0(build, settings):
    trainer = build(tiny_model(), held_out=ROWS[:3], **settings)
    trainer.train()
    for name, rows in (("train", ROWS), ("eval", ROWS[:3])):
        columns = trainer.step_zero[name].columns
        assert columns["index"].tolist() == [row["index"] for row in rows]
        for side, logps in zip(("chosen", "rejected"), reference.summed_logps(tiny_model(), rows), strict=True):
            # 1e-6 of a summed log-probability's size
            torch.testing.assert_close(columns[f"{side}_logp"], logps.detach(), rtol=1e-6, atol=0)
            assert columns[f"{side}_tokens"].tolist() == [row[f"{side}_length"] for row in rows]


@pytest.mark.parametrize("settings", [{}, {"pair_layout": "padded"}, {"max_tokens_per_micro_batch": 40}], ids=str)
@pytest.mark.parametrize("bf16", [False, True])
def test_log_ratios_begin_at_0(build, settings, bf16):
    """In bf16 within what the same rows differ by in other batches: eight bits of it."""
    trainer = build(tiny_model(), bf16=bf16, learning_rate=0.0, **settings)
    trainer.train()
    (record,) = [record for record in trainer.state.log_history if "loss" in record]
    size = trainer.step_zero["train"].columns["chosen_logp"].abs().mean().item()
    assert abs(record["rewards/chosen"]) <= BETA * size * (2**-8 if bf16 else 1e-6)


@pytest.mark.parametrize("kind", ["LoRA", "continued adapter"])
def test_an_adapters_reference_is_the_policy_as_it_was_given(build, kind):
    if kind == "LoRA":
        trainer, start = build(tiny_model(), peft_config=LORA, disable_dropout=True), tiny_model()
    else:
        policy = get_peft_model(tiny_model(), LORA)
        torch.manual_seed(3)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        trainer, start = build(policy), None
    chosen, _ = reference.summed_logps(trainer.model if start is None else start, ROWS)
    trainer.train()
    scored = trainer.step_zero["train"].columns["chosen_logp"]
    torch.testing.assert_close(scored, chosen.detach(), rtol=1e-6, atol=0)
    if kind != "LoRA":
        base, _ = reference.summed_logps(tiny_model(), ROWS)
        assert not torch.allclose(scored, base.detach(), rtol=1e-3)


@pytest.mark.parametrize("is_padded", [False, True])
def test_batches_by_tokens_hold_every_pair_once_within_the_budget(is_padded):
    """A padded batch is twice its pairs times the longest row; a packed one the sum of its pairs."""
    batches = scoring_batches(Dataset.from_list(ROWS), 3, 60, is_padded=is_padded)
    assert sorted(number for batch in batches for number in batch) == list(range(len(ROWS)))
    packed = [sum(row[key] for key in ("chosen_prompt_length", "chosen_length", "rejected_length")) for row in ROWS]
    for batch in batches:
        tokens = 2 * len(batch) * max(ROWS[n]["length"] for n in batch) if is_padded else sum(packed[n] for n in batch)
        assert tokens <= 60
    assert len(batches) < len(ROWS)


def test_pairs_that_share_an_index_cannot_be_told_apart(build):
    trainer = build(rows=[*ROWS, *ROWS])
    with pytest.raises(UserError, match="several pairs of train have the index 0"):
        trainer.train()


# ---- Kept ----


def test_scores_are_kept_beside_the_run_and_in_every_checkpoint_with_their_hash(build):
    trainer = build(held_out=ROWS[:3], **SAVING)
    trainer.train()
    kept = digest(trainer.step_zero)
    assert digest(load_step_zero(folder_of(trainer))) == kept
    for step in (1, 2):
        checkpoint = Path(trainer.args.output_dir, f"checkpoint-{step}")
        assert digest(load_step_zero(checkpoint / "reference")) == kept
        assert read_facts(checkpoint)["reference"] == kept
        assert "reference/train.safetensors" in read_facts(checkpoint)["files"]
    assert not list(Path(trainer.args.output_dir).glob("*.safetensors"))  # those would count as weights


def finished_and_resumed(build: Any, spoil: Any = lambda run: None, **settings: Any) -> tuple[Any, Any]:
    whole = build(**SAVING, held_out=ROWS[:3])
    whole.train()
    run = Path(whole.args.output_dir)
    shutil.rmtree(run / "checkpoint-2")
    spoil(run)
    resumed = build(**SAVING, held_out=ROWS[:3], **settings)
    calls = counted(resumed)
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert calls[0] == 0  # nothing was scored again
    return whole, resumed


def spoil_bit(run: Path) -> None:
    path = run / "_run/reference/train.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [lambda run: None, lambda run: shutil.rmtree(run / "_run/reference"), spoil_bit],
    ids=["untouched", "lost", "damaged"],
)
def test_a_resumed_run_goes_on_with_the_scores_of_its_checkpoint(build, spoil):
    whole, resumed = finished_and_resumed(build, spoil)
    assert digest(resumed.step_zero) == digest(whole.step_zero)
    assert digest(load_step_zero(folder_of(resumed))) == digest(whole.step_zero)  # and mends the folder
    for mine, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_checkpoint_that_is_resumed_elsewhere_brings_them_along(build, tmp_path):
    whole, resumed = finished_and_resumed(build, output_dir=str(tmp_path / "elsewhere"))
    assert digest(load_step_zero(tmp_path / "elsewhere/_run/reference")) == digest(whole.step_zero)
    assert resumed.state.global_step == 2


def test_a_checkpoint_without_them_is_refused(build):
    whole = build(**SAVING)
    whole.train()
    checkpoint = Path(whole.args.output_dir, "checkpoint-1")
    shutil.rmtree(checkpoint / "reference")
    with pytest.raises(UserError, match=r"checkpoint-1: it has no reference log-probabilities"):
        build(**SAVING).train(resume_from_checkpoint=str(checkpoint))


IDENTITY = Identity("run", "beta: 0.3\n", "data", None, "DDP or one process", 1, 8, start="weights")


@pytest.mark.parametrize(
    ("change", "scored_again"),
    [
        ({}, False),
        ({"recipe": "beta: 0.3\nlogging_steps: 3\n"}, False),
        ({"recipe": "beta: 0.4\n"}, True),
        ({"start": "other weights"}, True),
        ({"base": "other base"}, True),
    ],
    ids=str,
)
def test_a_run_killed_before_its_first_checkpoint_scores_again_only_what_is_another_runs(build, change, scored_again):
    first = build(held_out=ROWS[:3])
    first.identity = IDENTITY
    first.train()
    again = build(held_out=ROWS[:3])
    again.identity = IDENTITY._replace(**change)
    calls = counted(again)
    again.train()
    assert (calls[0] > 0) == scored_again
    assert digest(again.step_zero) == digest(first.step_zero)


def test_other_data_is_scored_again(build):
    first, again = build(), build(rows=ROWS[:7])
    for trainer in (first, again):
        trainer.identity = IDENTITY
    first.train()
    calls = counted(again)
    again.train()
    assert calls[0] > 0
    assert again.step_zero["train"].columns["index"].tolist() == list(range(7))


# ---- Asked for ----


def test_before_the_first_step_the_policy_is_its_own_reference(build):
    trainer = build(held_out=ROWS[:3])
    assert trainer.evaluate()["eval_rewards/margins"] == 0
    assert trainer.compute_loss(trainer.model, trainer.data_collator(ROWS)).item() == pytest.approx(0.693147, abs=1e-6)


def test_held_out_pairs_that_were_not_scored_are_refused(build):
    trainer = build(held_out=ROWS[:3])
    trainer.train()
    with pytest.raises(UserError, match="these pairs have no reference log-probabilities, because they were not scored"):
        trainer.evaluate(Dataset.from_list(ROWS[3:6]))


def test_another_model_as_reference_is_refused_in_one_sentence(build_of):
    with pytest.raises(UserError, match="ref_model: the reference is the policy itself at step 0, scored once"):
        build_of("dpo", ref_model=tiny_model())


def test_several_held_out_sets_have_their_own(build):
    sets = {"a": Dataset.from_list(ROWS[:3]), "b": Dataset.from_list(ROWS[3:5])}
    trainer = build(held_out=sets)
    trainer.train()
    assert set(trainer.step_zero) == {"train", "eval_a", "eval_b"}
    metrics = trainer.evaluate()
    assert metrics["eval_b_rewards/margins"] != 0
    assert "probe_rewards/margins" in metrics
