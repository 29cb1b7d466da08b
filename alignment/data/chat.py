"""Conversations -> the text of a prompt and its two responses."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import UserError

TEMPLATE_FOLDER = Path(__file__).parent / "templates"
TEXT_COLUMNS = ("prompt", "chosen", "rejected")
Turns = list[dict[str, str]]


def find_chat_template(
    tokenizer: PreTrainedTokenizerBase, model_path: str, *, recipe_template: str | None, preprocessing: str
) -> tuple[str, str]:
    """The Jinja text to use, and where it comes from.

    `published`: a model path that contains "mistral" decides alone, as in the published code. Otherwise the recipe's
    template (a shipped name, a .jinja file, or Jinja text), the tokenizer's own, and Zephyr's as the last resort.
    Raises UserError for a template that does not exist.
    """
    if preprocessing == "published" and "mistral" in model_path.lower():
        return shipped_template("mistral"), "mistral (the model path contains it)"
    if recipe_template is not None:
        return read_template(recipe_template), "the recipe"
    if tokenizer.chat_template:
        return tokenizer.chat_template, "the tokenizer"
    return shipped_template("zephyr"), "zephyr (neither recipe nor tokenizer has one)"


def shipped_template(name: str) -> str:
    return (TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def read_template(value: str) -> str:
    """A shipped name, a .jinja file, or Jinja text itself."""
    shipped = sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.jinja"))
    if value in shipped:
        return shipped_template(value)
    if "{{" in value or "{%" in value:
        return value
    if not Path(value).is_file():
        raise UserError(f"chat_template = {value!r}: no such file, and not one of the shipped {', '.join(shipped)}")
    return Path(value).read_text(encoding="utf-8")


def render(turns: Turns, tokenizer: PreTrainedTokenizerBase, *, generation_prompt: bool = False) -> str:
    """The template's text for these turns. Raises UserError with the template's own complaint."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(
            f"the chat template refuses a conversation of roles ({roles}): {error}. Set chat_template in the recipe to "
            "one that accepts it (shipped: llama-3, mistral, gemma, zephyr)."
        ) from error


def with_empty_system_turn(turns: Turns, template: str) -> Turns:
    """The published `auto_insert_empty_system_msg`: by the words that the template contains."""
    knows_system = "system" in template or "<|im_start|>" in template
    return [{"role": "system", "content": ""}, *turns] if knows_system and turns[0]["role"] != "system" else turns


def published_pair_text(row: dict[str, Turns], tokenizer: PreTrainedTokenizerBase, *, add_system: bool) -> dict[str, Any]:
    """Prompt and responses rendered apart; so the assistant's header, where there is one, opens the response."""
    prompt = with_empty_system_turn(row["prompt"], tokenizer.chat_template) if add_system else row["prompt"]
    return {
        "prompt": render(prompt, tokenizer),
        "chosen": without_bos(render(row["chosen"], tokenizer), tokenizer),
        "rejected": without_bos(render(row["rejected"], tokenizer), tokenizer),
        "system_added": len(prompt) > len(row["prompt"]),
    }


def without_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token else text


def exact_pair_text(row: dict[str, Turns], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The prompt as generation sees it; the response is what follows it in the whole conversation's text."""
    prompt = render(row["prompt"], tokenizer, generation_prompt=True)
    responses = {side: render(row["prompt"] + row[side], tokenizer) for side in ("chosen", "rejected")}
    for side, text in responses.items():
        if not text.startswith(prompt):
            raise UserError(
                f"the chat template writes a conversation differently once it is answered: its text does not begin with "
                f"the prompt's, so the {side} response cannot be told from it. The prompt ends with {prompt[-60:]!r}; "
                "set chat_template in the recipe to one that only appends."
            )
    return {"prompt": prompt, **{side: text[len(prompt) :] for side, text in responses.items()}, "system_added": False}


def pair_texts(
    batch: dict[str, list[Turns]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    preprocessing: str,
    add_system: bool,
) -> dict[str, list[Any]]:
    """A batch of conversations (columns prompt, chosen, rejected: lists of turns) as text, for `Dataset.map` in batches.

    Raises UserError naming the row whose conversation the template refuses.
    """
    rows = [
        dict(zip(TEXT_COLUMNS, turns, strict=True))
        for turns in zip(batch["prompt"], batch["chosen"], batch["rejected"], strict=True)
    ]
    render_pair = partial(published_pair_text, add_system=add_system) if preprocessing == "published" else exact_pair_text
    texts = [with_place(render_pair, row, tokenizer, index) for index, row in zip(indices, rows, strict=True)]
    return {key: [text[key] for text in texts] for key in (*TEXT_COLUMNS, "system_added")}


def message_texts(
    batch: dict[str, list[Turns]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    preprocessing: str,
    add_system: bool,
) -> dict[str, list[str]]:
    """A batch of whole conversations (column messages) as text, for supervised training. Raises as `pair_texts`."""
    inserts = preprocessing == "published" and add_system
    rows = [with_empty_system_turn(row, tokenizer.chat_template) if inserts else row for row in batch["messages"]]
    texts = [with_place(render, row, tokenizer, index) for index, row in zip(indices, rows, strict=True)]
    return {"text": texts}


def with_place(function: Callable[..., Any], row: Any, tokenizer: PreTrainedTokenizerBase, index: int) -> Any:
    try:
        return function(row, tokenizer)
    except UserError as error:
        raise UserError(f"row {index} of the shuffled split: {error}") from error


def check_published_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that the published rules would misuse.

    They render a response by itself. A template that writes a system block (or a date) above any conversation would
    write it inside each response, to be trained on and counted in the length.
    """
    question, reply = {"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}
    alone = without_bos(render([reply], tokenizer), tokenizer)
    if not render([question, reply], tokenizer).endswith(alone):
        raise UserError(
            f"preprocessing = published: this model's chat template puts {alone[: alone.find('reply')]!r} in front of "
            "every response that is rendered alone, which would be trained on. Use preprocessing: exact."
        )
