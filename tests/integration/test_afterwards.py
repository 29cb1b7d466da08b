"""What becomes of a model: merged, scored by itself, reviewed. scripts/merge_adapter.py and scripts/score_pairs.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from alignment.afterwards import merging
from alignment.afterwards.merging import merge_adapter
from alignment.errors import TrainingStopped, UserError
from alignment.run.checkpoints import training_of
from tests import builders
from tests.forked import Ended, Server
from tests.integration.conftest import RECIPE
from tests.workspaces import read_jsonl, recipe_of_run, save_adapter, save_model, save_workspace, write_recipe

MERGE, SCORE, REVIEW = "scripts/merge_adapter.py", "scripts/score_pairs.py", "scripts/review_run.py"
# bitsandbytes packs blocks of 64 weights: a hidden size that is a multiple of 128.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.05}
WHOLE = {"use_peft": None, "lora_r": None, "lora_target_modules": None, "lora_dropout": None}
DPO = {"beta": 0.1, "sft_weight": None}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    save_workspace(folder, 8, 6, **SIZES)
    save_model(folder / "half", dtype=torch.bfloat16, **SIZES)
    save_model(folder / "tied", tie_word_embeddings=True, **SIZES)
    save_adapter(folder / "model", folder / "adapter")
    shutil.copytree(folder / "model", folder / "ends otherwise")
    tokenizer = builders.bpe_tokenizer()
    tokenizer.eos_token = builders.PAD
    tokenizer.save_pretrained(folder / "ends otherwise")
    return folder


def ends(ended: Ended, status: int = 0) -> str:
    assert ended.status == status, ended.printed
    assert "Traceback" not in ended.printed, ended.printed
    return ended.printed


# ---- Merging ----

LORA = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
KINDS = {
    "lora": ("model", {}),
    "rank-stabilised": ("model", {"use_rslora": True}),
    "dora": ("model", {"use_dora": True}),
    "the head trained whole": ("model", {"modules_to_save": ["lm_head"]}),
    "embeddings of a tied model trained as one": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "the head of a tied model trained apart": ("tied", {"modules_to_save": ["lm_head"]}),
    "patterns of ranks and biases": (
        "model",
        {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"q_proj": 3}, "lora_bias": False},
    ),
    "on a base in bf16": ("half", {}),
}


def save_lora(base: Path, folder: Path, **settings: Any) -> None:
    """An adapter that changes what the model says, in everything that it trains."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{**LORA, **settings}))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name and "lora_A" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)


@torch.no_grad()
def logps(model: torch.nn.Module) -> Tensor:
    """(2, 40, vocabulary) log-probabilities of made-up rows."""
    ids = torch.randint(5, 200, (2, 40), generator=torch.Generator().manual_seed(1))
    return model.eval()(input_ids=ids).logits.log_softmax(-1)


def in_float32(folder: Path, adapter: Path | None = None) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_says_what_base_and_adapter_say(kind, workspace, tmp_path):
    base, settings = KINDS[kind]
    save_lora(workspace / base, tmp_path / "adapter", **settings)
    found = merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    wanted, merged = logps(in_float32(workspace / base, tmp_path / "adapter")), in_float32(tmp_path / "merged")
    assert found.moved > 0.05
    limit = 0.05 if base == "half" else 1e-4
    assert (wanted - logps(merged)).abs().max() < limit < (wanted - logps(in_float32(workspace / base))).abs().max()
    weights = load_file(tmp_path / "merged/model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.bfloat16 if base == "half" else torch.float32}
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_sums_are_computed_in_float32_and_rounded_once(workspace, tmp_path):
    """peft's own sum in bf16 would round the adapter's part, then the sum."""
    save_lora(workspace / "half", tmp_path / "adapter")
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "wide", dtype="float32")
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    wide, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "merged"))
    assert {weight.dtype for weight in wide.values()} == {torch.float32}
    assert all(torch.equal(wide[name].to(torch.bfloat16), merged[name]) for name in wide)


def test_a_sum_that_is_not_the_adapter_s_leaves_nothing(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "merged_in_float32", lambda model: model.unload())
    with pytest.raises(TrainingStopped, match="is not base and adapter: its log-probabilities are off by"):
        merge_adapter(str(workspace / "adapter"), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_rounding_that_drowns_an_adapter_is_told(workspace, tmp_path, caplog):
    caplog.set_level("INFO", "alignment")
    save_lora(workspace / "half", tmp_path / "adapter", lora_alpha=0.02, use_rslora=False)
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert "--dtype=float32 keeps all of it" in caplog.text


def test_tokens_that_the_adapter_s_tokenizer_adds_are_in_the_merged_model(workspace, tmp_path):
    tokenizer = builders.bpe_tokenizer()
    tokenizer.add_tokens([f"<extra {number}>" for number in range(600)])
    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    model.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert in_float32(tmp_path / "merged").get_input_embeddings().num_embeddings == len(tokenizer)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(tokenizer)


def adapter_of(folder: Path, base: Path) -> Path:
    """The adapter in `folder`, naming another base."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    return folder


@pytest.mark.parametrize("kind", ["output", "parent", "whole", "nowhere", "quantised", "tied", "stacked", "other", "nothing"])
def test_what_cannot_be_merged_is_one_sentence_before_anything_is_written(kind, workspace, tmp_path):
    adapter, output = tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(workspace / "adapter", adapter)
    told = {
        "output": "exists already; choose another folder",
        "parent": "is a file; choose another",
        "whole": "is a whole model, not a LoRA adapter",
        "nowhere": "its configuration cannot be loaded",
        "quantised": "has quantised weights (bitsandbytes), to which the sum would be rounded",
        "tied": "adapts lm_head alone, which in",
        "stacked": "is a LoRA adapter itself; merge that first",
        "other": "is no adapter of",
        "nothing": "which cannot be loaded",
    }
    name = str(adapter)
    if kind == "output":
        output.mkdir()
    elif kind == "parent":
        output.write_text("a file")
        output = output / "merged"
    elif kind in ("whole", "nowhere"):
        name = str(workspace / "model") if kind == "whole" else str(tmp_path / "no/such/folder")
    elif kind == "quantised":
        config = BitsAndBytesConfig(load_in_4bit=True)
        AutoModelForCausalLM.from_pretrained(workspace / "model", quantization_config=config).save_pretrained(tmp_path / "base")
        adapter_of(adapter, tmp_path / "base")
    elif kind == "tied":
        save_lora(workspace / "tied", adapter, target_modules=["lm_head"])
    elif kind == "stacked":
        adapter_of(adapter, workspace / "adapter")
    elif kind == "other":
        save_model(tmp_path / "base", num_hidden_layers=1, **SIZES)
        adapter_of(adapter, tmp_path / "base")
    elif kind == "nothing":
        adapter_of(adapter, tmp_path / "gone")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as refused:
        merge_adapter(name, output)
    assert told[kind] in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_merge_that_is_killed_leaves_nothing_that_looks_whole_and_the_same_command_makes_it(server, workspace, tmp_path):
    command, output = (str(workspace / "adapter"), str(tmp_path / "out/merged")), tmp_path / "out/merged"
    output.parent.mkdir()
    count = tmp_path / "count"
    ends(server.run(*command, method=MERGE, sabotage="count_file_events", folder=str(output.parent), into=str(count)))
    events = int(count.read_text())
    assert events > 8
    shutil.rmtree(output)
    for number in (3, events // 2, events - 1, events):
        ended = server.run(*command, method=MERGE, sabotage="kill_at_file_event", folder=str(output.parent), number=number)
        assert ended.status == -9, ended.printed
        assert [path.name for path in output.parent.iterdir() if not path.name.startswith(".")] == []
    assert "agree within" in ends(server.run(*command, method=MERGE))
    assert [path.name for path in output.parent.iterdir()] == ["merged"]
    assert "exists already" in ends(server.run(*command, method=MERGE), 2)


def test_the_adapter_of_a_run_is_merged_with_its_card_and_scores_as_the_run_did(server, workspace, tmp_path):
    keys = {
        **RECIPE,
        "max_steps": 2,
        "save_strategy": "no",
        "eval_strategy": "no",
        "do_eval": True,
        "preprocessing": "published",
    }
    ends(server.run(recipe_of_run(workspace, tmp_path, keys, {})))
    run, merged, scored = tmp_path / "run", tmp_path / "merged", tmp_path / "scored"
    recipe = run / "recipe.yaml"  # as if its best evaluation had chosen the step
    recipe.write_text(recipe.read_text().replace("load_best_model_at_end: false", "load_best_model_at_end: true"))
    ends(server.run(str(run), str(merged), method=MERGE))
    card = (merged / "README.md").read_text()
    assert card.count("## Files") == 1
    assert f"| Adapter | `{run}` |" in card
    assert "merged in float32 from a LoRA adapter (rank 4, alpha 32)" in card
    assert "library_name: transformers" in card
    assert "SimPO" in card
    assert "lora" not in card.partition("\n# ")[0]
    assert (merged / "generation_config.json").read_text() == (run / "generation_config.json").read_text()
    ends(server.run(str(merged), str(run / "recipe.yaml"), f"--output={scored}", method=SCORE))
    ours, theirs = ([row for row in read_jsonl(folder / "eval_pairs.jsonl") if row["step"] > 0] for folder in (scored, run))
    assert [row["chosen_logp"] for row in ours] == pytest.approx([row["chosen_logp"] for row in theirs], rel=1e-5)
    assert training_of(str(run)) == training_of(str(merged)) == (True, True)
    assert json.loads((scored / "environment.json").read_text())["is_chosen_step"]


# ---- Scoring ----

RUNS = {
    "whole, saved in bf16": ("simpo", WHOLE | {"model": "half"}),
    "an adapter, padded, by tokens": ("simpo", {"pair_layout": "padded", "max_tokens_per_micro_batch": 400}),
    "an adapter on 4 bits": ("simpo", {"load_in_4bit": True, "use_bnb_nested_quant": True}),
    "a template whose end is not yet the eos": (
        "simpo",
        WHOLE | {"model": "ends otherwise", "chat_template": "llama-3", "preprocessing": "published"},
    ),
    "dpo": ("dpo", WHOLE | DPO),
    "orpo": ("orpo", WHOLE | DPO),
}


@pytest.mark.parametrize("kind", RUNS)
def test_scoring_a_saved_model_gives_the_rows_of_its_run_s_last_evaluation(kind, server, workspace, tmp_path):
    method, changes = RUNS[kind]
    base = workspace / changes.get("model", "model")
    keys = {**RECIPE, "max_steps": 2, "save_strategy": "no", "eval_strategy": "no", "do_eval": True}
    changes = {key: value for key, value in changes.items() if key != "model"}
    recipe = recipe_of_run(workspace, tmp_path, keys, {**changes, "model_name_or_path": str(base)})
    ended = server.run(recipe, method=method)
    assert ended.status == 0, ended.printed
    run, scored = tmp_path / "run", tmp_path / "scored"
    before = (f"--before={base}",) if method == "dpo" else ()
    ended = server.run(str(run), str(run / "recipe.yaml"), f"--output={scored}", *before, method=SCORE)
    assert ended.status == 0, ended.printed
    wanted = [row for row in read_jsonl(run / "eval_pairs.jsonl") if row["step"] == 2 or before]
    assert len(wanted) == 6 * (1 + len(before))
    assert read_jsonl(scored / "eval_pairs.jsonl") == wanted


@pytest.fixture(scope="module")
def pairs_recipe(workspace) -> Path:
    """A recipe whose own model is of no interest."""
    keys = {**RECIPE, **WHOLE, "dataset_mixer": {str(workspace / "pairs"): 1.0}, "output_dir": "somewhere"}
    return write_recipe(workspace, {**keys, "model_name_or_path": "its/own"})


def score(server: Server, *options: object, **job: Any) -> Ended:
    return server.run(*map(str, options), method=SCORE, **job)


def test_two_models_that_were_not_trained_here_are_compared_by_the_review(server, workspace, pairs_recipe, tmp_path):
    for name in ("model", "adapter"):
        ends(score(server, workspace / name, pairs_recipe, f"--output={tmp_path / name}"))
    folders = (str(tmp_path / "model"), str(tmp_path / "adapter"))
    ends(server.run(*folders, f"--output={tmp_path / 'review'}", method=REVIEW))
    review = (tmp_path / "review/review.md").read_text()
    assert "| model minus adapter (single seeds) | 6 pairs; 0 and 0 unmatched |" in review
    assert {row["step"] for row in read_jsonl(tmp_path / "model/eval_pairs.jsonl")} == {1}


def test_a_model_before_its_training_is_scored_as_step_0_and_the_review_says_what_changed(
    server, workspace, pairs_recipe, tmp_path
):
    both, output = f"--before={workspace / 'model'}", tmp_path / "scored"
    ends(score(server, workspace / "adapter", pairs_recipe, both, f"--output={output}"))
    rows = read_jsonl(output / "eval_pairs.jsonl")
    assert [row["step"] for row in rows] == [0] * 6 + [1] * 6
    ends(score(server, workspace / "model", pairs_recipe, f"--output={tmp_path / 'alone'}"))
    alone = read_jsonl(tmp_path / "alone/eval_pairs.jsonl")
    assert [row["chosen_logp"] for row in rows[:6]] == pytest.approx([row["chosen_logp"] for row in alone], rel=1e-5)
    ends(server.run(str(output), method=REVIEW))
    assert "| D: change of accuracy | +" in (output / "review.md").read_text()


def test_two_processes_score_what_one_does(server, workspace, pairs_recipe, tmp_path):
    ends(score(server, workspace / "adapter", pairs_recipe, f"--output={tmp_path / 'one'}"))
    ends(score(server, workspace / "adapter", pairs_recipe, f"--output={tmp_path / 'two'}", processes=2))
    one, two = (read_jsonl(tmp_path / name / "eval_pairs.jsonl") for name in ("one", "two"))
    assert [row["index"] for row in two] == [row["index"] for row in one]
    for name in ("chosen_logp", "rejected_logp"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-5)


def test_what_cannot_be_scored_is_one_sentence_and_leaves_nothing(server, workspace, pairs_recipe, tmp_path):
    output = tmp_path / "scored"
    told = {
        ("nowhere/at/all", pairs_recipe): "nowhere/at/all",
        (workspace / "model", tmp_path / "none.yaml"): "none.yaml: no such file",
        (workspace / "model", pairs_recipe, "--gama_beta_ratio=1"): "did you mean 'gamma_beta_ratio'?",
        (workspace / "model", pairs_recipe, "--method=dpo"): "name what the model was with --before",
        (workspace / "model", pairs_recipe, f"--before={workspace / 'nobody'}"): "nobody",
    }
    for command, sentence in told.items():
        printed = ends(score(server, *command, f"--output={output}"), 2)
        assert sentence in printed
        assert not output.exists()
    output.mkdir()
    (output / "eval_pairs.jsonl").write_text("{}\n")
    assert "would be written over" in ends(score(server, workspace / "model", pairs_recipe, f"--output={output}"), 2)
    assert (output / "eval_pairs.jsonl").read_text() == "{}\n"


def test_an_adapter_that_was_trained_on_4_bits_is_merged_into_the_full_precision_model_and_its_card_says_so(
    server, workspace, tmp_path
):
    keys = {**RECIPE, "max_steps": 1, "save_strategy": "no", "eval_strategy": "no", "load_in_4bit": True}
    ends(server.run(recipe_of_run(workspace, tmp_path, keys, {})))
    merge_adapter(str(tmp_path / "run"), tmp_path / "merged")
    assert "| Base while training | quantised to 4 bits; log-probabilities" in (tmp_path / "merged/README.md").read_text()
    wanted = logps(in_float32(workspace / "model", tmp_path / "run"))
    assert (wanted - logps(in_float32(tmp_path / "merged"))).abs().max() < 1e-4
