"""The formats of three benchmarks: questions as they are published, answers as their judges read them.

AlpacaEval: alpaca-eval 0.6.6. Arena-Hard: arena-hard-auto since v2, for v0.1 too. MT-Bench: fschat 0.2.36.
"""

import hashlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from alignment.data.prompts import parsed, records_of
from alignment.errors import UserError

from .markdown import markdown_counts

Row = dict[str, Any]


class Question(NamedTuple):
    """What is asked, in turns. id: of its place or name and its words, the same in every run."""

    id: str
    turns: list[str]
    category: str | None
    row: Row


class Answered(NamedTuple):
    """A question with its responses, one for each turn, as they were generated."""

    question: Question
    responses: list[str]
    model: str
    tokens: int
    time: float


class Format(NamedTuple):
    """One benchmark: how its questions are known and read, and what a row of answers is."""

    published_as: str
    ending: str
    fits: Callable[[Row], bool]
    name: Callable[[Row], str | None]
    turns: Callable[[Row], list[str]]
    answer: Callable[[Answered], Row]


def alpacaeval_row(answered: Answered) -> Row:
    """White space around a response goes, as in alpaca-eval's own generation; the instruction stays as it is."""
    (response,) = answered.responses
    return {
        "instruction": answered.question.turns[0],
        "output": response.strip(),
        "generator": answered.model,
        **{key: answered.question.row[key] for key in ("dataset",) if key in answered.question.row},
    }


def arenahard_row(answered: Answered) -> Row:
    (response,) = answered.responses
    return {
        "uid": answered.question.row["uid"],
        "ans_id": answer_id(answered),
        "model": answered.model,
        "messages": [
            {"role": "user", "content": answered.question.turns[0]},
            {"role": "assistant", "content": {"answer": response}},
        ],
        "tstamp": answered.time,
        "metadata": {"token_len": answered.tokens, **markdown_counts(response)},
    }


def mtbench_row(answered: Answered) -> Row:
    return {
        "question_id": answered.question.row["question_id"],
        "answer_id": answer_id(answered),
        "model_id": answered.model,
        "choices": [{"index": 0, "turns": [response.strip() for response in answered.responses]}],
        "tstamp": answered.time,
    }


def answer_id(answered: Answered) -> str:
    return uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([answered.model, answered.question.id, answered.responses])).hex


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, str) for entry in value)


FORMATS = {
    "alpacaeval2": Format(
        published_as="alpaca_eval.json or alpaca_eval_gpt4_baseline.json, a list of rows with an instruction",
        ending=".json",
        fits=lambda row: isinstance(row.get("instruction"), str),
        name=lambda row: None,
        turns=lambda row: [row["instruction"]],
        answer=alpacaeval_row,
    ),
    "arenahard": Format(
        published_as="question.jsonl of arena-hard-v0.1 or arena-hard-v2.0, rows with a uid and a prompt",
        ending=".jsonl",
        fits=lambda row: isinstance(row.get("uid"), str) and isinstance(row.get("prompt"), str),
        name=lambda row: row["uid"],
        turns=lambda row: [row["prompt"]],
        answer=arenahard_row,
    ),
    "mt-bench": Format(
        published_as="FastChat's mt_bench/question.jsonl, rows with a question_id, a category and turns of text",
        ending=".jsonl",
        fits=lambda row: "question_id" in row and isinstance(row.get("category"), str) and is_texts(row.get("turns")),
        name=lambda row: str(row["question_id"]),
        turns=lambda row: row["turns"],
        answer=mtbench_row,
    ),
}


def read_questions(path: Path, benchmark: str) -> list[Question]:
    """The questions of a file, in its order. Raises UserError for a file of another format, or without questions."""
    wanted = FORMATS[benchmark]
    if not path.is_file():
        raise UserError(f"prompts = {str(path)!r}: no such file; give {wanted.published_as}")
    questions: list[Question] = []
    names: set[str] = set()
    for text, place in records_of(path):
        row = parsed(text, place)
        if not wanted.fits(row):
            raise UserError(f"{place}: is no question of {benchmark}'s{likely(row)}; give {wanted.published_as}")
        name = wanted.name(row) or str(len(questions))
        if name in names:
            raise UserError(f"{place}: a second question {name}; the judge knows questions by this name")
        names.add(name)
        turns = wanted.turns(row)
        words = hashlib.sha256(json.dumps([name, *turns]).encode()).hexdigest()
        questions.append(Question(f"{name} {words[:16]}", turns, row.get("category"), row))
    if not questions:
        raise UserError(f"prompts = {str(path)!r}: holds no questions; give {wanted.published_as}")
    return questions


def likely(row: Row) -> str:
    """What a row seems to be instead."""
    other = next((name for name, format_ in FORMATS.items() if format_.fits(row)), None)
    if other is not None:
        return f", but one of {other}'s"
    if isinstance(row.get("turns"), list) and "cluster" in row:
        return ", but one of Arena-Hard's older files, without uid"
    return f" (it has {', '.join(row)})"
