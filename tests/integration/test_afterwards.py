"""What becomes of a model: merged, scored by itself, reviewed. scripts/merge_adapter.py and scripts/score_pairs.py."""

from pathlib import Path

import pytest
import torch

from tests.integration.conftest import RECIPE
from tests.workspaces import read_jsonl, recipe_of_run, save_adapter, save_model, save_workspace

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
    return folder


# ---- Scoring ----

RUNS = {
    "whole, saved in bf16": ("simpo", WHOLE | {"model": "half"}),
    "an adapter, padded, by tokens": ("simpo", {"pair_layout": "padded", "max_tokens_per_micro_batch": 400}),
    "an adapter on 4 bits": ("simpo", {"load_in_4bit": True, "use_bnb_nested_quant": True}),
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
