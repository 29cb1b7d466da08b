"""Every response scored by the reward model, on all devices of the launch, in _rm.json."""

import hashlib
import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState

from alignment.data.prompts import Prompt, as_published
from alignment.data.template import Turns
from alignment.errors import TrainingStopped, UserError
from alignment.model.adapters import weights_fingerprint
from alignment.model.loading import Source, pinned
from alignment.run.run_folder import today

from .configs import RewardArguments
from .joining import EMPTY
from .prompts import stage_rows, texts_of
from .reward_models import RewardModel, load_reward_model, reward_config
from .stages import Stage, finish, share, stage, write_rows

logger = logging.getLogger(__name__)

WINDOW = 32  # batches whose conversations are sorted by length together


class Scored(NamedTuple):
    """A prompt, its responses, and their rewards where they are known."""

    prompt: Prompt
    responses: list[str]
    rewards: list[float | None] | None


def read_responses(file: Path) -> tuple[list[Scored], Counter]:
    """The rows of all_outputs.json, or of a file that has rewards too. Empty responses are left out and counted."""
    rows, counts, seen = [], Counter(), set()
    for row, prompt, place in stage_rows(file):
        responses = texts_of(row, "all_generated_responses", place)
        rewards = row.get("all_rm_scores")
        if rewards is not None and not (
            isinstance(rewards, list) and len(rewards) == len(responses) and all(map(is_reward, rewards))
        ):
            raise UserError(
                f"{place}: all_rm_scores needs a finite number, or null, for each of its {len(responses)} responses"
            )
        if prompt.id in seen:
            raise UserError(f"{place}: its prompt stands in an earlier row too; put their responses together")
        seen.add(prompt.id)
        spoken = [number for number, response in enumerate(responses) if response.strip()]
        counts[EMPTY] += len(responses) - len(spoken)
        kept = None if rewards is None else [rewards[number] for number in spoken]
        rows.append(Scored(prompt, [responses[number] for number in spoken], kept))
    if not rows:
        raise UserError(f"{file}: has no rows")
    return rows, +counts


def is_reward(value: Any) -> bool:
    """A finite number, or null for a response that has none."""
    return value is None or (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )


def score(args: RewardArguments, rows: list[Scored], stem: str, output: Path) -> list[Scored]:
    """The rows with their rewards, from the stage's file where an earlier command left them."""
    reward_config(args)  # refuses what is no model before anything is written
    final = output / f"{stem}_rm.json"
    settings = {
        **{key: value for key, value in asdict(args).items() if key != "reward_batch_size"},
        "reward_model_identity": reward_identity(args),
        "responses_sha256": responses_hash(rows),
    }
    with stage(output, final.stem, settings, date=today(), makes=[final]) as begun:
        if begun is not None:
            done = begun.everyones()
            missing = share([row for row in rows if row.prompt.id not in done])
            if missing:
                model = load_reward_model(args, PartialState().device)
                begun.keep(scored_rows(model, missing, args.reward_batch_size), done=len(done), total=len(rows), what="Scoring")
            finish(begun, lambda: write_rewards(final, begun, rows))
        else:
            logger.info("%s: is finished.", final)
    return read_responses(final)[0]


def reward_identity(args: RewardArguments) -> str:
    source = pinned(Source(args.reward_model, args.reward_revision))
    return source.revision or weights_fingerprint(Path(source.name))


def responses_hash(rows: Sequence[Scored]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt.id, row.responses]).encode())
    return digest.hexdigest()


def scored_rows(model: RewardModel, rows: Sequence[Scored], batch_size: int) -> Iterator[dict[str, Any]]:
    """A row for each prompt, once all of its responses have a score; null for those that are too long to have one."""
    for group in groups(rows, WINDOW * batch_size):
        conversations = [conversation(row.prompt, response) for row in group for response in row.responses]
        ids = model.encode(conversations)
        fitting = [number for number, row in enumerate(ids) if len(row) <= model.window]
        values = dict(zip(fitting, model.scores([ids[number] for number in fitting], batch_size=batch_size), strict=True))
        rewards = iter(values.get(number) for number in range(len(ids)))
        for row in group:
            own = [next(rewards) for _ in row.responses]
            if any(reward is not None and not math.isfinite(reward) for reward in own):
                raise TrainingStopped(
                    f"the reward model gives {own} for the responses to {as_published(row.prompt)!r:.80}; try another "
                    "--reward_dtype"
                )
            yield {"prompt_id": row.prompt.id, "rewards": own}


def groups(rows: Sequence[Scored], size: int) -> Iterator[list[Scored]]:
    """Rows together that have `size` responses or a few more."""
    group: list[Scored] = []
    for row in rows:
        group.append(row)
        if sum(len(one.responses) for one in group) >= size:
            yield group
            group = []
    if group:
        yield group


def conversation(prompt: Prompt, response: str) -> Turns:
    return [*prompt.turns, {"role": "assistant", "content": response}]


def write_rewards(final: Path, begun: Stage, rows: Sequence[Scored]) -> None:
    rewards = {row["prompt_id"]: row["rewards"] for row in begun.rows()}
    write_rows(final, (published_row(row, rewards[row.prompt.id]) for row in rows))


def published_row(row: Scored, rewards: Sequence[float | None]) -> dict[str, Any]:
    return {
        "prompt_id": row.prompt.id,
        "prompt": as_published(row.prompt),
        "all_generated_responses": row.responses,
        "all_rm_scores": list(rewards),
    }
