"""The quickstart's home-trained tokenizer, its small Llama of random weights, and responses sampled from a run."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from alignment.data.template import shipped_template

BOS, END_OF_TURN, PAD = "<|begin_of_text|>", "<|eot_id|>", "<|pad|>"
SPECIAL_TOKENS = [BOS, END_OF_TURN, PAD, "<|start_header_id|>", "<|end_header_id|>"]
MAX_NEW_TOKENS = 48  # the longest response of the data has 33 and its end of turn


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama-3's chat template; it ends up with one token for every word of the texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*texts, "user", "assistant"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        chat_template=shipped_template("llama-3"),
    )


def random_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        # At the usual 0.02 so narrow a model copies no order right after 1,250 steps; at 0.08 half of them.
        initializer_range=0.08,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def sample(model_path: Path, requests: Sequence[str], *, temperature: float, seed: int) -> list[str]:
    """One response to each request."""
    # Left padding, so that every response begins right behind its prompt.
    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_path)
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": request}] for request in requests],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )  # (requests, prompt tokens)
    set_seed(seed)
    tokens = model.generate(
        **prompts, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=MAX_NEW_TOKENS
    )  # (requests, prompt and response tokens)
    return tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
