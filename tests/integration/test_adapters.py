"""Runs that train adapters: on quantised weights, from an SFT adapter, and that what they save is what they measured."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from alignment.data.splits import CONVERSATIONS, PAIRS
from alignment.errors import UserError
from alignment.model.adapters import keep_4bit_layout, merge_once
from alignment.model.loading import find_adapter, load_policy
from alignment.pipeline import Method, main, run
from alignment.recipe.configs import ModelArguments
from scripts.sft_config import SFTConfig
from scripts.sft_trainer import SFTTrainer
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests import builders, reference
from tests.workspaces import held_out_tokens, recipe_of_run, save_adapter, save_workspace

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
    "max_length": 100,
    "max_prompt_length": 50,
    "learning_rate": 1e-3,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "do_eval": True,
    "eval_strategy": "no",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"]}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
# bitsandbytes packs blocks of 64 weights: a hidden size that is a multiple of 128.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.05}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A base, an SFT adapter of it that changes its scores, and 8 + 4 pairs."""
    folder = tmp_path_factory.mktemp("workspace")
    save_workspace(folder, 8, 4, **SIZES)
    save_adapter(folder / "model", folder / "sft")
    return folder


def recipe_file(workspace: Path, folder: Path, **changes) -> str:
    """The recipe of a run into folder/run; a change to None leaves a key out."""
    return recipe_of_run(workspace, folder, RECIPE, changes)


@torch.no_grad()
def scores(model: PreTrainedModel, workspace: Path) -> Tensor:
    """(8,) mean log-probabilities of the held-out responses, by the plain path."""
    return torch.cat(reference.mean_logps(model.eval(), held_out_tokens(workspace, builders.bpe_tokenizer(), RECIPE)))


def reported(folder: Path) -> Tensor:
    """As `scores`, by the run at its end."""
    pairs = [json.loads(line) for line in (folder / "eval_pairs.jsonl").read_text().splitlines()]
    end = [pair for pair in pairs if pair["step"] > 0]
    return torch.tensor([pair[f"{side}_reward"] / BETA for side in ("chosen", "rejected") for pair in end])


def losses(trainer: SimPOTrainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-5, atol=0)


def loaded_as(trainer: SimPOTrainer, folder: Path) -> PeftModel:
    """The saved adapter on its base, quantised as it was when it was trained."""
    config = getattr(trainer.model.config, "quantization_config", None)
    model = AutoPeftModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **({"quantization_config": config, "device_map": {"": "cpu"}} if config else {})
    )
    keep_4bit_layout(model)  # the other one rounds the scales to bf16
    return model


def sft_model(workspace: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(workspace / "model"), workspace / "sft")


def adapter_config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def environment(folder: Path) -> dict:
    return json.loads((folder / "environment.json").read_text())


# ---- Quantised bases ----


@pytest.fixture(scope="module")
def quantised(workspace) -> Path:
    """A model that was saved in 4 bits."""
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    config = BitsAndBytesConfig(**options, bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage="float32")
    folder = workspace / "quantised"
    AutoModelForCausalLM.from_pretrained(workspace / "model", quantization_config=config, dtype="float32").save_pretrained(
        folder
    )
    builders.bpe_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("asked", [{}, NF4], ids=["by itself", "and the recipe says so too"])
def test_a_model_that_was_saved_in_4_bits_is_trained_on_as_it_is(asked, quantised, workspace, tmp_path):
    trainer = run(SIMPO, [recipe_file(workspace, tmp_path, model_name_or_path=str(quantised), max_steps=2, **LORA, **asked)])
    assert trainer.model.get_base_model().is_quantized
    assert losses(trainer)[1] != losses(trainer)[0]


def test_a_second_process_reads_a_model_that_was_saved_in_4_bits(quantised, monkeypatch):
    monkeypatch.setattr("alignment.model.loading.receives_weights", lambda environment: True)
    model = load_policy(str(quantised), dtype="float32")
    assert model.is_quantized


QUANTISED = {"4 bits": NF4, "8 bits": {"load_in_8bit": True}}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("bits", QUANTISED)
def test_an_adapter_on_quantised_weights_learns_and_scores_the_same_when_it_is_loaded_again(
    bits, checkpointing, workspace, tmp_path
):
    settings = {"num_train_epochs": 4, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
    recipe = recipe_file(workspace, tmp_path, **LORA, **QUANTISED[bits], **settings, gradient_checkpointing=checkpointing)
    trainer = run(SIMPO, [recipe])
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.05
    # Stored in fewer bytes than float32, or nothing was quantised.
    layer = trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert layer.numel() * layer.element_size() <= 128 * 256

    again = loaded_as(trainer, tmp_path / "run")
    close(scores(again, workspace), scores(trainer.model, workspace))
    if bits == "4 bits":
        # In evaluation 8-bit layers round their inputs as well, and a packed row's inputs differ from a padded row's.
        close(scores(again, workspace), reported(tmp_path / "run"))
    assert adapter_config(tmp_path / "run")["base_model_name_or_path"] == str(workspace / "model")


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_evaluating_in_between_leaves_the_training_on_4_bit_weights_alone(kind, workspace, tmp_path):
    settings = {**LORA, **NF4, **kind, "learning_rate": 1e-2}
    alone = run(SIMPO, [recipe_file(workspace, tmp_path, **settings, do_eval=False, output_dir=str(tmp_path / "alone"))])
    watched = run(SIMPO, [recipe_file(workspace, tmp_path, **settings, eval_strategy="steps", eval_steps=1)])
    assert losses(watched) == losses(alone)
    both = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "run")]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_embeddings_and_head_are_trained_whole_beside_4_bit_layers(workspace, tmp_path):
    settings = {**LORA, **NF4, "lora_modules_to_save": ["lm_head", "embed_tokens"], "learning_rate": 1e-2}
    trainer = run(SIMPO, [recipe_file(workspace, tmp_path, **settings)])
    saved = load_file(tmp_path / "run/adapter_model.safetensors")
    base = load_file(workspace / "model/model.safetensors")
    assert not torch.equal(saved["base_model.model.lm_head.weight"], base["lm_head.weight"])
    assert not torch.equal(saved["base_model.model.model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    close(scores(loaded_as(trainer, tmp_path / "run"), workspace), reported(tmp_path / "run"))


# ---- From an SFT adapter ----


@pytest.fixture
def said(caplog):
    """How many lines of the log contain all of some words."""
    caplog.set_level(logging.INFO, logger="alignment")
    return lambda *words: sum(all(word in line for word in words) for line in caplog.messages)


def test_whole_training_from_an_adapter_begins_with_the_merged_model(workspace, tmp_path, said):
    recipe = recipe_file(workspace, tmp_path, model_name_or_path=str(workspace / "sft"), learning_rate=0.0, max_steps=1)
    run(SIMPO, [recipe])
    close(reported(tmp_path / "run"), scores(sft_model(workspace), workspace))
    assert (
        reported(tmp_path / "run") - scores(AutoModelForCausalLM.from_pretrained(workspace / "model"), workspace)
    ).abs().max() > 0.1
    close(scores(AutoModelForCausalLM.from_pretrained(tmp_path / "run"), workspace), reported(tmp_path / "run"))
    assert not (tmp_path / "run/base").exists()
    assert said("merged into its base", "the whole merged model is trained") == 1
    assert environment(tmp_path / "run")["sft_adapter"] == {"name": str(workspace / "sft"), "revision": "main", "use": "merged"}
    assert environment(tmp_path / "run")["model"] == {"name": str(workspace / "model"), "revision": None}
    assert str(workspace / "sft") in (tmp_path / "run/README.md").read_text()


LOAD_ELSEWHERE = """
import sys, torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
rows = torch.load(sys.argv[2])
from tests import reference
with torch.no_grad():
    torch.save(torch.cat(reference.mean_logps(model.eval(), rows)), sys.argv[3])
"""


@pytest.fixture(scope="module")
def stacked(workspace, tmp_path_factory) -> Path:
    """A new adapter trained on the merged model."""
    folder = tmp_path_factory.mktemp("stacked")
    run(SIMPO, [recipe_file(workspace, folder, model_name_or_path=str(workspace / "sft"), **LORA)])
    return folder


def test_a_new_adapter_names_the_merged_model_and_loads_in_a_fresh_process(stacked, workspace, tmp_path):
    assert adapter_config(stacked / "run")["base_model_name_or_path"] == str(stacked / "run/base")
    assert adapter_config(stacked / "run")["r"] == 4
    torch.save(held_out_tokens(workspace, builders.bpe_tokenizer(), RECIPE), tmp_path / "rows.pt")
    subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, str(stacked / "run"), str(tmp_path / "rows.pt"), str(tmp_path / "scores.pt")],
        cwd=ROOT, check=True, timeout=120,
    )  # fmt: skip
    close(torch.load(tmp_path / "scores.pt"), reported(stacked / "run"))
    merged = AutoModelForCausalLM.from_pretrained(stacked / "run/base")
    close(scores(merged, workspace), scores(sft_model(workspace), workspace))


def test_a_merged_model_is_kept_for_the_next_start_unless_its_adapter_changed(stacked, workspace, tmp_path):
    shutil.copytree(workspace / "sft", tmp_path / "sft")
    settings = {"model_name_or_path": str(tmp_path / "sft"), "max_steps": 1, "resume_from_checkpoint": "never", **LORA}
    recipe = recipe_file(workspace, tmp_path, **settings)
    weights = tmp_path / "run/base/model.safetensors"
    run(SIMPO, [recipe])
    first = weights.stat().st_ino
    run(SIMPO, [recipe])
    assert weights.stat().st_ino == first
    save_adapter(workspace / "model", tmp_path / "other")
    tensors = load_file(tmp_path / "other/adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, tmp_path / "sft/adapter_model.safetensors")
    run(SIMPO, [recipe])
    assert weights.stat().st_ino != first


@pytest.mark.parametrize("start", ["a model", "an adapter that is merged"])
def test_an_adapter_does_not_go_on_over_weights_that_changed(start, workspace, tmp_path, capsys):
    shutil.copytree(workspace, tmp_path / "own")
    changing = tmp_path / ("own/model" if start == "a model" else "own/sft")
    settings = {"model_name_or_path": str(changing), "max_steps": 2, "save_strategy": "steps", "save_steps": 1, **LORA}
    recipe = recipe_file(workspace, tmp_path, **settings)
    run(SIMPO, [recipe])
    (tmp_path / "run/adapter_model.safetensors").unlink()  # as if it had been killed at its end
    (weights,) = changing.glob("*model.safetensors")
    was = load_file(weights)
    save_file({name: 2 * tensor for name, tensor in was.items()}, weights, metadata={"format": "pt"})
    with pytest.raises(SystemExit):
        main(SIMPO, [recipe])
    assert "checkpoint-2 is an adapter that was trained on other weights" in capsys.readouterr().err
    save_file(was, weights, metadata={"format": "pt"})
    run(SIMPO, [recipe])
    assert (tmp_path / "run/adapter_model.safetensors").exists()


def test_a_whole_model_trained_where_an_adapter_was_is_not_loaded_with_it(workspace, tmp_path):
    run(SIMPO, [recipe_file(workspace, tmp_path, max_steps=1, **LORA)])
    run(SIMPO, [recipe_file(workspace, tmp_path, max_steps=1, resume_from_checkpoint="never")])
    assert not (tmp_path / "run/adapter_config.json").exists()
    close(scores(AutoModelForCausalLM.from_pretrained(tmp_path / "run"), workspace), reported(tmp_path / "run"))


def test_a_machine_that_does_not_see_the_merged_model_says_so(workspace, tmp_path):
    model_args = ModelArguments(model_name_or_path=str(workspace / "sft"))
    args = SimpleNamespace(output_dir=str(tmp_path), process_index=1)
    with pytest.raises(UserError, match="process 0 left no merged model here; on several machines output_dir must be"):
        merge_once(find_adapter(model_args), tmp_path / "base", model_args, args, builders.bpe_tokenizer())


def test_a_folder_that_is_in_the_way_of_the_merged_model_is_not_deleted(workspace, tmp_path, capsys):
    mine = tmp_path / "run/base/thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(SystemExit):
        main(SIMPO, [recipe_file(workspace, tmp_path, model_name_or_path=str(workspace / "sft"))])
    assert "base in it are no run's" in capsys.readouterr().err
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("settings", [{"sft_adapter": "continue"}, NF4], ids=["by the recipe", "because of 4 bits"])
def test_an_adapter_that_is_itself_trained_on_stays_one_adapter_of_the_same_base(settings, workspace, tmp_path, said):
    recipe = recipe_file(workspace, tmp_path, model_name_or_path=str(workspace / "sft"), use_peft=True, **settings)
    trainer = run(SIMPO, [recipe])
    config = adapter_config(tmp_path / "run")
    assert (config["r"], config["base_model_name_or_path"]) == (8, str(workspace / "model"))
    assert not (tmp_path / "run/base").exists()
    assert said("neither merged nor stacked, it is itself trained on") == 1
    assert environment(tmp_path / "run")["sft_adapter"]["use"] == "continued"
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (workspace / "sft", tmp_path / "run"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    close(scores(loaded_as(trainer, tmp_path / "run"), workspace), reported(tmp_path / "run"))


def test_an_adapter_that_is_trained_on_begins_where_it_ended(workspace, tmp_path):
    settings = {"use_peft": True, "sft_adapter": "continue", "learning_rate": 0.0, "max_steps": 1}
    run(SIMPO, [recipe_file(workspace, tmp_path, model_name_or_path=str(workspace / "sft"), **settings)])
    close(reported(tmp_path / "run"), scores(sft_model(workspace), workspace))


def test_a_base_given_by_a_relative_path_is_named_by_its_absolute_one(workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(workspace)
    run(SIMPO, [recipe_file(workspace, tmp_path, model_name_or_path="model", max_steps=1, **LORA)])
    monkeypatch.chdir(tmp_path)
    assert adapter_config(tmp_path / "run")["base_model_name_or_path"] == str(workspace / "model")
    close(scores(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run"), workspace), reported(tmp_path / "run"))


@pytest.mark.parametrize("settings", [{}, NF4], ids=["merged", "trained on, in 4 bits"])
def test_simpo_goes_on_from_the_adapter_of_a_supervised_run(settings, workspace, tmp_path):
    rows = [{"messages": pair["chosen"]} for pair in builders.pairs(12)]
    for name, part in (("train", rows[:8]), ("test", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part), encoding="utf-8")
    supervised = {
        **dict.fromkeys(("beta", "gamma_beta_ratio", "max_prompt_length")),
        "dataset_mixer": {str(tmp_path): 1.0}, "output_dir": str(tmp_path / "sft"), "learning_rate": 1e-2,
    }  # fmt: skip
    run(SFT, [recipe_file(workspace, tmp_path, **LORA, **settings, **supervised)])
    assert adapter_config(tmp_path / "sft")["base_model_name_or_path"] == str(workspace / "model")
    adapter = {"use_peft": True, **settings} if settings else LORA
    trainer = run(SIMPO, [recipe_file(workspace, tmp_path, model_name_or_path=str(tmp_path / "sft"), **adapter)])
    close(scores(loaded_as(trainer, tmp_path / "run"), workspace), reported(tmp_path / "run"))
    assert (tmp_path / "run/base").exists() == (not settings)


# ---- From the Hub ----


def on_hub(cache: Path, name: str, commit: str, folder: Path) -> None:
    """Put a folder where the Hub's client keeps what it has downloaded of `name`, branch main."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)


@pytest.fixture
def hub(workspace, tmp_path, monkeypatch) -> Path:
    """me/base and me/sft, an adapter of it."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    on_hub(cache, "me/base", "b" * 40, workspace / "model")
    shutil.copytree(workspace / "sft", tmp_path / "sft")
    config = {**adapter_config(tmp_path / "sft"), "base_model_name_or_path": "me/base"}
    (tmp_path / "sft/adapter_config.json").write_text(json.dumps(config))
    on_hub(cache, "me/sft", "a" * 40, tmp_path / "sft")
    return cache


def test_an_adapter_of_a_model_on_the_hub_names_it_with_its_commit(hub, workspace, tmp_path):
    run(SIMPO, [recipe_file(workspace, tmp_path, model_name_or_path="me/base", max_steps=1, **LORA)])
    config = adapter_config(tmp_path / "run")
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", "b" * 40)
    assert environment(tmp_path / "run")["model"] == {"name": "me/base", "revision": "b" * 40}


def test_an_adapter_on_the_hub_is_trained_on_with_its_bases_commit_and_tokenizer(hub, workspace, tmp_path):
    settings = {"use_peft": True, "sft_adapter": "continue", "max_steps": 1}
    run(SIMPO, [recipe_file(workspace, tmp_path, model_name_or_path="me/sft", **settings)])
    config = adapter_config(tmp_path / "run")
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", "b" * 40)
    facts = environment(tmp_path / "run")
    assert facts["model"] == {"name": "me/base", "revision": "b" * 40}
    assert facts["sft_adapter"] == {"name": "me/sft", "revision": "main", "use": "continued"}


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora = True: is a kind of LoRA; add use_peft: true"),
        ({**LORA, "load_in_8bit": True, "use_dora": True}, "use load_in_4bit, or LoRA"),
        ({**LORA, "lora_modules_to_save": ["head"]}, "the model has no layer head"),
        ({**LORA, "sft_adapter": "merge"}, "is a whole model, not a LoRA adapter"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(changes, message, workspace, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(SIMPO, [recipe_file(workspace, tmp_path, **changes)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
