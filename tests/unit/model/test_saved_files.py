"""What is read as a tokenizer, and what is written of tokenizer and config: for this library, and for transformers 4."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
)

from alignment.errors import UserError
from alignment.model import tokenizer_files
from alignment.model.config_files import config_as_came, saved_config, weights_alone, write_configs
from alignment.model.endings import end_of_turn, stop_at
from alignment.model.precision import Rounded, checkpoint_dtype, in_dtype
from alignment.model.saved import try_to_save
from alignment.model.tokenizer_files import difference, in_both_dialects, load_as_written, save_tokenizer, settle_class
from alignment.model.vocabulary import highest_id, refuse_unknown_ids, train_every_row
from tests import builders

CHATML = (
    "{% for m in messages %}{{'<|im_start|>'+m['role']+'\n'+m['content']+'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
GPT4_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = ["Here are 12:\n\n1. one", "What's 650841823 + 7?", "the quick brown fox 2023\n\n\n", "I'm sure. You're right."] * 20
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


# ---- Files ----


def byte_level(split: Any = None, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = plain if split is None else pre_tokenizers.Sequence([split, plain])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    return tokenizer


def sentencepiece_like(normalizer: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False))
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in ("<unk>", "<s>", "</s>")]
    return Tokenizer.from_str(json.dumps(state))


PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def write_folder(folder: Path, backend: Tokenizer, model_type: str = "llama", **settings: Any) -> Path:
    """A tokenizer's files, as they are published, beside a config."""
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 700}))
    return folder


def read(folder: Path) -> Any:
    return load_as_written(str(folder), None, trust_remote_code=False)


def settings_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer_config.json").read_text())


GPT2 = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FILES = {
    "digits one by one": (byte_level(pre_tokenizers.Digits(individual_digits=True)), "llama", GPT2),
    "digits by three": (byte_level(pre_tokenizers.Split(GPT4_SPLIT, "isolated")), "starcoder2", GPT2),
    "a normalizer": (
        byte_level(normalizer=normalizers.NFKC()),
        "gpt_neox",
        {**GPT2, "tokenizer_class": "GPTNeoXTokenizerFast"},
    ),
    "as its class has it": (byte_level(), "llama", GPT2),
    "a mark behind special tokens": (sentencepiece_like(PREPEND), "llama", {**LLAMA, "legacy": False}),
    "the legacy mark": (sentencepiece_like(PREPEND), "llama", {**LLAMA, "legacy": True}),
    "no mark": (sentencepiece_like(normalizers.Replace(" ", "▁")), "llama", {**LLAMA, "legacy": False}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_tokenizer_is_read_as_its_file_is_written_and_read_so_from_what_is_saved(name, tmp_path):
    backend, model_type, settings = FILES[name]
    tokenizer = read(write_folder(tmp_path / "policy", backend, model_type, **settings))
    assert difference(tokenizer, backend) is None
    saved = tmp_path / "run"
    saved.mkdir()
    (saved / "config.json").write_bytes((tmp_path / "policy/config.json").read_bytes())
    tokenizer.pad_token = tokenizer.eos_token
    save_tokenizer(tokenizer, saved)
    settle_class(tokenizer, saved, [tokenizer("Here are 12: 1984")["input_ids"]])
    assert difference(AutoTokenizer.from_pretrained(saved), backend) is None
    assert (saved / "tokenizer.json").read_bytes() == (tmp_path / "policy/tokenizer.json").read_bytes()
    own = {**settings_in(tmp_path / "policy"), "pad_token": tokenizer.eos_token}
    assert {**settings_in(saved), "tokenizer_class": None} == {**own, "tokenizer_class": None}


def test_a_tokenizer_that_no_class_reads_as_it_is_written_is_refused_before_training(tmp_path):
    """Of Qwen2 models transformers 5 builds every tokenizer in its own way, whatever class the files name."""
    folder = write_folder(tmp_path / "policy", FILES["digits by three"][0], "qwen2", **GPT2)
    tokenizer, saved = read(folder), tmp_path / "run"
    saved.mkdir()
    (saved / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_tokenizer(tokenizer, saved)
    with pytest.raises(UserError, match=r"served other tokens than it learnt.*tokenizer_name_or_path"):
        settle_class(tokenizer, saved, [])


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, False), (False, True)])
def test_the_flags_of_bos_and_eos_are_kept(bos, eos, tmp_path):
    backend = sentencepiece_like(PREPEND)
    text = f"{'<s> ' * bos}$A{' </s>' * eos}"
    backend.post_processor = processors.TemplateProcessing(single=text, special_tokens=[("<s>", 1), ("</s>", 2)])
    folder = write_folder(tmp_path / "policy", backend, **LLAMA, add_bos_token=bos, add_eos_token=eos)
    save_tokenizer(read(folder), tmp_path / "run")
    saved = settings_in(tmp_path / "run")
    assert (saved["add_bos_token"], saved["add_eos_token"]) == (bos, eos)


def test_special_tokens_and_the_file_of_a_remote_tokenizer_are_written_as_they_came(tmp_path):
    came = {**GPT2, "additional_special_tokens": ["<|im_start|>"], "auto_map": {"AutoTokenizer": ["tok.Tok", None]}}
    folder = write_folder(tmp_path / "policy", byte_level(), **came, my_key=1)
    (folder / "tokenizer.model").write_bytes(b"stand-in")
    tokenizer = read(folder)
    save_tokenizer(tokenizer, tmp_path / "run", eos_token="<|endoftext|>")
    assert settings_in(tmp_path / "run") == {**came, "my_key": 1, "eos_token": "<|endoftext|>"}
    assert (tmp_path / "run/tokenizer.model").read_bytes() == b"stand-in"


@pytest.mark.parametrize(
    ("came", "written"),
    [
        ({"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"extra_special_tokens": []}, {}),
        ({"extra_special_tokens": ["<x>"]}, {"additional_special_tokens": ["<x>"]}),
        ({"extra_special_tokens": {"image": "<x>"}}, {"extra_special_tokens": {"image": "<x>"}}),
        ({"auto_map": ["tok.Tok", None]}, {"auto_map": {"AutoTokenizer": ["tok.Tok", None]}}),
    ],
)
def test_what_version_4_cannot_read_is_written_in_words_that_both_know(came, written):
    assert in_both_dialects(came) == written


def test_a_tokenizer_made_in_memory_is_saved_for_both_versions(tmp_path):
    tokenizer = builders.bpe_tokenizer()
    save_tokenizer(tokenizer, tmp_path)
    assert settings_in(tmp_path)["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert difference(AutoTokenizer.from_pretrained(tmp_path), tokenizer.backend_tokenizer) is None


def test_a_tokenizer_with_tokens_of_the_users_own_is_written_as_it_is_and_not_as_it_came(tmp_path):
    tokenizer = read(write_folder(tmp_path / "policy", byte_level(), **GPT2))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mine|>"]})
    save_tokenizer(tokenizer, tmp_path / "run")
    assert AutoTokenizer.from_pretrained(tmp_path / "run").tokenize("a<|mine|>")[-1] == "<|mine|>"


def test_a_sentencepiece_file_alone_names_the_package_that_reads_it(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "policy", byte_level(), **LLAMA)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    monkeypatch.setattr(tokenizer_files, "has", lambda module: False)
    with pytest.raises(UserError, match="pip install sentencepiece protobuf"):
        read(folder)


# ---- Configs ----


def config_of(config: PreTrainedConfig, came: dict[str, Any] | None = None, dtype: str | None = None) -> dict[str, Any]:
    return saved_config(json.loads(config.to_json_string()), came or {}, config, dtype=dtype)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (LlamaConfig(rope_theta=500000.0), {"rope_theta": 500000.0}),
        (
            LlamaConfig(rope_parameters={**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 64}),
            {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
        ),
        (
            LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (PhiConfig(partial_rotary_factor=0.25), {"partial_rotary_factor": 0.25}),
        (GPTNeoXConfig(rotary_pct=0.5, rotary_emb_base=20000), {"rotary_pct": 0.5, "rotary_emb_base": 20000}),
        (Gemma3TextConfig(rope_theta=7e5, rope_local_base_freq=2e4), {"rope_theta": 7e5, "rope_local_base_freq": 2e4}),
        (
            Phi3Config(hidden_size=32, num_attention_heads=4, rope_parameters={**LONG, "rope_theta": 1e4}),
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        ),
    ],
)  # fmt: skip
def test_the_rotation_is_written_in_the_words_of_both_versions_and_read_as_it_was(config, keys, tmp_path):
    written = config_of(config)
    assert {key: written[key] for key in keys} == keys
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters.items() >= config.rope_parameters.items()


def test_the_type_of_the_weights_is_written_in_the_words_of_both_versions():
    written = config_of(LlamaConfig(dtype="float32"), dtype="bfloat16")
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_what_a_run_sets_for_itself_is_saved_as_it_came():
    config = GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, use_cache=False, eos_token_id=5, pad_token_id=5)
    written = config_of(config, {"model_type": "gpt2", "resid_pdrop": 0.2, "custom": 3})
    assert written["resid_pdrop"] == 0.2
    assert {"attn_pdrop", "use_cache", "pad_token_id"}.isdisjoint(written)
    read = GPT2Config(**written)
    assert (read.attn_pdrop, read.use_cache, read.pad_token_id) == (0.1, True, None)


def test_a_pad_token_of_its_own_is_saved():
    assert config_of(LlamaConfig(eos_token_id=5, pad_token_id=6), {"model_type": "llama"})["pad_token_id"] == 6


def test_settings_that_contradict_each_other_are_saved_as_they_came_and_refuse_nothing(tmp_path):
    model = builders.tiny_model()
    model.save_pretrained(tmp_path / "policy")
    (tmp_path / "policy/generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": 3})
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    model.generation_config.eos_token_id = [3, 4]
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "other")
    try_to_save(model, builders.bpe_tokenizer(), config_as_came(model), [[5, 6]], eos_token=None, trust_remote_code=False)
    folder = tmp_path / "run"
    with weights_alone(model):
        model.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    write_configs(model, folder, config_as_came(model))
    saved = json.loads((folder / "generation_config.json").read_text())
    assert (saved["temperature"], saved["eos_token_id"]) == (0.6, [3, 4])
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == [3, 4]


def test_a_config_that_cannot_be_saved_is_refused_before_training():
    model = builders.tiny_model()
    model.config.unsavable = {1, 2}
    with pytest.raises(UserError, match="cannot be saved and read again"):
        try_to_save(model, builders.bpe_tokenizer(), {}, [], eos_token=None, trust_remote_code=False)


# ---- Types ----


@pytest.mark.parametrize("tie", [True, False])
def test_weights_are_cast_once_where_they_are_one_and_taken_back_bit_for_bit(tie):
    model = builders.tiny_model(tie=tie)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounded = Rounded(model, torch.bfloat16, model)
    state = model.state_dict()
    assert all(torch.equal(value, before[name].bfloat16().float()) for name, value in state.items())
    cast = in_dtype(dict(state), torch.bfloat16, model)
    assert {value.dtype for value in cast.values()} == {torch.bfloat16}
    assert (cast["lm_head.weight"].data_ptr() == cast["model.embed_tokens.weight"].data_ptr()) == tie
    rounded.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_type_of_a_checkpoint_is_what_its_config_says_or_else_what_most_of_its_weights_have(tmp_path):
    assert checkpoint_dtype({"torch_dtype": "bfloat16"}) == "bfloat16"
    assert checkpoint_dtype({"text_config": {"dtype": "float16"}}) == "float16"
    builders.tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert checkpoint_dtype({}, str(tmp_path), "main") == "bfloat16"
    assert checkpoint_dtype({}) is None


# ---- Ids ----


def test_a_token_that_the_embedding_has_no_row_for_is_refused_with_its_id_and_the_way_out():
    model, tokenizer = builders.tiny_model(), builders.bpe_tokenizer()
    data = Dataset.from_list([{"chosen_input_ids": [5, builders.VOCABULARY]}, {"chosen_input_ids": []}])
    highest = highest_id(data, ["chosen_input_ids"])
    assert highest == builders.VOCABULARY
    with pytest.raises(UserError, match=rf"{builders.VOCABULARY} rows of embeddings.*of the data.*resize_token_embeddings"):
        refuse_unknown_ids(model, tokenizer, highest)
    refuse_unknown_ids(model, tokenizer, highest - 1)
    tokenizer.add_special_tokens({"eos_token": "<|new|>"})
    with pytest.raises(UserError, match=r"<\|new\|>.*of eos_token"):
        refuse_unknown_ids(model, tokenizer, 3)


def test_the_embedding_of_the_padding_token_learns():
    model = builders.tiny_model(pad_token_id=1)
    train_every_row(model)
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[1].abs().sum() > 0


# ---- Where generation stops ----


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (None, builders.EOS),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|pad|>\n' }}{% endfor %}", builders.PAD),
        ("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        ("{{ messages.nothing.there }}", None),
    ],
)
def test_the_end_of_a_turn_is_the_special_token_behind_a_reply(template, token):
    tokenizer = builders.bpe_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    found = end_of_turn(tokenizer)
    assert (found and tokenizer.convert_ids_to_tokens(found)) == token


def test_a_template_that_the_recipe_set_decides_where_generation_stops():
    model, tokenizer = builders.tiny_model(eos_token_id=2), builders.bpe_tokenizer()
    tokenizer.eos_token = builders.PAD
    assert stop_at(model, tokenizer, taught=True) == builders.EOS
    end, eos = tokenizer.convert_tokens_to_ids([builders.EOS, builders.PAD])
    assert model.generation_config.eos_token_id == [end, *({eos, 2} - {end})]
    assert stop_at(model, tokenizer, taught=False) is None
