"""Which chat template a run uses, what the recipe and the run give it to read, and what it renders."""

import difflib
import functools
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from transformers import PreTrainedTokenizerBase

from ..errors import UserError, not_utf8, shown
from .files import local_path

TEMPLATE_FOLDER = Path(__file__).parent / "templates"
Turns = list[dict[str, Any]]
# What transformers gives to every template; a default for it would never be read.
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
CLOCK = "strftime_now"


def find_chat_template(
    tokenizer: PreTrainedTokenizerBase, model_path: str, *, recipe_template: str | None, preprocessing: str
) -> tuple[str | dict[str, str], str]:
    """The Jinja text to use, or the tokenizer's named ones with their default, and where it comes from.

    `published`: a model path that contains "mistral" decides alone, as in the published code. Otherwise the recipe's
    template (a shipped name, a name of the tokenizer's, a .jinja file, or Jinja text), the tokenizer's own, and Zephyr's
    as the last resort. Raises UserError for a template that does not exist.
    """
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    if preprocessing == "published" and "mistral" in model_path.lower():
        return shipped_template("mistral"), "mistral (the model path contains it)"
    if recipe_template in named:
        return named[recipe_template].removeprefix("\ufeff"), f"the tokenizer's {recipe_template}"
    if recipe_template is not None:
        text = read_template(recipe_template)
        try:
            parsed(text)
        except TemplateSyntaxError as error:
            place = f"chat_template = {shown(recipe_template)}"
            raise UserError(f"{place}: is no Jinja template: line {error.lineno}: {error.message}") from error
        return text, "the recipe's"
    if named and "default" not in named:
        raise UserError(
            f"{model_path}: its tokenizer has the chat templates {', '.join(named)}, and none is the default; choose one: "
            f"chat_template: {next(iter(named))}, or one of the shipped {', '.join(shipped_names())}"
        )
    if named:
        return {name: text.removeprefix("\ufeff") for name, text in named.items()}, "the tokenizer's"
    if own:
        return own.removeprefix("\ufeff"), "the tokenizer's"
    return shipped_template("zephyr"), "zephyr (neither recipe nor tokenizer has one)"


def shipped_names() -> list[str]:
    return sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.jinja"))


def shipped_template(name: str) -> str:
    return (TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def read_template(value: str) -> str:
    """A shipped name, a .jinja file, or Jinja text itself."""
    if value in shipped_names():
        return shipped_template(value)
    path = local_path(value)
    if path is None and ("{{" in value or "{%" in value):
        return value.removeprefix("\ufeff")
    place = f"chat_template = {value!r}"
    if path is None or not path.is_file():
        raise UserError(f"{place}: no such file, and not one of the shipped {', '.join(shipped_names())}")
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark would stand in front of every conversation
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: {not_utf8(error)}") from error
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror}") from error


# ---- What a template reads beside the conversation ----


def with_settings(template: str | dict[str, str], settings: dict[str, Any] | None, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The template with the recipe's chat_template_kwargs as defaults, which the saved tokenizer carries on.

    Raises UserError for a key that it does not read.
    """
    if not settings:
        return template
    named = template if isinstance(template, dict) else {"": template}
    words = set().union(*map(variables, named.values()))
    for key in settings:
        check_setting(key, words, tokenizer)
    opening = "".join(
        f"{{% if {key} is not defined %}}{{% set {key} = {literal(value)} %}}{{% endif %}}\n" for key, value in settings.items()
    )
    opened = {name: opening + text for name, text in named.items()}
    return opened if isinstance(template, dict) else opened[""]


@functools.lru_cache(maxsize=8)
def variables(template: str) -> set[str]:
    """The names that a template looks up; none of one that is no Jinja, which fails when it is rendered."""
    try:
        return meta.find_undeclared_variables(parsed(template))
    except TemplateSyntaxError:
        return set()


def parsed(template: str) -> nodes.Template:
    """Raises TemplateSyntaxError."""
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # a tag of transformers'
    return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)


def check_setting(key: str, words: set[str], tokenizer: PreTrainedTokenizerBase) -> None:
    place = f"chat_template_kwargs.{key}"
    if key in GIVEN or key in tokenizer.special_tokens_map or key == CLOCK:
        raise UserError(f"{place}: is given by the data, the tokenizer or the run; remove it")
    if key not in words:
        near = difflib.get_close_matches(key, words, n=1, cutoff=0.7)
        advice = f"did you mean {near[0]!r}?" if near else "remove it, or choose a chat_template that does"
        raise UserError(f"{place}: the chat template reads nothing of this name; {advice}")


def literal(value: Any) -> str:
    """A value of a recipe as Jinja spells it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(str(key))}: {literal(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    return CLOCK in str(tokenizer.chat_template)


@functools.cache
def clock(date: str) -> str:
    """Jinja that sets the clock of templates to a day, at midnight: transformers' own would show when rows were rendered."""
    day = datetime.fromisoformat(date)
    values = {f"%{code}": day.strftime(f"%{code}") for code in "aAbBcCdDeFGhHIjmMprRSTuUVwWxXyYZz"}
    values |= {f"%-{code}": str(int(values[f"%{code}"])) for code in "dHIjmMS"}
    spelt = "".join(f" | replace({literal(code)}, {literal(value)})" for code, value in values.items())
    return f'{{% macro {CLOCK}(format) %}}{{{{ format{spelt} | replace("%%", "%") }}}}{{% endmacro %}}\n'


# ---- Rendering ----


def other_template() -> str:
    return f"Set chat_template in the recipe to one that suits these rows (shipped: {', '.join(shipped_names())})."


class TemplateRefusal(UserError):
    """A chat template's own complaint about a conversation, or its failure."""

    def __init__(self, roles: str, complaint: str):
        self.refusal = f"the chat template refuses a conversation of roles ({roles}): {complaint.rstrip('.')}"
        super().__init__(f"{self.refusal}. {other_template()}")


def render(
    turns: Turns,
    tokenizer: PreTrainedTokenizerBase,
    *,
    generation_prompt: bool = False,
    tools: list[dict] | None = None,
    documents: list[dict] | None = None,
    date: str | None = None,
) -> str:
    """The template's text for these turns, on this day. Raises TemplateRefusal with the template's own complaint."""
    try:
        template = tokenizer.get_chat_template(tools=tools)
        if date is not None and CLOCK in template:
            template = clock(date) + template
        return tokenizer.apply_chat_template(
            turns,
            tools=tools,
            documents=documents,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except Exception as error:  # a template is a program, and fails like one
        roles = ", ".join(turn["role"] for turn in turns)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TemplateRefusal(roles, reason) from error
