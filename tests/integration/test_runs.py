"""Whole runs on a tiny model: what a recipe leaves in its folder, what a mistake says, what a second start does."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.data.splits import CONVERSATIONS, PAIRS
from alignment.pipeline import Method, main, run
from scripts.review_run import main as review_run
from scripts.sft_config import SFTConfig
from scripts.sft_trainer import SFTTrainer
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests import builders, reference
from tests.workspaces import held_out_tokens, read_jsonl, recipe_of_run, save_chats, save_workspace

ROOT = Path(__file__).parents[2]
SIMPO = Method(config=SimPOConfig, trainer=SimPOTrainer, data=PAIRS)
SFT = Method(config=SFTConfig, trainer=SFTTrainer, data=CONVERSATIONS)
BETA = 2.5
RECIPE = {
    "attn_implementation": "sdpa",
    "preprocessing": "exact",
    "use_cpu": True,
    "beta": BETA,
    "gamma_beta_ratio": 0.5,
    "max_length": 160,
    "max_prompt_length": 80,
    "learning_rate": 1e-3,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A model, 16 + 6 pairs and as many conversations."""
    folder = tmp_path_factory.mktemp("workspace")
    rows = save_workspace(folder, 16, 6, initializer_range=0.1)
    save_chats(folder / "chats", rows, 16)
    return folder


def recipe_file(workspace: Path, folder: Path, **changes) -> str:
    """The recipe of a run into folder/run; a change to None leaves a key out."""
    return recipe_of_run(workspace, folder, RECIPE, changes)


SUPERVISED = {"beta": None, "gamma_beta_ratio": None, "max_prompt_length": None}  # keys of SimPO alone


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


# ---- What a run leaves ----


@pytest.fixture(scope="module")
def launched(workspace, tmp_path_factory) -> tuple[Path, str]:
    """The run folder of the launch command, and what it printed."""
    folder = tmp_path_factory.mktemp("launched")
    cache = {"HF_DATASETS_CACHE": str(folder / "cache")}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
    command = [*launch, "--config_file", "accelerate_configs/cpu.yaml"]
    done = subprocess.run(
        [*command, "scripts/run_simpo.py", recipe_file(workspace, folder), "--hub_token=hf_secret"],
        cwd=ROOT,
        env={**environment(), **cache},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout + done.stderr


def test_the_launch_command_leaves_a_model_that_scores_the_held_out_pairs_as_reported(launched, workspace):
    folder, _ = launched
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.use_cache
    assert tokenizer.chat_template == builders.bpe_tokenizer().chat_template
    pairs = read_jsonl(folder / "eval_pairs.jsonl")
    assert [(pair["step"], pair["index"]) for pair in pairs] == [(step, index) for step in (0, 4) for index in range(6)]
    pairs = pairs[6:]

    rows = held_out_tokens(workspace, tokenizer, RECIPE)
    with torch.no_grad():
        chosen, rejected = reference.mean_logps(AutoModelForCausalLM.from_pretrained(folder), rows)
    assert [pair["chosen_reward"] for pair in pairs] == pytest.approx((BETA * chosen).tolist(), rel=1e-5)
    assert [pair["rejected_reward"] for pair in pairs] == pytest.approx((BETA * rejected).tolist(), rel=1e-5)
    assert [pair["chosen_tokens"] for pair in pairs] == [row["chosen_length"] for row in rows]

    results = json.loads((folder / "eval_results.json").read_text())
    size = BETA * chosen.abs().max().item()
    assert results["eval_rewards/margins"] == pytest.approx((BETA * (chosen - rejected)).mean().item(), abs=1e-6 * size)
    assert results["eval_lengths/chosen"] == pytest.approx(sum(row["chosen_length"] for row in rows) / 6)


def test_a_run_is_reviewed_by_its_own_records(launched, tmp_path, capsys):
    folder, _ = launched
    review_run([str(folder), "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.startswith("run: no verdict: too few held-out prompts")  # there are six
    held_out, probe = (read_jsonl(folder / f"{name}_pairs.jsonl") for name in ("eval", "probe"))
    assert f"{sum(d_of(row) > 0 for row in held_out[6:]) / 6:.1%}".removesuffix("%") in (tmp_path / "review.md").read_text()
    assert [row["step"] for row in probe] == [0] * 6 + [4] * 6
    assert set(probe[0]) == set(held_out[0]) >= {"prompt_sha256", "chosen_mean_logp"}


def d_of(row: dict) -> float:
    return row["chosen_mean_logp"] - row["rejected_mean_logp"]


def test_a_run_explains_itself(launched, workspace):
    folder, printed = launched
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["beta"] == BETA
    assert recipe["loss_type"] == "sigmoid"  # a default is written down too
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    card = (folder / "README.md").read_text()
    assert all(text in card for text in ("SimPO", "arxiv.org/abs/2405.14734", str(workspace / "model"), "| beta | 2.5 |"))
    assert "| pairs per step | 4 |" in card
    assert "Reward accuracy" in card

    records = read_jsonl(folder / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "tokens_per_second", "tokens_saved"} <= records[0].keys()
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 4, 4]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert all((folder / name).is_file() for name in ("all_results.json", "train_results.json", "trainer_state.json"))
    assert "train: 16 rows read" in printed
    assert "chosen is the longer in" in printed


def test_the_recorded_recipe_starts_the_same_run_again(launched, tmp_path):
    folder, _ = launched
    trainer = run(SIMPO, [str(folder / "recipe.yaml"), f"--output_dir={tmp_path}"])
    again = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert again == pytest.approx(
        [record["loss"] for record in read_jsonl(folder / "metrics.jsonl") if "loss" in record], rel=1e-5
    )


def test_no_secret_and_no_pickle_is_left_behind(launched):
    folder, printed = launched
    assert "hf_secret" not in printed
    for path in folder.rglob("*"):
        assert path.suffix not in (".bin", ".pkl"), path
        if path.is_file():
            assert b"hf_secret" not in path.read_bytes(), path
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) & stat.S_IRGRP


# ---- Methods and settings ----


@pytest.mark.parametrize("preprocessing", ["published", "exact"])
def test_supervised_tuning_and_then_simpo_run_from_one_folder_to_the_next(preprocessing, workspace, tmp_path):
    sft = recipe_file(
        workspace, tmp_path, dataset_mixer={str(workspace / "chats"): 1.0}, preprocessing=preprocessing,
        beta=None, gamma_beta_ratio=None, max_prompt_length=None, max_length=None, max_seq_length=160,
        output_dir=str(tmp_path / "sft"),
    )  # fmt: skip
    tuned = run(SFT, [sft])
    losses = [record["loss"] for record in tuned.state.log_history if "loss" in record]
    assert losses[-1] < losses[0]
    card = (tmp_path / "sft/README.md").read_text(encoding="utf-8")
    assert f"`{workspace / 'model'}` trained on `{workspace / 'chats'}` with SFT, Supervised fine-tuning" in card
    assert "None" not in card
    simpo = recipe_file(workspace, tmp_path, model_name_or_path=str(tmp_path / "sft"), preprocessing=preprocessing)
    run(SIMPO, [simpo])
    assert not torch.equal(
        load_file(tmp_path / "sft/model.safetensors")["lm_head.weight"],
        load_file(tmp_path / "run/model.safetensors")["lm_head.weight"],
    )


def test_a_lora_run_saves_an_adapter_that_loads_onto_its_base(workspace, tmp_path):
    adapter = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"]}
    recipe = recipe_file(workspace, tmp_path, gradient_checkpointing=True, **adapter)
    run(SIMPO, [recipe])
    assert not (tmp_path / "run/model.safetensors").exists()
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    pairs = read_jsonl(tmp_path / "run/eval_pairs.jsonl")[6:]  # behind those before the first step
    with torch.no_grad():
        chosen, _ = reference.mean_logps(model, held_out_tokens(workspace, builders.bpe_tokenizer(), RECIPE))
    assert [pair["chosen_reward"] for pair in pairs] == pytest.approx((BETA * chosen).tolist(), rel=1e-5)


def test_bf16_computes_in_bf16_and_keeps_float32_parameters(workspace, tmp_path):
    trainer = run(SIMPO, [recipe_file(workspace, tmp_path, bf16=True, max_steps=1)])
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    float32 = run(SIMPO, [recipe_file(workspace, tmp_path, max_steps=1, output_dir=str(tmp_path / "float32"))])
    first, other = (t.state.log_history[0]["logps/chosen"] for t in (trainer, float32))
    assert first != other
    assert first == pytest.approx(other, rel=0.02)


def test_total_train_batch_size_sets_the_accumulation(workspace, tmp_path):
    trainer = run(SIMPO, [recipe_file(workspace, tmp_path, gradient_accumulation_steps=None, total_train_batch_size=8)])
    assert trainer.args.gradient_accumulation_steps == 4
    assert trainer.state.global_step == 2


def test_push_to_hub_comes_last_and_sends_the_card_with_its_figures(workspace, tmp_path, monkeypatch):
    pushed = []

    class Hub:
        def create_repo(self, *args, **options):
            return type("Repository", (), {"repo_id": "me/run"})

        def upload_folder(self, folder_path: str, **options):
            folder = Path(folder_path)
            pushed.append({path.name for path in folder.iterdir()} | {(folder / "README.md").read_text()})

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    run(SIMPO, [recipe_file(workspace, tmp_path, push_to_hub=True, hub_model_id="me/run")])
    assert len(pushed) == 1
    assert {"model.safetensors", "eval_pairs.jsonl", "recipe.yaml", "curves.png"} <= pushed[0]
    assert any("Reward accuracy" in entry for entry in pushed[0])


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"gama_beta_ratio": 0.5}, [], "did you mean 'gamma_beta_ratio'?"),
        ({}, ["--beta=-1"], "--beta=-1: must be positive"),
        ({"model_name_or_path": None}, [], "model_name_or_path is missing"),
        ({"model_name_or_path": "no/such-model"}, [], "no/such-model"),
        ({"dataset_mixer": {"nowhere.jsonl": 1.0}}, [], "nowhere.jsonl"),
        ({"attn_implementation": "flash_attention_2"}, [], "set attn_implementation: sdpa"),
        ({"chat_template": "{{ raise_exception('no') }}"}, [], "the chat template refuses"),
        ({"chat_template": "nothing.jinja"}, [], "shipped gemma, llama-3"),
        ({"max_tokens_per_micro_batch": 10}, [], "the longest pair has"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_and_status_2_and_leaves_nothing(changes, options, message, workspace, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(SIMPO, [recipe_file(workspace, tmp_path, **changes), *options])
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_stop_the_run_with_status_1_and_the_rows(workspace, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    builders.bpe_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(SystemExit) as exit_:
        main(SIMPO, [recipe_file(workspace, tmp_path, model_name_or_path=str(tmp_path / "broken"))])
    assert exit_.value.code == 1
    assert "step 1: the log-probabilities of training rows [" in capsys.readouterr().err
    assert not (tmp_path / "run/model.safetensors").exists()


# ---- A second start ----


def test_a_resumed_run_ends_with_the_weights_and_log_of_an_unbroken_one(workspace, tmp_path):
    recipe = recipe_file(workspace, tmp_path, save_strategy="steps", save_steps=2, save_total_limit=9, num_train_epochs=2)
    run(SIMPO, [recipe])
    unbroken, log = load_file(tmp_path / "run/model.safetensors"), read_jsonl(tmp_path / "run/metrics.jsonl")
    for later in ("checkpoint-4", "checkpoint-6", "checkpoint-8", "model.safetensors"):
        path = tmp_path / "run" / later
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    trainer = run(SIMPO, [recipe])
    assert trainer.state.global_step == 8
    resumed = load_file(tmp_path / "run/model.safetensors")
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)

    def trained(records: list[dict]) -> list[tuple]:
        return [(record["step"], record["loss"], record["rewards/margins"]) for record in records if "loss" in record]

    assert trained(read_jsonl(tmp_path / "run/metrics.jsonl")) == trained(log)


def test_a_resumed_supervised_run_logs_what_an_unbroken_one_logs(workspace, tmp_path):
    changes = {**SUPERVISED, "dataset_mixer": {str(workspace / "chats"): 1.0}, "num_train_epochs": 2, "logging_steps": 3}
    recipe = recipe_file(workspace, tmp_path, **changes, save_strategy="steps", save_steps=2, save_total_limit=9)
    run(SFT, [recipe])
    log = read_jsonl(tmp_path / "run/metrics.jsonl")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run/model.safetensors").unlink()
    run(SFT, [recipe])

    def trained(records: list[dict]) -> list[dict]:
        return [record for record in records if "loss" in record]

    assert trained(read_jsonl(tmp_path / "run/metrics.jsonl")) == trained(log)
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= trained(log)[-1].keys()


def test_a_changed_recipe_does_not_go_on_from_the_old_ones_checkpoint(workspace, tmp_path, capsys):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    run(SIMPO, [recipe_file(workspace, tmp_path, **settings)])
    with pytest.raises(SystemExit) as exit_:
        main(SIMPO, [recipe_file(workspace, tmp_path, **settings), "--beta=10"])
    assert exit_.value.code == 2
    assert "beta: 2.5 then, 10.0 now" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["run_simpo.py", "run_sft.py"])
def test_a_signal_to_a_run_and_its_loaders_workers_stops_it_with_everything_saved(script, workspace, tmp_path):
    sft = {**SUPERVISED, "dataset_mixer": {str(workspace / "chats"): 1.0}}
    changes = {"num_train_epochs": 300, "dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    recipe = recipe_file(workspace, tmp_path, **changes, **(sft if script == "run_sft.py" else {}))
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, f"scripts/{script}", recipe], cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            env={**environment(), "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    records = tmp_path / "run/metrics.jsonl"
    try:
        while not records.exists() or len(records.read_bytes().splitlines()) < 5:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 75, (tmp_path / "log").read_text()
    finally:
        process.kill()
    assert len(list((tmp_path / "run").glob("checkpoint-*/manifest.json"))) == 1
