"""One run, whatever the method: parse, check, load, train, save, evaluate, record."""

import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub.constants
import transformers
import yaml
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import global_then_local_main_first

from . import chat, prepare
from .checkpoints import RECIPE_FILE, checkpoint_to_resume
from .configs import DataArguments, ModelArguments, RunArguments
from .data import get_datasets
from .errors import TrainingStopped, UserError
from .models import check_attention, check_model_path, load_tokenizer, lora_config, model_init_kwargs
from .parser import H4ArgumentParser, full_recipe

logger = logging.getLogger(__name__)

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
    trainer: type[Trainer]
    data: DataKind


def main(method: Method, argv: Sequence[str] | None = None) -> None:
    """Run `method` on the command line; exit with 2 for a user's mistake, 1 for a run that had to stop."""
    # TRL reports each trainer's name to the Hub when it is built; nothing leaves this machine unasked.
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        run(method, argv)
        PartialState().destroy_process_group()  # gloo's threads can abort a process that ends with them running
    except UserError as error:
        sys.exit(report(error, status=2))
    except TrainingStopped as error:
        sys.exit(report(error, status=1))


def report(error: Exception, status: int) -> int:
    print(f"\nerror: {error}", file=sys.stderr, flush=True)
    return status


def run(method: Method, argv: Sequence[str] | None = None) -> Trainer:
    """Train, save, evaluate and record one recipe. Returns the trainer, for callers that look further.

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
    checkpoint = checkpoint_to_resume(run_.output_dir, training_args.resume_from_checkpoint, yaml.safe_load(run_.recipe))
    set_seed(training_args.seed)
    tokenizer = ready_tokenizer(run_)
    splits = tokenized_splits(method.data, tokenizer, run_)
    trainer = build_trainer(method, run_, tokenizer, splits)
    if trainer.is_world_process_zero():
        write_run_folder(run_)
    train(trainer, checkpoint)
    save(trainer)
    if training_args.do_eval:
        evaluate(trainer, run_)
    finish(trainer, run_)
    return trainer


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
    check_attention(model_args.attn_implementation, use_cpu=args.use_cpu)
    check_model_path(model_args)


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
    """Token ids of the splits "train" and, where there is held-out data, "test"; one line about each."""
    args = run_.training_args
    # One process reads and tokenizes; the others then find its files.
    with global_then_local_main_first():
        conversations, reports = get_datasets(
            run_.data_args,
            columns=kind.columns,
            preprocessing=args.preprocessing,
            bad_rows=args.bad_rows,
            seed=args.seed if args.data_seed is None else args.data_seed,
            do_eval=args.do_eval,
            num_proc=run_.workers,
        )
        splits = {}
        for name, rows in conversations.items():
            splits[name], notes = kind.tokenize(name, rows, tokenizer, run_)
            logger.info("%s: %s; %s", name, reports[name], notes[0])
            for note in notes[1:]:
                logger.info("%s: %s", name, note)
    return splits


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
    trainer = method.trainer(
        model=run_.model_args.model_name_or_path,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("test"),
        processing_class=tokenizer,
        peft_config=lora_config(run_.model_args),
        callbacks=[RunRecords(run_.recipe)],
    )
    trainer.dataset_names = list(run_.data_args.dataset_mixer)
    return trainer


class RunRecords(TrainerCallback):
    """Appends every logged record to metrics.jsonl, as it is logged, and puts the recipe into every checkpoint."""

    def __init__(self, recipe: str):
        self.recipe = recipe

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        # What an interrupted attempt logged after the checkpoint that this one resumes from will be logged again.
        path = Path(args.output_dir, "metrics.jsonl")
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines]
        write_jsonl(path, [record for record in records if state.global_step and record["step"] <= state.global_step])

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs) -> None:
        if state.is_world_process_zero:
            with Path(args.output_dir, "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            (checkpoint / RECIPE_FILE).write_text(self.recipe, encoding="utf-8")


def train(trainer: Trainer, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        logger.info("Resuming from %s.", checkpoint)
    metrics = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)).metrics
    metrics["train_samples"] = len(trainer.train_dataset)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


# ---- After training ----


def save(trainer: Trainer) -> None:
    """Weights (safetensors) and tokenizer into output_dir, with the cache that generation wants switched on."""
    config = trainer.accelerator.unwrap_model(trainer.model).config
    config.use_cache = True
    trainer.save_model(_internal_call=True)  # push_to_hub comes last, when card and figures are written
    config.use_cache = trainer.args.use_cache
    logger.info("Model saved to %s.", trainer.args.output_dir)


def evaluate(trainer: Trainer, run_: Run) -> None:
    """eval_results.json, and where the trainer scores pairs, eval_pairs.jsonl with every held-out pair's figures."""
    metrics = trainer.evaluate()
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
