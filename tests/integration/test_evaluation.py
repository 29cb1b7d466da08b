"""eval/generate_outputs.py as a process: killed, in several processes, and told something wrong."""

import pytest

from alignment.run.checkpoints import training_of
from alignment.run.records import write_jsonl
from tests.integration.conftest import RECIPE
from tests.workspaces import read_jsonl, recipe_of_run, save_model, save_workspace

GENERATE = "eval/generate_outputs.py"
SETTINGS = "eval/mt-bench/own-template.yaml"
CATEGORIES = ("writing", "math", "stem")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    save_model(folder / "my-run", initializer_range=0.1)
    rows = [
        {"question_id": 81 + number, "category": CATEGORIES[number % 3], "turns": [f"river {number}", f"kettle {number}"]}
        for number in range(5)
    ]
    write_jsonl(folder / "question.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def answer(server, workspace):
    def run(name: str, *options: str, **job):
        output = workspace / f"{name}.jsonl"
        words = (f"--model={workspace / 'my-run'}", f"--prompts={workspace / 'question.jsonl'}", f"--output={output}")
        ended = server.run(
            SETTINGS, *words, "--use_cpu", "--max_tokens=6", "--torch_dtype=float32", *options, method=GENERATE, **job
        )
        return ended, output

    return run


@pytest.fixture(scope="module")
def unbroken(answer):
    ended, output = answer("unbroken")
    assert ended.status == 0, ended.printed
    return replies(output)


def replies(output) -> dict[int, list[str]]:
    return {row["question_id"]: row["choices"][0]["turns"] for row in read_jsonl(output)}


@pytest.mark.parametrize("number", [3, 8])
def test_killed_in_either_turn_it_goes_on_and_ends_alike(answer, unbroken, number):
    killed, output = answer(f"killed-{number}", "--batch_size=1", sabotage="tear_row", number=number)
    assert killed.status == -9, killed.printed
    assert not output.exists()
    ended, output = answer(f"killed-{number}")
    assert ended.status == 0, ended.printed
    assert "its last line is torn" in ended.printed
    assert replies(output) == unbroken


def test_two_processes_answer_as_one(answer, unbroken):
    ended, output = answer("two", processes=2)
    assert ended.status == 0, ended.printed
    assert list(replies(output)) == [81, 82, 83, 84, 85]
    assert replies(output) == unbroken


def test_a_file_of_another_benchmark_ends_with_status_2_and_one_error(answer, workspace):
    write_jsonl(workspace / "alpaca.jsonl", [{"instruction": "river"}])
    ended, output = answer("other", f"--prompts={workspace / 'alpaca.jsonl'}")
    assert ended.status == 2
    assert "is no question of mt-bench's, but one of alpacaeval2's" in ended.printed
    assert "Traceback" not in ended.printed
    assert not output.exists()


def test_settings_that_are_given_no_model_end_with_status_2_and_its_placeholder(server, workspace):
    words = (f"--prompts={workspace / 'question.jsonl'}", f"--output={workspace / 'none.jsonl'}")
    ended = server.run(SETTINGS, *words, "--use_cpu", method=GENERATE)
    assert ended.status == 2
    assert "(give --model)" in ended.printed
    assert "Traceback" not in ended.printed


@pytest.mark.parametrize("preprocessing", ["published", "exact"])
def test_a_runs_own_recipe_tells_whether_it_was_trained_behind_an_empty_system_turn(server, tmp_path, preprocessing):
    save_workspace(tmp_path, 2, 1, initializer_range=0.1)
    changes = {
        "preprocessing": preprocessing,
        "use_peft": False,
        "num_train_epochs": 1,
        "do_eval": False,
        "eval_strategy": "no",
    }
    ended = server.run(recipe_of_run(tmp_path, tmp_path, RECIPE, changes))
    assert ended.status == 0, ended.printed
    assert training_of(str(tmp_path / "run")).behind_system_turn == (preprocessing == "published")
