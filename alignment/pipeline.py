"""One run, whatever the method: parse, check, load, train, save, evaluate, record."""

import logging
import os
import sys
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub.constants
import transformers
import yaml
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerState, TrainingArguments, set_seed

from .data.splits import DataKind, fingerprint, ready_tokenizer, tokenized_splits
from .errors import Problem, TrainingStopped, UserError
from .launch.launch import check_launch, leave_launch, outwait_compilers
from .launch.strategy import layout, take_strategy
from .launch.turns import decided_by_main
from .leaving import before_rounding, describe_files, save, settle_end
from .model.adapter_checks import check_adapters
from .model.adapters import base_identity, settle_adapter, start_identity, starting_point
from .model.loading import check_attention, check_model_path, model_init_kwargs
from .preference.configs import PairConfig
from .preflight.dry_run import dry_run
from .recipe.configs import DataArguments, ModelArguments, Run, RunArguments
from .recipe.idle import idle_keys
from .recipe.parser import Check, H4ArgumentParser, full_recipe
from .recipe.rehearsal import loading_problems, metric_problem, rehearse
from .run.checkpoints import Checkpoint, Identity
from .run.durable import TRAINER_STATE, DurableTrainer, EvaluationCut
from .run.failures import DISK_FULL, record_crash, report
from .run.hub import bounded, check_hub, push_run
from .run.output import log_to_stdout, outlast_readers
from .run.records import RunRecords, write_jsonl, write_run_folder
from .run.resuming import (
    AFRESH,
    checkpoint_to_resume,
    choice_of_attempt,
    holds_end,
    refuse_other_base,
    refuse_other_data,
    refuse_other_layout,
    refuse_other_recipe,
)
from .run.run_folder import find_launch, folder_problems, mark_launch, only_writer, read_status, run_date, today, write_status
from .run.signals import RunInterrupted, StopSignals
from .run.trackers import close_trackers, tracker_problems, watch_trackers, without_disabled
from .watch.samples import Samples, prompt_problems, sample_end, sample_requests, watch_samples
from .watch.settings import settings_at_risk
from .watch.warnings import Warnings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """What differs between training methods."""

    config: type[RunArguments]
    trainer: type[DurableTrainer]
    data: DataKind


def main(method: Method, argv: Sequence[str] | None = None) -> None:
    """Run `method` on the command line; exit with 2 for a user's mistake, 1 for a run that had to stop, 75 for one to go on."""
    # TRL reports each trainer's name to the Hub when it is built; nothing leaves this machine unasked.
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    outlast_readers()
    try:
        run(method, argv)
        leave_launch()
    except UserError as error:
        sys.exit(report(error, status=2))
    except KeyboardInterrupt:  # before the run listens to signals
        sys.exit(report(RunInterrupted("stopped by SIGINT, before anything was begun."), status=75))
    except RunInterrupted as error:
        sys.exit(bounded(report(error, status=75)))  # EX_TEMPFAIL: start it again
    except TrainingStopped as error:
        sys.exit(bounded(report(error, status=1)))
    except Exception as error:
        record_crash(error)
        bounded(1)
        raise


def run(method: Method, argv: Sequence[str] | None = None) -> DurableTrainer | None:
    """Train, save, evaluate and record one recipe. Returns the trainer, for callers that look further; None if the run was
    finished before.

    With prepare_only, the data is made ready and nothing else happens, with dry_run it is told what would; None then too.
    Raises UserError before anything expensive if the recipe, the environment or the data cannot work, and
    TrainingStopped if training broke down.
    """
    parser = H4ArgumentParser((ModelArguments, DataArguments, method.config))
    arguments = parser.parse(argv, recipe_checks(method))
    with parser.placing():
        return begin(method, parser, *arguments)


def begin(
    method: Method, parser: H4ArgumentParser, model_args: ModelArguments, data_args: DataArguments, training_args: RunArguments
) -> DurableTrainer | None:
    """What a recipe asks for, once it is read."""
    set_up_logging(training_args)
    notices = [*parser.notices, *idle_keys(parser), *settle(training_args, parser.recipe)]
    for notice in notices:
        logger.info(notice)
    logger.info("Objective: %s.", training_args.objective)
    recipe = training_args.followed_defaults | parser.recipe
    run_ = Run(model_args, data_args, training_args, full_recipe(recipe, parser.dataclass_types))
    check(run_, parser)
    if training_args.dry_run:
        dry_run(method.data, run_, parser, notices)
        return None
    if training_args.prepare_only:
        tokenizer, run_ = ready_tokenizer(run_), run_._replace(date=today())
        sample_requests(run_, tokenizer)
        tokenized_splits(method.data, tokenizer, run_)
        logger.info("The data is prepared, in %s; nothing was trained (prepare_only).", datasets.config.HF_DATASETS_CACHE)
        return None
    stop = StopSignals()
    is_main = training_args.process_index == 0
    with stop.listening(), only_writer(run_.output_dir) if is_main else nullcontext():
        try:
            return carry_out(method, run_, stop)
        except Exception as error:
            status = read_status(run_.output_dir)
            if is_main and status and status["state"] != "finished":
                state = "interrupted" if isinstance(error, RunInterrupted) else "failed"
                write_status(run_.output_dir, state, reason=str(error), error=type(error).__name__)
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise TrainingStopped(f"{error}. Checkpoints are as they were; with room, the same command goes on.") from error
            raise


def carry_out(method: Method, run_: Run, stop: StopSignals) -> DurableTrainer | None:
    """The run, from its checkpoint or from the start, to its end; None if it has been there before."""
    args = run_.training_args
    has_ended, checkpoint = where_to_begin(run_)
    begun = run_.output_dir if has_ended else checkpoint and checkpoint.path.parent
    run_ = run_._replace(date=decided_by_main(lambda: run_date(run_.output_dir, begun)))
    set_seed(args.seed)
    tokenizer = ready_tokenizer(run_)
    requests = sample_requests(run_, tokenizer)
    splits = tokenized_splits(method.data, tokenizer, run_)
    data = fingerprint(splits["train"])
    if has_ended:
        end_again(run_, data, stop)
        return None
    if checkpoint is not None:
        refuse_other_data(checkpoint, data)
    trainer = build_trainer(method, run_, tokenizer, splits)
    watch_trackers(trainer, run_.recipe, resumed_log=None if checkpoint is None else logged(checkpoint))
    samples = watch_samples(trainer, requests)
    trainer.stop = stop
    trainer.identity = identity_of(trainer, run_, data, checkpoint)
    if checkpoint is not None:
        trainer.evaluation_due = checkpoint.manifest.get("evaluation_due", False)
    if trainer.is_world_process_zero():
        write_run_folder(run_)
    try:
        with stop.deferred():
            enter(trainer, "training")
            train(trainer, checkpoint)
            enter(trainer, "ending")
            save(trainer, run_)
            if args.do_eval:
                enter(trainer, "ending")
                evaluate(trainer, run_)
            if samples is not None:
                enter(trainer, "ending")
                finish_samples(trainer, samples)
            enter(trainer, "ending")
            finish(trainer, run_)
            if args.push_to_hub:
                enter(trainer, "finished", pushed=False)
                push(run_, stop, before=trainer.push)
            else:
                enter(trainer, "finished")
    finally:
        close_trackers(trainer)
    return trainer


def logged(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What the run had logged when the checkpoint was written."""
    return TrainerState.load_from_json(str(checkpoint.path / TRAINER_STATE)).log_history


def where_to_begin(run_: Run) -> tuple[bool, Checkpoint | None]:
    """Whether the folder holds the end of a run; and if not, the checkpoint that this one goes on from."""
    args, output_dir = run_.training_args, run_.output_dir
    if args.world_size > 1:
        find_launch(output_dir, decided_by_main(lambda: mark_launch(output_dir)))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    refuse_restart_of_a_stop(output_dir, restarts)
    if decided_by_main(lambda: is_finished(run_)):
        return True, None
    checkpoint = decided_by_main(
        lambda: checkpoint_to_resume(
            output_dir, choice_of_attempt(args.resume_from_checkpoint, output_dir, restarts), trust=args.trust_checkpoint
        )
    )
    if checkpoint is not None:
        refuse_other_recipe(checkpoint, yaml.safe_load(run_.recipe), args.world_size, run_.rows_per_step)
    return False, checkpoint


def identity_of(trainer: DurableTrainer, run_: Run, data: str, checkpoint: Checkpoint | None) -> Identity:
    """What the checkpoints of this run will say of it. Raises UserError if that is not what `checkpoint` says."""
    strategy, processes = layout(trainer.accelerator), run_.training_args.world_size
    base = decided_by_main(lambda: base_identity(trainer, run_.model_args))
    start = decided_by_main(lambda: start_identity(run_.model_args))
    run_id = decided_by_main(lambda: uuid.uuid4().hex[:12])
    if checkpoint is not None:
        refuse_other_layout(checkpoint, strategy, processes)
        refuse_other_base(checkpoint, base)
        run_id = checkpoint.manifest.get("run_id", run_id)
    return Identity(run_id, run_.recipe, data, base, strategy, processes, run_.rows_per_step, start)


def end_again(run_: Run, data: str, stop: StopSignals) -> None:
    """The push that a finished run lacks, or word that it lacks nothing."""
    refuse_other_end(run_, data)
    if run_.training_args.push_to_hub and not read_status(run_.output_dir).get("pushed"):
        push(run_, stop)
        return
    logger.info(
        "%s: this run is finished; nothing is left to do (--resume_from_checkpoint=never starts it afresh).", run_.output_dir
    )


def refuse_restart_of_a_stop(output_dir: Path, restarts: int) -> None:
    """Raises RunInterrupted where a launcher with --max_restarts would go on with a run that was asked to stop."""
    status = read_status(output_dir)
    if status and status["state"] == "interrupted":
        if restarts:
            raise RunInterrupted(status["reason"])
        if PartialState().is_main_process:
            write_status(output_dir, "preparing")  # from here on a restart is one of this launch


def is_finished(run_: Run) -> bool:
    """Whether the folder holds the end of a run."""
    return run_.training_args.resume_from_checkpoint not in AFRESH and holds_end(run_.output_dir)


def refuse_other_end(run_: Run, data: str) -> None:
    """Raises UserError if the folder holds the end of another run than this."""
    recorded = Checkpoint(run_.output_dir, read_status(run_.output_dir))
    refuse_other_recipe(recorded, yaml.safe_load(run_.recipe), run_.training_args.world_size, run_.rows_per_step)
    refuse_other_data(recorded, data)


def enter(trainer: DurableTrainer, state: str, **more: Any) -> None:
    """Write down what comes next. Raises RunInterrupted instead, if a process was asked to stop before the end."""
    if state == "ending" and trainer.agree(trainer.stop.received is not None)[0]:
        trainer.leave()
    if trainer.is_world_process_zero():
        facts = trainer.facts() | more
        steps = {"max_steps": trainer.state.max_steps} if trainer.state.max_steps else {}  # not known before the first step
        write_status(Path(trainer.args.output_dir), state, **steps, **facts)


# ---- Before anything is loaded ----


def set_up_logging(args: TrainingArguments) -> None:
    """The suite's own lines on the main process; the libraries' at the recipe's log_level."""
    log_to_stdout()
    own_level = logging.INFO if args.process_index == 0 and not args.dry_run else logging.WARNING
    for name in ("alignment", "scripts"):
        logging.getLogger(name).setLevel(own_level)
    level = args.get_process_log_level()
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    if args.process_index != 0:
        datasets.disable_progress_bars()


def recipe_checks(method: Method) -> list[Check]:
    """What no dataclass can know; its problems stand in the one message about a recipe."""
    return [missing_names, rehearse, partial(unknown_metric, method), folder_problems, tracker_problems, prompt_problems]


def missing_names(values: SimpleNamespace) -> list[Problem]:
    """What no run can do without."""
    return [Problem(key, None, "is missing") for key in ("model_name_or_path", "dataset_mixer") if not getattr(values, key)]


def unknown_metric(method: Method, values: SimpleNamespace) -> list[Problem]:
    problem = metric_problem(values.metric_for_best_model, method.config.metrics(values))
    return [problem] if problem else []


def settle(args: RunArguments, recipe: dict[str, Any]) -> list[str]:
    """What the environment and two settings together make of the arguments; a line for each."""
    notices = []
    if recipe.get("do_eval") is False and str(recipe.get("eval_strategy", "no")) != "no":
        notices.append(f"do_eval is false: eval_strategy = {recipe['eval_strategy']} has no effect")
    if (kept := without_disabled(args.report_to)) != args.report_to:
        args.report_to = kept
        notices.append("WANDB_DISABLED is set: nothing is reported to wandb")
    return notices


def check(run_: Run, parser: H4ArgumentParser) -> None:
    """Raises UserError for what the recipe alone shows to be impossible here."""
    model_args, _, args, *_ = run_
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process; start with `accelerate launch --config_file "
            "accelerate_configs/multi_gpu.yaml`, or show one with CUDA_VISIBLE_DEVICES=0"
        )
    trains = not (args.prepare_only or args.dry_run)
    if trains:
        check_launch(args, os.environ)
        check_attention(model_args.attn_implementation, use_cpu=args.use_cpu)
    config = check_model_path(model_args)
    parser.refuse(loading_problems(args.model_init_kwargs, config))
    if trains:
        check_adapters(model_args, args, config)
        if args.push_to_hub and args.process_index == 0:
            check_hub(args)
        outwait_compilers(os.environ)


# ---- Training ----


def build_trainer(method: Method, run_: Run, tokenizer: PreTrainedTokenizerBase, splits: dict[str, Dataset]) -> Trainer:
    args = run_.training_args
    # A recipe's own model_init_kwargs have the last word.
    args.model_init_kwargs = {**model_init_kwargs(run_.model_args, args), **(args.model_init_kwargs or {})}
    policy, new_adapter = starting_point(run_.model_args, args, tokenizer)
    trainer = method.trainer(
        model=policy,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("test"),
        processing_class=tokenizer,
        peft_config=new_adapter,
        callbacks=[RunRecords()],
    )
    settle_adapter(trainer, run_.model_args)
    trainer.add_callback(Warnings(trainer, at_start_of(run_)))
    trainer.dataset_names = list(run_.data_args.dataset_mixer)
    trainer.template_settings = run_.data_args.chat_template_kwargs
    take_strategy(trainer)
    settle_end(trainer, run_)
    return trainer


def at_start_of(run_: Run) -> dict[str, str]:
    """Warnings of settings: name -> line."""
    args = run_.training_args
    if not isinstance(args, PairConfig):
        return {}
    return settings_at_risk(args, is_whole=not run_.model_args.use_peft, rows_per_step=run_.rows_per_step)


def train(trainer: DurableTrainer, checkpoint: Checkpoint | None) -> None:
    if checkpoint is not None:
        logger.info("Resuming from %s.", checkpoint.path)
    metrics = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path)).metrics
    trained_before = checkpoint is not None and checkpoint.step == trainer.state.global_step
    if trained_before and Path(trainer.args.output_dir, "train_results.json").is_file():
        return  # only the end was missing
    metrics["train_samples"] = len(trainer.train_dataset)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


# ---- After training ----


def evaluate(trainer: Trainer, run_: Run) -> None:
    """eval_results.json, and where the trainer scores pairs, each held-out and each probe pair's before and after."""
    unrounded = trainer.unrounded_figures = before_rounding(trainer)
    try:
        metrics = trainer.evaluate()
    except EvaluationCut:
        trainer.leave()
    metrics["eval_samples"] = len(trainer.eval_dataset)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics | ({"eval_before_rounding": unrounded} if unrounded else {}))
    if hasattr(trainer, "pair_records") and trainer.is_world_process_zero():
        write_jsonl(run_.output_dir / "eval_pairs.jsonl", trainer.pair_records())
        if probe := trainer.pair_records("probe"):
            write_jsonl(run_.output_dir / "probe_pairs.jsonl", probe)


def finish_samples(trainer: DurableTrainer, samples: Samples) -> None:
    try:
        sample_end(trainer, samples)
    except EvaluationCut:
        trainer.leave()


def finish(trainer: Trainer, run_: Run) -> None:
    """The card and the curves."""
    trainer.save_state()
    if trainer.is_world_process_zero():
        from .report.curves import plot_curves, read_metrics  # matplotlib takes a second to import

        records, picture = read_metrics(run_.output_dir / "metrics.jsonl"), run_.output_dir / "curves.png"
        plot_curves(records, picture, run_.output_dir.name, run_.training_args.objective)
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        describe_files(trainer, run_)


def push(run_: Run, stop: StopSignals, before: Future | None = None) -> None:
    """What a recipe asked for, after all else: the folder to the Hub, by the main process. Its status says how that went.

    before: the push of a checkpoint that is still on its way.
    """
    if not PartialState().is_main_process:
        return
    status = read_status(run_.output_dir)
    facts = {key: value for key, value in status.items() if key not in ("state", "reason")}
    with stop.deferred():
        try:
            push_run(run_.training_args, stop, before)
        except TrainingStopped as error:
            write_status(run_.output_dir, "finished", **facts | {"pushed": False, "reason": str(error)})
            raise
        write_status(run_.output_dir, "finished", **facts | {"pushed": True})
