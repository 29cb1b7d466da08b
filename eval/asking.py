"""Questions -> responses, turn by turn, each kept as it comes."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from alignment.data.chat import with_empty_system_turn
from alignment.data.prompts import Prompt
from alignment.data.template import Turns
from alignment.errors import UserError
from alignment.model.loading import positions
from alignment.report.review.reading import read_yaml
from alignment.run.checkpoints import RECIPE_FILE
from on_policy_data_gen.configs import PolicyArguments
from on_policy_data_gen.engines import open_engine
from on_policy_data_gen.responses import sample
from on_policy_data_gen.sampling import Engine, Request, Sampling, make_requests, policy_tokenizer, sampling_of
from on_policy_data_gen.stages import Stage

from .benchmarks import Question
from .settings import EvaluationArguments


@dataclass
class Examination:
    """Who is asked what, and how."""

    questions: Sequence[Question]
    policy: PolicyArguments
    args: EvaluationArguments

    def __post_init__(self) -> None:
        self.tokenizer: PreTrainedTokenizerBase = policy_tokenizer(self.policy)
        self.sampling: Sampling = sampling_of(self.policy, self.tokenizer)
        self.window = positions(self.policy.model_arguments())
        self.adds_system_turn = self.policy.chat_template is None and trained_behind_system_turn(self.policy.model)

    def temperature(self, question: Question) -> float:
        return float((self.args.category_temperatures or {}).get(question.category, self.sampling.temperature))


def trained_behind_system_turn(model: str) -> bool:
    """Whether this run, or checkpoint of one, put an empty system turn in front where its template knows that role.

    Published preprocessing does, and the template that such a run saves does not.
    """
    keys = read_yaml(Path(model, RECIPE_FILE))
    return keys.get("preprocessing") == "published" and keys.get("auto_insert_empty_system_msg") is True


def respond(begun: Stage, exam: Examination) -> None:
    """Keep a response to every turn of every question; the model is loaded only if one is missing."""
    engine: Engine | None = None
    try:
        for turn in range(max(len(question.turns) for question in exam.questions)):
            said = everyones_texts(begun)
            for temperature, group in requests_of(turn, exam, said, begun.date).items():
                missing = sorted((one for one in group if one.id not in said), key=lambda one: -len(one.ids))
                if not missing:
                    continue
                engine = engine or open_engine(exam.policy, exam.tokenizer, exam.sampling)
                engine.sampling = exam.sampling._replace(temperature=temperature)
                what = f"Turn {turn + 1}, temperature {temperature:g}"
                sample(begun, engine, missing, exam.args.seed, total=len(group), what=what)
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


def requests_of(turn: int, exam: Examination, said: dict[str, str], date: str) -> dict[float, list[Request]]:
    """What is asked in a turn, by temperature. said: the responses so far.

    Raises UserError if the first turn of a question leaves no room for a response.
    """
    conversations = [(one, turns) for one in exam.questions if (turns := conversation(one, turn, said))]
    if exam.adds_system_turn:
        template = exam.tokenizer.get_chat_template()
        conversations = [(one, with_empty_system_turn(turns, template)) for one, turns in conversations]
    prompts = [Prompt(turn_id(one, turn), turns) for one, turns in conversations]
    requests = make_requests(
        prompts, exam.tokenizer, max_tokens=exam.sampling.max_tokens, window=exam.window, date=date, quiet=True
    )
    if turn == 0:
        refuse_without_room(exam, requests)
    temperatures = {turn_id(one, turn): exam.temperature(one) for one in exam.questions}
    groups: dict[float, list[Request]] = defaultdict(list)
    for request in requests:
        groups[temperatures[request.id]].append(request)
    return groups


def turn_id(question: Question, turn: int) -> str:
    return f"{question.id} turn {turn + 1}"


def conversation(question: Question, turn: int, said: dict[str, str]) -> Turns | None:
    """The turns up to this one, with the responses between them; None where a question has no such turn, or no response."""
    earlier = [turn_id(question, number) for number in range(turn)]
    if turn >= len(question.turns) or any(key not in said for key in earlier):
        return None
    turns: Turns = []
    for text, key in zip(question.turns, earlier, strict=False):
        turns += [{"role": "user", "content": text}, {"role": "assistant", "content": said[key].strip()}]
    return [*turns, {"role": "user", "content": question.turns[turn]}]


def refuse_without_room(exam: Examination, requests: Sequence[Request]) -> None:
    fitting = {request.id for request in requests}
    without = [number for number, question in enumerate(exam.questions, 1) if turn_id(question, 0) not in fitting]
    if without:
        raise UserError(
            f"{len(without)} of {len(exam.questions)} questions leave no room for an answer (the first is number "
            f"{without[0]}): the model has {exam.window:,} positions, and a judge compares answers to every question"
        )
