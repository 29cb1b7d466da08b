"""Two processes on a CPU (gloo) make of a recipe what one does, however they divide the model among them."""

import json
import os
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from alignment.data.mixing import get_datasets
from alignment.data.prepare import to_pair_texts, to_tokens
from alignment.data.splits import PAIRS
from alignment.data.tokenization import LengthRules
from alignment.recipe.configs import DataArguments
from tests import builders, reference
from tests.comparing import differing
from tests.distributed.conftest import (
    BETA,
    HELD_OUT,
    Launched,
    environment,
    in_place,
    launch,
    launcher_config,
    records,
    scored_pairs,
)
from tests.distributed.worker import GPU_HEAD_CHUNK, RECOMPUTED
from tests.golden.traces import DATA, assert_follows, method_of
from tests.workspaces import read_jsonl

CONFIGS = {
    "ddp": "cpu.yaml",
    "zero2": "deepspeed_zero2.yaml",
    "zero3": "deepspeed_zero3.yaml",
    "fsdp1": "fsdp.yaml",
    "fsdp2": "fsdp2.yaml",
}
WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
    "fsdp1": "FullyShardedDataParallel",
    "fsdp2": "FSDPLlamaForCausalLM",
}
LORA = ["--use_peft=true", "--lora_r=4", "--lora_target_modules=all-linear"]
SAVING = ["--save_strategy=steps", "--save_steps=2", "--num_train_epochs=2"]
# Five prompts for two processes, in batches of two.
REPLIES = [
    '--sample_prompts=["the river", "a mountain of weather", "quickly because more now", "her lanterns would not", "because"]',
    "--sample_max_new_tokens=8", "--sample_temperature=0",
]  # fmt: skip
ONE_RECOMPUTED = ["--gradient_checkpointing=true", "--recompute_layers=1"]
RUNS = {
    "packed": ["--pair_layout=packed", *REPLIES],
    "padded": ["--pair_layout=padded"],
    "lora": [*LORA, *REPLIES],
    "by tokens": ["--max_tokens_per_micro_batch=300"],
    "qlora": [*LORA, "--load_in_4bit=true", "--bnb_4bit_quant_storage=float32"],  # the type that FSDP can shard
    "from an adapter": [*LORA, "--model_name_or_path={folder}/sft"],
    "one layer recomputed": [*ONE_RECOMPUTED, "--pair_layout=packed"],
    "one layer recomputed, padded lora": [*ONE_RECOMPUTED, *LORA, "--pair_layout=padded"],
}
# With the head of a GPU. Under sharding each of these is another module, whose parameters are gathered around its call.
HEADS = {
    "gpu head": ["--pair_layout=packed"],
    "saved head": [*LORA, '--lora_modules_to_save=["lm_head"]'],
    "adapted head": ["--use_peft=true", "--lora_r=4", '--lora_target_modules=["q_proj", "lm_head"]'],
    "mixture": ["--model_name_or_path={folder}/mixture"],
}
SHARDED = ("zero3", "fsdp1", "fsdp2")
TRAINED_HEADS = [(s, name) for s in SHARDED for name in HEADS if name != "adapted head" or s == "fsdp2"]
METHOD_RUNS = {
    "dpo": ("dpo", ["--beta=0.3", "--pair_layout=packed"]),
    "dpo lora": ("dpo", ["--beta=0.3", *LORA]),
    "dpo by tokens": ("dpo", ["--beta=0.3", "--max_tokens_per_micro_batch=300"]),
    "dpo from an adapter": (
        "dpo",
        ["--beta=0.3", "--use_peft=true", "--sft_adapter=continue", "--model_name_or_path={folder}/sft"],
    ),
    "orpo": ("orpo", ["--beta=0.3", "--pair_layout=packed"]),
}
GOLDEN = [path.stem for path in sorted((DATA / "recipes").glob("*.yaml")) if method_of(path.stem) != "simpo"]
# Ten pairs in steps of eight.
TEN_PAIRS = ['--dataset_mixer={{"{folder}/pairs": 10}}', "--do_eval=false", "--eval_strategy=no"]
INCOMPLETE = {
    "ten pairs": [*TEN_PAIRS, "--pair_layout=packed"],
    "ten pairs by tokens": [*TEN_PAIRS, "--max_tokens_per_micro_batch=300"],
}
# What the launcher says about checkpoints; the end has to be whole all the same.
LEFT_IN_SHARDS = {
    "zero3": {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"},
    "fsdp2": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
}
# Bytes of each process's GPU; the smaller one has room for 400 tokens with both layers recomputed, for 72 with one.
ROOMS = [10**9, 400 * 2 * RECOMPUTED]
PARAMETERS = sum(parameter.numel() for parameter in builders.tiny_model().parameters())

every_strategy = pytest.mark.parametrize("strategy", CONFIGS)


def jobs_of(strategy: str, recipe: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """All runs of a strategy, for one launch: starting two processes takes longer than these."""

    def job(name: str, *options: str, **settings: Any) -> dict[str, Any]:
        own = [f"--output_dir={folder / name}", f"--strategy={strategy}", "--num_processes=2"]
        argv = [str(recipe), *own, *in_place(options, recipe)]
        return {"argv": argv, **settings}

    jobs = {name: job(name, *options) for name, options in RUNS.items()}
    for name, (method, options) in METHOD_RUNS.items():
        jobs[name] = job(name, *options, method=method)
    jobs["bf16"] = job("bf16", "--bf16=true", "--max_steps=1")
    for name, options in (("whole", ["--pair_layout=packed"]), ("whole lora", LORA)):
        resumed = name.replace("whole", "resumed")
        again = {"source": str(folder / name), "target": str(folder / resumed), "step": 2}
        jobs |= {name: job(name, *options, *SAVING), resumed: job(resumed, *options, *SAVING, rewind=again)}
    jobs["fitted"] = job("fitted", "--pair_layout=packed", "--gradient_checkpointing=true", rooms=ROOMS)
    if strategy == "ddp":
        jobs |= {name: job(name, *options) for name, options in INCOMPLETE.items()}
        jobs |= {f"golden {name}": golden_job(name, folder / f"golden {name}") for name in GOLDEN}
    if strategy in SHARDED:
        jobs |= {name: job(name, *options, gpu_head=True) for name, options in HEADS.items()}
    if strategy in LEFT_IN_SHARDS:
        sharded = {"environment": LEFT_IN_SHARDS[strategy]}
        jobs["sharded"] = job("sharded", "--pair_layout=packed", **sharded)
        jobs["full for shards"] = job("full for shards", sabotage="no room for shards either", **sharded)
        jobs["disk full"] = job("disk full", "--pair_layout=packed", sabotage="disk full at the end", **sharded)
    return jobs


def golden_job(name: str, folder: Path) -> dict[str, Any]:
    """A golden recipe on two processes: each step's two micro-batches at once instead of one after the other."""
    policy = DATA / ("policy-header" if name.endswith("header") else "policy-zephyr")
    place = [f"--model_name_or_path={policy}", f'--dataset_mixer={{"{DATA / "pairs"}": 1.0}}', f"--output_dir={folder}"]
    argv = [str(DATA / f"recipes/{name}.yaml"), *place, "--gradient_accumulation_steps=1", "--num_processes=2"]
    return {"argv": argv, "method": method_of(name)}


@pytest.fixture(scope="session")
def launched(recipe, tmp_path_factory):
    """strategy -> its launch, of which there is one a session."""
    launches: dict[str, Launched] = {}

    def launched_with(strategy: str) -> Launched:
        if strategy not in launches:
            folder = tmp_path_factory.mktemp(strategy)
            config = launcher_config(CONFIGS[strategy], folder)
            leave_compiler_lock(folder)
            launches[strategy] = launch(config, folder, jobs_of(strategy, recipe, folder))
        assert launches[strategy].status == 0, launches[strategy].printed
        return launches[strategy]

    return launched_with


def leave_compiler_lock(folder: Path) -> None:
    """What a launch left that was killed while it compiled an operator of DeepSpeed, a day ago."""
    lock = Path(environment(folder)["TORCH_EXTENSIONS_DIR"], "deepspeed_shm_comm/lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    os.utime(lock, (time.time() - 86400,) * 2)


# ---- Numbers ----


@every_strategy
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_match_one(name, strategy, launched, one_process):
    assert_same_run(one_process(*RUNS[name]), launched(strategy).folder / name)


@every_strategy
def test_layers_are_recomputed_where_the_model_is_divided_too(strategy, launched):
    for facts in launched(strategy).facts:
        assert [facts[name]["recomputed"] for name in RUNS if name.startswith("one layer")] == [1, 1]


@every_strategy
def test_all_processes_divide_their_steps_as_the_one_with_the_least_room_has_to(strategy, launched, one_process):
    """And the step is the same. DeepSpeed's engine would count a trial as part of a step."""
    saved = load_file(launched(strategy).folder / "fitted" / "model.safetensors")
    elements = sum(tensor.numel() for tensor in saved.values())
    for facts in launched(strategy).facts:
        assert facts["fitted"]["division"] == [400, 2]
        assert facts["fitted"]["parameters"] == elements  # before they are divided among processes
        assert facts["fitted"]["trials"] == (0 if strategy.startswith("zero") else 2)
    gathers = "gathers the weights twice" in launched(strategy).printed
    assert gathers == (strategy in SHARDED)
    assert_same_run(one_process("--pair_layout=packed"), launched(strategy).folder / "fitted")


def assert_same_run(one: Path, two: Path) -> None:
    """The same records, gradient norms among them, and the same weights."""
    for key, count in (("loss", 2), ("eval_loss", 2)):
        ours, theirs = records(one, key), records(two, key)
        assert len(ours) == len(theirs) == count
        for mine, other in zip(ours, theirs, strict=True):
            assert other[key] == pytest.approx(mine[key], rel=1e-5)
            assert not differing(comparable(other), comparable(mine))
    (weights,) = (path.name for path in one.glob("*model.safetensors"))
    assert_close(load_file(two / weights), load_file(one / weights), rtol=1e-5, atol=1e-6)


@every_strategy
@pytest.mark.parametrize("name", METHOD_RUNS)
def test_dpo_and_orpo_on_two_processes_match_one(name, strategy, launched, one_process):
    method, options = METHOD_RUNS[name]
    one, two = one_process(*options, method=method), launched(strategy).folder / name
    for key in ("loss", "eval_loss"):
        for mine, other in zip(records(one, key), records(two, key), strict=True):
            assert not differing(comparable(other), comparable(mine), beta=0.3)
    (weights,) = (path.name for path in one.glob("*model.safetensors"))
    assert_close(load_file(two / weights), load_file(one / weights), rtol=1e-5, atol=2e-6)
    if method == "dpo":
        ours, theirs = (scored_pairs(folder, before=True) for folder in (one, two))
        for key in ("reference_chosen_logp", "reference_rejected_logp"):
            assert [row[key] for row in theirs] == pytest.approx([row[key] for row in ours], rel=1e-6)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_published_baseline_on_two_processes_gives_the_published_trace(name, launched):
    folder = launched("ddp").folder / f"golden {name}"
    assert_follows([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], name)


def test_an_incomplete_last_step_has_the_same_pairs_when_it_is_divided_by_tokens(launched):
    fixed, by_tokens = (records(launched("ddp").folder / name, "loss") for name in INCOMPLETE)
    assert len(fixed) == 2
    for mine, other in zip(fixed, by_tokens, strict=True):
        assert not differing(comparable(other), comparable(mine))


def comparable(record: dict[str, float]) -> dict[str, float]:
    """Without times, and the share of tokens saved, which depends on how rows are grouped."""
    timing = ("second", "runtime", "memory", "tokens_saved")
    return {name: value for name, value in record.items() if not any(part in name for part in timing)}


@every_strategy
@pytest.mark.parametrize("name", RUNS)
def test_every_held_out_pair_is_scored_once_and_as_by_one_process(name, strategy, launched, one_process):
    ours, theirs = scored_pairs(one_process(*RUNS[name])), scored_pairs(launched(strategy).folder / name)
    assert [pair["index"] for pair in theirs] == list(range(HELD_OUT))
    for key in ("chosen_reward", "rejected_reward", "chosen_tokens", "rejected_tokens"):
        assert [pair[key] for pair in theirs] == pytest.approx([pair[key] for pair in ours], rel=1e-5)


@every_strategy
def test_parameters_are_float32_and_so_are_log_probabilities_where_bf16_computes(strategy, launched, one_process):
    for facts in launched(strategy).facts:
        assert facts["bf16"]["master"] == ["torch.float32"]
        assert facts["bf16"]["logps"] == "torch.float32"
        assert facts["bf16"]["frequencies"] == ["torch.float32"]
    (bf16,) = records(launched(strategy).folder / "bf16", "loss")
    float32 = records(one_process(*RUNS["packed"]), "loss")[0]
    assert bf16["logps/chosen"] != float32["logps/chosen"]
    assert bf16["logps/chosen"] == pytest.approx(float32["logps/chosen"], rel=0.01)


@every_strategy
@pytest.mark.parametrize("name", ["packed", "lora"])
def test_the_replies_of_two_processes_are_those_of_one(name, strategy, launched, one_process):
    one, two = (read_jsonl(folder / "samples.jsonl") for folder in (one_process(*RUNS[name]), launched(strategy).folder / name))
    assert [row["step"] for row in one] == [0] * 5 + [2] * 5
    assert two == one
    assert one[:5] != one[5:]


# ---- The head, where it is sharded ----


@pytest.mark.parametrize(("strategy", "name"), TRAINED_HEADS)
def test_a_gpus_head_trains_under_sharding_as_in_one_process(strategy, name, launched, one_process):
    assert_same_run(one_process(*HEADS[name]), launched(strategy).folder / name)


@pytest.mark.parametrize(("strategy", "name"), TRAINED_HEADS)
def test_processes_have_different_numbers_of_the_heads_chunks_there(strategy, name, launched):
    scored = [facts[name]["scored"] for facts in launched(strategy).facts]
    assert len(scored[0]) == len(scored[1])
    assert max(abs(mine // GPU_HEAD_CHUNK - other // GPU_HEAD_CHUNK) for mine, other in zip(*scored, strict=True)) > 4


@pytest.mark.parametrize("strategy", ["zero3", "fsdp1"])
def test_an_adapter_on_the_head_is_refused_where_processes_would_wait_for_its_chunks(strategy, launched):
    for facts in launched(strategy).facts:
        assert "an adapter on lm_head cannot be trained under" in facts["adapted head"]["stopped"]
        assert facts["adapted head"]["micro_batches"] == 0


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("name", ["packed", "by tokens", "lora", "saved head"])
def test_every_micro_batch_reduces_its_gradients_and_keeps_no_whole_one(name, strategy, launched):
    for facts in launched(strategy).facts:
        assert facts[name]["micro_batches"] > 2  # of two steps
        assert facts[name]["units"] > 1
        assert facts[name]["reductions"] == facts[name]["units"] * facts[name]["micro_batches"]
        assert facts[name]["whole_gradients"] == 0


# ---- The strategy that was asked for ----


@every_strategy
def test_the_run_is_divided_as_it_was_asked_to_be(strategy, launched):
    held = [facts["packed"]["held_in_training"] for facts in launched(strategy).facts]
    assert len(held) == 2
    for facts in launched(strategy).facts:
        assert (facts["packed"]["strategy"], facts["packed"]["processes"]) == (strategy, 2)
        assert facts["packed"]["wrapped"] == WRAPPERS[strategy]
    if strategy in ("ddp", "zero2"):
        assert held == [PARAMETERS, PARAMETERS]
    else:
        assert max(held) < 0.6 * PARAMETERS


@pytest.mark.parametrize("strategy", ["zero3", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("name", ["packed", "lora"])
def test_only_the_first_process_reads_a_model_that_is_going_to_be_sharded(name, strategy, launched):
    first, second = (facts[name] for facts in launched(strategy).facts)
    assert second["read"] == 0
    assert (first["held"] < 0.6 * PARAMETERS) if strategy == "zero3" else first["read"] > 0


# ---- The end ----


@pytest.fixture(scope="session")
def held_out(recipe) -> list[dict[str, Any]]:
    """The held-out rows, tokenized."""
    splits, _ = get_datasets(
        DataArguments(dataset_mixer={str(recipe.parent / "pairs"): 1.0}),
        columns=PAIRS.columns, preprocessing="exact", bad_rows="refuse", seed=42, do_eval=True,
    )  # fmt: skip
    tokenizer = builders.bpe_tokenizer()
    texts = to_pair_texts(splits["test"], tokenizer, preprocessing="exact", add_system=False, num_proc=None)
    return list(to_tokens(texts, tokenizer, LengthRules(160, 80, "keep_end", "exact"), num_proc=None))


def assert_scores_as_reported(folder: Path, rows: list[dict[str, Any]]) -> None:
    is_adapter = (folder / "adapter_config.json").exists()
    model = (AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM).from_pretrained(folder)
    with torch.no_grad():
        chosen, rejected = reference.mean_logps(model, rows)
    pairs = scored_pairs(folder)
    assert [pair["chosen_reward"] for pair in pairs] == pytest.approx((BETA * chosen).tolist(), rel=1e-5)
    assert [pair["rejected_reward"] for pair in pairs] == pytest.approx((BETA * rejected).tolist(), rel=1e-5)


@every_strategy
@pytest.mark.parametrize("name", ["packed", "padded", "lora", "from an adapter"])
def test_the_run_ends_with_a_model_that_scores_the_held_out_pairs_as_reported(name, strategy, launched, held_out):
    assert_scores_as_reported(launched(strategy).folder / name, held_out)


@pytest.mark.parametrize(("strategy", "name"), [(s, name) for s, name in TRAINED_HEADS if name.endswith("ed head")])
def test_an_adapter_with_a_head_of_its_own_is_saved_whole_under_sharding(strategy, name, launched, held_out):
    assert_scores_as_reported(launched(strategy).folder / name, held_out)


@pytest.mark.parametrize("strategy", LEFT_IN_SHARDS)
def test_the_end_is_whole_where_the_launcher_leaves_checkpoints_in_shards(strategy, launched, held_out):
    assert_scores_as_reported(launched(strategy).folder / "sharded", held_out)


@pytest.mark.parametrize("strategy", LEFT_IN_SHARDS)
def test_a_model_that_cannot_be_saved_whole_leaves_shards_and_the_command_for_later(strategy, launched, tmp_path):
    folder = launched(strategy).folder / "disk full"
    messages = [facts["disk full"]["stopped"] for facts in launched(strategy).facts]
    assert "No space left on device" in messages[0]
    command = messages[0].rsplit("together: ", 1)[1]
    assert messages[1].endswith(command)
    assert not list(folder.glob("*.safetensors"))
    subprocess.run(shlex.split(command), env=environment(tmp_path), capture_output=True, check=True, timeout=120)
    whole = load_file(launched(strategy).folder / "sharded/model.safetensors")
    later = load_file(folder / "model.safetensors")
    assert all(torch.equal(later[name], whole[name]) for name in whole)
    assert_close(AutoModelForCausalLM.from_pretrained(folder).state_dict(), whole, rtol=0, atol=0)


@pytest.mark.parametrize("strategy", LEFT_IN_SHARDS)
def test_where_there_is_no_room_for_shards_either_none_are_left_and_the_message_says_so(strategy, launched):
    folder = launched(strategy).folder / "full for shards"
    for facts in launched(strategy).facts:
        assert "Nor could its shards ([Errno 28] No space left on device)" in facts["full for shards"]["stopped"]
    assert not (folder / "shards").exists()
    assert not list(folder.glob("*.safetensors"))


# ---- Going on ----


@every_strategy
@pytest.mark.parametrize("name", ["", " lora"], ids=["full", "lora"])
def test_a_resumed_run_ends_bit_for_bit_as_an_unbroken_one(name, strategy, launched):
    whole, resumed = (launched(strategy).folder / f"{part}{name}" for part in ("whole", "resumed"))
    for facts in launched(strategy).facts:
        assert facts[f"whole{name}"]["moments_resumed"] == 0
        assert facts[f"resumed{name}"]["moments_resumed"] > 0
    for file in ("model.safetensors", "adapter_model.safetensors"):
        assert (whole / file).exists() == (resumed / file).exists()
    (weights,) = (path.name for path in whole.glob("*model.safetensors"))
    ours, theirs = load_file(whole / weights), load_file(resumed / weights)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [comparable(record) for record in records(resumed, "loss")] == [comparable(r) for r in records(whole, "loss")]
