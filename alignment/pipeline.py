"""One run, whatever the method: parse, check, load, train, save, evaluate, record."""

import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import huggingface_hub.constants
import pyarrow as pa
import transformers
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed

from . import chat, prepare
from .adapters import check_adapters, provenance, settle_adapter, starting_point
from .checkpoints import (
    AFRESH,
    RECIPE_FILE,
    Checkpoint,
    Identity,
    checkpoint_to_resume,
    refuse_other_data,
    refuse_other_layout,
    refuse_other_recipe,
)
from .configs import DataArguments, ModelArguments, RunArguments
from .data import get_datasets
from .durable import DurableTrainer, EvaluationCut, layout
from .errors import TrainingStopped, UserError
from .failures import record_crash, report
from .models import check_attention, check_model_path, load_tokenizer, model_init_kwargs
from .parser import H4ArgumentParser, full_recipe
from .run_folder import only_writer, read_status, write_status
from .signals import RunInterrupted, StopSignals
from .strategy import check_launch, save_whole_model, take_strategy

logger = logging.getLogger(__name__)
T = TypeVar("T")

RECORDED_PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "tokenizers", "safetensors")


class Run(NamedTuple):
    """What a recipe and a command line say, parsed and checked."""

    model_args: ModelArguments
    data_args: DataArguments
    training_args: TrainingArguments
    recipe: str  # YAML of every field, without secrets

    @property
    def output_dir(self) -> Path:
        return Path(self.training_args.output_dir)

    @property
    def rows_per_step(self) -> int:
        args = self.training_args
        return args.rows_per_forward * args.gradient_accumulation_steps

    @property
    def workers(self) -> int | None:
        return self.training_args.dataset_num_proc or self.data_args.preprocessing_num_workers


@dataclass(frozen=True)
class DataKind:
    """The rows that a method trains on, and how they become tokens."""

    columns: tuple[str, ...]
    tokenize: Callable[[str, Dataset, PreTrainedTokenizerBase, Run], tuple[Dataset, list[str]]]


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
    try:
        run(method, argv)
        PartialState().destroy_process_group()  # gloo's threads can abort a process that ends with them running
    except UserError as error:
        sys.exit(report(error, status=2))
    except RunInterrupted as error:
        sys.exit(report(error, status=75))  # EX_TEMPFAIL: start it again
    except TrainingStopped as error:
        sys.exit(report(error, status=1))
    except Exception as error:
        record_crash(error)
        raise


def run(method: Method, argv: Sequence[str] | None = None) -> DurableTrainer | None:
    """Train, save, evaluate and record one recipe. Returns the trainer, for callers that look further; None if the run was
    finished before.

    With prepare_only, the data is made ready and nothing else happens; None then too.
    Raises UserError before anything expensive if the recipe, the environment or the data cannot work, and
    TrainingStopped if training broke down.
    """
    parser = H4ArgumentParser((ModelArguments, DataArguments, method.config))
    model_args, data_args, training_args = parser.parse(argv)
    set_up_logging(training_args)
    for notice in parser.notices:
        logger.info(notice)
    run_ = Run(model_args, data_args, training_args, full_recipe(parser.recipe, parser.dataclass_types))
    check(run_)
    if training_args.prepare_only:
        tokenized_splits(method.data, ready_tokenizer(run_), run_)
        logger.info("The data is prepared, in %s; nothing was trained (prepare_only).", datasets.config.HF_DATASETS_CACHE)
        return None
    stop = StopSignals()
    is_main = training_args.process_index == 0
    with stop.listening(), only_writer(run_.output_dir) if is_main else nullcontext():
        try:
            return carry_out(method, run_, stop)
        except Exception as error:
            if is_main and read_status(run_.output_dir):
                state = "interrupted" if isinstance(error, RunInterrupted) else "failed"
                write_status(run_.output_dir, state, reason=str(error))
            raise


def carry_out(method: Method, run_: Run, stop: StopSignals) -> DurableTrainer | None:
    """The run, from its checkpoint or from the start, to its end; None if it has been there before."""
    args = run_.training_args
    checkpoint = decided_by_main(
        lambda: checkpoint_to_resume(run_.output_dir, args.resume_from_checkpoint, trust=args.trust_checkpoint)
    )
    if checkpoint is not None:
        refuse_other_recipe(checkpoint, yaml.safe_load(run_.recipe), args.world_size, run_.rows_per_step)
    set_seed(args.seed)
    tokenizer = ready_tokenizer(run_)
    splits = tokenized_splits(method.data, tokenizer, run_)
    data = fingerprint(splits["train"])
    if checkpoint is not None:
        refuse_other_data(checkpoint, data)
    if is_finished(run_, data):
        logger.info(
            "%s: this run is finished; nothing is left to do (--resume_from_checkpoint=never starts it afresh).",
            run_.output_dir,
        )
        return None
    trainer = build_trainer(method, run_, tokenizer, splits)
    trainer.stop = stop
    strategy = layout(trainer.accelerator)
    run_id = decided_by_main(lambda: uuid.uuid4().hex[:12])
    if checkpoint is not None:
        refuse_other_layout(checkpoint, strategy, args.world_size)
        trainer.evaluation_due = checkpoint.manifest.get("evaluation_due", False)
        run_id = checkpoint.manifest.get("run_id", run_id)
    trainer.identity = Identity(run_id, run_.recipe, data, strategy, args.world_size, run_.rows_per_step)
    if trainer.is_world_process_zero():
        write_run_folder(run_)
    with stop.deferred():
        enter(trainer, "training")
        train(trainer, checkpoint)
        enter(trainer, "ending")
        save(trainer)
        if args.do_eval:
            enter(trainer, "ending")
            evaluate(trainer, run_)
        enter(trainer, "ending")
        finish(trainer, run_)
        enter(trainer, "finished")
    return trainer


def decided_by_main(decide: Callable[[], T]) -> T:
    """What the main process decides, on all of them; an error on it ends the others through the launcher."""
    return broadcast_object_list([decide() if PartialState().is_main_process else None])[0]


def fingerprint(rows: Dataset) -> str:
    """SHA-256 of all rows in their order, wherever they were read from and however they are stored."""
    digest = hashlib.sha256(repr(rows.features).encode())
    for table in rows.with_format("arrow").iter(1000):
        table = table.take(pa.array(range(len(table))))  # a slice's last byte of bits would hold those of the next rows too
        for column in table.combine_chunks().itercolumns():
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(
                sink, pa.schema([("column", column.type)])
            ) as stream:  # offsets start anew, unlike in memory
                stream.write_table(pa.table({"column": column}))
            digest.update(sink.getvalue())
    return digest.hexdigest()


def is_finished(run_: Run, data: str) -> bool:
    """Whether the folder holds the end of this very run. Raises UserError if it holds the end of another."""
    status = read_status(run_.output_dir)
    if run_.training_args.resume_from_checkpoint in AFRESH or not status or status["state"] != "finished":
        return False
    if not any(run_.output_dir.glob("*.safetensors")):
        return False
    recorded = Checkpoint(run_.output_dir, {**status, "step": status["step"]})
    refuse_other_recipe(recorded, yaml.safe_load(run_.recipe), run_.training_args.world_size, run_.rows_per_step)
    refuse_other_data(recorded, data)
    return True


def enter(trainer: DurableTrainer, state: str) -> None:
    """Write down what comes next. Raises RunInterrupted instead, if a process was asked to stop before the end."""
    if state == "ending" and trainer.agree(trainer.stop.received is not None)[0]:
        raise RunInterrupted(trainer.interruption())
    if trainer.is_world_process_zero():
        facts = trainer.facts()
        write_status(Path(trainer.args.output_dir), state, max_steps=trainer.state.max_steps, **facts)


# ---- Before anything is loaded ----


def set_up_logging(args: TrainingArguments) -> None:
    """The suite's own lines on the main process; the libraries' at the recipe's log_level."""
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    own_level = logging.INFO if args.process_index == 0 else logging.WARNING
    for name in ("alignment", "scripts"):
        logging.getLogger(name).setLevel(own_level)
    level = args.get_process_log_level()
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    if args.process_index != 0:
        datasets.disable_progress_bars()


def check(run_: Run) -> None:
    """Raises UserError for what the recipe alone shows to be impossible here."""
    model_args, data_args, args, _ = run_
    for key, value in (("model_name_or_path", model_args.model_name_or_path), ("dataset_mixer", data_args.dataset_mixer)):
        if not value:
            raise UserError(f"the recipe names no {key}")
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process; start with `accelerate launch --config_file "
            "accelerate_configs/multi_gpu.yaml`, or show one with CUDA_VISIBLE_DEVICES=0"
        )
    if not args.prepare_only:
        check_launch(args)
        check_attention(model_args.attn_implementation, use_cpu=args.use_cpu)
    config = check_model_path(model_args)
    if not args.prepare_only:
        check_adapters(model_args, args, config)


# ---- Data ----


def ready_tokenizer(run_: Run) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template that is trained on, and that is saved with the model."""
    tokenizer = load_tokenizer(run_.model_args, run_.data_args)
    tokenizer.chat_template, source = chat.find_chat_template(
        tokenizer,
        run_.model_args.model_name_or_path,
        recipe_template=run_.data_args.chat_template,
        preprocessing=run_.training_args.preprocessing,
    )
    logger.info("Chat template: %s.", source)
    return tokenizer


def tokenized_splits(kind: DataKind, tokenizer: PreTrainedTokenizerBase, run_: Run) -> dict[str, Dataset]:
    """Token ids of the splits "train" and, where there is held-out data, "test"; one line about each.

    Raises UserError if they would train or evaluate nothing, or if what an earlier run left in the cache is damaged.
    """
    args = run_.training_args
    seed = args.seed if args.data_seed is None else args.data_seed
    if (run_.workers or 1) > 1:
        stop_tokenizer_threads()
    if PartialState().local_process_index > 0:
        time.sleep(1)  # let the process go first whose progress is shown
    tokenizer_name = prepare.tokenizer_identity(tokenizer)
    work = repr((run_.data_args, kind.columns, args.preprocessing, args.bad_rows, seed, args.do_eval, tokenizer_name))
    splits = {}
    try:
        with prepare.one_process_at_a_time(work):
            conversations, reports = get_datasets(
                run_.data_args,
                columns=kind.columns,
                preprocessing=args.preprocessing,
                bad_rows=args.bad_rows,
                seed=seed,
                do_eval=args.do_eval,
                num_proc=run_.workers,
            )
            for name, rows in conversations.items():
                splits[name], notes = kind.tokenize(name, rows, tokenizer, run_)
                logger.info("%s: %s; %s", name, reports[name], notes[0])
                for note in notes[1:]:
                    logger.info("%s: %s", name, note)
    except (OSError, pa.ArrowException, UserError) as error:
        if message := prepare.damage(error):
            raise UserError(message) from error
        raise
    stop_tokenizer_threads()
    args.refuse_zero_steps(len(splits["train"]))
    if args.do_eval and len(splits["test"]) == 0:
        raise UserError("test has no row left to evaluate on; --do_eval=false trains without")
    return splits


def stop_tokenizer_threads() -> None:
    """To be called before a process forks: in its child, the tokenizer would wait for threads that were left behind."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def tokenize_pair_rows(name: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, run_: Run) -> tuple[Dataset, list[str]]:
    args = run_.training_args
    if args.preprocessing == "published":
        chat.check_published_template(tokenizer)
    texts = prepare.to_pair_texts(
        rows,
        tokenizer,
        preprocessing=args.preprocessing,
        add_system=run_.data_args.auto_insert_empty_system_msg,
        num_proc=run_.workers,
    )
    if name == "train":
        log_samples(texts)
    tokens = prepare.to_tokens(texts, tokenizer, args.length_rules, num_proc=run_.workers)
    notes = [prepare.describe_tokens(tokens, dropped=len(texts) - len(tokens), rules=args.length_rules)]
    if args.preprocessing == "published":
        notes.append(prepare.describe_published(texts, tokens, tokenizer))
    return tokens, notes


def tokenize_conversation_rows(
    name: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, run_: Run
) -> tuple[Dataset, list[str]]:
    texts = prepare.to_message_texts(
        rows,
        tokenizer,
        preprocessing=run_.training_args.preprocessing,
        add_system=run_.data_args.auto_insert_empty_system_msg,
        num_proc=run_.workers,
    )
    tokens = prepare.to_sequences(texts, tokenizer, num_proc=run_.workers)
    return tokens, [f"tokens (median / 95 % / max): {prepare.spread(prepare.sequence_lengths(tokens))}"]


def log_samples(texts: Dataset) -> None:
    """The first training pair as the model will read it, the surest way to see a template mistake."""
    logger.info("First training pair:\n%s", "\n".join(f"[{key}] {texts[0][key]!r}" for key in chat.TEXT_COLUMNS))


PAIRS = DataKind(columns=("chosen", "rejected"), tokenize=tokenize_pair_rows)
CONVERSATIONS = DataKind(columns=("messages",), tokenize=tokenize_conversation_rows)


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
    trainer.dataset_names = list(run_.data_args.dataset_mixer)
    take_strategy(trainer)
    return trainer


class RunRecords(TrainerCallback):
    """Appends every logged record to metrics.jsonl, as it is logged."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        # As of the checkpoint: what an interrupted attempt logged after it will be logged again.
        path = Path(args.output_dir, "metrics.jsonl")
        write_jsonl(path, [{"step": record["step"], **record} for record in state.log_history])

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs) -> None:
        if state.is_world_process_zero:
            with Path(args.output_dir, "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def train(trainer: DurableTrainer, checkpoint: Checkpoint | None) -> None:
    if checkpoint is not None:
        logger.info("Resuming from %s.", checkpoint.path)
    metrics = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path)).metrics
    if checkpoint is not None and checkpoint.step == trainer.state.global_step:
        return  # trained before: only its end was missing
    metrics["train_samples"] = len(trainer.train_dataset)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


# ---- After training ----


def save(trainer: Trainer) -> None:
    """Weights (safetensors) and tokenizer into output_dir, with the cache that generation wants switched on."""
    config = trainer.accelerator.unwrap_model(trainer.model).config
    config.use_cache = True
    save_whole_model(trainer)
    config.use_cache = trainer.args.use_cache
    logger.info("Model saved to %s.", trainer.args.output_dir)


def evaluate(trainer: Trainer, run_: Run) -> None:
    """eval_results.json, and where the trainer scores pairs, eval_pairs.jsonl with every held-out pair's figures."""
    try:
        metrics = trainer.evaluate()
    except EvaluationCut:
        raise RunInterrupted(trainer.interruption()) from None
    metrics["eval_samples"] = len(trainer.eval_dataset)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    pairs = getattr(trainer, "eval_pairs", {}).get("eval")
    if pairs is not None and trainer.is_world_process_zero():
        columns = [column.tolist() for column in pairs.values()]
        records = [dict(zip(pairs, values, strict=True)) for values in zip(*columns, strict=True)]
        write_jsonl(run_.output_dir / "eval_pairs.jsonl", records)


def finish(trainer: Trainer, run_: Run) -> None:
    """The card, the curves, and the push that a recipe asked for."""
    trainer.save_state()
    if trainer.is_world_process_zero():
        from .review.plots import plot_curves, read_metrics  # matplotlib takes a second to import

        plot_curves(read_metrics(run_.output_dir / "metrics.jsonl"), run_.output_dir / "curves.png", run_.output_dir.name)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def write_run_folder(run_: Run) -> None:
    """What is known before training: the resolved recipe, package versions and commit."""
    run_.output_dir.mkdir(parents=True, exist_ok=True)
    (run_.output_dir / RECIPE_FILE).write_text(run_.recipe, encoding="utf-8")
    environment = {
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES},
        "commit": commit(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "device": str(run_.training_args.device),
        **provenance(run_.model_args),
    }
    (run_.output_dir / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


def commit() -> str | None:
    """The suite's git commit, with "+changes" where the working tree differs from it; None outside a checkout."""
    folder = Path(__file__).parent
    head = git(folder, "rev-parse", "HEAD")
    return head and head + ("+changes" if git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
