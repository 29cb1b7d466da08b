"""Questions -> responses, turn by turn, kept as they come -> the file that a judge reads."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from alignment.data.template import Turns
from alignment.errors import UserError
from alignment.run.run_folder import today
from on_policy_data_gen.configs import PolicyArguments, PromptArguments
from on_policy_data_gen.engines import check_engine, open_engine
from on_policy_data_gen.prompts import Prompt
from on_policy_data_gen.responses import sample, stage_settings
from on_policy_data_gen.sampling import Engine, Request, Sampling, make_requests, policy_tokenizer, positions, sampling_of
from on_policy_data_gen.stages import Row, Stage, finish, stage, write_lines, write_rows

from .benchmarks import FORMATS, Answered, Question, read_questions
from .settings import EvaluationArguments

logger = logging.getLogger(__name__)

Count = Callable[[str], int]
"""Tokens of a text."""


def evaluate(policy: PolicyArguments, args: EvaluationArguments) -> None:
    """Answer every question of the benchmark. Killed, the same command goes on; finished, it does nothing."""
    check_engine(policy)
    questions = read_questions(Path(args.prompts), args.benchmark)
    tokenizer, output = policy_tokenizer(policy), Path(args.output)
    count = token_counter(args.token_counter, tokenizer)
    sampling, window = sampling_of(policy, tokenizer), positions(policy)
    settings = all_settings(policy, args, questions, tokenizer, sampling)
    with stage(output.parent, output.stem, settings, date=today(), makes=[output]) as begun:
        if begun is None:
            logger.info("%s: is finished.", output)
            return
        respond(begun, questions, tokenizer, sampling, window, policy, args)
        finish(begun, lambda: write_answers(output, begun, questions, args, count))


def all_settings(
    policy: PolicyArguments,
    args: EvaluationArguments,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
) -> dict[str, Any]:
    """What the answers depend on, as the stages of on-policy data keep it."""
    asked = PromptArguments(data_dir=args.prompts)
    own = {"benchmark": args.benchmark, "generator": args.model_name(), "seed": args.seed}
    own |= {"category_temperatures": args.category_temperatures, "token_counter": args.token_counter}
    return {**own, **stage_settings(asked, policy, [Prompt(one.id, []) for one in questions], tokenizer, sampling)}


# ---- Responses ----


def respond(
    begun: Stage,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    window: int | None,
    policy: PolicyArguments,
    args: EvaluationArguments,
) -> None:
    """Keep a response to every turn of every question; the model is loaded only if one is missing."""
    engine: Engine | None = None
    try:
        for turn in range(max(len(question.turns) for question in questions)):
            said = everyones_texts(begun)
            prompts = [Prompt(turn_id(one, turn), turns) for one in questions if (turns := conversation(one, turn, said))]
            requests = make_requests(
                prompts, tokenizer, max_tokens=sampling.max_tokens, window=window, date=begun.date, quiet=True
            )
            if turn == 0:
                refuse_without_room(questions, requests, window)
            for temperature, group in by_temperature(questions, requests, turn, args, sampling).items():
                missing = sorted((one for one in group if one.id not in said), key=lambda one: -len(one.ids))
                if not missing:
                    continue
                engine = engine or open_engine(policy, tokenizer, sampling)
                engine.sampling = sampling._replace(temperature=temperature)
                what = f"Turn {turn + 1}, temperature {temperature:g}"
                sample(begun, engine, missing, args.seed, total=len(group), what=what)
    finally:
        if engine is not None:
            engine.close()


def everyones_texts(begun: Stage) -> dict[str, str]:
    """What all processes have kept, the same on each: none goes on before every one has read it."""
    state = PartialState()
    state.wait_for_everyone()
    said = {row["prompt_id"]: row["text"] for row in begun.rows()}
    state.wait_for_everyone()
    return said


def turn_id(question: Question, turn: int) -> str:
    return f"{question.id} turn {turn + 1}"


def conversation(question: Question, turn: int, said: dict[str, str]) -> Turns | None:
    """The turns up to this one, with the responses between them; None where a question has no such turn, or no response."""
    earlier = [turn_id(question, number) for number in range(turn)]
    if turn >= len(question.turns) or any(key not in said for key in earlier):
        return None
    turns: Turns = []
    for text, key in zip(question.turns, [*earlier, None], strict=False):
        turns.append({"role": "user", "content": text})
        if key is not None:
            turns.append({"role": "assistant", "content": said[key].strip()})
    return turns


def refuse_without_room(questions: Sequence[Question], requests: Sequence[Request], window: int | None) -> None:
    fitting = {request.id for request in requests}
    without = [number for number, question in enumerate(questions, 1) if turn_id(question, 0) not in fitting]
    if without:
        raise UserError(
            f"{len(without)} of {len(questions)} questions leave no room for an answer (the first is number {without[0]}): the "
            f"model has {window:,} positions, and a judge compares answers to every question"
        )


def by_temperature(
    questions: Sequence[Question], requests: Sequence[Request], turn: int, args: EvaluationArguments, sampling: Sampling
) -> dict[float, list[Request]]:
    own = args.category_temperatures or {}
    temperatures = {turn_id(one, turn): float(own.get(one.category, sampling.temperature)) for one in questions}
    groups: dict[float, list[Request]] = defaultdict(list)
    for request in requests:
        groups[temperatures[request.id]].append(request)
    return groups


# ---- The file ----


def write_answers(
    output: Path, begun: Stage, questions: Sequence[Question], args: EvaluationArguments, count: Count
) -> dict[str, Any]:
    """In the questions' order. A turn that had no room left for a response has an empty one, and is counted."""
    rows = {row["prompt_id"]: row for row in begun.rows()}
    format_, now = FORMATS[args.benchmark], time.time()
    answers = []
    for question in questions:
        texts = [rows[key]["text"] if (key := turn_id(question, turn)) in rows else "" for turn in range(len(question.turns))]
        answers.append(format_.answer(Answered(question, texts, args.model_name(), count(texts[0]), now)))
    (write_rows if format_.ending == ".json" else write_lines)(output, answers)
    counts = answer_counts(questions, rows)
    logger.info("%s: %s.", output, ", ".join(f"{number:,} {what}" for what, number in counts.items()))
    return counts


def answer_counts(questions: Sequence[Question], rows: dict[str, Row]) -> dict[str, int]:
    return {
        "questions": len(questions),
        "responses": len(rows),
        "cut at max_tokens or at the model's last position": sum(row["finish_reason"] == "length" for row in rows.values()),
        "empty": sum(not row["text"].strip() for row in rows.values()),
        "turns without room for a response": sum(len(question.turns) for question in questions) - len(rows),
    }


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
