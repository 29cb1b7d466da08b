"""What generation stops at: the token that ends a turn in the template that was trained on."""

import logging

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

REPLY = "reply"


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the template writes behind an assistant's turn; None where it writes none."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": REPLY}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return None  # the data's own rendering reports it
    ids = tokenizer(text.rpartition(REPLY)[2], add_special_tokens=False)["input_ids"]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    return next((number for number in ids if number in special), None)


def ends_of(model: PreTrainedModel) -> list[int]:
    """What a model stops at, by its generation settings."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def stop_at(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, taught: bool) -> str | None:
    """Have generation stop at the tokenizer's eos and at the end of a turn. Returns the eos of what is saved, if another.

    taught: the recipe set the template, so that the end of a turn is not yet what the tokenizer ends in.
    """
    if model.generation_config is None:
        return None
    end, eos = end_of_turn(tokenizer), tokenizer.eos_token_id
    if missing := [number for number in dict.fromkeys((end, eos)) if number is not None and number not in ends_of(model)]:
        model.generation_config.eos_token_id = [*missing, *ends_of(model)]
    if end is None:
        return None
    name = tokenizer.convert_ids_to_tokens(end)
    if end in missing and end != eos:
        logger.info("Generation stops at %s too, which ends a turn in this template; the saved model says so.", name)
    if not taught or end == tokenizer.eos_token_id:
        return None
    logger.info("The saved tokenizer's eos is %s instead of %s, as the recipe's template has it.", name, tokenizer.eos_token)
    return name
