"""While a run trains: replies to fixed prompts, and warnings; neither moves a number of its training, or is said twice."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.data.prompts import as_read, prompt_of
from alignment.report.review.reading import read_replies
from tests.integration.test_faults import assert_same_end, go_on, metrics
from tests.integration.test_interrupted import stop
from tests.workspaces import read_jsonl, save_chats, write_recipe

PROMPTS = ["the river", [{"role": "user", "content": "a mountain of weather"}], "quickly because more now two time people"]
NEW_TOKENS = 8
SAMPLES = [f"--sample_prompts={json.dumps(PROMPTS)}", f"--sample_max_new_tokens={NEW_TOKENS}"]
STEPS = [0, 3, 6, 8]


def samples(folder: Path) -> list[dict]:
    return read_jsonl(folder / "samples.jsonl")


def greedy(folder: Path, base: Path) -> list[str]:
    """What transformers makes of a saved model, or of an adapter, a prompt at a time."""
    is_adapter = (folder / "adapter_config.json").exists()
    model = (AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM).from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    replies = []
    for _, ids in as_read([prompt_of(prompt) for prompt in PROMPTS], tokenizer, date=None):
        assert ids.count(tokenizer.bos_token_id) == 1
        tokens = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
            max_new_tokens=NEW_TOKENS, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        replies.append(tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True))
    return replies


# ---- Replies ----


@pytest.mark.parametrize("options", [(), ("--use_peft=false", "--pair_layout=padded", "--gradient_checkpointing=true")])
def test_replies_are_those_of_the_model_as_it_was_and_as_it_is_saved(options, recipe, unbroken):
    folder, base = unbroken(*SAMPLES, "--sample_temperature=0", *options), recipe.parent / "model"
    rows = samples(folder)
    assert [row["step"] for row in rows] == [step for step in STEPS for _ in PROMPTS]
    assert [row["prompt"] for row in rows[:3]] == [PROMPTS[0], "a mountain of weather", PROMPTS[2]]
    assert [row["response"] for row in rows if row["step"] == 0] == greedy(base, base)
    assert [row["response"] for row in rows if row["step"] == 8] == greedy(folder, base)
    assert all(0 <= row["tokens"] <= NEW_TOKENS for row in rows)
    assert rows[0] != rows[-3]


def test_a_run_that_replies_trains_as_one_that_does_not(unbroken):
    """Dropout is on, so that random numbers that replies had used would show."""
    assert_same_end(unbroken(*SAMPLES), unbroken())


def test_drawn_replies_depend_on_the_seed_and_not_on_what_else_is_sampled(server, recipe, unbroken, tmp_path):
    whole = [row for row in samples(unbroken(*SAMPLES)) if row["step"] == 0]
    alone = [f"--sample_prompts={json.dumps(PROMPTS[:1])}", SAMPLES[1], "--max_steps=1", "--save_strategy=no"]
    for seed, is_same in ((42, True), (43, False)):
        go_on(server, recipe, tmp_path / str(seed), *alone, f"--seed={seed}")
        assert (samples(tmp_path / str(seed))[0] == whole[0]) == is_same


def test_the_review_reads_them(unbroken):
    found = read_replies(unbroken(*SAMPLES) / "samples.jsonl", notes := [])
    assert (found.n, found.unit, notes) == (len(PROMPTS), "tokens", [])


@pytest.mark.parametrize(
    ("place", "number"), [("training", 11), ("sampling", 2), ("evaluation", 4), ("sampling", 4), ("the end", 1)]
)
def test_an_interrupted_run_has_every_reply_once(place, number, server, recipe, unbroken, tmp_path):
    """A batch holds two prompts: the second call is of step 0, the fourth of step 3."""
    stop(server, recipe, tmp_path, *SAMPLES, place=place, number=number)
    go_on(server, recipe, tmp_path, *SAMPLES)
    assert_same_end(tmp_path, unbroken(*SAMPLES))
    assert (tmp_path / "samples.jsonl").read_bytes() == (unbroken(*SAMPLES) / "samples.jsonl").read_bytes()


def test_replies_behind_the_checkpoint_that_is_resumed_come_again(server, recipe, unbroken, tmp_path):
    killed = server.run(
        str(recipe), f"--output_dir={tmp_path}", *SAMPLES,
        sabotage="die_in", place="training", number=8, ranks=[0],
    )  # fmt: skip
    assert killed.status == -9
    assert {row["step"] for row in samples(tmp_path)} == {0, 3}  # and the checkpoint is of step 2
    go_on(server, recipe, tmp_path, *SAMPLES)
    assert (tmp_path / "samples.jsonl").read_bytes() == (unbroken(*SAMPLES) / "samples.jsonl").read_bytes()


def test_two_processes_give_the_replies_of_one(server, recipe, unbroken, tmp_path):
    options = [*SAMPLES, "--sample_temperature=0", "--disable_dropout=true"]
    go_on(server, recipe, tmp_path, *options, processes=2)
    assert samples(tmp_path) == samples(unbroken(*options))


def test_without_an_evaluation_there_are_replies_before_and_after(server, recipe, tmp_path):
    go_on(server, recipe, tmp_path, *SAMPLES, "--do_eval=false", "--max_steps=2")
    assert [row["step"] for row in samples(tmp_path)] == [0, 0, 0, 2, 2, 2]


def test_supervised_tuning_replies_too(server, recipe, tmp_path):
    pairs = [row for name in ("train", "test") for row in read_jsonl(recipe.parent / f"pairs/{name}.jsonl")]
    save_chats(tmp_path / "chats", pairs, 16)
    keys = {
        "model_name_or_path": str(recipe.parent / "model"), "dataset_mixer": {str(tmp_path / "chats"): 1.0}, "use_cpu": True,
        "max_length": 160, "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True,
        "sample_prompts": PROMPTS, "sample_max_new_tokens": NEW_TOKENS, "preprocessing": "exact",
    }  # fmt: skip
    ended = server.run(str(write_recipe(tmp_path, keys)), f"--output_dir={tmp_path / 'run'}", method="scripts/run_sft.py")
    assert ended.status == 0, ended.printed
    assert [row["step"] for row in samples(tmp_path / "run")] == [0, 0, 0, 2, 2, 2]


# ---- Refused ----


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[]", "sample_prompts=[]: has no prompt"),
        ("missing.jsonl", "missing.jsonl: no such file"),
        ('["good", " "]', "entry 2 (' '): the prompt is empty"),
        ('["good", [{"role": "user"}]]', "entry 2 ([{'role': 'user'}]): the prompt has the turn"),
        ("{folder}/rows.jsonl", "rows.jsonl, line 2: has neither prompt nor messages; it has question"),
        ("{folder}/empty.jsonl", "the file has no row"),
        (json.dumps(["river " * 1100]), "and its reply up to 8 (sample_max_new_tokens), and the model has 1,024 positions"),
    ],
)
def test_what_cannot_be_replied_to_is_refused_in_one_line_before_anything_is_loaded(value, message, server, recipe, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "good"}\n{"question": "bad"}\n')
    (tmp_path / "empty.jsonl").touch()
    given = f"--sample_prompts={value.replace('{folder}', str(tmp_path))}"
    ended = server.run(str(recipe), f"--output_dir={tmp_path / 'run'}", given, SAMPLES[1])
    assert ended.status == 2
    assert message in ended.printed
    assert ended.printed.count("sample_prompts") <= 3
    assert "Traceback" not in ended.printed
    assert "train: " not in ended.printed  # the data


def test_prompts_come_from_a_file_too(server, recipe, tmp_path, unbroken):
    rows = [
        {"prompt": PROMPTS[0]},
        {"messages": [*PROMPTS[1], {"role": "assistant", "content": "left out"}]},
        {"prompt": PROMPTS[2]},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    go_on(server, recipe, tmp_path / "run", f"--sample_prompts={tmp_path / 'prompts.jsonl'}", SAMPLES[1], "--max_steps=1")
    assert samples(tmp_path / "run")[:3] == samples(unbroken(*SAMPLES))[:3]


# ---- Warnings ----

RUINED = [
    "--use_peft=false", "--learning_rate=0.5", "--sft_weight=0", "--gamma_beta_ratio=1.5", "--lr_scheduler_type=constant",
    "--max_grad_norm=0",
]  # fmt: skip
AT_START = ["learning_rate", "gamma_beta_ratio", "pairs_per_step"]


def warnings(folder: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["warning"]) for row in read_jsonl(folder / "warnings.jsonl")]


@pytest.fixture(scope="module")
def ruined(server, recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ruined")
    return folder, go_on(server, recipe, folder, *RUINED).printed


def test_a_run_that_ruins_its_model_says_so_once_at_the_first_evaluation_that_shows_it(ruined):
    folder, printed = ruined
    assert warnings(folder) == [*((0, name) for name in AT_START), (3, "chosen_fell")]
    assert printed.count("less than half as likely per token") == 1
    (text,) = (row["text"] for row in read_jsonl(folder / "warnings.jsonl") if row["warning"] == "chosen_fell")
    first, later = (
        sum(row["chosen_mean_logp"] for row in read_jsonl(folder / "eval_pairs.jsonl") if (row["step"] == 0) == is_first) / 6
        for is_first in (True, False)
    )
    assert later - first < -0.7
    assert "6 held-out pairs" in text
    card = (folder / "README.md").read_text()
    assert "## Warnings\n" in card
    assert text in card


def test_a_resumed_run_does_not_repeat_what_it_said(server, recipe, ruined, tmp_path):
    stop(server, recipe, tmp_path, *RUINED, place="training", number=11)
    again = go_on(server, recipe, tmp_path, *RUINED).printed
    assert "Resuming from" in again
    assert "WARNING: Step" not in again
    assert warnings(tmp_path) == warnings(ruined[0])
    assert metrics(tmp_path) == metrics(ruined[0])


def test_without_held_out_pairs_the_log_tells(server, recipe, tmp_path):
    go_on(server, recipe, tmp_path, *RUINED, "--do_eval=false", "--logging_steps=1")
    assert [name for _, name in warnings(tmp_path)] == [*AT_START, "chosen_fell"]


def test_a_usual_run_is_told_of_its_small_batch_alone(unbroken):
    assert warnings(unbroken()) == [(0, "pairs_per_step")]
    assert "## Warnings" in (unbroken() / "README.md").read_text()
