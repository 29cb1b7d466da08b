"""The model card of a run."""

import re
from pathlib import Path
from typing import Any

import yaml

from .objective import Objective

HELD_OUT = {
    "loss": "Loss",
    "mean_token_accuracy": "Accuracy of the next token",
    "entropy": "Entropy of the next token (nats)",
    "rewards/accuracies": "Reward accuracy",
    "rewards/margins": "Reward margin",
    "rewards/chosen": "Reward of chosen responses",
    "rewards/rejected": "Reward of rejected responses",
    "lengths/chosen": "Length of chosen responses (tokens)",
    "lengths/rejected": "Length of rejected responses (tokens)",
}


def warned(warnings: list[dict[str, Any]]) -> str:
    """A section on what the run warned of (step and text of each), for the end of a card; nothing where it did not."""
    lines = [f"- Step {row['step']}: {row['text']}." for row in warnings]
    return "\n".join(["", "## Warnings", "", *lines, ""]) if lines else ""


def is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def run_card(
    objective: Objective,
    *,
    name: str,
    base_model: str | None,
    datasets: list[str],
    settings: dict[str, Any],
    held_out: dict[str, float],
) -> str:
    """Markdown with its metadata block. `held_out` maps metric keys without `eval_` to figures; empty: never evaluated.

    An objective without rewards is one on conversations.
    """
    on_pairs, paper = objective.reward is not None, objective.paper
    metadata = {
        "library_name": "transformers",
        "model_name": name,
        "tags": [objective.tag, *(["preference-optimization"] if on_pairs else []), "alignment"],
        # The Hub refuses a card whose header names what is no repository.
        **({"base_model": base_model} if base_model and is_hub_name(base_model) else {}),
        **({"datasets": on_hub} if (on_hub := [name for name in datasets if is_hub_name(name)]) else {}),
    }
    trained_on = ", ".join(f"`{dataset}`" for dataset in datasets) or ("preference pairs" if on_pairs else "conversations")
    rows = [f"| {label} | {held_out[key]:.4f} |" for key, label in HELD_OUT.items() if key in held_out]
    figures = [f"## Held-out {'pairs' if on_pairs else 'conversations'}", "", "| | |", "|---|---|", *rows, ""] if rows else []
    reference = "the policy itself before its first step" if objective.has_reference else "none"
    facts = {
        "objective": objective.name,
        f"loss of a {'pair' if on_pairs else 'token'}": f"`{objective.formula}`",
        **objective.parameters,
        **({"reference": reference} if on_pairs else {}),
    }
    method = f"[{objective.name}]({paper.url})" if paper else objective.name
    rewards = [f"Rewards are {objective.reward}; the difference of two, the margin, is what is trained.", ""]
    lines = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        "",
        f"`{base_model or 'A language model'}` trained on {trained_on} with {method}, {objective.title}: {objective.paragraph}",
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *[f"| {key} | {value} |" for key, value in (facts | settings).items()],
        "",
        *figures,
        *(rewards if on_pairs else []),
        *(["## Citation", "", f"```bibtex\n{paper.bibtex}\n```", ""] if paper else []),
    ]
    return "\n".join(lines)
