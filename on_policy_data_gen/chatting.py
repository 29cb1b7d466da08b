"""Behind scripts/generate.py: a conversation on a terminal, or a file of prompts answered into JSONL."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import TextStreamer

from alignment.data.prompts import prompt_of
from alignment.data.template import Turns
from alignment.errors import Problem, UserError
from alignment.recipe.values import expanded
from alignment.run.run_folder import today

from .configs import PolicyArguments, PromptArguments, path_problems, refuse
from .engines import check_engine, open_engine
from .in_process import TransformersEngine
from .prompts import read_prompts
from .responses import sample, stage_settings
from .sampling import asking, policy_tokenizer, sampling_of
from .stages import finish, stage, write_lines


@dataclass
class GenerateArguments:
    """A file in and a file out, or neither: a conversation."""

    input: str | None = field(default=None, metadata={"help": "Prompts to answer: what --data_dir of decode.py takes."})
    output: str | None = field(default=None, metadata={"help": "JSONL of the responses, with their prompts."})
    prompt_split: str | None = field(default=None, metadata={"help": "Split of the input; null as in decode.py."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the input; null as in decode.py."})
    system: str | None = field(default=None, metadata={"help": "System turn that a conversation begins with."})
    seed: int = field(default=42, metadata={"help": "Seed; each prompt's own is derived from it."})

    def __post_init__(self) -> None:
        problems = path_problems(self, "input") + path_problems(self, "output", expand=expanded)
        if (self.input is None) != (self.output is None):
            given, missing = ("input", "output") if self.output is None else ("output", "input")
            problems.append(Problem(given, getattr(self, given), f"needs {missing} too"))
        if self.system is not None and self.input is not None:
            problems.append(Problem("system", self.system, "is for a conversation; put it into the prompts of input"))
        refuse(self, problems)


def generate(policy: PolicyArguments, args: GenerateArguments) -> None:
    check_engine(policy)
    if args.input is None:
        chat(policy, args)
    else:
        answer_file(policy, args)


def answer_file(policy: PolicyArguments, args: GenerateArguments) -> None:
    """A row for each prompt of the input that there is room for, in its order: prompt_id, messages, tokens, finish_reason."""
    asked = PromptArguments(data_dir=args.input, prompt_split=args.prompt_split, prompt_column=args.prompt_column)
    tokenizer, prompts, output = policy_tokenizer(policy), read_prompts(asked), Path(args.output)
    sampling = sampling_of(policy, tokenizer)
    settings = {"seed": args.seed, **stage_settings(asked, policy, prompts, tokenizer, sampling)}
    with stage(output.parent, output.stem, settings, date=today(), makes=[output]) as begun:
        if begun is None:
            return
        requests = asking(policy, tokenizer, sampling)(prompts, date=begun.date)
        done = begun.everyones()
        missing = [request for request in requests if request.id not in done]
        if missing:
            engine = open_engine(policy, tokenizer, sampling)
            try:
                sample(begun, engine, missing, args.seed, total=len(requests), what="Generating")
            finally:
                engine.close()

        def write() -> None:
            answers = {row["prompt_id"]: row for row in begun.rows()}
            write_lines(
                output,
                (
                    {
                        "prompt_id": prompt.id,
                        "messages": [*prompt.turns, {"role": "assistant", "content": answers[prompt.id]["text"]}],
                        "tokens": answers[prompt.id]["tokens"],
                        "finish_reason": answers[prompt.id]["finish_reason"],
                    }
                    for prompt in prompts
                    if prompt.id in answers
                ),
            )

        finish(begun, write)


def chat(policy: PolicyArguments, args: GenerateArguments) -> None:
    """Until the input ends, or an empty line. /new begins another conversation. Tokens appear as they are drawn."""
    if PartialState().num_processes > 1:
        raise UserError("a conversation is held by one process; start one")
    tokenizer = policy_tokenizer(policy)
    sampling = sampling_of(policy, tokenizer)
    requests_of, engine = asking(policy, tokenizer, sampling), open_engine(policy, tokenizer, sampling)
    streams = isinstance(engine, TransformersEngine) and sys.stdout.isatty()
    options = {"streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)} if streams else {}
    opening: Turns = [] if args.system is None else [{"role": "system", "content": args.system}]
    turns = [*opening]
    try:
        for said in user_lines():
            if said == "/new":
                turns = [*opening]
                continue
            turns.append({"role": "user", "content": said})
            (request,) = requests_of([prompt_of(turns)], date=today(), quiet=True)
            (answer,) = engine.answers([request], args.seed, **options)
            if not streams:
                print(answer.text, flush=True)
            turns.append({"role": "assistant", "content": answer.text})
    finally:
        engine.close()


def user_lines() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()
