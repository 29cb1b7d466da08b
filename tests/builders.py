"""Tiny models, tokenizers and preference pairs, made from nothing, equal for equal seeds; for tests and benchmarks."""

import functools
import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from alignment.data.chat import TEXT_COLUMNS, pair_texts
from alignment.data.template import Turns, shipped_template

VOCABULARY = 512
BOS, EOS, PAD = "<|begin_of_text|>", "<|eot_id|>", "<|pad|>"
SPECIAL_TOKENS = [BOS, EOS, PAD, "<|start_header_id|>", "<|end_header_id|>"]
TEXT = """
the a of and to in is that it for on with as was at by from this be are or an not have they which one you were all her
his she there would their we him been has when who will more no if out so said what up its about into than them can only
other new some could time these two may then do first any my now such like our over man me even most made river mountain
lanterns weather, number: theorem kettle quickly Answer: because however, between 1984 42 3.14
"""
WORDS = TEXT.split()

# Shared by every kind. Wide random weights, so that log-probabilities differ and soft-capping has something to cap.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 8}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 3.0}),
    "qwen2": (Qwen2Config, {}),
    "gpt2": (GPT2Config, {}),
    "phi": (PhiConfig, {}),  # a head with a bias
    "granite": (GraniteConfig, {"logits_scaling": 4.0}),  # divides its logits
    "cohere": (CohereConfig, {"logit_scale": 0.25}),  # multiplies them
    "mixtral": (
        MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1},
    ),
    "hyperclovax": (HyperCLOVAXConfig, {"logits_scaling": 4.0}),  # multiplies them too, by Granite's key
}


def tiny_model(
    kind: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, tie: bool = False, **settings: Any
) -> PreTrainedModel:
    """A randomly initialised causal language model: two layers, hidden size 32. `settings` go into its config."""
    config_type, own = KINDS[kind]
    config = config_type(**{**SIZES, **own, "tie_word_embeddings": tie, **settings})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def tiny_reward_model(*, seed: int = 5, **settings: Any) -> LlamaForSequenceClassification:
    """A Llama with one label, as reward models have it."""
    config = LlamaConfig(**{**SIZES, "num_labels": 1, **settings})
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config)


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


@functools.cache
def backend() -> str:
    """The JSON of a byte-level BPE tokenizer, trained on WORDS. Some words are one token, some several."""
    rng = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((sentence(rng, 12) for _ in range(200)), trainer)
    return tokenizer.to_str()


def bpe_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """A fresh tokenizer with Llama-3's template and end of turn; without a bos, as Qwen's, if `bos` is false."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend()), bos_token=BOS if bos else None, eos_token=EOS, pad_token=PAD
    )
    tokenizer.chat_template = shipped_template("llama-3")
    return tokenizer


def pairs(count: int, seed: int = 0) -> list[dict[str, Turns]]:
    """Rows of `chosen` and `rejected` conversations that begin alike, as data sets have them; 3 to 80 words a turn."""
    rng = random.Random(seed)

    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": sentence(rng, rng.randint(3, 80))}

    rows = []
    for _ in range(count):
        prompt = [turn("user")]
        if rng.random() < 0.3:
            prompt += [turn("assistant"), turn("user")]
        rows.append({"chosen": [*prompt, turn("assistant")], "rejected": [*prompt, turn("assistant")]})
    return rows


def split_pairs(rows: list[dict[str, Turns]]) -> list[dict[str, Turns]]:
    """`pairs` as the chat template takes them: `prompt`, and the last turn of each side."""
    return [{"prompt": row["chosen"][:-1], "chosen": row["chosen"][-1:], "rejected": row["rejected"][-1:]} for row in rows]


def text_rows(count: int, seed: int = 0, *, preprocessing: str = "published") -> list[dict[str, str]]:
    """`pairs` as text, in the template of `bpe_tokenizer`."""
    rows = split_pairs(pairs(count, seed))
    batch = {column: [row[column] for row in rows] for column in TEXT_COLUMNS}
    texts = pair_texts(batch, list(range(count)), bpe_tokenizer(), preprocessing=preprocessing, add_system=False)
    return [dict(zip(TEXT_COLUMNS, row, strict=True)) for row in zip(*(texts[key] for key in TEXT_COLUMNS), strict=True)]


def token_rows(lengths: list[tuple[int, int, int]], seed: int = 0) -> list[dict[str, Any]]:
    """Tokenized pairs of random ids. lengths: tokens of each pair's prompt, chosen and rejected response."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(len(SPECIAL_TOKENS), VOCABULARY) for _ in range(count)]

    rows = []
    for index, (prompt, chosen, rejected) in enumerate(lengths):
        start = ids(prompt)
        rows.append(
            {
                "chosen_input_ids": start + ids(chosen),
                "chosen_prompt_length": prompt,
                "chosen_length": chosen,
                "rejected_input_ids": start + ids(rejected),
                "rejected_prompt_length": prompt,
                "rejected_length": rejected,
                "length": prompt + max(chosen, rejected),
                "truncated": False,
                "eos_added": False,
                "index": index,
            }
        )
    return rows
