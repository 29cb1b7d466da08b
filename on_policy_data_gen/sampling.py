"""What is asked of a model: prompts as token ids with one bos, how to sample, where to stop. Engines answer in any order."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from alignment.data.chat import with_empty_system_turn
from alignment.data.prompts import Prompt, as_read
from alignment.data.splits import templated_tokenizer
from alignment.errors import UserError
from alignment.model.endings import end_of_turn
from alignment.model.loading import positions, weights_source
from alignment.run.checkpoints import training_of

from .configs import PolicyArguments

logger = logging.getLogger(__name__)

AT_A_TIME = 1000  # texts that are tokenized together


class Sampling(NamedTuple):
    """How a response is drawn; stop_ids end one and are not part of its text."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_ids: list[int]


class Request(NamedTuple):
    """A prompt as the model reads it. max_tokens: what its response may take, so that both fit the model."""

    id: str
    text: str
    ids: list[int]
    max_tokens: int


class Answer(NamedTuple):
    """A response. finish_reason: stop, or length where it was cut at max_tokens."""

    id: str
    text: str
    tokens: int
    finish_reason: str


class Engine(Protocol):
    """What generates. sampling may be another between two calls of answers."""

    sampling: Sampling

    def answers(self, requests: Sequence[Request], seed: int) -> Iterator[Answer]: ...

    def close(self) -> None: ...


def policy_tokenizer(args: PolicyArguments) -> PreTrainedTokenizerBase:
    """The policy's tokenizer with its chat template: the saved one, unless the arguments name another."""
    return templated_tokenizer(args.model_arguments(), args.data_arguments(), preprocessing="exact")


def sampling_of(args: PolicyArguments, tokenizer: PreTrainedTokenizerBase) -> Sampling:
    return Sampling(args.temperature, args.top_p, args.top_k, args.max_tokens, stop_ids(args, tokenizer))


def stop_ids(args: PolicyArguments, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's eos, the end of a turn in its template, and what the model's generation_config.json names."""
    source = weights_source(args.model_arguments())
    try:
        named = GenerationConfig.from_pretrained(source.name, revision=source.revision).eos_token_id
    except OSError:
        named = None
    ids = [tokenizer.eos_token_id, end_of_turn(tokenizer), *(named if isinstance(named, list) else [named])]
    return [number for number in dict.fromkeys(ids) if number is not None]


def adds_system_turn(args: PolicyArguments) -> bool:
    """Whether the policy is asked behind an empty system turn, as it was trained."""
    return args.chat_template is None and training_of(args.model).behind_system_turn


def asking(policy: PolicyArguments, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> Callable[..., list[Request]]:
    """`make_requests` of prompts for this policy: as long as it has positions, behind what it was trained behind."""
    return partial(
        make_requests,
        tokenizer=tokenizer,
        max_tokens=sampling.max_tokens,
        window=positions(policy.model_arguments()),
        add_system=adds_system_turn(policy),
    )


def make_requests(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    window: int | None,
    date: str,
    add_system: bool = False,
    quiet: bool = False,
) -> list[Request]:
    """A request for every prompt that leaves room for a response; a log line counts the others.

    date: what a template's clock shows. add_system: as `adds_system_turn` says.
    Raises UserError for a prompt that the template cannot write, or if none has room.
    """
    requests, too_long = [], 0
    if add_system:
        template = tokenizer.get_chat_template()
        prompts = [prompt._replace(turns=with_empty_system_turn(prompt.turns, template)) for prompt in prompts]
    for start in tqdm(range(0, len(prompts), AT_A_TIME), desc="Rendering prompts", disable=quiet or len(prompts) < AT_A_TIME):
        part = prompts[start : start + AT_A_TIME]
        for prompt, (text, ids) in zip(part, as_read(part, tokenizer, date=date), strict=True):
            room = max_tokens if window is None else min(max_tokens, window - len(ids))
            if room > 0:
                requests.append(Request(prompt.id, text, ids, room))
            else:
                too_long += 1
    if not requests:
        raise UserError(f"no prompt leaves room for a response: the model has {window:,} positions")
    if too_long:
        logger.info("left out: %s prompts that fill the model's %s positions.", f"{too_long:,}", f"{window:,}")
    return requests
