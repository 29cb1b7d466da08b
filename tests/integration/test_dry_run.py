"""--dry_run: what it refuses, what it foretells, and that it leaves nothing behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoConfig, BloomConfig

from alignment.data.splits import CONVERSATIONS, PAIRS
from alignment.pipeline import Method, main, run
from alignment.preflight import dry_run
from alignment.run.records import write_jsonl
from scripts.dpo_config import DPOConfig
from scripts.dpo_trainer import DPOTrainer
from scripts.orpo_config import ORPOConfig
from scripts.orpo_trainer import ORPOTrainer
from scripts.sft_config import SFTConfig
from scripts.sft_trainer import SFTTrainer
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests import builders
from tests.workspaces import read_jsonl, recipe_of_run, save_adapter, save_chats, save_workspace

ROOT = Path(__file__).parents[2]
SIMPO = Method(config=SimPOConfig, trainer=SimPOTrainer, data=PAIRS)
OTHERS = {
    "dpo": Method(config=DPOConfig, trainer=DPOTrainer, data=PAIRS),
    "orpo": Method(config=ORPOConfig, trainer=ORPOTrainer, data=PAIRS),
}
SFT = Method(config=SFTConfig, trainer=SFTTrainer, data=CONVERSATIONS)
KEYS = {
    "preprocessing": "exact", "use_cpu": True, "max_length": 160, "max_prompt_length": 80, "num_train_epochs": 1,
    "per_device_train_batch_size": 4, "do_eval": True, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
# As a recipe for GPUs has it.
GPU_KEYS = {
    "use_cpu": None, "bf16": True, "tf32": True, "attn_implementation": "flash_attention_2", "report_to": ["wandb"],
    "gradient_checkpointing": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A model, 24 + 6 pairs, and the same as conversations; `bare` is the model without its weights."""
    folder = tmp_path_factory.mktemp("workspace")
    rows = save_workspace(folder, 24, 6, initializer_range=0.1)
    save_chats(folder / "chats", rows, 24)
    shutil.copytree(folder / "model", folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture
def unestimated(monkeypatch):
    """The memory is not what the test is about, and takes seconds."""

    def none(plan):
        raise ValueError("the test does without")

    monkeypatch.setattr(dry_run, "estimate", none)


def recipe_file(workspace: Path, folder: Path, **changes) -> str:
    return recipe_of_run(workspace, folder, KEYS, changes)


def told(capsys, recipe: str, *options: str, method: Method = SIMPO) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a dry run."""
    status = 0
    try:
        main(method, [recipe, "--dry_run", *options])
    except SystemExit as exit_:
        status = exit_.code
    output = capsys.readouterr()
    return status, output.out, output.err


# ---- It would start ----


def test_a_recipe_for_gpus_is_foreseen_without_gpu_weights_or_launcher(workspace, tmp_path):
    """As a command: what this machine lacks is listed, the memory is estimated, nothing is written."""
    recipe = recipe_file(workspace, tmp_path, model_name_or_path=str(workspace / "bare"), **GPU_KEYS)
    before = sorted(tmp_path.rglob("*"))
    options = ["--strategy=fsdp2", "--num_processes=2", "--gpu_memory=80", "--tokens_per_second=5000", "--gpu_price=2"]
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(tmp_path.parent / "cache"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "scripts/run_simpo.py", recipe, "--dry_run", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    out = done.stdout
    assert "\x1b" not in out
    for title in ("Recipe", "Model", "Data", "Rows", "Lengths", "Steps", "Memory", "Time", "Disk", "Verdict"):
        assert f"\n== {title}" in out
    lacks = out.partition("== What only this machine lacks\n")[2].partition("\n\n")[0]
    for lack in (
        "2 GPUs: none here",
        "the package flash_attn is not installed",
        "wandb is not installed",
        "the model's weights: none",
    ):
        assert lack in lacks
    assert re.search(r"24 pairs, 8 a step \(4 x 1 x 2 processes\): 3 steps an epoch, 3 in all", out)
    assert "CUDA and NCCL take 5 to 8 GiB: a guess" in out
    assert re.search(r"It would start\. It should fit: [\d.]+ GiB and 5 to 8 of 80", out)


def test_a_run_that_will_not_fit_ends_with_1_and_says_what_it_needs(workspace, tmp_path, capsys):
    recipe = recipe_file(workspace, tmp_path, **GPU_KEYS | {"attn_implementation": None})
    status, out, err = told(capsys, recipe, "--gpu_memory=4")
    assert status == 1
    assert re.search(r"error: it will not fit 4 GiB: its largest micro-batch needs [\d.]+, and CUDA at least 5; raise", err)
    assert "4 GiB " in out  # the table is there all the same
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("unestimated")
def test_what_is_foretold_is_what_the_run_then_does(workspace, tmp_path, capsys):
    """Steps, evaluations, checkpoints and their bytes; and the dry run itself leaves the folder alone, before and after."""
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": None,
        "gradient_accumulation_steps": 2,
    }
    recipe = recipe_file(workspace, tmp_path, **changes)
    status, out, _ = told(capsys, recipe)
    assert status == 0
    assert not (tmp_path / "run").exists()
    assert "output_dir: starts there" in out
    steps = int(re.search(r"([\d,]+) in all", out)[1])
    evaluations, checkpoints = map(int, re.search(r"(\d+) evaluations?, (\d+) checkpoints?", out).groups())
    run(SIMPO, [recipe])
    folder = tmp_path / "run"
    status_file = json.loads((folder / "_run/status.json").read_text())
    assert status_file["step"] == steps == 3
    saved = sorted(folder.glob("checkpoint-*"))
    assert len(saved) == checkpoints == 2
    scored = [row["step"] for row in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in row]
    assert evaluations == len(scored) + 1  # before the first step, which only eval_pairs.jsonl has
    files = ("model.safetensors", "optimizer.pt")
    written = sum((saved[0] / name).stat().st_size for name in files)
    parameters = builders.tiny_model().num_parameters()
    assert written == pytest.approx(12 * parameters, rel=0.1)  # what `disk` reckons, and the files' heads

    listing = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    status, out, _ = told(capsys, recipe)
    assert (status, "output_dir: holds the end of this run: nothing is left to do" in out) == (0, True)
    status, out, _ = told(capsys, recipe, "--resume_from_checkpoint=never")
    assert "output_dir: starts afresh; the run that is there is set aside" in out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == listing
    status, _, err = told(capsys, recipe, "--beta=9")
    assert status == 2
    assert "was made by another recipe" in err
    (folder / "_run/status.json").unlink()
    (folder / "model.safetensors").unlink()
    status, out, _ = told(capsys, recipe)
    assert re.search(r"output_dir: goes on from \S+checkpoint-3, step 3", " ".join(out.split()))


@pytest.mark.usefixtures("unestimated")
@pytest.mark.parametrize("name", OTHERS)
def test_every_entry_point_over_pairs_has_it(name, workspace, tmp_path, capsys):
    status, out, _ = told(capsys, recipe_file(workspace, tmp_path), method=OTHERS[name])
    assert status == 0
    assert f"objective: {name.upper()}" in out
    assert "not estimated: the test does without" in out
    assert "It would start." in out


def test_supervised_tuning_has_it_without_what_is_about_pairs(workspace, tmp_path, capsys):
    changes = {"dataset_mixer": {str(workspace / "chats"): 1.0}, "max_prompt_length": None}
    recipe = recipe_file(workspace, tmp_path, **changes)
    status, out, _ = told(capsys, recipe, "--gpu_memory=80", "--show_row=5", method=SFT)
    assert status == 0
    assert "24 sequences, 4 a step" in out
    assert "it cannot be had for supervised tuning" in out
    assert "Whether it fits 80 GiB is not known." in out
    assert "row 5 (asked for)\nconversation, scored but for its first token" in out
    assert "rejected" not in out
    status, out, _ = told(capsys, recipe, "--packing", method=SFT)
    assert status == 0
    assert int(re.search(r"(\d+) sequences", out)[1]) < 24


@pytest.mark.usefixtures("unestimated")
def test_an_adapter_that_is_trained_on_is_foreseen_too(workspace, tmp_path, capsys):
    save_adapter(workspace / "model", tmp_path / "adapter")
    builders.bpe_tokenizer().save_pretrained(tmp_path / "adapter")
    changes = {"model_name_or_path": str(tmp_path / "adapter"), "use_peft": True, "sft_adapter": "continue"}
    status, out, _ = told(capsys, recipe_file(workspace, tmp_path, **changes))
    assert status == 0
    # Rank 8 on q_proj (32 -> 32) and up_proj (32 -> 64) of two layers.
    assert f"{2 * 8 * (64 + 96) / 1e6:.1f} million trained" in out


# ---- It would be refused ----

GOOD = builders.pairs(4)
QUESTION, ANSWER = {"role": "user", "content": "Which river?"}, {"role": "assistant", "content": "That one."}
LAST_TURN = {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, QUESTION]}
OTHER_PROMPT = {"chosen": GOOD[0]["chosen"], "rejected": GOOD[1]["rejected"]}
BAD_ROLE = {
    "chosen": [{"role": "narrator", "content": "Once."}, ANSWER],
    "rejected": [{"role": "narrator", "content": "Once."}, ANSWER],
}


class Bad(NamedTuple):
    """Changes to a recipe, and the sentence that refuses it."""

    changes: dict[str, Any]
    sentence: str


RECIPES = {
    "a misspelt key": Bad(
        {"gama_beta_ratio": 0.5}, r"line \d+: unknown key 'gama_beta_ratio' \(did you mean 'gamma_beta_ratio'\?\)"
    ),
    "a word for a number": Bad({"learning_rate": "fast"}, r"line \d+: learning_rate = 'fast': expected a number"),
    "a negative beta": Bad({"beta": -1.0}, r"line \d+: beta = -1\.0: must be positive"),
    "no room for a response": Bad(
        {"max_prompt_length": 160}, r"max_prompt_length = 160: leaves no room for a response in max_length = 160"
    ),
    "no model": Bad({"model_name_or_path": None}, r"model_name_or_path is missing"),
    "a model that is not there": Bad(
        {"model_name_or_path": "/nowhere/model"}, r"'/nowhere/model': its configuration cannot be loaded"
    ),
    "a layer that the model lacks": Bad(
        {"use_peft": True, "lora_target_modules": ["q_proj", "w_pack"]}, r"the model has no layer w_pack; it has .*q_proj"
    ),
    "bits without an adapter": Bad(
        {"load_in_4bit": True}, r"load_in_4bit = True: quantised weights cannot be trained; add use_peft: true"
    ),
    "eight bits under FSDP": Bad(
        {"use_peft": True, "load_in_8bit": True, "strategy": "fsdp2"},
        r"load_in_8bit = True: FSDP 2 cannot shard integer weights",
    ),
    "a step that processes cannot share": Bad(
        {"total_train_batch_size": 128, "num_processes": 3},
        r"total_train_batch_size = 128: is no multiple of 12 \(per_device_train_batch_size 4 x 3 processes\)",
    ),
    "one process that is four": Bad(
        {"strategy": "single", "num_processes": 4}, r"strategy = single: is one process, and num_processes is 4"
    ),
    "a figure that no evaluation gives": Bad(
        {"metric_for_best_model": "bleu"}, r"metric_for_best_model = 'bleu': no evaluation gives that"
    ),
    "a template that is not there": Bad(
        {"chat_template": "lama-3"}, r"chat_template = 'lama-3': no such file, and not one of the shipped"
    ),
    "a budget below the longest pair": Bad(
        {"max_tokens_per_micro_batch": 20},
        r"max_tokens_per_micro_batch = 20: the longest pair has \d+ tokens; give at least that",
    ),
    "a tracker that is none": Bad({"report_to": ["wandbb"]}, r"there is no tracker called 'wandbb' \(did you mean 'wandb'\?\)"),
    "an unknown setting of the model": Bad(
        {"model_init_kwargs": {"rope_thetaa": 1}}, r"rope_thetaa is no setting of this model"
    ),
    "a split that is not there": Bad(
        {"dataset_splits": ["train_prefs", "test"]}, r"no split 'train_prefs'; it has test, train"
    ),
    "a share above all": Bad({"dataset_mixer": {"pairs": 1.5}}, r"dataset_mixer.pairs = 1.5: must be a fraction in \(0, 1\]"),
    "a row that is not there": Bad({"show_row": 24}, r"show_row = 24: the training split has rows 0 to 23"),
    "a run without a speed": Bad({"speed_of": "/nowhere/run"}, r"speed_of = '/nowhere/run': is not the folder of a run"),
    "a price without a speed": Bad(
        {"gpu_price": 2.0}, r"gpu_price = 2\.0: needs a speed; add --tokens_per_second or --speed_of"
    ),
}
ROWS = {
    "a row that no reader reads": ("{\n", r"train\.jsonl, line 1: .*JSON"),
    "a column that is not there": ([{"chosen": [QUESTION, ANSWER], "bad": []}], r"no column 'rejected'; it has chosen, bad"),
    "a conversation that ends with its user": (
        [*GOOD, LAST_TURN], r"train\.jsonl, line 5: rejected ends with a user turn; the last turn must be the assistant's",
    ),
    "two prompts for one pair": ([*GOOD, OTHER_PROMPT], r"line 5: chosen and rejected differ before the last turn"),
    "a role that is none": ([*GOOD, BAD_ROLE], r"train\.jsonl, line 5: .* has a turn by 'narrator'; a role is"),
    "nothing at all": ([], r"train\.jsonl: has no rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe_is_refused_with_the_sentence_of_a_run(name, workspace, tmp_path, capsys):
    changes, sentence = RECIPES[name]
    status, _, err = told(capsys, recipe_file(workspace, tmp_path, **changes))
    assert status == 2
    assert re.search(sentence, err), err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ROWS)
def test_bad_data_is_refused_by_file_and_line(name, workspace, tmp_path, capsys):
    rows, sentence = ROWS[name]
    (tmp_path / "bad").mkdir()
    for file in ("train.jsonl", "test.jsonl"):
        good = isinstance(rows, str) or file == "test.jsonl"
        write_jsonl(tmp_path / "bad" / file, GOOD if good else rows)
    if isinstance(rows, str):
        (tmp_path / "bad/train.jsonl").write_text(rows)
    status, _, err = told(capsys, recipe_file(workspace, tmp_path, dataset_mixer={str(tmp_path / "bad"): 1.0}))
    assert status == 2
    assert re.search(sentence, err), err
    assert "Traceback" not in err


def test_more_rows_than_there_are_are_refused(workspace, tmp_path, capsys):
    status, _, err = told(capsys, recipe_file(workspace, tmp_path, dataset_mixer={str(workspace / "pairs"): 900}))
    assert status == 2
    assert "900 rows asked for, 24 available" in err


def test_a_folder_of_somebody_elses_is_refused_and_left_alone(workspace, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    status, _, err = told(capsys, recipe_file(workspace, tmp_path))
    assert status == 2
    assert "config.json in it are no run's" in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_tokenizer_with_ids_beyond_the_model_is_refused(workspace, tmp_path, capsys):
    shutil.copytree(workspace / "bare", tmp_path / "small")
    config = AutoConfig.from_pretrained(tmp_path / "small")
    config.vocab_size = 300
    config.save_pretrained(tmp_path / "small")
    status, _, err = told(capsys, recipe_file(workspace, tmp_path, model_name_or_path=str(tmp_path / "small")))
    assert status == 2
    assert "the model has 300 rows of embeddings, and none for" in err


def test_a_layout_that_the_architecture_cannot_have_is_refused(workspace, tmp_path, capsys):
    shutil.copytree(workspace / "bare", tmp_path / "bloom")
    BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=4).save_pretrained(tmp_path / "bloom")
    recipe = recipe_file(workspace, tmp_path, model_name_or_path=str(tmp_path / "bloom"), pair_layout="packed")
    status, _, err = told(capsys, recipe)
    assert status == 2
    assert "pair_layout = packed: not possible with this model" in err


def test_options_of_a_dry_run_are_refused_without_it(workspace, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(SIMPO, [recipe_file(workspace, tmp_path), "--gpu_memory=80", "--show_row=1"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert "--gpu_memory=80: is read by a dry run alone; add --dry_run, or remove it" in err
    assert "--show_row=1: is read by a dry run alone" in err
