"""Replies to a recipe's prompts before the first step, at each evaluation and at the end: samples.jsonl, and the trackers.

By the forward that trains, on all processes, each with a share of the prompts: no process ever holds a whole model that is
divided.
"""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.chat import with_empty_system_turn
from ..data.prompts import Prompt, as_published, as_read, parsed, prompt_of, records_of, row_seed
from ..data.template import Turns
from ..errors import Problem, UserError, shown
from ..launch.strategy import strategy_of
from ..launch.turns import decided_by_main
from ..model.config_files import whole_model
from ..model.endings import end_of_turn, ends_of
from ..model.generation import replies
from ..model.loading import positions
from ..preference.fidelity import evaluating
from ..recipe.configs import Run
from ..report.review.reading import SAMPLES_FILE
from ..run.durable import DurableTrainer, EvaluationCut
from ..run.records import replace_jsonl
from ..run.trackers import tell_replies

logger = logging.getLogger(__name__)

COLUMNS = ("prompt", "messages")  # of a file's rows
GATHERING = ("zero3", "fsdp1", "fsdp2")  # strategies whose forward gathers parameters, on all processes at once


class Request(NamedTuple):
    """A prompt as the recipe has it and as the model reads it. seed: of its reply, at every step."""

    prompt: str | Turns
    ids: list[int]
    seed: int


# ---- Before a run ----


def prompt_problems(values: SimpleNamespace) -> list[Problem]:
    """A file that is not there; what is in it, and in a list, is read with the tokenizer."""
    given = values.sample_prompts
    if not isinstance(given, str) or not given or Path(given).is_file():
        return []
    return [Problem("sample_prompts", given, "no such file; give a JSON or JSONL file, or a list of prompts")]


def sample_requests(run_: Run, tokenizer: PreTrainedTokenizerBase) -> list[Request]:
    """The recipe's different prompts, in their order. Raises UserError for one that cannot be read, or leaves no room."""
    args = run_.training_args
    if args.sample_prompts is None:
        return []
    given = {prompt.id: (place, prompt) for place, prompt in given_prompts(args.sample_prompts)}
    window, requests = positions(run_.model_args), []
    add_system = args.preprocessing == "published" and run_.data_args.auto_insert_empty_system_msg
    for place, prompt in given.values():
        turns = with_empty_system_turn(prompt.turns, tokenizer.get_chat_template()) if add_system else prompt.turns
        try:
            (_, ids), *_ = as_read([prompt._replace(turns=turns)], tokenizer, date=run_.date)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        if window is not None and len(ids) + args.sample_max_new_tokens > window:
            raise UserError(
                f"{place}: has {len(ids):,} tokens and its reply up to {args.sample_max_new_tokens:,} (sample_max_new_tokens), "
                f"and the model has {window:,} positions; shorten either"
            )
        requests.append(Request(as_published(prompt), ids, row_seed(args.seed, prompt.id)))
    return requests


def given_prompts(given: list[Any] | str) -> Iterator[tuple[str, Prompt]]:
    """Each prompt with its place. Raises UserError for what is none, and for a file without any."""
    if isinstance(given, str):
        entries = [(place, value_of(text, place)) for text, place in records_of(Path(given))]
        if not entries:
            raise UserError(f"sample_prompts = {given!r}: the file has no row")
    else:
        entries = [(f"entry {number} ({shown(value)})", value) for number, value in enumerate(given, start=1)]
    for place, value in entries:
        place = f"sample_prompts = {given!r}: {place}" if isinstance(given, str) else f"sample_prompts: {place}"
        try:
            yield place, prompt_of(value)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error


def value_of(text: bytes, place: str) -> Any:
    row = parsed(text, place)
    column = next((name for name in COLUMNS if name in row), None)
    if column is None:
        raise UserError(f"sample_prompts: {place}: has neither {' nor '.join(COLUMNS)}; it has {', '.join(row) or 'nothing'}")
    return row[column]


# ---- While it trains ----


class Samples(TrainerCallback):
    """Replies to all prompts at a step, as rows of step, prompt, response and tokens. A step's rows are written at once.

    Random numbers, training mode and the model's own settings are left as they were.
    """

    def __init__(self, trainer: DurableTrainer, requests: list[Request]):
        self.trainer, self.requests = trainer, requests
        self.path = Path(trainer.args.output_dir, SAMPLES_FILE)
        self.rows: list[dict[str, Any]] = []  # of the main process
        self.steps: set[int] = set()  # that there are replies of
        self.told: set[int] = set()  # that an attempt before has told the trackers of
        self.is_complete = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """With a model that is divided as it will be trained. As of the checkpoint: what came behind it comes again."""

        def known() -> set[int]:
            resumed = state.global_step > 0 and self.path.is_file()
            rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()] if resumed else []
            self.told = {row["step"] for row in rows}
            self.rows = [row for row in rows if row["step"] <= state.global_step]
            self.write()
            return {row["step"] for row in self.rows}

        self.steps = decided_by_main(known)
        if state.global_step == 0:
            self.sample()

    def sample(self, *, again: bool = False) -> None:
        """Where there are no replies of this step yet; again: also where there are, of other weights, in their place.

        Raises EvaluationCut, and writes nothing, if a process was asked to stop.
        """
        step = self.trainer.state.global_step
        if step in self.steps and not again:
            return
        responses = self.responses()
        self.steps.add(step)
        if not self.trainer.is_world_process_zero():
            return
        decode = self.trainer.processing_class.decode
        rows = [
            {
                "step": step,
                "prompt": request.prompt,
                "response": decode(response, skip_special_tokens=True),
                "tokens": len(response),
            }
            for request, response in zip(self.requests, responses, strict=True)
        ]
        self.rows = [row for row in self.rows if row["step"] != step] + rows
        self.write()
        if step not in self.told or again:
            tell_replies(self.trainer, step, rows)

    def responses(self) -> list[list[int]]:
        """Token ids of each reply, without its end, on all processes."""
        trainer, args, requests = self.trainer, self.trainer.args, self.requests
        policy, tokenizer = whole_model(trainer.bare_model()), trainer.processing_class
        model = trainer._wrap_model(trainer.model, training=False)
        ends = ends_of(policy) or [end for end in (tokenizer.eos_token_id, end_of_turn(tokenizer)) if end is not None]
        by_length = sorted(range(len(requests)), key=lambda number: len(requests[number].ids))  # little padding
        mine, size = by_length[args.process_index :: args.world_size], args.eval_batch_size
        found: dict[int, list[int]] = {}
        shown_here = trainer.is_world_process_zero() and not args.disable_tqdm
        bar = tqdm(total=len(mine), desc="Replying to sample_prompts", unit="prompt", leave=False, disable=not shown_here)
        with bar, evaluating(model), trainer.compute_loss_context_manager():
            for start in range(0, math.ceil(len(requests) / args.world_size), size):
                numbers = mine[start : start + size]
                batch = [requests[number] for number in numbers or by_length[:1]]  # collectives come in equal numbers
                tokens = replies(
                    model, policy, [request.ids for request in batch], ends=ends, pad=tokenizer.pad_token_id,
                    max_new_tokens=args.sample_max_new_tokens, seeds=[request.seed for request in batch],
                    temperature=args.sample_temperature, device=args.device,
                    synced=args.world_size > 1 and strategy_of(trainer.accelerator) in GATHERING,
                )  # fmt: skip
                found |= dict(zip(numbers, tokens, strict=False))  # none of the repeated one
                bar.update(len(numbers))
                if trainer.agree(trainer.stop.received is not None)[0]:
                    raise EvaluationCut
        everywhere = {number: response for part in gather_object([found]) for number, response in part.items()}
        return [everywhere[number] for number in range(len(requests))]

    def write(self) -> None:
        """In one move. A full disk costs rows, and not the run."""
        try:
            replace_jsonl(self.path, self.rows)
        except OSError as error:
            if self.is_complete:
                logger.warning("%s cannot be written (%s) and lacks replies from here on.", self.path, error.strerror)
            self.is_complete = False


def watch_samples(trainer: DurableTrainer, requests: list[Request]) -> Samples | None:
    """Have a trainer reply to them; None where there are none."""
    if not requests:
        return None
    samples = Samples(trainer, requests)
    trainer.add_callback(samples)
    trainer.sample = samples.sample
    return samples


def sample_end(trainer: DurableTrainer, samples: Samples) -> None:
    """Replies of what is saved, which may be other weights than the last step's: rounded, or of the best step.

    Raises EvaluationCut if a process was asked to stop.
    """
    is_rounded = trainer.rounded is not None and bool(trainer.rounded.before)
    is_best = trainer.args.load_best_model_at_end and trainer.state.best_global_step != trainer.state.global_step
    samples.sample(again=is_rounded or is_best)
