"""From prompts to a SimPO run on a CPU with tiny models, in processes that are killed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_from_disk

from alignment.run.records import write_jsonl
from tests import builders
from tests.completions_server import completions_server, reply
from tests.forked import ROOT, Ended, Server
from tests.workspaces import fake_vllm_python, read_jsonl, save_model, write_recipe

RUN, DECODE = "scripts/run_on_policy.py", "on_policy_data_gen/decode.py"
POST_PROCESS, ANNOTATE = "on_policy_data_gen/post_process.py", "on_policy_data_gen/reward_model_annotate.py"
REVIEW, SCORE = "scripts/review_run.py", "scripts/score_pairs.py"
PROMPTS = 9


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A policy, a reward model, prompts of one and of three turns."""
    folder = tmp_path_factory.mktemp("on-policy")
    save_model(folder / "policy", initializer_range=0.1)
    builders.tiny_reward_model().save_pretrained(folder / "reward")
    builders.bpe_tokenizer().save_pretrained(folder / "reward")
    write_jsonl(folder / "prompts.jsonl", [{"messages": row["chosen"]} for row in builders.pairs(PROMPTS)])
    return folder


@pytest.fixture(scope="module")
def recipe(workspace) -> Path:
    """The shipped small recipe, on this workspace's models."""
    keys = yaml.safe_load((ROOT / "training_configs/on-policy/quickstart.yaml").read_text(encoding="utf-8"))
    here = {
        "model": str(workspace / "policy"), "reward_model": str(workspace / "reward"), "batch_size": 2,
        "data_dir": str(workspace / "prompts.jsonl"), "reward_batch_size": 2, "seeds": [13, 21], "max_tokens": 8,
        "prompt_column": None, "max_prompts": None, "test_size": 0.25,
    }  # fmt: skip
    return write_recipe(workspace, {**keys, **here})


def ends(ended: Ended, status: int = 0) -> str:
    assert ended.status == status, ended.printed
    return ended.printed


def make(server: Server, recipe: Path, folder: Path, **options: Any) -> Ended:
    return server.run(str(recipe), f"--output_dir={folder}", method=RUN, **options)


@pytest.fixture(scope="module")
def unbroken(server, recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "data"
    ends(make(server, recipe, folder))
    return folder


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


SCORES = ("all_rm_scores", "chosen_score", "rejected_score")


def assert_same_rows(rows: list[dict], others: list[dict]) -> None:
    """Scores are rounded otherwise in batches of another shape; the rest is equal."""
    for row, other in zip(rows, others, strict=True):
        assert {key: row[key] for key in row if key not in SCORES} == {key: other[key] for key in other if key not in SCORES}
        for key in SCORES:
            assert row.get(key) == pytest.approx(other.get(key), abs=1e-5)


def assert_same_data(folder: Path, other: Path) -> None:
    names = sorted(path.name for path in other.glob("*.json"))
    assert sorted(path.name for path in folder.glob("*.json")) == names
    for name in names:
        assert_same_rows(rows_of(folder / name), rows_of(other / name))
    for split in ("train", "test"):
        assert_same_rows([*load_from_disk(folder / "pairs" / split)], [*load_from_disk(other / "pairs" / split)])
    cards = [(path / "pairs/README.md").read_text().replace(str(path), "") for path in (folder, other)]
    assert cards[0] == cards[1]
    assert not [*(folder / "_stages").glob("*.jsonl")]


def test_data_of_a_chain_that_is_killed_in_every_stage_is_the_unbroken_ones_and_trains_and_is_reviewed(
    server, recipe, unbroken, tmp_path
):
    data = tmp_path / "data"
    kills = [
        {"sabotage": "tear_row", "number": 4},  # sampling, in the middle of a row
        {"sabotage": "die_in", "place": "a pass's end", "number": 1, "ranks": [0]},
        {"sabotage": "tear_row", "number": 6},  # of the second seed, for nothing of the first is left to do
        {"sabotage": "die_in", "place": "joining", "number": 1, "ranks": [0]},
        {"sabotage": "tear_row", "number": 3},  # scoring
        {"sabotage": "die_in", "place": "making the data set", "number": 1, "ranks": [0]},
    ]
    for kill in kills:
        ends(make(server, recipe, data, **kill), -9)
    ends(make(server, recipe, data))
    assert_same_data(data, unbroken)
    assert "is finished" in ends(make(server, recipe, data))

    simpo = write_recipe(tmp_path, simpo_keys(recipe, data))
    ends(server.run(str(simpo), sabotage="die_in", place="training", number=3, ranks=[0]), -9)
    ends(server.run(str(simpo)))
    run, scored = tmp_path / "run", tmp_path / "scored"
    pairs = read_jsonl(run / "eval_pairs.jsonl")
    assert len({row["prompt_sha256"] for row in pairs}) == len(load_from_disk(data / "pairs/test")) == 2
    assert "no verdict: too few held-out prompts" in ends(server.run(str(run), method=REVIEW))
    assert "2 pairs" in (run / "review.md").read_text()
    assert (run / "report.html").is_file()

    ends(server.run(str(run), str(run / "recipe.yaml"), f"--output={scored}", method=SCORE))
    assert read_jsonl(scored / "eval_pairs.jsonl") == [row for row in pairs if row["step"] > 0]


def simpo_keys(recipe: Path, data: Path) -> dict[str, Any]:
    model = yaml.safe_load(recipe.read_text())["model"]
    return {
        "model_name_or_path": model, "dataset_mixer": {str(data / "pairs"): 1.0}, "preprocessing": "exact", "use_cpu": True,
        "beta": 2.0, "max_length": 256, "max_prompt_length": 200, "learning_rate": 1e-3, "per_device_train_batch_size": 2,
        "save_steps": 1, "logging_steps": 1, "do_eval": True, "report_to": "none", "disable_tqdm": True,
        "output_dir": str(data.parent / "run"),
    }  # fmt: skip


def test_the_data_set_has_every_prompt_on_one_side_and_the_scores(unbroken):
    saved = load_from_disk(unbroken / "pairs")
    assert not {*saved["train"]["prompt_id"]} & {*saved["test"]["prompt_id"]}
    assert len(saved["test"]) == 2
    for row in [*saved["train"], *saved["test"]]:
        rewards = dict(zip(row["all_generated_responses"], row["all_rm_scores"], strict=True))
        assert row["chosen_score"] == max(rewards.values()) == rewards[row["chosen"][-1]["content"]]
        assert row["rejected_score"] == min(rewards.values()) == rewards[row["rejected"][-1]["content"]]
        assert row["chosen"][:-1] == row["rejected"][:-1]
        assert (row["prompt"] is None) == (len(row["chosen"]) > 2)


def test_the_card_tells_what_made_the_data(unbroken, workspace):
    card = (unbroken / "pairs/README.md").read_text()
    for told in (str(workspace / "policy"), str(workspace / "reward"), "13, 21", '"temperature": 0.8', "| pairs | 7 | 2 |"):
        assert told in card
    assert re.search(r"\| length, prompt \| \d+ / \d+ / \d+ / \d+ \|", card)
    assert f"{unbroken / 'pairs'}: 1.0" in card


def test_two_processes_make_the_data_of_one(server, recipe, unbroken, tmp_path):
    ends(make(server, recipe, tmp_path / "data", processes=2))
    assert_same_data(tmp_path / "data", unbroken)


def test_one_process_goes_on_from_what_two_have_left(server, recipe, unbroken, tmp_path):
    data = tmp_path / "data"
    ended = make(server, recipe, data, processes=2, sabotage="tear_row", number=3)
    assert -9 in ended.statuses, ended.printed
    printed = ends(make(server, recipe, data))
    assert "its last line is torn" in printed
    assert_same_data(data, unbroken)


def test_other_settings_for_a_stage_that_is_half_done_are_refused_by_key(server, recipe, workspace, tmp_path):
    data = tmp_path / "data"
    ends(make(server, recipe, data, sabotage="tear_row", number=4), -9)
    before = sorted(path.read_bytes() for path in (data / "_stages").glob("*.json*"))
    printed = ends(server.run(str(recipe), f"--output_dir={data}", "--temperature=0.5", "--max_prompts=8", method=RUN), 2)
    assert "half done, with other settings" in printed
    assert "temperature: 0.8 then, 0.5 now" in printed
    assert "max_prompts: None then, 8 now" in printed
    assert "top_p" not in printed
    assert sorted(path.read_bytes() for path in (data / "_stages").glob("*.json*")) == before


def test_the_stages_one_by_one_with_the_published_flags_make_the_recipes_data(server, workspace, unbroken, tmp_path):
    policy, reward = workspace / "policy", workspace / "reward"
    for seed in (13, 21):
        ends(
            server.run(
                f"--data_dir={workspace / 'prompts.jsonl'}",
                f"--model={policy}",
                "--temperature=0.8",
                "--top_p",
                "0.95",
                "--max_tokens=8",
                f"--seed={seed}",
                f"--output_dir={tmp_path}",
                "--use_cpu",
                method=DECODE,
            )
        )
    ends(server.run(f"--generation_file_dir={tmp_path}", method=POST_PROCESS))
    ends(
        server.run(
            f"--generation_file={tmp_path / 'all_outputs.json'}",
            f"--reward_model={reward}",
            f"--output_dir={tmp_path}",
            "--test_size=0.25",
            "--use_cpu",
            method=ANNOTATE,
        )
    )
    assert_same_data(tmp_path, unbroken)


def test_published_files_are_joined_by_prompt_and_annotated(server, workspace, tmp_path):
    """Without ids, in different orders, one of them lacking a prompt: by position responses would answer other prompts."""
    prompts = [f"question {number}" for number in range(4)]
    for seed, order in ((13, [0, 1, 2, 3]), (42, [3, 1, 0])):
        rows = [
            {"prompt": prompts[n], "format_prompt": "...", "generated_text": f"answer {seed} to question {n}"} for n in order
        ]
        (tmp_path / f"output_{seed}.json").write_text(json.dumps(rows, indent=4))
    printed = ends(server.run(f"--generation_file_dir={tmp_path}", method=POST_PROCESS))
    assert "prompts that not every file has 1" in printed
    joined = rows_of(tmp_path / "all_outputs.json")
    assert [row["prompt"] for row in joined] == ["question 0", "question 1", "question 3"]
    for row in joined:
        number = row["prompt"][-1]
        assert row["all_generated_responses"] == [f"answer {seed} to question {number}" for seed in (13, 42)]
    ends(
        server.run(
            f"--generation_file={tmp_path / 'all_outputs.json'}",
            f"--reward_model={workspace / 'reward'}",
            "--use_cpu",
            f"--output_dir={tmp_path}",
            method=ANNOTATE,
        )
    )
    assert "not recorded" in (tmp_path / "pairs/README.md").read_text()
    assert {*rows_of(tmp_path / "all_outputs_bin.json")[0]} >= {"prompt", "all_rm_scores", "chosen", "rejected"}


def test_scores_that_are_there_are_paired_without_a_reward_model(server, tmp_path):
    scored = [
        {"prompt": f"q{n}", "all_generated_responses": ["a", "b", "c"], "all_rm_scores": [0.3, 0.1, 0.2]} for n in range(3)
    ]
    (tmp_path / "all_outputs_rm.json").write_text(json.dumps(scored))
    ends(
        server.run(
            f"--generation_file={tmp_path / 'all_outputs_rm.json'}",
            f"--output_dir={tmp_path}",
            "--pair_rule=all_pairs",
            "--reward_model=there/is/none",
            "--use_cpu",
            method=ANNOTATE,
        )
    )
    saved = load_from_disk(tmp_path / "pairs")
    assert (len(saved["train"]), len(saved["test"])) == (6, 3)


# ---- Generated elsewhere ----


def test_a_server_is_asked_once_for_each_row_though_the_stage_is_killed(server, workspace, tmp_path):
    with completions_server("served") as stand_in:
        command = (
            f"--data_dir={workspace / 'prompts.jsonl'}", f"--model={workspace / 'policy'}", f"--server={stand_in.url}",
            "--served_model=served", "--concurrency=1", "--max_tokens=8", f"--output_dir={tmp_path}", "--use_cpu",
        )  # fmt: skip
        ends(server.run(*command, method=DECODE, sabotage="tear_row", number=4), -9)
        asked = len(stand_in.requests)
        assert asked < PROMPTS
        ends(server.run(*command, method=DECODE))
    assert len(stand_in.requests) - asked == PROMPTS - 3
    texts = {tuple(request["prompt"]): reply(request["prompt"], request["seed"]) for request in stand_in.requests}
    rows = rows_of(tmp_path / "output_42.json")
    assert len(texts) == len(rows) == PROMPTS
    assert {row["generated_text"] for row in rows} == {*texts.values()}
    printed = ends(server.run(*command[:2], "--max_tokens=8", f"--output_dir={tmp_path}", "--use_cpu", method=DECODE), 2)
    assert "engine: 'server' then, 'transformers' now" in printed


def test_vllm_goes_on_where_a_killed_stage_stopped(server, workspace, tmp_path):
    python, log = fake_vllm_python(tmp_path)
    command = (
        f"--data_dir={workspace / 'prompts.jsonl'}", f"--model={workspace / 'policy'}", "--engine=vllm", "--max_tokens=8",
        f"--vllm_python={python}", f"--output_dir={tmp_path / 'data'}", "--use_cpu",
    )  # fmt: skip
    ends(server.run(*command, method=DECODE, sabotage="tear_row", number=5), -9)
    log.rename(tmp_path / "before.jsonl")
    ends(server.run(*command, method=DECODE))
    assert sum("ids" in row for row in read_jsonl(log)) == PROMPTS - 4
    assert len(rows_of(tmp_path / "data/output_42.json")) == PROMPTS


def test_a_launch_of_several_processes_is_none_for_a_server(server, workspace, tmp_path):
    ended = server.run(
        f"--data_dir={workspace / 'prompts.jsonl'}", f"--model={workspace / 'policy'}", "--server=http://localhost:1",
        f"--output_dir={tmp_path}", "--use_cpu", method=DECODE, processes=2,
    )  # fmt: skip
    assert "2 processes were launched, and a server divides the work itself" in ends(ended, 2)
