"""Counts of a split, settings and their origins, disk, and known pitfalls."""

import pytest
import torch
from datasets import Dataset

from alignment.data.prepare import to_tokens
from alignment.data.splits import Prepared
from alignment.data.tokenization import LengthRules
from alignment.model.loading import check_model_path
from alignment.preflight.disk import Disk, disk_of
from alignment.preflight.lengths import pair_facts, shared_prompts
from alignment.preflight.model import skeleton_of
from alignment.preflight.pitfalls import data_warnings, disk_warnings, setting_warnings
from alignment.preflight.settings import meant, origins, shown
from alignment.preflight.steps import schedule_of
from alignment.recipe.configs import DataArguments, ModelArguments
from alignment.recipe.parser import H4ArgumentParser
from scripts.simpo_config import SimPOConfig
from tests.builders import tiny_model
from tests.workspaces import save_model

ROWS = [
    ("river", " the mountain", " the"),
    ("river", " a", " a kettle of weather"),
    ("kettle", " and more", " and more"),
    ("lanterns", " him", " her"),
]


def split_of(rows, tokenizer, max_length: int = 100) -> Prepared:
    texts = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])
    rules = LengthRules(max_length, max_length // 2, "keep_end", "exact")
    return Prepared(to_tokens(texts, tokenizer, rules, num_proc=None), texts, None, [])


# ---- Pairs ----


def test_pairs_are_counted(tokenizer):
    facts = pair_facts(split_of(ROWS, tokenizer))
    assert (facts.pairs, facts.dropped, facts.truncated) == (4, 0, 0)
    assert (facts.identical, facts.repeated_prompts) == (1, 1)
    assert (facts.chosen_longer, facts.rejected_longer) == (0.25, 0.25)
    assert facts.lengths["prompt"].most == len(tokenizer("lanterns")["input_ids"])


def test_cut_and_dropped_pairs_are_counted(tokenizer):
    long = ("river" + " river" * 30, " the mountain" * 30, " the")
    facts = pair_facts(split_of([*ROWS, long, ("kettle", " x", "")], tokenizer, max_length=20))
    assert (facts.pairs, facts.dropped, facts.truncated) == (5, 1, 1)


def test_held_out_prompts_that_are_trained_on_are_counted(tokenizer):
    splits = {"train": split_of(ROWS, tokenizer), "test": split_of([ROWS[1], ("new", " a", " b")], tokenizer)}
    assert shared_prompts(splits) == 1
    assert shared_prompts({"train": splits["train"]}) is None


# ---- Origins ----


def parsed(tmp_path, text: str, *options: str):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    parser = H4ArgumentParser((ModelArguments, DataArguments, SimPOConfig))
    *_, args = parser.parse([str(recipe), "--dry_run", *options])
    return parser, args


def test_every_value_says_where_it_comes_from(tmp_path):
    text = "model_name_or_path: me/policy\nwarmup_ratio: 0.1\n\nbeta: 2.5\nbf16: true\nhub_token: hidden\noutput_dir: out\n"
    parser, args = parsed(tmp_path, text, "--beta=3", "--total_train_batch_size=64", "--num_processes=4")
    found = {origin.key: origin for origin in origins(parser, args)}
    sources = {key: (shown(found[key]), found[key].source) for key in found}
    assert sources["model_name_or_path"] == ("me/policy", "line 1")
    assert sources["warmup_steps"] == ("0.1", "line 2, as warmup_ratio")
    assert sources["beta"] == ("3.0", "command line")
    assert sources["hub_token"] == ("...", "line 6")
    assert sources["gradient_accumulation_steps"] == ("2", "total_train_batch_size / (8 x 4 processes)")
    assert sources["gamma_beta_ratio"] == ("0.25", "default")
    assert sources["loss_type"] == ("sigmoid", "default")
    assert found.keys() == parser.targets.keys()


def test_what_the_recipe_means_is_kept_whatever_a_dry_run_computes_on(tmp_path):
    parser, args = parsed(tmp_path, "bf16: true\ntf32: true\noutput_dir: out\n")
    assert (args.use_cpu, args.bf16, args.tf32) == (True, True, None)
    assert (meant(parser)["use_cpu"], meant(parser)["tf32"]) == (False, True)


# ---- Disk and pitfalls ----


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


def case(model_folder, tmp_path, model: dict | None = None, **settings):
    """What the rules look at, of a recipe on a tiny model."""
    model_args = ModelArguments(model_name_or_path=str(model_folder), **(model or {}))
    keys = {"output_dir": str(tmp_path / "run"), "report_to": "none", "dry_run": True, "per_device_train_batch_size": 128}
    args = SimPOConfig(
        **keys | {"max_length": 200, "max_prompt_length": 100, "learning_rate": 1e-6, "logging_steps": 5} | settings
    )
    skeleton = skeleton_of(model_args, args, check_model_path(model_args))
    return args, model_args, skeleton, schedule_of(args, 128 * 100)


def warned(*arguments, use_cpu: bool = True) -> str:
    return "\n".join(setting_warnings(*arguments, {"use_cpu": use_cpu}))


def test_a_run_as_the_authors_have_it_is_not_warned_of(model_folder, tmp_path):
    assert warned(*case(model_folder, tmp_path, bf16=True), use_cpu=False) == ""


@pytest.mark.parametrize(
    ("settings", "model", "sentence"),
    [
        ({"learning_rate": 5e-6}, None, "learning_rate = 5e-06: whole models fall into repetition towards 1e-5"),
        ({"gamma_beta_ratio": 1.5}, None, "gamma_beta_ratio = 1.5: the authors stay between 0 and 1"),
        ({"per_device_train_batch_size": 4}, None, "4 pairs a step: published settings belong to 128"),
        ({}, {"torch_dtype": "bfloat16"}, "torch_dtype = bfloat16: an AdamW step of 1e-06 rounds to nothing"),
        ({"warmup_steps": 400}, None, "warmup_steps = 400: the run has 300 steps, so that it never leaves the warm-up"),
        ({"do_eval": True, "eval_strategy": "steps", "eval_steps": 400}, None, "eval_steps = 400: the run has 300 steps"),
        ({"logging_steps": 500}, None, "logging_steps = 500: the run has 300 steps"),
        ({"save_steps": 1000000}, None, "nothing is saved before the end"),
    ],
)
def test_known_bad_settings_are_warned_of(settings, model, sentence, model_folder, tmp_path):
    assert sentence in warned(*case(model_folder, tmp_path, model, **settings))


def test_an_adapter_may_have_an_adapters_rate_and_a_half_precision_base(model_folder, tmp_path):
    model = {"use_peft": True, "torch_dtype": "bfloat16"}
    assert warned(*case(model_folder, tmp_path, model, learning_rate=1e-5)) == ""


def test_a_gpu_without_half_precision_is_warned_of(model_folder, tmp_path):
    assert "neither bf16 nor fp16" in warned(*case(model_folder, tmp_path), use_cpu=False)


def test_data_that_teaches_length_or_nothing_is_warned_of(tokenizer):
    facts = pair_facts(split_of(ROWS, tokenizer))
    assert list(data_warnings(facts._replace(identical=0), None)) == []
    bad = facts._replace(truncated=3, chosen_longer=0.9)
    lines = list(data_warnings(bad, 2))
    assert [line.split(":")[0] for line in lines] == [
        "1 training pairs prefer nothing",
        "75% of the training pairs are cut; raise max_length, or leave out the longest",
        "2 held-out pairs have a prompt that is trained on",
        "the chosen response is the longer one in 90% of the training pairs",
    ]


def test_a_disk_that_is_too_small_is_warned_of():
    assert list(disk_warnings(Disk(10e9, 3, 5e9, "float32", int(36e9)))) == []
    assert "34 GB free" in next(disk_warnings(Disk(10e9, 3, 5e9, "float32", int(34e9))))


def test_disk_by_hand(model_folder, tmp_path):
    """Weights and AdamW's moments, 4 + 8 bytes an element, in three checkpoints; the end in the checkpoint's float32."""
    parameters = tiny_model().num_parameters()
    args, model_args, skeleton, _ = case(model_folder, tmp_path)
    disk = disk_of(args, model_args, skeleton, "single", checkpoints=4)
    assert (disk.checkpoint, disk.kept, disk.end) == (12 * parameters, 3, 4 * parameters)
    zero, *_ = case(model_folder, tmp_path, bf16=True)
    assert disk_of(zero, model_args, skeleton, "zero3", checkpoints=4).checkpoint == (2 + 4 + 8) * parameters
    args.save_dtype = "bfloat16"
    assert disk_of(args, model_args, skeleton, "single", checkpoints=1)[1:3] == (1, 2 * parameters)


def test_the_skeleton_counts_what_an_adapter_trains(model_folder, tmp_path):
    _, _, skeleton, _ = case(model_folder, tmp_path, {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj"]})
    assert skeleton.trained == 2 * 4 * (32 + 32)  # two layers, A and B of 32 x 32
    assert skeleton.parameters == tiny_model().num_parameters()
    assert {parameter.device.type for parameter in skeleton.model.parameters()} == {"meta"}
    assert skeleton.dtype == torch.float32
