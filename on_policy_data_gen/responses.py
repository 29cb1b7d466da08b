"""The first stage: a response of the policy to every prompt, once for each seed, in output_SEED.json."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from alignment.data.prompts import Prompt, as_published
from alignment.model.adapters import start_identity
from alignment.run.run_folder import today

from .configs import PolicyArguments, PromptArguments
from .engines import check_engine, open_engine
from .prompts import read_prompts
from .sampling import Engine, Request, Sampling, adds_system_turn, asking, policy_tokenizer, sampling_of
from .stages import FOLDER, Stage, finish, read_record, share, stage, write_rows

logger = logging.getLogger(__name__)

# Settings that say how fast the rows come, and on what, and not what is in them.
INDIFFERENT = (
    "batch_size", "vllm_python", "vllm_options", "tensor_parallel", "data_parallel", "server", "served_model", "concurrency",
    "use_cpu",
)  # fmt: skip


def output_file(output: Path, seed: int) -> Path:
    return output / f"output_{seed}.json"


def decode(prompt_args: PromptArguments, policy_args: PolicyArguments, seeds: Sequence[int], output: Path) -> None:
    """Sample for each seed what is not there yet. The model is loaded once, and only if something is missing."""
    check_engine(policy_args)
    tokenizer = policy_tokenizer(policy_args)
    sampling, prompts = sampling_of(policy_args, tokenizer), read_prompts(prompt_args)
    requests_of = asking(policy_args, tokenizer, sampling)
    known = stage_settings(prompt_args, policy_args, prompts, tokenizer, sampling)
    engine = None
    try:
        for seed in seeds:
            final = output_file(output, seed)
            with stage(output, final.stem, {"seed": seed, **known}, date=today(), makes=[final]) as begun:
                if begun is None:
                    logger.info("%s: is finished.", final)
                    continue
                requests = requests_of(prompts, date=begun.date)
                done = begun.everyones()
                missing = sorted((one for one in requests if one.id not in done), key=lambda one: -len(one.ids))
                if missing and engine is None:
                    engine = open_engine(policy_args, tokenizer, sampling)
                if missing:
                    sample(begun, engine, missing, seed, total=len(requests), what=f"Sampling, seed {seed}")
                finish(begun, lambda: write_responses(final, begun, prompts, requests))  # noqa: B023 (called before the next)
                logger.info("%s: %s responses.", final, f"{len(requests):,}")
    finally:
        if engine is not None:
            engine.close()


def sample(begun: Stage, engine: Engine, missing: Sequence[Request], seed: int, *, total: int, what: str) -> None:
    """This process's share of what is missing, each answer kept as it comes. total: of all requests, for the progress bar."""
    answers = (answer._asdict() for answer in engine.answers(share(missing), seed))
    rows = ({"prompt_id": answer.pop("id"), **answer} for answer in answers)
    begun.keep(rows, done=total - len(missing), total=total, what=what)


def stage_settings(
    prompt_args: PromptArguments,
    policy_args: PolicyArguments,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
) -> dict[str, Any]:
    """What the responses depend on: everything that was asked for, the very prompts, the very model and template."""
    asked = {key: value for key, value in {**asdict(prompt_args), **asdict(policy_args)}.items() if key not in INDIFFERENT}
    return {
        **asked,
        "engine": "server" if policy_args.server else policy_args.engine,
        "stop_ids": sampling.stop_ids,
        "prompts_sha256": sha256([prompt.id for prompt in prompts]),
        "template_sha256": sha256(tokenizer.chat_template),
        **({"empty_system_turn": True} if adds_system_turn(policy_args) else {}),
        "model_identity": start_identity(policy_args.model_arguments()),
    }


def sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def write_responses(final: Path, begun: Stage, prompts: Sequence[Prompt], requests: Sequence[Request]) -> dict[str, Any]:
    """The published file, in the prompts' order, with each prompt's id and how its response ended."""
    answers = {row["prompt_id"]: row for row in begun.rows()}
    texts = {request.id: request.text for request in requests}
    asked = [prompt for prompt in prompts if prompt.id in texts]
    write_rows(
        final,
        (
            {
                "prompt_id": prompt.id,
                "prompt": as_published(prompt),
                "format_prompt": texts[prompt.id],
                "generated_text": answers[prompt.id]["text"],
                "tokens": answers[prompt.id]["tokens"],
                "finish_reason": answers[prompt.id]["finish_reason"],
            }
            for prompt in asked
        ),
    )
    cut = sum(answers[prompt.id]["finish_reason"] == "length" for prompt in asked)
    return {
        "prompts": len(prompts),
        "too_long": len(prompts) - len(asked),
        "responses": len(asked),
        "cut_at_max_tokens": cut,
        "processes": PartialState().num_processes,
    }


def sampling_records(output: Path) -> dict[str, Any]:
    """What is known of the files output*.json in a folder: by name, the settings and the result of the stage that made it."""
    names = sorted(path.stem for path in output.glob("output*.json"))
    records = {name: read_record(output / FOLDER, name) for name in names}
    return {name: {key: record[key] for key in ("date", "settings", "result")} for name, record in records.items() if record}
