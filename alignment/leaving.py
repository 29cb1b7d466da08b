"""What a run leaves: decided before training, saved and read again after it, described on its card."""

import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from .launch.strategy import save_whole_model
from .launch.turns import decided_by_main
from .model.adapter_checks import bits_of
from .model.adapters import trained_base
from .model.companions import companion_folders, copy_companions, licence_of
from .model.config_files import whole_model
from .model.endings import stop_at
from .model.loading import weights_source
from .model.precision import Rounded, checkpoint_dtype
from .model.saved import ROWS, TOKENS, refuse_another_model, spoken, try_to_save
from .recipe.configs import Run
from .report.card import warned
from .report.review.reading import WARNINGS_FILE, read_warnings
from .report.saved_files import complete_card
from .run.durable import DurableTrainer

logger = logging.getLogger(__name__)


def settle_end(trainer: DurableTrainer, run_: Run) -> None:
    """What the folder will say that the run leaves, tried before it is trained for."""
    args, model, tokenizer = run_.training_args, trainer.bare_model(), trainer.processing_class
    trainer.saved_eos = stop_at(whole_model(model), tokenizer, taught=run_.data_args.chat_template is not None)
    if not isinstance(model, PeftModel):
        trainer.saves_in = args.save_dtype or checkpoint_dtype(trainer.config_as_came, *weights_source(run_.model_args))
    rows, trusted = sample_rows(trainer.train_dataset), run_.model_args.trust_remote_code
    came, eos = trainer.config_as_came, trainer.saved_eos
    decided_by_main(lambda: try_to_save(model, tokenizer, came, rows, eos_token=eos, trust_remote_code=trusted))


def sample_rows(data: Dataset) -> list[list[int]]:
    """The beginnings of a few training rows, in token ids."""
    columns = [name for name in data.column_names if name.endswith("input_ids")]
    return [ids[:TOKENS] for row in data.select(range(min(ROWS, len(data)))) for ids in (row[name] for name in columns)]


# ---- After training ----


def save(trainer: DurableTrainer, run_: Run) -> None:
    """The model into output_dir, in the type it is to have, and then read again: it must be the one that was trained."""
    round_to_saved(trainer)
    rows = sample_rows(trainer.train_dataset)
    wanted = spoken(trainer.model_wrapped, rows)
    save_whole_model(trainer)
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        for source in companion_folders(run_.model_args):
            copy_companions(source, folder)
        logger.info("Model saved to %s%s.", folder, f": {kept}" if (kept := best_step(trainer)) else "")
    decided_by_main(lambda: refuse_another_end(trainer, rows, wanted))


def best_step(trainer: DurableTrainer) -> str:
    """Which step's weights are saved, where those are not the last one's."""
    args, state = trainer.args, trainer.state
    if not args.load_best_model_at_end or state.best_global_step in (None, state.global_step):
        return ""
    figure = f"{args.metric_for_best_model} {state.best_metric:.4g}"
    return f"of step {state.best_global_step}, the best of {state.global_step} ({figure})"


def round_to_saved(trainer: DurableTrainer) -> None:
    """What is evaluated, and saved, is what the saved type can hold."""
    if trainer.saves_in is None:
        return
    model = trainer.bare_model()
    trainer.rounded = Rounded(trainer.model, getattr(torch, trainer.saves_in), model)
    trained = str(model.dtype).removeprefix("torch.")
    logger.info(
        "Weights are saved in %s, as the checkpoint's (save_dtype changes it); they were trained in %s%s.", trainer.saves_in,
        trained, " and are evaluated as they are saved" if trainer.rounded.before else "",
    )  # fmt: skip


def refuse_another_end(trainer: DurableTrainer, rows: list[list[int]], wanted: list[Tensor]) -> None:
    args = trainer.args
    model = trainer.bare_model()
    half = args.bf16 or args.fp16 or model.dtype != torch.float32
    refuse_another_model(
        Path(args.output_dir), model, trainer.processing_class, rows, wanted, init_kwargs=args.model_init_kwargs, half=half
    )


def before_rounding(trainer: DurableTrainer) -> dict[str, float]:
    """Figures of the weights as they were trained, where a step evaluated those and others are saved."""
    step = trainer.state.best_global_step if trainer.args.load_best_model_at_end else trainer.state.global_step
    records = [record for record in trainer.state.log_history if "eval_loss" in record and record["step"] == step]
    return records[-1] if records and trainer.rounded is not None and trainer.rounded.before else {}


def describe_files(trainer: DurableTrainer, run_: Run) -> None:
    """The card's part on what is beside it, and what the run warned of."""
    card = run_.output_dir / "README.md"
    text = complete_card(card.read_text(encoding="utf-8"), **files_facts(trainer, run_))
    card.write_text(text + warned(read_warnings(run_.output_dir / WARNINGS_FILE)), encoding="utf-8")


def files_facts(trainer: DurableTrainer, run_: Run) -> dict[str, Any]:
    """What the card says of the files: see `complete_card`."""
    model, unrounded = trainer.bare_model(), trainer.unrounded_figures
    dtype = str(model.dtype).removeprefix("torch.")
    saved = trainer.saves_in or dtype
    base, licence = weights_source(run_.model_args), licence_of(run_.model_args)
    rows = {"Weights": saved if saved == dtype else f"{saved}, trained in {dtype}"}
    metadata: dict[str, Any] = {**licence, "base_model_relation": "finetune"}
    tags: list[str] = []
    if isinstance(model, PeftModel):
        adapter = model.peft_config[model.active_adapter]
        merged = trained_base(run_.model_args, run_.training_args).name
        rows = {"Weights": f"a LoRA adapter (rank {adapter.r}, alpha {adapter.lora_alpha}) of `{merged}`"}
        metadata |= {"library_name": "peft", "base_model": base.name, "base_model_relation": "adapter"}
        tags = ["lora"]
        if bits := bits_of(run_.model_args, model.config):
            kind = f", {run_.model_args.bnb_4bit_quant_type}" if bits == 4 else ""
            rows["Base while training"] = (
                f"quantised to {bits} bits (bitsandbytes{kind}); on a base of another precision it gives other "
                "log-probabilities than those above"
            )
            tags.append(f"{bits}-bit")
    if kept := best_step(trainer):
        rows["Weights"] += f", {kept}"
    if licence:
        rows["Licence of the base"] = str(licence.get("license_name") or licence["license"])
    as_saved = [record for record in trainer.state.log_history if "eval_loss" in record][-1:]
    figures = [{key.removeprefix("eval_"): value for key, value in record.items()} for record in (*as_saved, unrounded)]
    return {
        "rows": rows, "metadata": metadata, "tags": tags,
        "as_saved": figures[0] if as_saved else {}, "unrounded": figures[-1] if as_saved else {},
    }  # fmt: skip
