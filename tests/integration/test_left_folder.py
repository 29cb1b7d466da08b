"""The folder that a run leaves is the model that was trained: its weights, their type, its tokenizer, its licence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignment.leaving
from alignment.data.splits import PAIRS
from alignment.errors import TrainingStopped, UserError
from alignment.pipeline import Method, main, run
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests import builders, reference
from tests.workspaces import held_out_tokens, read_jsonl, recipe_of_run, save_model, save_workspace

SIMPO = Method(config=SimPOConfig, trainer=SimPOTrainer, data=PAIRS)
RECIPE = {
    "preprocessing": "exact",
    "use_cpu": True,
    "beta": 2.5,
    "max_length": 160,
    "max_prompt_length": 80,
    "learning_rate": 1e-3,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    save_workspace(folder, 8, 4, initializer_range=0.1)
    save_model(folder / "half", dtype=torch.bfloat16, initializer_range=0.1)
    for name in ("LICENSE", "USE_POLICY.md", "NOTICE.txt", "tokenizer.model", "preprocessor_config.json"):
        (folder / "half" / name).write_text(name)
    (folder / "half/README.md").write_text("---\nlicense: llama3.1\n---\n")
    return folder


def start(workspace: Path, folder: Path, **changes) -> SimPOTrainer:
    return run(SIMPO, [recipe_of_run(workspace, folder, RECIPE, changes)])


def types_in(folder: Path) -> set[torch.dtype]:
    return {weight.dtype for weight in load_file(folder / "model.safetensors").values()}


# ---- The type of the weights ----


@pytest.fixture(scope="module")
def half(workspace, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    start(workspace, folder, model_name_or_path=str(workspace / "half"))
    return folder / "run"


def test_a_checkpoint_in_bf16_is_saved_in_bf16_and_its_master_weights_in_float32(half):
    assert types_in(half) == {torch.bfloat16}
    assert types_in(half / "checkpoint-2") == {torch.float32}
    config = json.loads((half / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_the_last_evaluation_is_of_the_weights_as_they_are_saved(half, workspace):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32), AutoTokenizer.from_pretrained(half)
    with torch.no_grad():
        chosen, _ = reference.mean_logps(model, held_out_tokens(workspace, tokenizer, RECIPE))
    pairs = [pair for pair in read_jsonl(half / "eval_pairs.jsonl") if pair["step"] == 2]
    assert [pair["chosen_reward"] for pair in pairs] == pytest.approx((2.5 * chosen).tolist(), rel=1e-5)
    unrounded, rounded = (record for record in read_jsonl(half / "metrics.jsonl") if "eval_loss" in record)
    assert unrounded["eval_rewards/chosen"] != rounded["eval_rewards/chosen"]


def test_figures_of_the_rounded_and_of_the_unrounded_weights_stand_side_by_side(half):
    results = json.loads((half / "eval_results.json").read_text())
    unrounded, rounded = (record for record in read_jsonl(half / "metrics.jsonl") if "eval_loss" in record)
    assert results["eval_loss"] == rounded["eval_loss"]
    assert results["eval_before_rounding"]["eval_loss"] == unrounded["eval_loss"]
    card = (half / "README.md").read_text()
    assert "| Weights | bfloat16, trained in float32 |" in card
    assert f"| Loss | {rounded['eval_loss']:.4f} | {unrounded['eval_loss']:.4f} |" in card


def test_save_dtype_changes_the_type(workspace, tmp_path):
    start(workspace, tmp_path, save_dtype="float16", do_eval=False, eval_strategy="no")
    assert types_in(tmp_path / "run") == {torch.float16}


def test_an_adapter_keeps_the_type_it_is_trained_in(workspace, tmp_path):
    adapter = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"], "save_dtype": "bfloat16"}
    start(workspace, tmp_path, model_name_or_path=str(workspace / "half"), **adapter)
    assert {weight.dtype for weight in load_file(tmp_path / "run/adapter_model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "run/generation_config.json").read_text())
    card = (tmp_path / "run/README.md").read_text()
    assert "library_name: peft" in card
    assert "LoRA adapter" in card


# ---- Files ----


def test_licences_and_what_belongs_to_the_tokenizer_go_along_and_the_card_names_the_licence(half):
    for name in ("LICENSE", "USE_POLICY.md", "NOTICE.txt", "tokenizer.model", "preprocessor_config.json"):
        assert (half / name).read_text() == name
    assert "license: llama3.1" in (half / "README.md").read_text()


# ---- What would not be the same ----


def damaged_save(monkeypatch, damage) -> None:
    save = alignment.leaving.save_whole_model

    def save_and_damage(trainer) -> None:
        save(trainer)
        damage(Path(trainer.args.output_dir))

    monkeypatch.setattr(alignment.leaving, "save_whole_model", save_and_damage)


def another_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def another_rotation(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rope_theta": 30.0, "rope_parameters": {"rope_theta": 30.0}}))


def another_merge(folder: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    del state["model"]["merges"][:20]
    (folder / "tokenizer.json").write_text(json.dumps(state))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (another_weight, "is not the one that was trained"),
        (another_rotation, "is not the one that was trained"),
        (another_merge, "the saved tokenizer is not the one"),
        (no_weights, "cannot be read again"),
    ],
)
def test_a_folder_that_is_not_the_trained_model_ends_the_run_with_one_message(
    damage, message, workspace, tmp_path, monkeypatch
):
    damaged_save(monkeypatch, damage)
    with pytest.raises(TrainingStopped, match=message):
        start(workspace, tmp_path)
    assert json.loads((tmp_path / "run/_run/status.json").read_text())["state"] == "failed"


def test_tokens_beyond_the_embedding_are_refused_before_training(workspace, tmp_path, capsys):
    shutil.copytree(workspace / "model", tmp_path / "model")
    tokenizer = builders.bpe_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|new|>"})
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as exit_:
        main(SIMPO, [recipe_of_run(workspace, tmp_path, RECIPE, {"model_name_or_path": str(tmp_path / "model")})])
    assert exit_.value.code == 2
    assert "resize_token_embeddings" in capsys.readouterr().err


def test_what_the_end_would_refuse_to_save_is_refused_before_training(workspace, tmp_path, monkeypatch):
    def refuse(*args, **kwargs) -> None:
        raise ValueError("no such rule")

    monkeypatch.setattr("alignment.model.saved.save_tokenizer", refuse)
    with pytest.raises(UserError, match=r"cannot be saved and read again .ValueError: no such rule"):
        start(workspace, tmp_path)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
