"""From a benchmark's questions to the file of answers that its judge reads."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignment.data.prompts import Prompt
from alignment.errors import UserError
from alignment.run.run_folder import today
from on_policy_data_gen.configs import PolicyArguments, PromptArguments
from on_policy_data_gen.engines import check_engine
from on_policy_data_gen.responses import stage_settings
from on_policy_data_gen.stages import Stage, finish, stage, write_lines, write_rows

from .asking import Examination, respond, turn_id
from .benchmarks import FORMATS, Answered, read_questions
from .settings import EvaluationArguments

logger = logging.getLogger(__name__)

Count = Callable[[str], int]
"""Tokens of a text."""


def evaluate(policy: PolicyArguments, args: EvaluationArguments) -> None:
    """Answer every question of the benchmark. Killed, the same command goes on; finished, it does nothing."""
    check_engine(policy)
    exam = Examination(read_questions(Path(args.prompts), args.benchmark), policy, args)
    count, output = token_counter(args.token_counter, exam.tokenizer), Path(args.output)
    with stage(output.parent, output.stem, all_settings(exam), date=today(), makes=[output]) as begun:
        if begun is None:
            logger.info("%s: is finished.", output)
            return
        if exam.adds_system_turn:
            logger.info(
                "%s was trained behind an empty system turn where its template knows one; so it is asked.", policy.model
            )
        respond(begun, exam)
        finish(begun, lambda: write_answers(output, begun, exam, count))


def all_settings(exam: Examination) -> dict[str, Any]:
    """What the answers depend on, as the stages of on-policy data keep it."""
    args, prompts = exam.args, [Prompt(question.id, []) for question in exam.questions]
    return {
        "benchmark": args.benchmark,
        "generator": args.model_name(),
        "seed": args.seed,
        "category_temperatures": args.category_temperatures,
        "token_counter": args.token_counter,
        "adds_system_turn": exam.adds_system_turn,
        **stage_settings(PromptArguments(data_dir=args.prompts), exam.policy, prompts, exam.tokenizer, exam.sampling),
    }


def write_answers(output: Path, begun: Stage, exam: Examination, count: Count) -> dict[str, Any]:
    """In the questions' order. A turn that had no room left for a response has an empty one, and is counted."""
    rows = {row["prompt_id"]: row for row in begun.rows()}
    format_, now = FORMATS[exam.args.benchmark], time.time()
    answers = []
    for question in exam.questions:
        keys = [turn_id(question, turn) for turn in range(len(question.turns))]
        texts = [rows[key]["text"] if key in rows else "" for key in keys]
        answers.append(format_.answer(Answered(question, texts, exam.args.model_name(), count(texts[0]), now)))
    (write_rows if format_.ending == ".json" else write_lines)(output, answers)
    counts = {
        "questions": len(exam.questions),
        "responses": len(rows),
        "cut at max_tokens or at the model's last position": sum(row["finish_reason"] == "length" for row in rows.values()),
        "empty": sum(not row["text"].strip() for row in rows.values()),
        "turns without room for a response": sum(len(question.turns) for question in exam.questions) - len(rows),
    }
    logger.info("%s: %s.", output, ", ".join(f"{number:,} {what}" for what, number in counts.items()))
    return counts


def token_counter(name: str, tokenizer: PreTrainedTokenizerBase) -> Count:
    """Raises UserError where the encoding cannot be had, before anything is generated."""
    if name == "model":
        return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
    advice = "or give --token_counter=model, which counts the model's own tokens"
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(
            f"token_counter = {name!r}: needs the package tiktoken; run `pip install 'simpo-suite[eval]'`, {advice}"
        ) from error
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:  # requests' exceptions are such
        raise UserError(
            f"token_counter = {name!r}: tiktoken has not got this encoding and cannot fetch it ({type(error).__name__}); let "
            f"it do so once, with TIKTOKEN_CACHE_DIR set to a folder that is kept, {advice}"
        ) from error
    return lambda text: len(encoding.encode(text, disallowed_special=()))
