"""The data set's README.md: what made it, what was left out, what it is like."""

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from .configs import PairArguments

Row = dict[str, Any]
Count = Callable[[list[str]], list[int]]
"""Lengths of texts."""
LIMITS = (1024, 2048, 4096)  # usual values of max_length, which cuts what is longer


def data_card(
    *,
    folder: str,
    made_by: Sequence[Sequence[str]],
    counts: dict[str, int],
    unit: str,
    splits: dict[str, dict[str, str]],
) -> str:
    """made_by: rows of what and value. unit: of lengths. splits: the figures of each, by name."""
    both = "dataset_splits: [train, test]" if "test" in splits else "do_eval: false"
    return "\n".join(
        [
            *("---", "tags:", "- preference-data", "- on-policy", "---", "", "# On-policy preference pairs", ""),
            "Responses of one model to every prompt, scored by a reward model, and paired, by the SimPO training suite.",
            *("", "```yaml", "dataset_mixer:", f"  {folder}: 1.0", both, "```", "", "## What made it", ""),
            *table(("", ""), made_by),
            *("", "## Counts", ""),
            *table(("", "number"), [(what, f"{count:,}") for what, count in counts.items()]),
            *("", "## What it is like", "", f"Median / mean / 95 % / largest; lengths in {unit}, of the texts alone.", ""),
            *table(("", *splits), [(name, *(own[name] for own in splits.values())) for name in next(iter(splits.values()))]),
            "",
        ]
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [line_of(head), "|" + "---|" * len(head), *map(line_of, rows)]


def line_of(cells: Sequence[Any]) -> str:
    texts = (" ".join(str(cell).replace("|", "\\|").split()) for cell in cells)
    return "| " + " | ".join(texts) + " |"


def prompt_text(row: Row) -> str:
    return "\n".join(turn["content"] for turn in row["chosen"][:-1])


def statistics(rows: Sequence[Row], count: Count, trained_on: Collection[str] = ()) -> dict[str, str]:
    """Of one split's pairs what a dry run tells of them: how many, how long, how many alike, which side is longer; and rewards.

    trained_on: prompts of the training split, for one that is held out.
    """
    prompts = list(map(prompt_text, rows))
    lengths = {
        "prompt": np.array(count(prompts)),
        **{side: np.array(count([row[side][-1]["content"] for row in rows])) for side in ("chosen", "rejected")},
    }
    chosen, rejected = lengths["chosen"], lengths["rejected"]
    whole = lengths["prompt"] + np.maximum(chosen, rejected)
    margins = np.array([row["chosen_score"] - row["rejected_score"] for row in rows])
    return {
        "pairs": f"{len(rows):,}",
        "prompts": f"{len({row['prompt_id'] for row in rows}):,}",
        **{f"length, {name}": spread(counts) for name, counts in lengths.items()},
        **{f"longer than {limit:,}, prompt and reply": f"{np.sum(whole > limit):,}" for limit in LIMITS},
        "both replies the same": f"{sum(row['chosen'][-1]['content'] == row['rejected'][-1]['content'] for row in rows):,}",
        "prompt of an earlier pair": f"{len(rows) - len({*prompts}):,}",
        "prompt that is trained on": f"{sum(prompt in trained_on for prompt in prompts):,}" if trained_on else "",
        "the longer one is chosen": f"{np.mean(chosen > rejected):.1%}",
        "the shorter one is chosen": f"{np.mean(chosen < rejected):.1%}",
        "reward, chosen": spread(np.array([row["chosen_score"] for row in rows]), ".4g"),
        "reward, rejected": spread(np.array([row["rejected_score"] for row in rows]), ".4g"),
        "margin": spread(margins, ".4g"),
    }


def spread(numbers: np.ndarray, form: str = ",.0f") -> str:
    """Median / mean / 95th percentile / largest."""
    values = (np.median(numbers), np.mean(numbers), np.percentile(numbers, 95), np.max(numbers))
    return " / ".join(format(float(value), form) for value in values)


def sampled_with(sampling: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows about the policy, from the records of the passes. What differs between passes is listed."""
    if not sampling:
        return [("policy", "not recorded: the responses came in files of another program")]
    settings = [record["settings"] for record in sampling.values()]

    def of(*keys: str) -> str:
        return shown([{key: each.get(key) for key in keys} if len(keys) > 1 else each.get(keys[0]) for each in settings])

    rows = [
        ("policy", of("model")),
        ("revision", of("model_revision")),
        ("commit or fingerprint", of("model_identity")),
        ("prompts", of("data_dir", "prompt_split", "prompt_column", "max_prompts")),
        ("chat template", of("chat_template", "chat_template_kwargs", "template_sha256")),
        ("day that the template's clock showed", shown([record["date"] for record in sampling.values()])),
        ("sampling", of("temperature", "top_p", "top_k", "max_tokens", "stop_ids")),
        ("engine, precision", of("engine", "torch_dtype")),
        ("seeds", ", ".join(str(each["seed"]) for each in settings)),
    ]
    results = [record["result"] for record in sampling.values()]
    cut, made = (sum(result[key] for result in results) for key in ("cut_at_max_tokens", "responses"))
    return [*rows, ("responses sampled", f"{made:,}, {cut:,} of them cut at max_tokens")]


def scored_with(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows about the reward model, from the record of its stage."""
    if not record:
        return [("reward model", "not recorded: the scores came in a file of another program")]
    settings = record["settings"]
    return [
        ("reward model", f"`{settings['reward_model']}`"),
        ("its revision", f"`{settings['reward_revision']}`"),
        ("its commit or fingerprint", f"`{settings['reward_model_identity']}`"),
    ]


def paired_with(args: PairArguments) -> list[tuple[str, str]]:
    largest = "any" if args.max_margin is None else args.max_margin
    return [
        ("pairs", f"`{args.pair_rule}`, margins from {args.min_margin} to {largest}, seed {args.pair_seed}"),
        ("held out", f"{args.test_size} of the prompts, by their hashes, seed {args.pair_seed}"),
    ]


def shown(values: Sequence[Any]) -> str:
    texts = dict.fromkeys(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values)
    return "; ".join(f"`{text}`" for text in texts)
