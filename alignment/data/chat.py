"""Conversations -> the text of a prompt and its two responses; what a response is, is decided and proved here, row by row.

`exact`: prompt + response is the template's own text of the whole conversation, up to the end of the reply's turn; the response
holds the reply, whole, and nothing behind its end. `published`: as the published code glued them, with a word on every row
where that is not so.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .rows import REFUSED, SAID, TEMPLATE_COLUMNS, Finding, is_unicode, whole_turns
from .template import TemplateRefusal, Turns, other_template, render, variables

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
SIDES = ("chosen", "rejected")
# A reply of one word that no other text holds: around it stands what the template writes around any reply.
PROBE = "qzxprobeqzx"

LOST = "the template leaves out part of a turn"
UNWRITTEN = "the template does not write a key of the rows"
REWRITTEN = "the template rewrites an answered prompt"
GLUED = "glued text is none of the template's"
SECOND_BOS = "bos twice"
ENDLESS = "no end of turn"
EMPTY = "empty response"
SPECIAL = "special token in the text"
SCORED_OPENING = "the template's own words before the reply are scored"
SHARED_OPENING = "header given to the prompt, as the template has no generation prompt"
ENDED = "eos added, as the template has no end of turn that is a token"
UNSEEN_TOOLS = "tools not written, as in the published code"
REMARKS = {SPECIAL, SCORED_OPENING, SHARED_OPENING, ENDED, UNSEEN_TOOLS}
# What makes a template unfit for the published rules where it happens in every row.
MISUSED = {GLUED, SECOND_BOS}


class Fault(UserError):
    """Why a row cannot be trained on as it is."""

    def __init__(self, reason: str, detail: str):
        self.finding = Finding(reason, detail)
        super().__init__(detail)


class Frame(NamedTuple):
    """What a template writes around a reply: before it, behind it, the end of its turn, and whether that is a token."""

    opening: str
    tail: str
    ending: str
    ends: bool


# ---- The published rules ----


def with_empty_system_turn(turns: Turns, template: str) -> Turns:
    """The published `auto_insert_empty_system_msg`: by the words that the template contains."""
    knows_system = "system" in template or "<|im_start|>" in template
    return [{"role": "system", "content": ""}, *turns] if knows_system and turns[0]["role"] != "system" else turns


def published_pair_text(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, add_system: bool, date: str | None = None
) -> dict[str, Any]:
    """Prompt and responses rendered apart; so the assistant's header, where there is one, opens the response."""
    prompt = with_empty_system_turn(row["prompt"], tokenizer.get_chat_template()) if add_system else row["prompt"]
    texts = {
        "prompt": render(prompt, tokenizer, date=date),
        "chosen": without_bos(render(row["chosen"], tokenizer, date=date), tokenizer),
        "rejected": without_bos(render(row["rejected"], tokenizer, date=date), tokenizer),
    }
    given = [*row["prompt"], *row["chosen"], *row["rejected"]]
    findings = [*glue_faults(prompt, row, texts, partial(render, tokenizer=tokenizer, date=date))]
    findings += [*bos_faults(texts, given, tokenizer), *special_tokens(given, tokenizer)]
    if row.get("tools"):
        findings.append(Finding(UNSEEN_TOOLS, "the published code hands no tools to the template; preprocessing: exact does"))
    return {**texts, "system_added": len(prompt) > len(row["prompt"]), "add_eos": False, "findings": findings}


def without_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token else text


def glue_faults(prompt: Turns, row: dict[str, Turns], texts: dict[str, str], draw: Callable[[Turns], str]) -> Iterator[Finding]:
    """Where prompt + response is not what the template writes for the whole conversation, and what is in neither."""
    if missing := left_out([turn for turn in prompt if turn["role"] != "assistant"], texts["prompt"]):
        yield missing
    for side in SIDES:
        glued = texts["prompt"] + texts[side]
        try:
            whole = draw(prompt + row[side])
        except TemplateRefusal as refusal:
            yield Finding(GLUED, f"prompt and {side} are no conversation of the template's: {refusal.refusal}")
            continue
        if glued != whole:
            yield Finding(GLUED, f"prompt + {side} is {around_difference(glued, whole)}")
        elif missing := left_out(row[side], texts[side]):
            yield missing


def around_difference(ours: str, theirs: str) -> str:
    """Two texts side by side, from a little before they part."""
    parting = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    span = slice(max(parting - 30, 0), parting + 50)
    return f"...{ours[span]!r}..., where the template writes ...{theirs[span]!r}..."


# ---- The exact rules ----


def exact_pair_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, date: str | None = None) -> dict[str, Any]:
    """The prompt as generation sees it; the response is what follows it in the whole conversation's text.

    Raises TemplateRefusal or Fault for a row in which that is not the reply, whole and with its end.
    """
    beside = beside_turns(row, tokenizer)
    draw = partial(render, tokenizer=tokenizer, date=date, **beside)
    turns = [without_mark(turn, tokenizer.eos_token) for turn in row["prompt"]]
    prompt = draw(turns, generation_prompt=True)
    frame = frame_of(turns, prompt, draw, tokenizer)
    texts, ends = {}, {}
    for side in SIDES:
        replies = [without_mark(without_mark(turn, tokenizer.eos_token), frame.ending.strip()) for turn in row[side]]
        if all(is_silent(turn) for turn in replies):
            raise Fault(EMPTY, f"{side} is empty")
        response = response_text(side, prompt, draw(turns + replies))
        if missing := left_out(replies, response):
            raise Fault(*missing)
        texts[side], ends[side] = up_to_its_end(response, frame, tokenizer)
    if missing := left_out([turn for turn in turns if turn["role"] != "assistant"], prompt) or unnamed_tool(
        beside["tools"], prompt
    ):
        raise Fault(*missing)
    if not all(ends.values()) and tokenizer.eos_token is None:
        raise Fault(ENDLESS, f"nothing ends the response {texts['chosen'][-60:]!r}, and the tokenizer has no eos")
    given = [*row["prompt"], *row["chosen"], *row["rejected"]]
    for fault in bos_faults({"prompt": prompt, **texts}, given, tokenizer):
        raise Fault(*fault)
    prompt, texts, opening = with_opening(prompt, texts, frame, lambda: draw(turns))
    findings = [*opening, *special_tokens(given, tokenizer)]
    if not all(ends.values()):
        findings.append(Finding(ENDED, f"the response ends with {texts['chosen'][-30:]!r}, where generation would not stop"))
    return {"prompt": prompt, **texts, "system_added": False, "add_eos": not all(ends.values()), "findings": findings}


def beside_turns(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[dict] | None]:
    """The row's tools and documents. A column of that name with something else in it matters where the template reads it."""
    beside = {}
    for column in TEMPLATE_COLUMNS:
        value = row.get(column) or None
        is_list = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
        if not is_list and value is not None and column in variables(tokenizer.get_chat_template()):
            advice = "the template reads a list of {...} there; mend the column, or remove it"
            raise Fault(REFUSED, f"{column} is {value!r:.200}; {advice}")
        beside[column] = value if is_list else None
    return beside


def without_mark(turn: dict[str, Any], mark: str | None) -> dict[str, Any]:
    """An assistant's turn without the end that its text already has: the template writes one behind it."""
    content = turn["content"]
    if turn["role"] != "assistant" or not mark or mark not in content:
        return turn
    while (stripped := content.rstrip()).endswith(mark):
        content = stripped.removesuffix(mark)
    return {**turn, "content": content}


def frame_of(turns: Turns, prompt: str, draw: Callable[..., str], tokenizer: PreTrainedTokenizerBase) -> Frame:
    before, found, tail = draw([*turns, {"role": "assistant", "content": PROBE}]).rpartition(PROBE)
    if not found:
        raise Fault(LOST, "the template does not write the content of an assistant's turn")
    ending, ends = end_of_turn(tail, prompt, lambda: draw(turns), tokenizer)
    return Frame(before.removeprefix(prompt) if before.startswith(prompt) else "", tail, ending, ends)


def response_text(side: str, prompt: str, whole: str) -> str:
    if not whole.startswith(prompt):
        raise Fault(
            REWRITTEN,
            f"the chat template writes a conversation differently once it is answered: its text does not begin with "
            f"the prompt's, so the {side} response cannot be told from it. The prompt is {around_difference(prompt, whole)}. "
            f"{other_template()}",
        )
    return whole[len(prompt) :]


def end_of_turn(tail: str, prompt: str, unasked: Callable[[], str], tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """What of the text behind a reply is the end of its turn, and whether there is a token in it that generation stops at.

    The tokenizer's eos; for want of it, a special token. White space behind it belongs to the turn, as in every rendering; more
    is the next turn's header, which some templates write behind any conversation.
    """
    eos, specials = tokenizer.eos_token, special_pattern(tokenizer)
    mark = re.search(re.escape(eos), tail) if eos else None
    mark = mark or (specials.search(tail) if specials else None)
    if mark is None:
        is_next_header = bool(tail.strip()) and prompt.endswith(tail)
        return ("" if is_next_header else tail), False
    behind = tail[mark.end() :]
    is_whole = not behind.strip() or (mark[0] != eos and prompt != unasked())
    return (tail if is_whole else tail[: mark.end()]), True


def up_to_its_end(response: str, frame: Frame, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """The response without what stands behind its turn, and whether it ends in a token that generation stops at."""
    if frame.tail and response.endswith(frame.tail):
        return response.removesuffix(frame.tail) + frame.ending, frame.ends
    # Some templates end a turn that calls tools otherwise.
    specials = special_pattern(tokenizer)
    last = [match.end() for match in specials.finditer(response)][-1:] if specials else []
    return response, last == [len(response.rstrip())]


def with_opening(
    prompt: str, texts: dict[str, str], frame: Frame, unasked: Callable[[], str]
) -> tuple[str, dict[str, str], list[Finding]]:
    """The words that the template writes before any reply: the prompt's, where it writes none for a generation prompt."""
    opening = frame.opening
    if not opening.strip() or not all(text.startswith(opening) for text in texts.values()):
        return prompt, texts, []
    if prompt != unasked():
        return prompt, texts, [Finding(SCORED_OPENING, f"the template writes {opening!r} before a reply")]
    cut = {side: text.removeprefix(opening) for side, text in texts.items()}
    return prompt + opening, cut, [Finding(SHARED_OPENING, f"{opening!r} has to be added when generating")]


def generation_text(turns: Turns, tokenizer: PreTrainedTokenizerBase, *, date: str | None = None) -> str:
    """The text behind which a model generates its reply: the prompt of `exact_pair_text`.

    Raises TemplateRefusal or Fault for a template that cannot write this prompt, or writes bos twice.
    """
    draw = partial(render, tokenizer=tokenizer, date=date)
    turns = [without_mark(turn, tokenizer.eos_token) for turn in turns]
    prompt = draw(turns, generation_prompt=True)
    frame = frame_of(turns, prompt, draw, tokenizer)
    for fault in bos_faults({"prompt": prompt}, turns, tokenizer):
        raise Fault(*fault)
    return with_opening(prompt, {}, frame, lambda: draw(turns))[0]


# ---- Proofs ----


def left_out(turns: Turns, text: str) -> Finding | None:
    """Something that a turn says and that is not in the text; white space and JSON's escapes make no difference."""
    for turn in turns:
        if not is_written(turn["content"], text):
            return Finding(LOST, f"{text!r:.200} lacks {turn['content']!r:.200}, which a turn by the {turn['role']} says")
        for key in SAID:
            for word in leaves(turn.get(key)):
                if not is_written(word, text):
                    return unwritten(key, word, text)
    return None


def unwritten(key: str, word: str, text: str) -> Finding:
    return Finding(UNWRITTEN, f"{text!r:.200} lacks {word!r:.200} of {key}. {without_key(key)}")


def without_key(key: str) -> str:
    return f"Set chat_template to one that writes {key}, or remove {key} from the rows"


def is_silent(turn: dict[str, Any]) -> bool:
    return not turn["content"].strip() and not any(turn.get(key) for key in SAID)


def leaves(value: Any) -> Iterator[str]:
    """The texts in a nested value, without those that only say what kind of thing it is."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from () if key in ("type", "id") else leaves(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from leaves(entry)
    elif isinstance(value, str):
        yield value


def is_written(word: str, text: str) -> bool:
    if word.strip() in text:
        return True
    word, text = "".join(word.split()), "".join(text.split())
    return word in text or json.dumps(word, ensure_ascii=False)[1:-1] in text or written_in_parts(word, text)


def written_in_parts(word: str, text: str) -> bool:
    """Arguments of a call, given as JSON text, that a template spells otherwise; reasoning that it sets off from the reply."""
    try:
        parts = [*leaves(json.loads(word))]
    except (ValueError, RecursionError):
        parts = re.split(r"</?think>", word)
        return len(parts) > 1 and all(part in text for part in parts)
    return bool(parts) and all("".join(part.split()) in text for part in parts)


def unnamed_tool(tools: list[dict] | None, prompt: str) -> Finding | None:
    functions = [function if isinstance(function := tool.get("function"), dict) else tool for tool in tools or []]
    names = [name for function in functions if isinstance(name := function.get("name"), str)]
    return next((unwritten("tools", name, prompt) for name in names if name not in prompt), None)


def bos_faults(texts: dict[str, str], given: Turns, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """A bos that is not the one at the beginning, unless it is in what somebody said, or opens every turn."""
    bos = tokenizer.bos_token
    if bos is None or bos == tokenizer.eos_token or any(bos in turn["content"] for turn in given):
        return
    for column, text in texts.items():
        own = text.removeprefix(bos) if column == "prompt" else text
        if bos in own and (bos + bos in text or not bos_opens_turns(tokenizer, str(tokenizer.chat_template))):
            yield Finding(SECOND_BOS, f"{column} has {bos!r} elsewhere than at its beginning: {text[:60]!r}")


@functools.lru_cache(maxsize=4)
def bos_opens_turns(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the tokenizer's template opens each turn with bos, as ChatML does where <|im_start|> is called that."""
    roles = ("user", "assistant", "user")
    try:
        text = render([{"role": role, "content": PROBE} for role in roles], tokenizer)
    except TemplateRefusal:
        return False
    return all(tokenizer.bos_token in part for part in text.split(PROBE)[: len(roles)])


def special_tokens(given: Turns, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    specials = special_pattern(tokenizer)
    found = next((match for turn in given if specials and (match := specials.search(turn["content"]))), None)
    if found is not None:
        yield Finding(SPECIAL, f"a turn holds {found[0]!r}, which is read as that token: {around(found)!r}")


def around(match: re.Match) -> str:
    return match.string[max(match.start() - 20, 0) : match.end() + 20]


@functools.lru_cache(maxsize=4)  # asked several times a row, and Llama-3 has 256 special tokens
def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern | None:
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    words = sorted({*names, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words))) if words else None


# ---- Batches ----


def pair_texts(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    preprocessing: str,
    add_system: bool,
    date: str | None = None,
) -> dict[str, list[Any]]:
    """A batch of conversations (columns prompt, chosen, rejected: lists of turns) as text, for `Dataset.map` in batches.

    Adds what was found in each row; the texts of a row that cannot be used are empty. Raises UserError with the place of a
    row that the published rules cannot render.
    """
    if preprocessing == "published":
        render_pair = partial(published_pair_text, add_system=add_system, date=date)
    else:
        render_pair = partial(exact_pair_text, date=date)
    unusable = {**dict.fromkeys(TEXT_COLUMNS, ""), "system_added": False, "add_eos": False}
    return text_columns(batch, indices, tokenizer, render_pair, TEXT_COLUMNS, unusable, preprocessing)


def message_texts(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    preprocessing: str,
    add_system: bool,
    date: str | None = None,
) -> dict[str, list[Any]]:
    """A batch of whole conversations (column messages) as text, for supervised training. As `pair_texts`."""
    if preprocessing == "published":
        render_whole = partial(published_message_text, add_system=add_system, date=date)
    else:
        render_whole = partial(exact_message_text, date=date)
    unusable = {"text": "", "add_eos": False}
    return text_columns(batch, indices, tokenizer, render_whole, ("messages",), unusable, preprocessing)


def text_columns(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    function: Callable[[dict[str, Any], PreTrainedTokenizerBase], dict[str, Any]],
    columns: tuple[str, ...],
    unusable: dict[str, Any],
    preprocessing: str,
) -> dict[str, list[Any]]:
    places = batch.get("place") or [f"row {index}" for index in indices]
    texts = []
    for place, *values in zip(places, *batch.values(), strict=True):
        row = whole_turns(dict(zip(batch, values, strict=True)), columns)
        texts.append({**text_of(function, row, place, tokenizer, unusable, preprocessing), "place": place})
    return {key: [text[key] for text in texts] for key in (*unusable, "place", "findings")}


def text_of(
    function: Callable[..., dict[str, Any]],
    row: dict[str, Any],
    place: str,
    tokenizer: PreTrainedTokenizerBase,
    unusable: dict[str, Any],
    preprocessing: str,
) -> dict[str, Any]:
    try:
        text = function(row, tokenizer)
        if row.get("more") and not all(is_unicode(value) for value in text.values() if isinstance(value, str)):
            raise Fault(REFUSED, "a turn holds half of a character (\\ud800 to \\udfff)")
    except (TemplateRefusal, Fault) as error:
        if preprocessing == "published":
            raise UserError(f"{place}: {error}") from error
        finding = error.finding if isinstance(error, Fault) else Finding(REFUSED, str(error))
        text = {**unusable, "findings": [finding]}
    return {**text, "findings": [finding._asdict() for finding in text["findings"]]}


def published_message_text(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, add_system: bool, date: str | None = None
) -> dict[str, Any]:
    turns = with_empty_system_turn(row["messages"], tokenizer.get_chat_template()) if add_system else row["messages"]
    text = render(turns, tokenizer, date=date)
    findings = [*bos_faults({"prompt": text}, turns, tokenizer), *special_tokens(turns, tokenizer)]
    if missing := left_out(turns[-1:], text):
        findings.append(missing)
    return {"text": text, "add_eos": False, "findings": findings}


def exact_message_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, date: str | None = None) -> dict[str, Any]:
    """The template's text of a whole conversation, up to the end of its last turn."""
    beside = beside_turns(row, tokenizer)
    draw = partial(render, tokenizer=tokenizer, date=date, **beside)
    *turns, reply = [without_mark(turn, tokenizer.eos_token) for turn in row["messages"]]
    frame = frame_of(turns, draw(turns, generation_prompt=True), draw, tokenizer) if turns else Frame("", "", "", True)
    reply = without_mark(reply, frame.ending.strip())
    text, ends = up_to_its_end(draw([*turns, reply]), frame, tokenizer)
    if missing := left_out([reply], text) or left_out([turn for turn in turns if turn["role"] != "assistant"], text):
        raise Fault(*missing)
    for fault in bos_faults({"prompt": text}, row["messages"], tokenizer):
        raise Fault(*fault)
    if not ends and tokenizer.eos_token is None:
        raise Fault(ENDLESS, f"nothing ends {text[-60:]!r}, and the tokenizer has no eos")
    findings = [*special_tokens(row["messages"], tokenizer)]
    if not ends:
        findings.append(Finding(ENDED, f"the text ends with {text[-30:]!r}, where generation would not stop"))
    return {"text": text, "add_eos": not ends, "findings": findings}


# ---- Before any row ----


def check_published_template(tokenizer: PreTrainedTokenizerBase, *, date: str | None = None) -> None:
    """Refuse a template that the published rules would misuse.

    They render a response by itself, and glue it to the prompt. A template that writes a system block (or a date) above any
    conversation would write it inside each response, to be trained on and counted in the length; one that ends a conversation
    with eos would write it between question and reply.
    """
    question, reply = {"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}
    try:
        alone = without_bos(render([reply], tokenizer, date=date), tokenizer)
        whole, prompt = (render(turns, tokenizer, date=date) for turns in ([question, reply], [question]))
    except TemplateRefusal as refusal:
        raise UserError(f"preprocessing = published: {refusal.refusal}. {way_out(tokenizer, date)}") from refusal
    opening, found, _ = alone.partition("reply")
    if not found:
        reason = "does not write a response that is rendered alone"
    elif opening not in whole:
        reason = f"puts {opening!r} in front of every response that is rendered alone, which would be trained on"
    elif prompt + alone != whole:
        reason = f"is not made to be rendered in parts: prompt + response would be {around_difference(prompt + alone, whole)}"
    else:
        return
    raise UserError(f"preprocessing = published: this model's chat template {reason}. {way_out(tokenizer, date)}")


def way_out(tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> str:
    """What does help with a template that the published rules misuse: the exact ones, where they can use it."""
    question, reply = {"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}
    try:
        exact_pair_text({"prompt": [question], "chosen": [reply], "rejected": [reply]}, tokenizer, date=date)
    except (Fault, TemplateRefusal):
        return other_template()
    return "Use preprocessing: exact."
