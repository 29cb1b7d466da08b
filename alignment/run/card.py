"""README.md of a run's folder, as any method's trainer writes it."""

from pathlib import Path
from typing import Any

from transformers import Trainer

from ..report.card import run_card
from ..report.objective import Objective


def write_card(
    trainer: Trainer, objective: Objective, *, base_model: str | None, datasets: list[str], settings: dict[str, Any]
) -> None:
    """The card of what was trained so far, with the figures of the last evaluation. On the main process; others return.

    settings: rows of the card's table, behind the seed, rate and steps that every run has.
    """
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    evaluations = [record for record in trainer.state.log_history if "eval_loss" in record]
    held_out = {key.removeprefix("eval_"): value for key, value in evaluations[-1].items()} if evaluations else {}
    common = {
        "learning rate": args.learning_rate,
        "steps": trainer.state.global_step,
        "preprocessing": args.preprocessing,
        "seed": args.seed,
    }
    name = (args.hub_model_id or args.run_name or Path(args.output_dir).name).split("/")[-1]
    about = {"name": name, "base_model": base_model, "datasets": datasets, "held_out": held_out}
    card = run_card(objective, **about, settings=common | settings)
    Path(args.output_dir, "README.md").write_text(card, encoding="utf-8")
