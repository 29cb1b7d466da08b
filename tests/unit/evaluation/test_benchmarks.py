"""Files of questions in, files of answers out: the published formats, field by field."""

import json

import pytest

from alignment.errors import ConfigError, UserError
from eval.benchmarks import FORMATS, Answered, read_questions
from eval.markdown import markdown_counts
from eval.settings import EvaluationArguments

ALPACA = [
    {"dataset": "helpful_base", "instruction": "  Why “rivers”?\n\u2028 ", "output": "By rain.", "generator": "gpt4"},
    {"dataset": "koala", "instruction": "Name a mountain.", "output": "Ätna.", "generator": "gpt4"},
]
ARENA = [
    {"uid": "2edbb5f36f5b42be", "category": "hard_prompt", "subcategory": "coding", "prompt": "Write a kettle."},
    {"uid": "ec71c09662a64365", "category": "creative_writing", "subcategory": "x", "prompt": "A poem of 42 lanterns."},
]
MT = [
    {"question_id": 81, "category": "writing", "turns": ["Write of a river.", "Now of a man."]},
    {"question_id": 111, "category": "math", "turns": ["3.14?", "1984?"], "reference": ["yes", "no"]},
]
OLD_ARENA = [
    {"question_id": "328c149ed45a41c0", "category": "arena-hard-v0.1", "cluster": "c", "turns": [{"content": "A kettle."}]}
]
QUESTIONS = {"alpacaeval2": ALPACA, "arenahard": ARENA, "mt-bench": MT}


def write(path, rows):
    as_list = path.suffix == ".json"
    text = json.dumps(rows, ensure_ascii=False) if as_list else "".join(f"{json.dumps(row)}\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def answered(benchmark: str, tmp_path, *responses: str) -> dict:
    question = read_questions(write(tmp_path / "q.json", QUESTIONS[benchmark]), benchmark)[0]
    return FORMATS[benchmark].answer(Answered(question, [*responses], "my-run", 7, 1.5))


def test_an_alpacaeval_row_has_its_instruction_byte_for_byte(tmp_path):
    row = answered("alpacaeval2", tmp_path, " Rain.\n")
    assert row == {"instruction": ALPACA[0]["instruction"], "output": "Rain.", "generator": "my-run", "dataset": "helpful_base"}


def test_an_arena_hard_row_has_todays_fields_and_types(tmp_path):
    row = answered("arenahard", tmp_path, "# Kettle\n\n- **hot**\n")
    assert isinstance(row.pop("ans_id"), str)
    assert row == {
        "uid": "2edbb5f36f5b42be",
        "model": "my-run",
        "messages": [
            {"role": "user", "content": "Write a kettle."},
            {"role": "assistant", "content": {"answer": "# Kettle\n\n- **hot**\n"}},
        ],
        "tstamp": 1.5,
        "metadata": {
            "token_len": 7,
            "header_count": {"h1": 1, "h2": 0, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
            "list_count": {"ordered": 0, "unordered": 1},
            "bold_count": {"**": 1, "__": 0},
        },
    }


def test_an_mt_bench_row_has_one_choice_of_two_turns(tmp_path):
    row = answered("mt-bench", tmp_path, "It flows.", " He goes.")
    assert isinstance(row.pop("answer_id"), str)
    assert row == {
        "question_id": 81,
        "model_id": "my-run",
        "choices": [{"index": 0, "turns": ["It flows.", "He goes."]}],
        "tstamp": 1.5,
    }


def test_answers_to_different_questions_have_different_ids(tmp_path):
    questions = read_questions(write(tmp_path / "q.jsonl", MT), "mt-bench")
    rows = [FORMATS["mt-bench"].answer(Answered(one, ["same", "same"], "my-run", 1, 1.0)) for one in questions]
    assert rows[0]["answer_id"] != rows[1]["answer_id"]


def test_an_instruction_asked_twice_is_answered_twice(tmp_path):
    questions = read_questions(write(tmp_path / "q.json", [ALPACA[0], ALPACA[0]]), "alpacaeval2")
    assert len({question.id for question in questions}) == 2


@pytest.mark.parametrize("benchmark", QUESTIONS)
@pytest.mark.parametrize("given", QUESTIONS)
def test_another_benchmarks_file_is_refused_by_name(benchmark, given, tmp_path):
    path = write(tmp_path / "q.jsonl", QUESTIONS[given])
    if benchmark == given:
        assert len(read_questions(path, benchmark)) == 2
        return
    with pytest.raises(UserError, match=f"q.jsonl, line 1: is no question of {benchmark}'s, but one of {given}'s; give"):
        read_questions(path, benchmark)


@pytest.mark.parametrize(
    ("benchmark", "content", "message"),
    [
        ("arenahard", json.dumps(OLD_ARENA[0]), "one of Arena-Hard's older files, without uid"),
        ("mt-bench", json.dumps(OLD_ARENA[0]), "one of Arena-Hard's older files"),
        ("alpacaeval2", '{"prompt": "x"}', r"\(it has prompt\)"),
        ("alpacaeval2", "[]", "holds no questions"),
        ("alpacaeval2", "instruction,output", "is no JSON"),
        ("mt-bench", "\n".join(json.dumps(MT[0]) for _ in range(2)), "line 2: a second question 81"),
    ],
)
def test_what_is_no_file_of_questions_is_one_error(benchmark, content, message, tmp_path):
    path = tmp_path / "q.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_questions(path, benchmark)


def test_a_missing_file_is_told_with_its_published_name(tmp_path):
    with pytest.raises(UserError, match=r"no such file; give FastChat's mt_bench/question\.jsonl"):
        read_questions(tmp_path / "none.jsonl", "mt-bench")


def test_markdown_is_counted_outside_of_code():
    text = "# One\n### Three\n####no\n1. a\n 2. b\n- c\n* **d** and **e**\n__f__\n```\n# code\n- code\n**code**\n```\n"
    assert markdown_counts(text) == {
        "header_count": {"h1": 1, "h2": 0, "h3": 1, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 2},
        "bold_count": {"**": 2, "__": 1},
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "x.jsonl"}, "must end in .json, or alpacaeval2's judge does not find it"),
        ({"benchmark": "mt-bench", "output": "x.json"}, "must end in .jsonl"),
        ({"benchmark": "arenahard", "output": "x.jsonl", "generator": "y"}, "takes the model's name from the file's, x"),
        ({"benchmark": None}, "benchmark = None: is missing"),
        ({"prompts": None}, "prompts = None: is missing"),
        ({"category_temperatures": {"math": -1.0}}, "category_temperatures.math"),
    ],
)
def test_settings_that_no_judge_could_read_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvaluationArguments(**{"benchmark": "alpacaeval2", "prompts": "q.json", "output": "x.json", **settings})


def test_the_generators_name_is_the_outputs_unless_one_is_given():
    given = {"benchmark": "alpacaeval2", "prompts": "q.json", "output": "out/my-run.json"}
    assert EvaluationArguments(**given).model_name() == "my-run"
    assert EvaluationArguments(**given, generator="Mine").model_name() == "Mine"
