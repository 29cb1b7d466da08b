"""Matrices and finished cells, written by hand."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from alignment.ablation.cells import Cell
from alignment.run.records import write_jsonl
from alignment.run.run_folder import write_status

BASE = {
    "model_name_or_path": "somewhere/model",
    "dataset_mixer": {"some/pairs": 1.0},
    "preprocessing": "exact",
    "use_cpu": True,
    "do_eval": True,
    "beta": 2.5,
    "gamma_beta_ratio": 0.5,
    "max_length": 160,
    "max_prompt_length": 80,
    "learning_rate": 1e-3,
    "use_peft": True,
    "report_to": "none",
}
SIMPO, DPO, ORPO = {"method": "simpo"}, {"method": "dpo", "beta": 0.1}, {"method": "orpo", "beta": 0.1}
RANKS = {"r16": {"lora_r": 16, "lora_alpha": 32}, "r8": {"lora_r": 8, "lora_alpha": 16}}
AXES = {"objective": {"simpo": SIMPO, "dpo": DPO}, "rank": RANKS, "seed": [42]}
LAUNCH = {"accelerate_config": "accelerate_configs/cpu.yaml", "gpus_per_node": 0}


def write_matrix(folder: Path, recipe: Mapping[str, Any] = BASE, **keys: Any) -> str:
    """folder/matrix.yaml beside its base, `recipe`; a key that is None is left out."""
    (folder / "base.yaml").write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
    whole = {"base": "base.yaml", "axes": AXES, "launch": LAUNCH, "output_dir": str(folder / "out"), **keys}
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in whole.items() if value is not None}, sort_keys=False))
    return str(path)


def pair_rows(step: int, margins: list[float], *, level: float = -1.0, scale: float = 1.0) -> list[dict[str, Any]]:
    """Pairs with these d; rewards are `scale` times the mean log-probabilities."""
    rows = []
    for index, margin in enumerate(margins):
        scores = {"chosen": level + margin / 2, "rejected": level - margin / 2}
        rows.append(
            {
                "step": step,
                "index": index,
                **dict.fromkeys(("prompt_sha256", "chosen_sha256", "rejected_sha256"), f"{index}"),
                **{f"{side}_tokens": 20 for side in scores},
                **{f"{side}_mean_logp": score for side, score in scores.items()},
                **{f"{side}_logp": 20 * score for side, score in scores.items()},
                **{f"{side}_reward": scale * score for side, score in scores.items()},
            }
        )
    return rows


def finish(
    cell: Cell, *, right: int = 60, pairs: int = 100, gap: float = 0.0, train_margin: float = 1.0, fell: float = 0.0,
    losses: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7), seed: int = 0,
) -> None:  # fmt: skip
    """The folder of a run that got `right` of its held-out pairs right; the probe's d lies `gap` above theirs.

    fell: by how much the chosen responses' log-probabilities fell, nats per token.
    """
    order = random.Random(seed).sample(range(pairs), pairs)  # whichever pairs these are
    margins = [0.1 if place < right else -0.1 for place in order]
    before = [0.1 if place < pairs // 2 else -0.1 for place in range(pairs)]
    cell.run.mkdir(parents=True)
    held_out = [*pair_rows(0, before), *pair_rows(4, margins, level=-1.0 - fell)]
    probe = [*pair_rows(0, before), *pair_rows(4, [margin + gap for margin in margins], level=-1.0 - fell)]
    write_jsonl(cell.run / "eval_pairs.jsonl", held_out)
    write_jsonl(cell.run / "probe_pairs.jsonl", probe)
    log = [{"step": step, "loss": loss, "rewards/margins": train_margin} for step, loss in enumerate(losses, start=1)]
    write_jsonl(cell.run / "metrics.jsonl", log)
    (cell.run / "eval_results.json").write_text(json.dumps({"eval_loss": losses[-1]}))
    (cell.run / "recipe.yaml").write_text(yaml.safe_dump(dict(cell.recipe)))
    (cell.run / "model.safetensors").touch()
    (cell.run / "_run").mkdir()
    write_status(cell.run, "finished", step=4)


def break_down(cell: Cell, state: str = "failed", **facts: Any) -> None:
    (cell.run / "_run").mkdir(parents=True)
    write_status(cell.run, state, **facts)
