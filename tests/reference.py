"""The published algorithms, spelled plainly and slowly: what every fast path must equal."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignment.data.tokenization import SIDES, LengthRules


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def split(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt part and of the response, from two calls of the tokenizer."""
    full = encode(tokenizer, prompt + response)
    alone = encode(tokenizer, prompt)
    boundary = len(alone)
    if full[:boundary] != alone:  # the prompt's last token has merged with the response
        boundary -= 1
    return full[:boundary], full[boundary:]


def tokenize_row(row: dict[str, str], tokenizer: PreTrainedTokenizerBase, rules: LengthRules) -> dict[str, list[int]]:
    """One text pair by the published rules, one text at a time: ids and labels of both sides, and the prompt's ids.

    Raises ValueError if the two prompt parts differ by more than one token.
    """
    prompt = encode(tokenizer, row["prompt"])
    chosen_prompt, chosen = split(tokenizer, row["prompt"], row["chosen"])
    rejected_prompt, rejected = split(tokenizer, row["prompt"], row["rejected"])
    different = sum(a != b for a, b in zip(chosen_prompt, rejected_prompt, strict=False))
    if different > 1 or abs(len(chosen_prompt) - len(rejected_prompt)) > 1:
        raise ValueError("the prompt parts differ")

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompts = [prompt, chosen_prompt, rejected_prompt]
    if bos is not None:
        prompts = [ids if ids and ids[0] == bos else [bos, *ids] for ids in prompts]
    responses = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in (chosen, rejected)]

    longer = max(len(ids) for ids in responses)
    keep = slice(-rules.max_prompt_length, None)
    if rules.truncation_mode == "keep_start":
        keep = slice(rules.max_prompt_length)
    prompts = [ids[keep] if len(ids) + longer > rules.max_length else ids for ids in prompts]
    room = rules.max_length - rules.max_prompt_length
    responses = [
        response[:room] if len(ids) + longer > rules.max_length else response
        for ids, response in zip(prompts[1:], responses, strict=True)
    ]

    tokens = {"prompt_input_ids": prompts[0]}
    for side, ids, response in zip(("chosen", "rejected"), prompts[1:], responses, strict=True):
        tokens[f"{side}_input_ids"] = ids + response
        tokens[f"{side}_labels"] = [-100] * len(ids) + response
    return tokens


def mean_logps(model: PreTrainedModel, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """(B,) and (B,): mean log-probability per response token of tokenized pairs, chosen and rejected.

    One padded forward over 2B rows, and a log-softmax over all of its (2B, T, V) logits.
    """
    sides = [(row[f"{side}_input_ids"], row[f"{side}_prompt_length"]) for side in ("chosen", "rejected") for row in rows]
    longest = max(len(ids) for ids, _ in sides)
    input_ids, attention_mask = torch.zeros(2, len(sides), longest, dtype=torch.long)  # (2B, T) each
    labels = torch.full((len(sides), longest), -100)
    for number, (ids, prompt) in enumerate(sides):
        input_ids[number, : len(ids)] = torch.tensor(ids)
        attention_mask[number, : len(ids)] = 1
        labels[number, prompt : len(ids)] = torch.tensor(ids[prompt:])

    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # (2B, T, V)
    logits, labels = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)), labels[:, 1:]
    mask = labels != -100
    token_logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)  # (2B, T - 1)
    chosen, rejected = ((token_logps * mask).sum(-1) / mask.sum(-1)).chunk(2)
    return chosen, rejected


def simpo_step_loss(
    model: PreTrainedModel,
    rows: list[dict[str, Any]],
    *,
    beta: float,
    gamma_beta_ratio: float,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> Tensor:
    """The loss of one optimizer step over `rows` as one micro-batch: a scalar with its graph."""
    chosen, rejected = mean_logps(model, rows)
    logits = beta * (chosen - rejected - gamma_beta_ratio)
    loss = (-(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)).mean()
    tokens = torch.tensor([len(row["chosen_input_ids"]) - row["chosen_prompt_length"] for row in rows])
    return loss - sft_weight * (chosen * tokens).sum() / tokens.sum()


def summed_logps(model: PreTrainedModel, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """(B,) and (B,): log-probability of each response of tokenized pairs, chosen and rejected."""
    tokens = [torch.tensor([len(row[f"{side}_input_ids"]) - row[f"{side}_prompt_length"] for row in rows]) for side in SIDES]
    return tuple(mean * count for mean, count in zip(mean_logps(model, rows), tokens, strict=True))


def dpo_step_loss(
    model: PreTrainedModel, frozen: PreTrainedModel, rows: list[dict[str, Any]], *, beta: float, per_token: bool = False
) -> Tensor:
    """The loss of one optimizer step over `rows`, by a policy and a second model as its reference."""
    logps = mean_logps if per_token else summed_logps
    with torch.no_grad():
        reference_chosen, reference_rejected = logps(frozen, rows)
    chosen, rejected = logps(model, rows)
    return -F.logsigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected))).mean()


def orpo_step_loss(model: PreTrainedModel, rows: list[dict[str, Any]], *, beta: float) -> Tensor:
    """The cross-entropy of the chosen rows from their second token on, and the odds ratio's part, of rows as one batch."""
    chosen, rejected = mean_logps(model, rows)
    log_odds = chosen - rejected - torch.log1p(-chosen.exp()) + torch.log1p(-rejected.exp())
    whole = [{**row, "chosen_prompt_length": 1} for row in rows]
    nats, _ = summed_logps(model, whole)
    tokens = sum(len(row["chosen_input_ids"]) - 1 for row in rows)
    return -nats.sum() / tokens - beta * F.logsigmoid(log_odds).mean()
