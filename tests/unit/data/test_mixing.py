"""alignment.data.mixing: every source, split, share and row is used as documented, or refused by a message that says why."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError

from alignment.data import mixing, sources
from alignment.data.mixing import SplitReport, get_datasets
from alignment.data.rows import Turn
from alignment.errors import UserError
from alignment.recipe.configs import DataArguments

REPOSITORY = Path(__file__).parents[3]
GOLDEN = REPOSITORY / "tests" / "golden" / "data"


def user(content: str) -> Turn:
    return {"role": "user", "content": content}


def assistant(content: str) -> Turn:
    return {"role": "assistant", "content": content}


def pair(question: str = "q", chosen: str = "good", rejected: str = "bad") -> dict[str, list[Turn]]:
    return {
        "chosen": [user(question), assistant(chosen)],
        "rejected": [user(question), assistant(rejected)],
    }


def pairs(count: int, name: str = "q") -> list[dict[str, list[Turn]]]:
    return [pair(f"{name}{number}") for number in range(count)]


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(
    mixer: dict[str, Any], *, splits: Sequence[str] = ("train", "test"), configs: list | None = None, **options: Any
) -> tuple[DatasetDict, dict[str, SplitReport]]:
    """get_datasets with the options that a test does not speak of."""
    data_args = DataArguments(dataset_mixer=mixer, dataset_splits=list(splits), dataset_configs=configs)
    defaults = {
        "columns": ("chosen", "rejected"),
        "preprocessing": "published",
        "bad_rows": "refuse",
        "seed": 0,
        "do_eval": False,
    }
    return get_datasets(data_args, **{**defaults, **options})


def questions(rows: Dataset) -> list[str]:
    return [row["prompt"][-1]["content"] for row in rows]


def error_of(*args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        read(*args, **options)
    return str(raised.value)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test works in an empty folder, with its own cache and without a network."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return work


# Sources


def json_folder() -> None:
    write("source/train.jsonl", pairs(4))
    write("source/test.jsonl", pairs(2, "t"))


def json_list_folder() -> None:
    Path("source").mkdir()
    Path("source/train.json").write_text(json.dumps(pairs(4)))
    Path("source/test.json").write_text(json.dumps(pairs(2, "t")))


def parquet_folder_as_on_the_hub() -> None:
    Path("source/data").mkdir(parents=True)
    Dataset.from_list(pairs(4)[:2]).to_parquet("source/data/train-00000-of-00002-0a1b2c.parquet")
    Dataset.from_list(pairs(4)[2:]).to_parquet("source/data/train-00001-of-00002-0a1b2c.parquet")
    Dataset.from_list(pairs(2, "t")).to_parquet("source/data/test-00000-of-00001.parquet")
    Path("source/README.md").write_text("# Pairs\n")
    Path("source/dataset_infos.json").write_text("{}")


def saved_dataset_dict() -> None:
    DatasetDict({"train": Dataset.from_list(pairs(4)), "test": Dataset.from_list(pairs(2, "t"))}).save_to_disk("source")


def saved_dataset_per_split() -> None:
    Dataset.from_list(pairs(4)).save_to_disk("source/train")
    Dataset.from_list(pairs(2, "t")).save_to_disk("source/test")


@pytest.mark.parametrize(
    "make",
    [json_folder, json_list_folder, parquet_folder_as_on_the_hub, saved_dataset_dict, saved_dataset_per_split],
)
def test_every_kind_of_folder_gives_the_same_rows(make):
    make()
    mixed, _ = read({"source": 1.0}, do_eval=True)
    assert set(mixed) == {"train", "test"}
    assert sorted(questions(mixed["train"])) == ["q0", "q1", "q2", "q3"]
    assert sorted(questions(mixed["test"])) == ["t0", "t1"]


def test_split_names_are_taken_from_file_names_whole():
    write("source/train_prefs.jsonl", pairs(3, "prefs"))
    write("source/train_sft.jsonl", pairs(3, "sft"))
    mixed, _ = read({"source": 1.0}, splits=["train_prefs"])
    assert sorted(questions(mixed["train"])) == ["prefs0", "prefs1", "prefs2"]


@pytest.mark.parametrize("name", ["latest.jsonl", "contest_pairs.jsonl", "train_dev.jsonl", "interval.jsonl"])
def test_a_file_is_for_training(name):
    write(name, pairs(2))
    write("eval.jsonl", pairs(1, "t"))
    mixed, _ = read({name: 1.0, "eval.jsonl": 1.0}, do_eval=True)
    assert sorted(questions(mixed["train"])) == ["q0", "q1"]
    assert questions(mixed["test"]) == ["t0"]


@pytest.mark.parametrize("name", ["test.jsonl", "my-eval-2.jsonl", "Validation_prefs.jsonl", "dev.jsonl", "val.json"])
def test_a_file_whose_name_says_evaluation_is_never_trained_on(name):
    write("train.jsonl", pairs(2))
    write(name, pairs(1, "t"))
    mixed, _ = read({"train.jsonl": 1.0, name: 0.5}, do_eval=True)
    assert sorted(questions(mixed["train"])) == ["q0", "q1"]
    assert questions(mixed["test"]) == ["t0"]


def test_a_glob_sends_each_file_where_its_name_says():
    for name, rows in {"b": pairs(1, "b"), "a": pairs(2, "a"), "test": pairs(1, "t")}.items():
        write(f"source/{name}.jsonl", rows)
    mixed, _ = read({"source/*.jsonl": 1.0}, do_eval=True)
    assert sorted(questions(mixed["train"])) == ["a0", "a1", "b0"]
    assert questions(mixed["test"]) == ["t0"]


def test_the_files_of_a_glob_are_read_in_the_order_of_their_names(monkeypatch):
    for name in "abc":
        write(f"source/{name}.jsonl", pairs(1, name))
    in_order = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(sorted(in_order(self, pattern), reverse=True)))
    mixed, _ = read({"source/*.jsonl": 2})
    assert sorted(questions(mixed["train"])) == ["a0", "b0"]


def test_a_file_serves_recipes_that_name_other_splits_and_is_used_once():
    write("source/train_prefs.jsonl", pairs(1))
    write("source/train_sft.jsonl", pairs(1, "sft"))
    write("more.jsonl", pairs(1, "more"))
    mixed, _ = read({"source": 1.0, "more.jsonl": 1.0}, splits=["train_prefs", "train_sft"])
    assert sorted(questions(mixed["train"])) == ["more0", "q0", "sft0"]


@pytest.mark.parametrize(("name", "purpose"), [("saved", "train"), ("saved_test", "test")])
def test_a_single_saved_dataset_is_treated_like_a_file(name, purpose):
    Dataset.from_list(pairs(2, "saved")).save_to_disk(name)
    write("a.jsonl", pairs(1))
    write("test.jsonl", pairs(1))
    mixed, _ = read({name: 1.0, "a.jsonl": 1.0, "test.jsonl": 1.0}, do_eval=True)
    assert {"saved0", "saved1"} < set(questions(mixed[purpose]))


def test_a_saved_dataset_is_read_and_nothing_is_written_beside_it():
    Dataset.from_list(pairs(3)).save_to_disk("saved")
    before = sorted(Path("saved").iterdir())
    mixed, _ = read({"saved": 1.0})
    assert sorted(questions(mixed["train"])) == ["q0", "q1", "q2"]
    assert sorted(Path("saved").iterdir()) == before


def test_a_path_may_start_with_a_tilde(monkeypatch, own_folder):
    monkeypatch.setenv("HOME", str(own_folder))
    write("a.jsonl", pairs(2))
    mixed, _ = read({"~/a.jsonl": 1.0})
    assert len(mixed["train"]) == 2


@pytest.mark.parametrize("make", [json_folder, saved_dataset_dict])
def test_a_local_source_is_never_asked_of_the_hub(make, monkeypatch):
    make()
    asked = []
    load_dataset = sources.load_dataset
    monkeypatch.setattr(sources, "load_dataset", lambda path, *rest, **kw: asked.append(path) or load_dataset(path, **kw))
    read({"source": 1.0}, do_eval=True)
    assert set(asked) <= {"json"}


@pytest.mark.parametrize(
    ("mixer", "configs", "expected"),
    [
        ({"owner/pairs": 1.0}, None, ("owner/pairs", None)),
        ({"owner/pairs:english": 1.0}, None, ("owner/pairs", "english")),
        ({"owner/pairs": 1.0}, ["english"], ("owner/pairs", "english")),
    ],
)
def test_a_hub_dataset_is_loaded_by_name_and_config(mixer, configs, expected, monkeypatch):
    asked = []
    found = DatasetDict({"train": Dataset.from_list(pairs(3)), "test": Dataset.from_list(pairs(1, "t"))})
    monkeypatch.setattr(sources, "load_dataset", lambda *args: asked.append(args) or found)
    mixed, _ = read(mixer, configs=configs, do_eval=True)
    assert asked == [expected]
    assert sorted(questions(mixed["train"])) == ["q0", "q1", "q2"]
    assert questions(mixed["test"]) == ["t0"]


def test_a_row_of_a_hub_dataset_is_named_by_dataset_config_split_and_row(monkeypatch):
    found = DatasetDict({"train": Dataset.from_list([pair(), pair(chosen="")])})
    monkeypatch.setattr(sources, "load_dataset", lambda *args: found)
    _, reports = read({"owner/pairs:english": 1.0})
    assert reports["train"].places == ["owner/pairs:english, split train, row 1: the last turn of chosen is empty"]


def test_two_configs_for_one_hub_dataset_are_refused():
    assert "one place" in error_of({"owner/pairs:english": 1.0}, configs=["german"])


def test_a_config_for_a_local_source_is_refused_and_null_or_default_is_not():
    write("a.jsonl", pairs(1))
    assert error_of({"a.jsonl": 1.0}, configs=["english"]).startswith("a.jsonl: is local and has no config 'english'")
    for config in (None, "default"):
        assert len(read({"a.jsonl": 1.0}, configs=[config])[0]["train"]) == 1


def test_a_source_that_is_nowhere_is_one_line_with_what_was_tried_and_what_would_work(own_folder):
    message = error_of({"owner/pairs": 1.0})
    assert message.startswith(f"owner/pairs: no file or folder of this name, seen from {own_folder}, and the Hub gave none")
    assert "Couldn't reach 'owner/pairs' on the Hub" in message
    assert "hf auth login" in message
    assert "local path" in message
    assert "\n" not in message


def test_the_reason_of_the_hub_is_passed_on_in_one_line(monkeypatch):
    def refuse(*args):
        raise DatasetNotFoundError("Dataset 'owner/pairs' is a gated dataset on the Hub.\nAsk for access.")

    monkeypatch.setattr(sources, "load_dataset", refuse)
    message = error_of({"owner/pairs": 1.0})
    assert "is a gated dataset on the Hub. Ask for access." in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["./pairs", "/nowhere/pairs", "a/b/pairs", "pairs.jsonl", "nowhere/train.parquet"])
def test_what_can_only_be_a_path_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(sources, "load_dataset", lambda *args: pytest.fail("asked the Hub"))
    assert error_of({name: 1.0}).startswith(f"{name}: no file or folder of this name")


def test_a_glob_without_a_match_is_an_error():
    assert error_of({"pairs/*.jsonl": 1.0}).startswith("pairs/*.jsonl: matches no file")


def test_a_folder_without_data_is_an_error_that_says_what_it_should_hold():
    write("source/notes.txt", [])
    message = error_of({"source": 1.0})
    assert message.startswith("source: holds no dataset")
    assert "train.jsonl" in message


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("broken.jsonl", '{"chosen": \n', "broken.jsonl, line 1: is no JSON (Expecting value at column 11); every line"),
        ("broken.parquet", "no parquet", "broken.parquet: cannot be read: Parquet magic bytes not found"),
        ("empty.jsonl", "", "empty.jsonl: has no rows"),
        ("pairs.csv", "chosen,rejected\n", "pairs.csv: pairs.csv is none of the files that can be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(name, text, problem):
    Path(name).write_text(text)
    assert error_of({name: 1.0}).startswith(problem)


def test_one_split_in_two_formats_is_refused():
    write("source/train.jsonl", pairs(1))
    Dataset.from_list(pairs(1)).to_parquet("source/train.parquet")
    assert "train.jsonl, train.parquet" in error_of({"source": 1.0})


def test_an_empty_mixer_is_an_error():
    assert error_of({}).startswith("dataset_mixer: ")


# Splits


@pytest.mark.parametrize("split", ["train", "train_prefs", "my_training", "train_test"])
def test_a_split_with_train_in_its_name_is_trained_on(split):
    write(f"source/{split}.jsonl", pairs(1))
    mixed, _ = read({"source": 1.0}, splits=[split])
    assert questions(mixed["train"]) == ["q0"]


@pytest.mark.parametrize("split", ["test", "test_prefs", "validation", "eval", "dev", "val"])
def test_a_split_named_for_evaluation_is_evaluated_on(split):
    write("source/train.jsonl", pairs(1))
    write(f"source/{split}.jsonl", pairs(1, "t"))
    mixed, _ = read({"source": 1.0}, splits=["train", split], do_eval=True)
    assert questions(mixed["test"]) == ["t0"]


def test_a_split_whose_name_says_nothing_is_refused():
    write("source/train.jsonl", pairs(1))
    assert error_of({"source": 1.0}, splits=["train", "gen"]).startswith("dataset_splits: 'gen' could be")


def test_a_missing_split_is_an_error_with_the_splits_there_are_and_a_command_line_that_works():
    write("source/train.jsonl", pairs(1))
    write("source/validation.jsonl", pairs(1, "t"))
    assert error_of({"source": 1.0}, do_eval=True) == (
        "source: no split 'test'; it has train, validation. Try --dataset_splits=train,validation"
    )
    mixed, _ = read({"source": 1.0}, splits=["train", "validation"], do_eval=True)
    assert questions(mixed["test"]) == ["t0"]


def test_a_missing_split_without_a_substitute_is_an_error_with_another_way_out():
    write("source/train.jsonl", pairs(1))
    assert error_of({"source": 1.0}, do_eval=True).endswith("--do_eval=false")
    assert "no split 'train_prefs'; it has train" in error_of({"source": 1.0}, splits=["train_prefs"])


def test_a_lone_source_must_have_every_evaluation_split_that_is_named():
    write("source/train.jsonl", pairs(1))
    write("source/test.jsonl", pairs(1))
    message = error_of({"source": 1.0}, splits=["train", "test", "validation"], do_eval=True)
    assert message == "source: no split 'validation'; it has test, train. Try --dataset_splits=train,test"


def test_files_about_a_dataset_are_no_splits_of_it():
    parquet_folder_as_on_the_hub()
    assert error_of({"source": 1.0}, splits=["train_x"]).startswith("source: no split 'train_x'; it has test, train.")


def test_a_run_without_evaluation_needs_and_reads_no_evaluation_split():
    write("source/train.jsonl", pairs(1))
    Path("source/test.jsonl").write_text("no JSON")
    mixed, reports = read({"source": 1.0, "source/*.jsonl": 1.0}, do_eval=False)
    assert set(mixed) == set(reports) == {"train"}


def test_in_a_mixture_one_source_with_an_evaluation_split_is_enough_and_the_others_are_noted():
    write("with/train.jsonl", pairs(1))
    write("with/test.jsonl", pairs(1, "t"))
    write("without/train.jsonl", pairs(1))
    mixed, reports = read({"with": 1.0, "without": 1.0}, do_eval=True)
    assert questions(mixed["test"]) == ["t0"]
    assert str(reports["test"]) == "1 row read; without has no split 'test'"
    assert reports["train"].notes == []


def test_a_mixture_without_any_evaluation_split_is_an_error_for_every_source():
    write("a/train.jsonl", pairs(1))
    write("b/train.jsonl", pairs(1))
    message = error_of({"a": 1.0, "b": 1.0}, do_eval=True)
    assert [line.split(":")[0] for line in message.splitlines()] == ["a", "b"]


def test_evaluation_without_evaluation_rows_is_an_error():
    write("a.jsonl", pairs(1))
    assert error_of({"a.jsonl": 1.0}, do_eval=True).startswith("no evaluation rows in a.jsonl")


def test_a_training_split_missing_from_one_of_several_sources_is_an_error():
    write("a/train.jsonl", pairs(1))
    write("b/train_prefs.jsonl", pairs(1))
    assert error_of({"a": 1.0, "b": 1.0}).startswith("b: no split 'train'; it has train_prefs")


def test_no_training_rows_at_all_is_an_error():
    write("test.jsonl", pairs(1))
    assert error_of({"test.jsonl": 1.0}, do_eval=True).startswith("no training rows in test.jsonl")


# Shares and order


def test_published_takes_the_first_rows_of_each_train_split_of_each_source_and_shuffles_with_42():
    for source in ("a", "b"):
        for split in ("train_x", "train_y"):
            write(f"{source}/{split}.jsonl", pairs(4, f"{source}-{split}-"))
    mixed, reports = read({"a": 0.5, "b": 0.75}, splits=["train_x", "train_y"], seed=7)
    parts = [("a-train_x-", 2), ("a-train_y-", 2), ("b-train_x-", 3), ("b-train_y-", 3)]
    in_order = [f"{name}{number}" for name, count in parts for number in range(count)]
    assert questions(mixed["train"]) == [in_order[i] for i in np.random.default_rng(42).permutation(10)]
    assert reports["train"].read == 10


def test_evaluation_splits_are_read_whole():
    write("source/train.jsonl", pairs(4))
    write("source/test.jsonl", pairs(5, "t"))
    mixed, _ = read({"source": 0.25}, do_eval=True)
    assert (len(mixed["train"]), len(mixed["test"])) == (1, 5)


@pytest.mark.parametrize(("share", "count"), [(1, 10), (1.0, 10), (0.39, 3), (0.1, 1), (2, 2), (10, 10)])
@pytest.mark.parametrize("preprocessing", ["published", "exact"])
def test_a_share_is_a_fraction_rounded_down_or_a_row_count_and_1_is_everything(share, count, preprocessing):
    write("a.jsonl", pairs(10))
    mixed, _ = read({"a.jsonl": share}, preprocessing=preprocessing)
    assert len(set(questions(mixed["train"]))) == count


@pytest.mark.parametrize("preprocessing", ["published", "exact"])
def test_more_rows_than_there_are_or_none_at_all_is_an_error(preprocessing):
    write("a.jsonl", pairs(10))
    assert error_of({"a.jsonl": 11}, preprocessing=preprocessing) == "a.jsonl: 11 rows asked for, 10 available"
    assert error_of({"a.jsonl": 0.05}, preprocessing=preprocessing).startswith("a.jsonl: a share of 0.05 is none")


def test_exact_draws_and_shuffles_by_seed_while_published_ignores_it():
    write("a.jsonl", pairs(200))

    def rows(preprocessing, seed):
        return questions(read({"a.jsonl": 0.5}, preprocessing=preprocessing, seed=seed)[0]["train"])

    assert rows("exact", 1) == rows("exact", 1)
    assert set(rows("exact", 1)) != set(rows("exact", 2))
    assert any(int(question[1:]) >= 100 for question in rows("exact", 1))
    assert rows("published", 1) == rows("published", 2)


def test_exact_shuffles_a_whole_source_by_seed():
    write("a.jsonl", pairs(50))
    orders = [questions(read({"a.jsonl": 1.0}, preprocessing="exact", seed=seed)[0]["train"]) for seed in (1, 2)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("preprocessing", ["published", "exact"])
def test_fewer_than_three_rows_are_enough(count, preprocessing):
    write("a.jsonl", pairs(count))
    assert len(read({"a.jsonl": 1.0}, preprocessing=preprocessing)[0]["train"]) == count


def zephyr_text(turns: list[Turn], insert_system: bool) -> str:
    if insert_system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": ""}, *turns]
    return "".join(f"<|{turn['role']}|>\n{turn['content']}</s>\n" for turn in turns)


def header_text(turns: list[Turn], insert_bos: bool) -> str:
    texts = [f"<|start|>{turn['role']}<|end|>\n\n{turn['content']}<|eot|>" for turn in turns]
    return "".join(["<s>" * insert_bos, *texts])


@pytest.mark.parametrize(
    ("name", "render"),
    [
        ("sigmoid-zephyr", zephyr_text),
        ("keep-start-zephyr", zephyr_text),
        ("sigmoid-header", header_text),
        ("truncated-header", header_text),
    ],
)
def test_the_golden_rows_come_as_and_in_the_order_in_which_the_published_code_read_them(name, render, monkeypatch):
    monkeypatch.chdir(GOLDEN)
    recipe = yaml.safe_load(Path(f"recipes/{name}.yaml").read_text())
    mixed, _ = read(recipe["dataset_mixer"], splits=recipe["dataset_splits"], do_eval=True)
    golden = json.loads(Path(f"tokens/{name}.json").read_text())
    assert (len(mixed["train"]), len(mixed["test"])) == (48, 12)
    for row, expected in zip(mixed["train"], golden, strict=True):
        assert render(row["prompt"], True) == expected["prompt"]
        assert render(row["chosen"], False) == expected["chosen"]
        assert render(row["rejected"], False) == expected["rejected"]


# Rows


def only_row(row: dict[str, Any], **options: Any) -> tuple[dict[str, list[Turn]], SplitReport]:
    write("row.jsonl", [row])
    mixed, reports = read({"row.jsonl": 1.0}, **options)
    return {key: mixed["train"][0][key] for key in ("prompt", "chosen", "rejected")}, reports["train"]


def test_without_a_prompt_list_the_prompt_is_all_chosen_turns_but_the_last():
    earlier = [{"role": "system", "content": "s"}, user("u1"), assistant("a1"), user("u2")]
    row, _ = only_row(
        {
            "prompt": "a string",
            "chosen": [*earlier, assistant("c")],
            "rejected": [*earlier, assistant("r")],
            "score": 1,
        }
    )
    assert row == {"prompt": earlier, "chosen": [assistant("c")], "rejected": [assistant("r")]}


@pytest.mark.parametrize("prompt", [None, [], [{"role": "user"}], ["text"], 3])
def test_a_prompt_that_is_no_list_of_turns_is_ignored(prompt):
    row, _ = only_row({"prompt": prompt, **pair("q", "c", "r")})
    assert row == {"prompt": [user("q")], "chosen": [assistant("c")], "rejected": [assistant("r")]}


def test_with_a_prompt_list_chosen_and_rejected_are_the_responses():
    row, report = only_row({"prompt": [user("q")], "chosen": [assistant("c")], "rejected": [assistant("r")]})
    assert row == {"prompt": [user("q")], "chosen": [assistant("c")], "rejected": [assistant("r")]}
    assert report.tolerated == {}


@pytest.mark.parametrize("preprocessing", ["published", "exact"])
def test_a_prompt_repeated_by_the_responses_is_removed_from_them_and_counted(preprocessing):
    row, report = only_row({"prompt": [user("q")], **pair("q", "c", "r")}, preprocessing=preprocessing)
    assert row == {"prompt": [user("q")], "chosen": [assistant("c")], "rejected": [assistant("r")]}
    assert report.tolerated == {"prompt repeated in a response": 1}


def test_a_prompt_repeated_by_one_response_is_removed_from_that_one():
    row, report = only_row(
        {"prompt": [user("q")], "chosen": [user("q"), assistant("c")], "rejected": [assistant("r")]},
        preprocessing="exact",
    )
    assert row == {"prompt": [user("q")], "chosen": [assistant("c")], "rejected": [assistant("r")]}
    assert report.tolerated == {"prompt repeated in a response": 1}


def test_a_response_never_becomes_empty_because_it_is_the_prompt():
    row, report = only_row({"prompt": [user("q")], "chosen": [user("q")], "rejected": [assistant("r")]})
    assert row["chosen"] == [user("q")]
    assert report.tolerated == {"last turn is not the assistant's": 1}


def test_a_turn_keeps_its_role_and_content_only():
    row, _ = only_row({"chosen": [{**user("q"), "name": "x"}, assistant("c")], "rejected": pair()["rejected"]})
    assert row["prompt"] == [user("q")]


MALFORMED = [
    (
        {"chosen": [user("q"), assistant("c")], "rejected": [user("other"), assistant("r")]},
        "earlier turns differ",
        "chosen and rejected differ before the last turn; they must share the prompt",
    ),
    (
        {"prompt": [user("q")], "chosen": [assistant("c")], "rejected": [user("other"), assistant("r")]},
        "earlier turns differ",
        "chosen and rejected differ before the last turn; they must share the prompt",
    ),
    (
        {"chosen": [user("q"), assistant("c")], "rejected": [user("q"), user("r")]},
        "last turn is not the assistant's",
        "rejected ends with a user turn; the last turn must be the assistant's",
    ),
    (
        {"chosen": [{"role": "narrator", "content": "q"}, assistant("c")]}
        | {"rejected": [{"role": "narrator", "content": "q"}, assistant("r")]},
        "unknown role",
        "chosen has a turn by 'narrator'; a role is system, developer, user, assistant, tool",
    ),
    (pair(chosen=""), "empty response", "the last turn of chosen is empty"),
    (pair(rejected=" \n"), "empty response", "the last turn of rejected is empty"),
    (pair(question=" "), "empty turn", "chosen has an empty turn before the last one"),
    (
        {"prompt": [user("")], "chosen": [assistant("c")], "rejected": [assistant("r")]},
        "empty turn",
        "chosen has an empty turn before the last one",
    ),
]


@pytest.mark.parametrize(("row", "reason", "detail"), MALFORMED)
def test_a_malformed_row_is_kept_by_published_and_refused_or_dropped_by_exact(row, reason, detail):
    write("pairs/train.jsonl", [pair("q0"), pair("q1"), row])
    place = f"pairs/train.jsonl, line 3: {detail}"

    mixed, reports = read({"pairs": 1.0}, preprocessing="published", bad_rows="drop")
    assert len(mixed["train"]) == 3
    assert reports["train"] == SplitReport(3, {}, {reason: 1}, [place], [])

    message = error_of({"pairs": 1.0}, preprocessing="exact")
    assert message.splitlines()[0] == place
    assert "bad_rows: drop" in message
    assert f"{reason} 1" in message

    mixed, reports = read({"pairs": 1.0}, preprocessing="exact", bad_rows="drop")
    assert sorted(questions(mixed["train"])) == ["q0", "q1"]
    assert reports["train"] == SplitReport(3, {reason: 1}, {}, [place], [])
    assert reports["train"].kept == 2


def test_an_empty_system_turn_is_well_formed():
    system = {"role": "system", "content": ""}
    row, report = only_row({key: [system, *turns] for key, turns in pair().items()}, preprocessing="exact")
    assert row["prompt"] == [system, user("q")]
    assert report.tolerated == {}


@pytest.mark.parametrize("preprocessing", ["published", "exact"])
def test_identical_responses_are_kept_and_counted(preprocessing):
    row, report = only_row(pair(chosen="same", rejected="same"), preprocessing=preprocessing)
    assert row["chosen"] == row["rejected"]
    assert report.tolerated == {"identical responses": 1}


def test_a_dropped_row_is_not_counted_as_tolerated_too():
    write("a.jsonl", [pair(), pair(chosen="", rejected="")])
    _, reports = read({"a.jsonl": 1.0}, preprocessing="exact", bad_rows="drop")
    assert reports["train"].dropped == {"empty response": 1}
    assert reports["train"].tolerated == {}


UNREADABLE = [
    ({"chosen": None}, "chosen is null"),
    ({"rejected": None}, "rejected is null"),
    ({"rejected": []}, "rejected is an empty list"),
    (
        {"chosen": "some text"},
        'chosen is the text \'some text\', not a list of turns: [{"role": "assistant", "content": CHOSEN}]',
    ),
    ({"chosen": {"a": 1}}, "chosen is {'a': 1}, not a list of {role, content}"),
    ({"chosen": [user("q"), {"role": "assistant", "content": None}]}, "chosen has the turn {"),
    ({"chosen": [user("q"), assistant(3)]}, "chosen has the turn {"),
    ({"rejected": [{"from": "human", "value": "q"}]}, "rejected has the turn {"),
    ({"rejected": ["q", "r"]}, "rejected has the turn 'q'"),
    (
        {"chosen": [assistant("c")], "rejected": [assistant("r")]},
        "no prompt turn: chosen is a response only, and prompt is null",
    ),
    (
        {"prompt": "q", "chosen": [assistant("c")], "rejected": [assistant("r")]},
        'no prompt turn: chosen is a response only, and prompt is the text \'q\', not a list of turns: [{"role": "user",',
    ),
    (
        {"prompt": [{"role": "user", "content": [{"type": "text"}]}], "chosen": [assistant("c")], "rejected": [assistant("r")]},
        "no prompt turn: chosen is a response only, and prompt has the turn {",
    ),
]


@pytest.mark.parametrize(("change", "problem"), UNREADABLE)
@pytest.mark.parametrize("preprocessing", ["published", "exact"])
def test_a_row_that_cannot_be_read_is_an_error_in_both_modes(change, problem, preprocessing):
    write("pairs/train.jsonl", [pair(), {**pair(), **change}])
    message = error_of({"pairs": 1.0}, preprocessing=preprocessing, bad_rows="drop")
    assert message.startswith(f"pairs/train.jsonl, line 2: {problem}")


def test_a_missing_column_is_an_error_with_the_columns_there_are():
    write("a.jsonl", [{"chosen": pair()["chosen"], "score": 1}])
    assert error_of({"a.jsonl": 1.0}) == "a.jsonl: no column 'rejected'; it has chosen, score"


def test_bad_rows_of_all_sources_are_told_at_once_the_first_few_by_place():
    write("a/train.jsonl", [pair(chosen="")] * 3)
    write("a/test.jsonl", [pair(), {"chosen": [user("q"), user("c")], "rejected": pair()["rejected"]}])
    write("b.jsonl", [pair(chosen="")] * 1200)
    message = error_of({"a": 1.0, "b.jsonl": 1.0}, preprocessing="exact", do_eval=True)
    assert message.splitlines() == [
        "a/train.jsonl, line 1: the last turn of chosen is empty",
        "a/train.jsonl, line 2: the last turn of chosen is empty",
        "a/train.jsonl, line 3: the last turn of chosen is empty",
        "...",
        "bad rows: empty response 1,203, last turn is not the assistant's 1; bad_rows: drop leaves out what is malformed",
    ]


def test_a_report_names_the_first_few_rows_of_each_reason():
    write("a.jsonl", [pair(chosen="")] * 5 + [pair(question="")])
    _, reports = read({"a.jsonl": 1.0})
    numbers = [place.split(":")[0] for place in reports["train"].places]
    assert numbers == ["a.jsonl, line 1", "a.jsonl, line 2", "a.jsonl, line 3", "a.jsonl, line 6"]


def test_the_row_number_is_the_one_in_the_file_even_in_a_sample():
    rows = pairs(40)
    rows[33] = pair(chosen="")
    write("a.jsonl", rows)
    places = set()
    for seed in range(8):
        _, reports = read({"a.jsonl": 0.5}, preprocessing="exact", bad_rows="drop", seed=seed)
        places |= set(reports["train"].places)
    assert places == {"a.jsonl, line 34: the last turn of chosen is empty"}


def test_only_the_rows_of_the_share_are_checked():
    write("a.jsonl", [*pairs(2), {"chosen": None, "rejected": None}, pair()])
    mixed, _ = read({"a.jsonl": 0.5})
    assert len(mixed["train"]) == 2


def test_nothing_left_to_train_on_is_an_error():
    write("a.jsonl", [pair(chosen="")])
    message = error_of({"a.jsonl": 1.0}, preprocessing="exact", bad_rows="drop")
    assert message == "train has no row left: 1 row read, 1 dropped (empty response 1)"


def test_a_report_is_one_line():
    report = SplitReport(
        2900,
        {"empty response": 2, "last turn is not the assistant's": 1},
        {"identical responses": 4},
        ["place"],
        ["note"],
    )
    assert str(report) == (
        "2,900 rows read, 3 dropped (empty response 2, last turn is not the assistant's 1), "
        "tolerated: identical responses 4; note"
    )
    assert report.kept == 2897


def test_conversations_keep_their_messages_only_and_are_checked_too():
    messages = [user("q"), assistant("a")]
    write("a.jsonl", [{"messages": messages, "prompt": "q", "chosen": 1}, {"messages": [user("q")], "prompt": "q"}])
    options = {"columns": ("messages",), "preprocessing": "exact"}
    assert "line 2: messages ends with a user turn" in error_of({"a.jsonl": 1.0}, **options)
    mixed, reports = read({"a.jsonl": 1.0}, bad_rows="drop", **options)
    assert mixed["train"]["messages"][:] == [messages]
    assert reports["train"].dropped == {"last turn is not the assistant's": 1}
    mixed, _ = read({"a.jsonl": 1.0}, columns=("messages",))
    assert len(mixed["train"]) == 2


def test_a_conversation_that_cannot_be_read_is_an_error():
    write("a.jsonl", [{"messages": None}, {"messages": [user("q")]}])
    assert error_of({"a.jsonl": 1.0}, columns=("messages",)).startswith("a.jsonl, line 1: messages is null")


def test_sources_with_different_columns_and_types_mix():
    write("a.jsonl", [{**pair("a"), "prompt": "text", "score": 1.5}])
    write("b.jsonl", [{"prompt": [user("b")], "chosen": [assistant("c")], "rejected": [{**assistant("r"), "name": "n"}]}])
    assert sorted(questions(read({"a.jsonl": 1.0, "b.jsonl": 1.0})[0]["train"])) == ["a", "b"]


# Cache, processes, progress


def arrow_files(folder: Path) -> dict[str, int]:
    """Path -> time of the last change, in ns."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.arrow")}


def test_a_second_run_computes_nothing_again_in_this_process_or_another(tmp_path):
    write("source/train.jsonl", pairs(5))
    write("source/test.jsonl", pairs(2))
    mixed, _ = read({"source": 0.5}, preprocessing="exact", do_eval=True)
    files = arrow_files(tmp_path)
    assert len(files) >= 4
    read({"source": 0.5}, preprocessing="exact", do_eval=True)
    assert arrow_files(tmp_path) == files
    program = (
        "from alignment.recipe.configs import DataArguments; from alignment.data.mixing import get_datasets\n"
        "mixed, _ = get_datasets(DataArguments(dataset_mixer={'source': 0.5}), columns=('chosen', 'rejected'), "
        "preprocessing='exact', bad_rows='refuse', seed=0, do_eval=True)\n"
        "print([row['prompt'][-1]['content'] for row in mixed['train']])"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(questions(mixed["train"]))
    assert arrow_files(tmp_path) == files


def test_changed_rules_are_applied_although_the_rows_are_cached(tmp_path, monkeypatch):
    write("a.jsonl", pairs(2))
    read({"a.jsonl": 1.0})
    before = arrow_files(tmp_path)
    monkeypatch.setattr(mixing, "code_digest", lambda: "another version of the rules")
    read({"a.jsonl": 1.0})
    assert set(arrow_files(tmp_path)) > set(before)


def test_several_processes_give_the_rows_and_places_of_one():
    rows = pairs(2500)
    rows[2400] = pair("q2400", chosen="")
    write("a.jsonl", rows)
    one, one_report = read({"a.jsonl": 1.0})
    datasets.disable_caching()
    try:
        two, two_report = read({"a.jsonl": 1.0}, num_proc=2)
    finally:
        datasets.enable_caching()
    assert questions(one["train"]) == questions(two["train"])
    assert one_report == two_report
    assert two_report["train"].places == ["a.jsonl, line 2401: the last turn of chosen is empty"]


@pytest.mark.parametrize("is_main", [True, False])
def test_progress_bars_are_shown_by_the_main_process_only(is_main, monkeypatch):
    write("a.jsonl", pairs(2))
    datasets.enable_progress_bars()
    monkeypatch.setattr(mixing.PartialState, "is_main_process", is_main)
    read({"a.jsonl": 1.0})
    shown = not datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    assert shown == is_main
