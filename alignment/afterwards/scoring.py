"""Any model or adapter on a recipe's held-out pairs, by the evaluation of the trainer: records that a review reads."""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.sources import TEST
from ..data.splits import fingerprint, ready_tokenizer, tokenized_splits
from ..errors import TrainingStopped, UserError
from ..model.adapters import keep_4bit_layout, starting_point
from ..model.loading import find_adapter, load_tokenizer, model_init_kwargs
from ..model.tokenizer_files import state_of
from ..pipeline import Method, check, recipe_checks, set_up_logging
from ..preference.reference import StepZero
from ..preference.trainer import PairTrainer
from ..recipe.configs import DataArguments, ModelArguments, Run
from ..recipe.parser import H4ArgumentParser, full_recipe, read_options, read_recipe
from ..report.review.reading import HELD_OUT_FILE, read_json
from ..run.checkpoints import training_of
from ..run.durable import TRAINER_STATE
from ..run.records import replace_jsonl, write_run_folder
from ..run.run_folder import DATE_FILE, today

logger = logging.getLogger(__name__)
T = TypeVar("T")

# What a recipe says of its own model, which is not the one that is scored; an option in its place is read.
OF_ITS_MODEL = {"model_revision": "main", "base_model_revision": "null", "tokenizer_name_or_path": "null"}
# What it says of training, saving and sending: nothing of it is done here.
OF_TRAINING = {
    "do_eval": "true", "eval_strategy": "no", "eval_on_start": "false", "load_best_model_at_end": "false",
    "metric_for_best_model": "null", "early_stopping_patience": "null", "save_strategy": "no", "save_minutes": "null",
    "report_to": "none", "push_to_hub": "false", "prepare_only": "false", "dry_run": "false", "resume_from_checkpoint": "null",
    "score_step_0": "true", "train_probe": "0", "total_train_batch_size": "null", "strategy": "null", "num_processes": "null",
}  # fmt: skip
# An adapter has its own.
OF_A_NEW_ADAPTER = {
    "lora_r": "16", "lora_alpha": "32", "lora_dropout": "0.05", "use_rslora": "false", "use_dora": "false",
    "lora_target_modules": "null", "lora_modules_to_save": "null",
}  # fmt: skip
WHOLE = {
    "use_peft": "false", "sft_adapter": "null", "load_in_4bit": "false", "load_in_8bit": "false",
    "use_bnb_nested_quant": "false",
}  # fmt: skip
ADAPTER = {"use_peft": "true", "sft_adapter": "continue"}


def score_pairs(
    methods: Mapping[str, Method],
    model: str,
    recipe: Path,
    options: Sequence[str] = (),
    *,
    before: str | None = None,
    output: Path | None = None,
    method: str | None = None,
) -> Path:
    """Score the held-out pairs of `recipe` by `model`, and leave the records in a folder, which is returned.

    options: `--key=value`, in place of the recipe's. before: a model whose scores are recorded as those of step 0, and are the
    reference of an objective that has one. output: a folder without records. method: one of `methods`; None: as the recipe
    says. Rows are those of a run's last evaluation, and their step the model's. Raises UserError before a model is loaded.
    """
    chosen = methods[method or method_of(recipe)]
    folder = output or Path("scored", short_name(model))
    run_ = run_of(chosen, model, recipe, folder, options)
    objective = run_.training_args.objective
    if objective.has_reference and before is None:
        raise UserError(f"{recipe}: {objective.name} rewards what changed in training; name what the model was with --before")
    earlier = None if before is None else run_of(chosen, before, recipe, folder, [*options, *as_options(OF_ITS_MODEL)])
    tokenizer = tokenizer_of(run_, recipe)
    rows, step_zero = held_out(chosen, run_, tokenizer), None
    if earlier is not None:
        step_zero = scored_before(chosen, earlier, tokenizer_of(earlier, recipe), rows)
    trainer = loaded(chosen, run_, tokenizer, rows)
    trainer.state.global_step = step_of(model)
    trainer.step_zero = {} if step_zero is None else {"eval": step_zero}
    metrics = within_memory(trainer.evaluate)
    if PartialState().is_main_process:
        write(folder, run_, trainer.pair_records(), metrics)
    return folder


def short_name(model: str) -> str:
    """Of the folder that its records go to: the model's, with its run's for a checkpoint."""
    parts = Path(model).resolve().parts if Path(model).exists() else tuple(model.split("/"))
    return "--".join(parts[-2:] if parts[-1].startswith(f"{PREFIX_CHECKPOINT_DIR}-") else parts[-1:])


# ---- The recipe ----


def method_of(recipe: Path) -> str:
    """simpo, dpo or orpo: by the command in a recipe's first lines, or by the run that it is the record of; else simpo."""
    head = recipe.read_text(encoding="utf-8", errors="replace")[:1000] if recipe.is_file() else ""
    if found := re.search(r"run_(simpo|dpo|orpo)\.py", head):
        return found[1]
    name = read_json(recipe.parent / "environment.json").get("objective", {}).get("name", "")
    return "orpo" if "ORPO" in name else "dpo" if "DPO" in name or "IPO" in name else "simpo"


def run_of(method: Method, model: str, recipe: Path, folder: Path, options: Sequence[str]) -> Run:
    """The recipe as a run of this model that trains nothing. Raises UserError for what cannot be scored here."""
    parser = H4ArgumentParser((ModelArguments, DataArguments, method.config))
    given = {option.key: option.value for option in read_options(options, parser.targets)}
    revision = str(given.get("model_revision", "main"))
    adapter = find_adapter(ModelArguments(model_name_or_path=model, model_revision=revision))
    kind = {**OF_A_NEW_ADAPTER, **(WHOLE if adapter is None else ADAPTER)}
    forced = {"model_name_or_path": model, "output_dir": str(folder), **OF_TRAINING, **kind}
    argv = [str(recipe), *as_options(OF_ITS_MODEL), *options, *as_options(forced)]
    model_args, data_args, training_args = parser.parse(argv, recipe_checks(method))
    with parser.placing():
        set_up_logging(training_args)
        recipe_text = full_recipe(training_args.followed_defaults | parser.recipe, parser.dataclass_types)
        run_ = Run(model_args, data_args, training_args, recipe_text, date_of(recipe.parent, Path(model)))
        check(run_, parser)
    return run_


def as_options(values: Mapping[str, str]) -> list[str]:
    return [f"--{key}={value}" for key, value in values.items()]


def date_of(*folders: Path) -> str:
    """The day that chat templates read: that of the run in the first folder that holds one, else today."""
    known = (folder / DATE_FILE for folder in folders)
    return next((path.read_text(encoding="utf-8") for path in known if path.is_file()), today())


def step_of(model: str) -> int:
    """How many steps a model was trained for, as its folder says; 1 where it does not: behind the step 0 of another."""
    return read_json(Path(model, TRAINER_STATE)).get("global_step") or 1


# ---- Scoring ----


def tokenizer_of(run_: Run, recipe: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, ready, that ends texts as the recipe's own did in training.

    Where a recipe sets the template, what a run leaves names the end of a turn as eos, for generation; texts that are trained
    on end in the eos of the model that training began with.
    """
    tokenizer = ready_tokenizer(run_)
    keys = {given.key: given.value for given in read_recipe(str(recipe))}
    own = {key: str(keys[key]) for key in ("model_name_or_path", *OF_ITS_MODEL) if keys.get(key) is not None}
    if run_.data_args.chat_template is None or own.get("model_name_or_path") == run_.model_args.model_name_or_path:
        return tokenizer
    trusted = run_.model_args.trust_remote_code
    try:
        trained_with = load_tokenizer(ModelArguments(**own, trust_remote_code=trusted), DataArguments())
    except UserError as error:
        logger.warning("%s; texts end in the eos of the model that is scored, %s.", error, tokenizer.eos_token)
        return tokenizer
    if state_of(trained_with) == state_of(tokenizer) and trained_with.eos_token != tokenizer.eos_token:
        logger.info("Texts end in %s, as in training; the saved eos is %s.", trained_with.eos_token, tokenizer.eos_token)
        tokenizer.eos_token = trained_with.eos_token
    return tokenizer


def held_out(method: Method, run_: Run, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    return tokenized_splits(method.data, tokenizer, run_, names=(TEST,))[TEST]


def loaded(method: Method, run_: Run, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> PairTrainer:
    """A trainer that evaluates, with the model as a run would hold it at its end."""
    args = run_.training_args
    args.model_init_kwargs = {**model_init_kwargs(run_.model_args, args), **(args.model_init_kwargs or {})}
    policy, _ = starting_point(run_.model_args, args, tokenizer)
    trainer = method.trainer(model=policy, args=args, eval_dataset=rows, processing_class=tokenizer)
    keep_4bit_layout(trainer.model)
    trainer.settle_scoring(rows)
    return trainer


def scored_before(method: Method, run_: Run, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> StepZero:
    """What the model before training says of the rows. Raises UserError if its tokenizer makes other tokens of them."""
    data = fingerprint(rows)
    if fingerprint(held_out(method, run_, tokenizer)) != data:
        raise UserError(
            f"--before {run_.model_args.model_name_or_path}: its tokenizer makes other tokens of the held-out pairs; score "
            "each model by itself, and compare them with scripts/review_run.py"
        )
    trainer = loaded(method, run_, tokenizer, rows)
    columns = within_memory(lambda: trainer.score(rows, "held-out pairs, before training"))
    return StepZero(data, columns)


def within_memory(work: Callable[[], T]) -> T:
    try:
        return work()
    except torch.OutOfMemoryError as error:
        raise TrainingStopped(
            "out of memory; give a smaller --per_device_eval_batch_size or --max_tokens_per_micro_batch=TOKENS, or "
            "--torch_dtype=bfloat16"
        ) from error


def write(folder: Path, run_: Run, records: list[dict[str, Any]], metrics: dict[str, float]) -> None:
    """Recipe, versions and figures; the records last, in one move."""
    # Its recipe says nothing of how the model was trained.
    write_run_folder(run_, is_chosen_step=training_of(run_.model_args.model_name_or_path).is_chosen_step)
    (folder / "eval_results.json").write_text(json.dumps(metrics, indent=4, sort_keys=True) + "\n", encoding="utf-8")
    replace_jsonl(folder / HELD_OUT_FILE, records)
    logger.info("%s: %d rows; scripts/review_run.py %s reads them.", folder / HELD_OUT_FILE, len(records), folder)
