"""Questions -> responses, turn by turn, each kept as it comes."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from alignment.data.prompts import Prompt
from alignment.data.template import Turns
from alignment.errors import UserError
from alignment.model.loading import positions
from on_policy_data_gen.configs import PolicyArguments
from on_policy_data_gen.engines import open_engine
from on_policy_data_gen.responses import sample
from on_policy_data_gen.sampling import Engine, Request, Sampling, adds_system_turn, asking, policy_tokenizer, sampling_of
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
        self.adds_system_turn = adds_system_turn(self.policy)

    def temperature(self, question: Question) -> float:
        return float((self.args.category_temperatures or {}).get(question.category, self.sampling.temperature))


def respond(begun: Stage, exam: Examination) -> None:
    """Keep a response to every turn of every question; the model is loaded only if one is missing."""
    engine: Engine | None = None
    try:
        for turn in range(max(len(question.turns) for question in exam.questions)):
            said = {key: row["text"] for key, row in begun.everyones().items()}
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


def requests_of(turn: int, exam: Examination, said: dict[str, str], date: str) -> dict[float, list[Request]]:
    """What is asked in a turn, by temperature. said: the responses so far.

    Raises UserError if the first turn of a question leaves no room for a response.
    """
    conversations = [(one, turns) for one in exam.questions if (turns := conversation(one, turn, said))]
    prompts = [Prompt(turn_id(one, turn), turns) for one, turns in conversations]
    requests = asking(exam.policy, exam.tokenizer, exam.sampling)(prompts, date=date, quiet=True)
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
