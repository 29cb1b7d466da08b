"""Text -> token ids: where a response begins, what is added, what is cut. Plain lists, in batches."""

from typing import Any, Literal, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..errors import UserError

SIDES = ("chosen", "rejected")
TOKEN_COLUMNS = ("chosen_input_ids", "chosen_prompt_length", "rejected_input_ids", "rejected_prompt_length")


class LengthRules(NamedTuple):
    """How long a row may be, in tokens, and what is cut."""

    max_length: int
    max_prompt_length: int
    truncation_mode: Literal["keep_end", "keep_start"]
    preprocessing: Literal["published", "exact"]


class Response(NamedTuple):
    """One response behind its prompt: two lists of token ids."""

    prompt: list[int]
    response: list[int]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, no special tokens added."""
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [encoding.ids for encoding in plain_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)]


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The fast tokenizer without the truncation or padding of its last use, with which many are saved."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def split_response(prompt: list[int], full: list[int]) -> Response:
    """Cut prompt + response where the prompt ends; one token earlier if its last token merged with the response."""
    boundary = len(prompt) if full[: len(prompt)] == prompt else len(prompt) - 1
    return Response(full[:boundary], full[boundary:])


def prompts_agree(chosen: list[int], rejected: list[int]) -> bool:
    """The two prompt parts may differ by one token, where each response merged with the prompt's end in its own way."""
    different = sum(a != b for a, b in zip(chosen, rejected, strict=False))
    return different <= 1 and abs(len(chosen) - len(rejected)) <= 1


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts its bos in front of a text, as it does when it serves one."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def add_ends(part: Response, tokenizer: PreTrainedTokenizerBase, *, add_eos: bool, add_bos: bool = True) -> Response:
    """One bos in front of the prompt, and an eos behind the response, where the tokenizer has them and they are missing."""
    bos, eos = tokenizer.bos_token_id if add_bos else None, tokenizer.eos_token_id
    prompt = part.prompt if bos is None or part.prompt[:1] == [bos] else [bos, *part.prompt]
    response = part.response if not add_eos or eos is None or part.response[-1:] == [eos] else [*part.response, eos]
    return Response(prompt, response)


def truncate_published(part: Response, longer: int, rules: LengthRules) -> Response:
    """The published cut: the prompt to max_prompt_length, then the response to max_length - max_prompt_length."""
    prompt, response = part
    if len(prompt) + longer > rules.max_length:
        keep = rules.max_prompt_length
        prompt = prompt[:keep] if rules.truncation_mode == "keep_start" else prompt[-keep:]
    if len(prompt) + longer > rules.max_length:
        response = response[: rules.max_length - rules.max_prompt_length]
    return Response(prompt, response)


def truncate_exact(part: Response, longer: int, rules: LengthRules, *, bos: int | None) -> Response:
    """Cut the prompt by the overflow, to max_prompt_length at the least, keeping its bos; then the response to what fits."""
    prompt, response = part
    kept = max(rules.max_length - longer, rules.max_prompt_length)
    if kept < len(prompt):
        head = prompt[:1] if prompt[0] == bos else []
        tail = kept - len(head)
        body = prompt[len(head) :]
        prompt = head + (body[:tail] if rules.truncation_mode == "keep_start" else body[len(body) - tail :])
    return Response(prompt, response[: rules.max_length - len(prompt)])


def tokenize_pair(
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    tokenizer: PreTrainedTokenizerBase,
    rules: LengthRules,
    *,
    add_eos: bool = False,
    add_bos: bool = True,
) -> dict[str, Any]:
    """One pair, from the ids of its prompt and of prompt + response, to what is trained on.

    Returns the ids of both sides, their prompt and response lengths, and whether the pair was truncated or given an eos.
    Raises ValueError if the two sides do not share a prompt.
    """
    parts = [split_response(prompt, full) for full in (chosen, rejected)]
    if not prompts_agree(parts[0].prompt, parts[1].prompt):
        raise ValueError("chosen and rejected do not begin with the same prompt tokens; the tokenizer merges across turns")
    # `exact` leaves the template's own end of turn as it is, where generation stops there.
    add_eos = add_eos or rules.preprocessing == "published"
    whole = [add_ends(part, tokenizer, add_eos=add_eos, add_bos=add_bos) for part in parts]
    longer = max(len(part.response) for part in whole)
    if rules.preprocessing == "published":
        cut = [truncate_published(part, longer, rules) for part in whole]
    else:
        cut = [truncate_exact(part, longer, rules, bos=tokenizer.bos_token_id) for part in whole]
    row: dict[str, Any] = {}
    for side, part in zip(SIDES, cut, strict=True):
        row[f"{side}_input_ids"] = part.prompt + part.response
        row[f"{side}_prompt_length"] = len(part.prompt)
        row[f"{side}_length"] = len(part.response)
    row["length"] = max(len(row[f"{side}_input_ids"]) for side in SIDES)  # for train_sampling_strategy: group_by_length
    for side, before, after in zip(SIDES, whole, cut, strict=True):
        row[f"{side}_truncated"] = after != before
    row["truncated"] = cut != whole
    row["eos_added"] = any(len(a.response) < len(b.response) for a, b in zip(parts, whole, strict=True))
    return row


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], chosen: list[str], rejected: list[str]
) -> tuple[list[list[int]], ...]:
    """Ids of each prompt, of prompt + chosen and of prompt + rejected.

    Tokenizers split at special tokens before anything else. So where every response begins with one, as with Llama-3's
    header, nothing can merge across the boundary, and the prompt is encoded once instead of three times.
    """
    splits = tuple(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and not (token.normalized or token.lstrip or token.single_word)
    )
    apart = bool(splits) and all(response.startswith(splits) for response in (*chosen, *rejected))
    responses = [*chosen, *rejected]
    texts = responses if apart else [p + r for p, r in zip([*prompts, *prompts], responses, strict=True)]
    count = len(prompts)
    encoded = encode_texts(tokenizer, [*prompts, *texts])
    alone, sides = encoded[:count], (encoded[count : 2 * count], encoded[2 * count :])
    if apart:
        sides = tuple([p + r for p, r in zip(alone, side, strict=True)] for side in sides)
    return alone, *sides


def tokenize_pairs(
    batch: dict[str, list[str]], indices: list[int], tokenizer: PreTrainedTokenizerBase, rules: LengthRules
) -> dict[str, list[Any]]:
    """A batch of text pairs (columns prompt, chosen, rejected) as token ids, for `Dataset.map` in batches with indices.

    Adds `index`, the row of the pair in its split. Rows that say so (column add_eos) are given an eos in `exact` too. Raises
    UserError naming the row that cannot be tokenized.
    """
    columns = encode_pairs(tokenizer, *(batch[column] for column in ("prompt", *SIDES)))
    # `exact` adds no bos that nothing would write in front of a prompt that is served.
    add_bos = rules.preprocessing == "published" or writes_bos(tokenizer)
    places = batch.get("place") or [f"row {index}" for index in indices]
    add_eos = batch.get("add_eos") or [False] * len(indices)
    rows = []
    for index, place, ends_so, *ids in zip(indices, places, add_eos, *columns, strict=True):
        try:
            rows.append({**tokenize_pair(*ids, tokenizer, rules, add_eos=ends_so, add_bos=add_bos), "index": index})
        except ValueError as error:
            raise UserError(f"{place}: {error}") from error
    return {key: [row[key] for row in rows] for key in rows[0]}


def tokenize_texts(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, preprocessing: str = "published"
) -> dict[str, list[list[int]]]:
    """A batch of whole conversations (column text) as token ids, each with one bos where the tokenizer has it.

    `exact`: where the text or the tokenizer writes one. Rows that say so (column add_eos) are given an eos.
    """
    add_bos = preprocessing == "published" or writes_bos(tokenizer)
    add_eos = batch.get("add_eos") or [False] * len(batch["text"])
    rows = [
        add_ends(Response(ids, []), tokenizer, add_eos=ends_so, add_bos=add_bos)
        for ids, ends_so in zip(encode_texts(tokenizer, batch["text"]), add_eos, strict=True)
    ]
    return {"input_ids": [row.prompt + row.response for row in rows]}
