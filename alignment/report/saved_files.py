"""What a model card says of the files beside it: their type, their base, its licence, and what rounding changed."""

from typing import Any

from huggingface_hub import ModelCard

from .card import HELD_OUT, is_hub_name


def complete_card(
    card: str,
    *,
    rows: dict[str, str],
    metadata: dict[str, Any],
    tags: list[str],
    as_saved: dict[str, float],
    unrounded: dict[str, float],
) -> str:
    """A card, whoever wrote it, with a section on its files. metadata: of the header, where a value of None says nothing.

    as_saved, unrounded: figures of the last evaluation, by metric key without `eval_`; unrounded is empty where nothing was
    rounded, or not evaluated before.
    """
    parsed = ModelCard(card, ignore_metadata_errors=True)
    for key, value in metadata.items():
        if value is not None and (key != "base_model" or is_hub_name(value)):
            setattr(parsed.data, key, value)
    parsed.data.tags = [*(parsed.data.tags or []), *(tag for tag in tags if tag not in (parsed.data.tags or []))]
    lines = ["", "## Files", "", "| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows.items()), ""]
    if unrounded:
        lines += ["| Held-out pairs | as saved | before rounding |", "|---|---|---|"]
        known = [key for key in HELD_OUT if key in as_saved and key in unrounded]
        lines += [*(f"| {HELD_OUT[key]} | {as_saved[key]:.4f} | {unrounded[key]:.4f} |" for key in known), ""]
    return "\n".join([parsed.content.rstrip(), *lines])
