"""`--dry_run`: what a run would be. Raises what the run would raise, and prints the rest."""

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
import yaml
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.prepare import pair_tokens, sequence_lengths
from ..data.sources import TEST, TRAIN
from ..data.splits import DataKind, Prepared, prepared_splits, tokenizer_and_source
from ..errors import TrainingStopped, UserError
from ..launch.launch import launcher_strategy
from ..model.adapter_checks import check_adapters, local_complaints
from ..model.adapters import whole_models
from ..model.loading import FLASH_PACKAGES, WHOLE_WEIGHTS, check_model_path, find_adapter
from ..preference.collate import PackedCollator, PaddedCollator
from ..preference.configs import PairConfig
from ..preference.memory import GIB, estimate
from ..preference.steps import check_token_budget
from ..recipe.configs import Run, RunArguments
from ..recipe.parser import H4ArgumentParser
from ..run.resuming import outlook
from ..run.run_folder import DATE_FILE, today
from ..watch.samples import sample_requests
from .disk import disk_of
from .lengths import conversation_lengths, pair_facts, shared_prompts, spread_of
from .memory import Memory, memory_of, plan_of, sizes_of
from .model import Skeleton, refuse_ids, skeleton_of
from .pitfalls import data_warnings, disk_warnings, setting_warnings
from .report import Report, gib, new_console
from .rows import ShownRow, chosen_rows, place_of, shown_conversation, shown_pair
from .settings import meant, origins
from .shown import LEGEND, MARKS, has_colours, show_row
from .steps import duration_of, schedule_of, speed_of, step_tokens


class WillNotFit(TrainingStopped):
    """A run that would start, and end out of memory."""


def dry_run(kind: DataKind, run_: Run, parser: H4ArgumentParser, notices: list[str]) -> None:
    """Print what the run would be; nothing is loaded, trained, or written into output_dir.

    Raises UserError where a run would be refused, and WillNotFit if it needs more memory than gpu_memory.
    """
    args = run_.training_args
    if args.process_index > 0:
        return
    report, wanted, lacks = Report(new_console()), meant(parser), list(parser.lacks)
    speed = speed_of(args)
    strategy = planned_strategy(args, wanted, os.environ)
    config = check_model_path(run_.model_args)
    with whole_models():  # a launcher's ZeRO-3 would divide what has no data
        check_adapters(run_.model_args, args, config, elsewhere=strategy)
        lacks += local_complaints(run_.model_args, args, config)
        skeleton = skeleton_of(run_.model_args, args, config)
    standing = outlook(
        run_.output_dir, args.resume_from_checkpoint, comparable(run_), args.planned_processes, run_.rows_per_step
    )
    values = origins(parser, args)
    report.recipe(parser.place, values)
    report.lines([f"objective: {args.objective}", *notices])
    tokenizer, source = tokenizer_and_source(run_.model_args, run_.data_args, preprocessing=args.preprocessing)
    attention = run_.model_args.attn_implementation or skeleton.attention
    report.model(run_.model_args.model_name_or_path, skeleton, source, attention)
    run_ = run_._replace(date=date_of(run_))
    sample_requests(run_, tokenizer)
    splits = prepared_splits(kind, tokenizer, run_)
    refuse_ids(skeleton, tokenizer, [split.tokens for split in splits.values()])
    report.data(splits)
    look = look_at_pairs if isinstance(args, PairConfig) else look_at_conversations
    rows, tokens, warnings = look(report, splits, tokenizer, run_)

    schedule = schedule_of(args, len(rows))
    in_steps = step_tokens(args, tokens[TRAIN], schedule.rows_per_step, grouped_by(rows, args))
    report.steps(schedule, len(rows), in_steps, "pairs" if isinstance(args, PairConfig) else "sequences", standing)
    memory = None
    if isinstance(args, PairConfig):
        memory, reason = memory_or_reason(run_, skeleton, wanted, strategy, rows)
        if memory is None:
            warnings.append(f"the memory is not known: {reason}")
    else:
        reason = "the estimate is made for steps over pairs; it cannot be had for supervised tuning, whose step is TRL's"
    if memory is not None:
        report.memory(memory, args.gpu_memory)
    else:
        report.section("Memory")
        report.lines([f"not estimated: {reason}"])
    if speed is not None:
        scored = int(tokens[TEST].sum()) * schedule.evaluations if TEST in tokens else 0
        scored += in_steps.epoch * args.objective.has_reference
        report.time(duration_of(speed, schedule, in_steps.epoch, scored, args.gpu_price), speed, args.gpu_price)
    disk = disk_of(args, run_.model_args, skeleton, strategy, schedule.checkpoints)
    report.disk(disk)
    report.defaults(values)
    lacks += lacking(run_, wanted, strategy)
    if lacks:
        report.section("What only this machine lacks")
        report.lines(lacks)
    settings = setting_warnings(args, run_.model_args, skeleton, schedule, wanted)
    if warnings := [*settings, *warnings, *disk_warnings(disk)]:
        report.section("Warnings")
        report.lines(warnings)
    conclude(report, memory, args.gpu_memory)


def comparable(run_: Run) -> dict[str, Any]:
    """The recipe without what a dry run is told to reckon with."""
    recipe = yaml.safe_load(run_.recipe)
    return {key: value for key, value in recipe.items() if key not in ("strategy", "num_processes")}


def date_of(run_: Run) -> str:
    """The day that chat templates read: that of the run that would go on, or today."""
    path = run_.output_dir / DATE_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else today()


def planned_strategy(args: RunArguments, wanted: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """What to reckon with: as the option says, the launcher, the recipe's own keys; else plain processes."""
    processes = args.planned_processes
    if args.strategy == "single" and processes > 1:
        raise UserError(f"strategy = single: is one process, and num_processes is {processes}; choose ddp, fsdp2, zero3, ...")
    asked = args.strategy or launcher_strategy(environment)
    if asked is None and wanted["deepspeed"]:
        asked = f"zero{settings_of(wanted['deepspeed']).get('zero_optimization', {}).get('stage', 0)}"
    if asked is None and wanted["fsdp"]:
        config = settings_of(wanted["fsdp_config"] or {})
        asked = f"fsdp{config.get('version', config.get('fsdp_version', 2))}"
    return asked or ("ddp" if processes > 1 else "single")


def settings_of(given: dict[str, Any] | str) -> dict[str, Any]:
    """A mapping, or the JSON file that holds it."""
    if isinstance(given, dict):
        return given
    try:
        return json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{given}: cannot be read as JSON ({error})") from error


# ---- The rows ----

# The training rows as the collator gets them, tokens of each row by split, and warnings.
Look = tuple[Dataset, dict[str, np.ndarray], list[str]]


def look_at_pairs(report: Report, splits: dict[str, Prepared], tokenizer: PreTrainedTokenizerBase, run_: Run) -> Look:
    args, train = run_.training_args, splits[TRAIN]
    places = chosen_rows(pair_tokens(train.tokens), np.asarray(train.tokens["truncated"]))
    if args.show_row is not None:
        places = {place_of(args.show_row, train.tokens, len(train.texts)): "asked for"}
    show(report, [shown_pair(place, why, train, tokenizer, args.length_rules) for place, why in places.items()], args)
    facts, shared = {name: pair_facts(split) for name, split in splits.items()}, shared_prompts(splits)
    report.pairs(facts, shared)
    tokens = {name: pair_tokens(split.tokens) for name, split in splits.items()}
    return train.tokens, tokens, list(data_warnings(facts[TRAIN], shared))


def look_at_conversations(report: Report, splits: dict[str, Prepared], tokenizer: PreTrainedTokenizerBase, run_: Run) -> Look:
    """As TRL prepares them: packed, or cut to max_length."""
    args = run_.training_args
    rows, lengths, spreads = splits[TRAIN].tokens, {}, {}
    limit = None if args.packing else args.max_length
    for name, split in splits.items():
        lengths[name], cut = conversation_lengths(split.tokens, limit)
        spreads[name] = spread_of(lengths[name]), cut
    if args.packing:
        rows = trl.pack_dataset(rows.select_columns(["input_ids"]), args.max_length, args.packing_strategy)
        lengths[TRAIN] = sequence_lengths(rows)
    places = chosen_rows(lengths[TRAIN], sequence_lengths(rows) > lengths[TRAIN])
    if args.show_row is not None:
        places = {place_of(args.show_row, rows, len(rows)): "asked for"}
    shown = [
        shown_conversation(place, why, rows[place]["input_ids"], limit, args.truncation_mode, tokenizer)
        for place, why in places.items()
    ]
    show(report, shown, args)
    report.conversations(spreads)
    return rows, lengths, []


def show(report: Report, rows: list[ShownRow], args: RunArguments) -> None:
    report.section("Rows, as the collator gets them")
    report.lines([LEGEND if has_colours(report.console) else MARKS])
    for row in rows:
        show_row(report.console, row, whole=args.show_row is not None)


def grouped_by(rows: Dataset, args: RunArguments) -> np.ndarray | None:
    column = args.length_column_name
    return np.asarray(rows[column]) if column in rows.column_names else None


# ---- The machine, and the end ----


def memory_or_reason(
    run_: Run, skeleton: Skeleton, wanted: Mapping[str, Any], strategy: str, rows: Dataset
) -> tuple[Memory | None, str]:
    """Raises UserError for a budget below the longest pair."""
    args = run_.training_args
    if isinstance(args.max_tokens_per_micro_batch, int):
        check_token_budget(
            args.max_tokens_per_micro_batch, PackedCollator() if skeleton.why_padded is None else PaddedCollator(0), rows
        )
    try:
        plan = plan_of(args, run_.model_args, skeleton, wanted, strategy, rows)
        model = estimate(plan)
    except ValueError as error:
        return None, " ".join(str(error).split())
    sizes = sizes_of(rows, plan, scores_prompt=args.objective.scores_prompt)
    return memory_of(model, args, sizes, skeleton.parameters, args.gpu_memory), ""


def lacking(run_: Run, wanted: Mapping[str, Any], strategy: str) -> list[str]:
    """What another machine may have; each with what that means for what was printed."""
    args, model_args, found = run_.training_args, run_.model_args, []
    if not wanted["use_cpu"]:
        gpus, processes = torch.cuda.device_count(), args.planned_processes
        if gpus < processes:
            has = f"{gpus or 'none'} here; all was reckoned for them"
            found.append(f"{processes} GPU{'s' * (processes > 1)}: {has}")
        elif args.bf16 and not torch.cuda.is_bf16_supported():
            found.append("bf16 = True: the GPUs here do not compute in it")
    needed = {f"attn_implementation = {model_args.attn_implementation}": FLASH_PACKAGES.get(model_args.attn_implementation)}
    needed[f"strategy {strategy}"] = "deepspeed" if strategy.startswith("zero") else None
    found += [
        f"{what}: the package {package} is not installed here"
        for what, package in needed.items()
        if package is not None and importlib.util.find_spec(package) is None
    ]
    if not wanted["use_cpu"] and wanted.get("use_liger_kernel", False) is None and not importlib.util.find_spec("liger_kernel"):
        found.append(
            "use_liger_kernel = None: liger_kernel is not installed here; with it a step needs less memory than is said"
        )
    folder = Path(model_args.model_name_or_path)
    if folder.is_dir() and find_adapter(model_args) is None and not any((folder / name).is_file() for name in WHOLE_WEIGHTS):
        found.append(f"the model's weights: none in {folder}; its config and tokenizer are all that was read")
    if args.push_to_hub:
        found.append("push_to_hub = True: the Hub was not asked whether this account may write there")
    return found


def conclude(report: Report, memory: Memory | None, gpu_memory: float | None) -> None:
    """The last line. Raises WillNotFit."""
    report.section("Verdict")
    verdict = "It would start."
    if gpu_memory is not None and memory is None:
        verdict += f" Whether it fits {gpu_memory:g} GiB is not known."
    if gpu_memory is not None and memory is not None:
        low, high = memory.context
        need = gib(memory.longest.peak.total)
        if memory.longest.peak.total > (gpu_memory - low) * GIB:
            advice = "raise --num_processes under fsdp2 or zero3, lower max_length, or train an adapter (use_peft)"
            raise WillNotFit(
                f"it will not fit {gpu_memory:g} GiB: its largest micro-batch needs {need}, and CUDA at least {low}; {advice}"
            )
        surely = memory.longest.peak.total <= (gpu_memory - high) * GIB
        verdict += f" {'It should fit' if surely else 'It may not fit'}: {need} GiB and {low} to {high} of {gpu_memory:g}."
    report.lines([verdict])
