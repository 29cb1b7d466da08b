"""The model card of a SimPO run."""

import re
from pathlib import Path
from typing import Any

import yaml

PAPER = "https://arxiv.org/abs/2405.14734"
CITATION = """\
@inproceedings{meng2024simpo,
  title     = {SimPO: Simple Preference Optimization with a Reference-Free Reward},
  author    = {Meng, Yu and Xia, Mengzhou and Chen, Danqi},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024}
}"""

HELD_OUT = {
    "loss": "Loss",
    "rewards/accuracies": "Reward accuracy",
    "rewards/margins": "Reward margin",
    "rewards/chosen": "Reward of chosen responses",
    "rewards/rejected": "Reward of rejected responses",
    "lengths/chosen": "Length of chosen responses (tokens)",
    "lengths/rejected": "Length of rejected responses (tokens)",
}


def is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def simpo_card(
    *, name: str, base_model: str | None, datasets: list[str], settings: dict[str, Any], held_out: dict[str, float]
) -> str:
    """Markdown with its metadata block. `held_out` maps metric keys without `eval_` to figures; empty: never evaluated."""
    metadata = {
        "library_name": "transformers",
        "model_name": name,
        "tags": ["simpo", "preference-optimization", "alignment"],
        # The Hub refuses a card whose header names what is no repository.
        **({"base_model": base_model} if base_model and is_hub_name(base_model) else {}),
        **({"datasets": on_hub} if (on_hub := [name for name in datasets if is_hub_name(name)]) else {}),
    }
    trained_on = ", ".join(f"`{dataset}`" for dataset in datasets) or "preference pairs"
    rows = [f"| {label} | {held_out[key]:.4f} |" for key, label in HELD_OUT.items() if key in held_out]
    figures = ["## Held-out pairs", "", "| | |", "|---|---|", *rows, ""] if rows else []
    lines = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        "",
        f"`{base_model or 'A language model'}` trained on {trained_on} with [SimPO]({PAPER}), Simple Preference "
        "Optimization: the reward of a response is beta times its mean log-probability per token, no reference model is "
        "used, and the chosen response must beat the rejected one by a margin gamma.",
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *[f"| {key} | {value} |" for key, value in settings.items()],
        "",
        *figures,
        "Rewards are log-probabilities times beta, so they are negative; their difference is what is trained.",
        "",
        "## Citation",
        "",
        f"```bibtex\n{CITATION}\n```",
        "",
    ]
    return "\n".join(lines)
