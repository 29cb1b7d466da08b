"""Where tokenizer and policy come from, in which precision, and that nothing random is left in them."""

import json
import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from alignment.errors import UserError, reason_of
from alignment.model.loading import (
    check_attention,
    check_model_path,
    disable_dropout,
    load_policy,
    load_tokenizer,
    model_init_kwargs,
)
from alignment.recipe.configs import DataArguments, ModelArguments
from scripts.simpo_config import SimPOConfig
from tests.builders import bpe_tokenizer, tiny_model

ROOT = Path(__file__).parents[3]
IDS = torch.arange(5, 25)[None]


def training_args(tmp_path, **settings) -> SimPOConfig:
    return SimPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True, **settings)


# ---- Precision ----


@pytest.mark.parametrize(
    ("torch_dtype", "loaded"),
    [(None, torch.float32), ("auto", torch.bfloat16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)],
)
def test_a_bf16_checkpoint_is_loaded_in_float32_unless_the_recipe_says_otherwise(torch_dtype, loaded, tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    model_args = ModelArguments(model_name_or_path=str(tmp_path), torch_dtype=torch_dtype)
    model = load_policy(str(tmp_path), **model_init_kwargs(model_args, training_args(tmp_path)))
    assert {parameter.dtype for parameter in model.parameters()} == {loaded}


@pytest.fixture
def unquantised(tmp_path) -> str:
    """A folder with a model's configuration, of which no more is read before its weights are."""
    tiny_model().config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_recipe_settings_reach_from_pretrained_in_words_that_json_knows(unquantised, tmp_path):
    model_args = ModelArguments(
        model_name_or_path=unquantised,
        model_revision="v2",
        attn_implementation="sdpa",
        use_peft=True,
        load_in_4bit=True,
        use_bnb_nested_quant=True,
    )
    kwargs = model_init_kwargs(model_args, training_args(tmp_path))
    assert json.loads(json.dumps(kwargs)) == {
        "revision": "v2",
        "trust_remote_code": False,
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_storage": "uint8",
        },
        "device_map": {"": "cpu"},
    }


def test_4_bit_weights_compute_in_bf16_where_the_run_does(unquantised, tmp_path):
    model_args = ModelArguments(model_name_or_path=unquantised, use_peft=True, load_in_4bit=True)
    settings = model_init_kwargs(model_args, training_args(tmp_path, bf16=True))["quantization_config"]
    assert settings["bnb_4bit_compute_dtype"] == "bfloat16"


def test_8_bit_weights_have_settings_of_their_own(unquantised, tmp_path):
    model_args = ModelArguments(model_name_or_path=unquantised, use_peft=True, load_in_8bit=True)
    settings = model_init_kwargs(model_args, training_args(tmp_path))["quantization_config"]
    assert settings == {"quant_method": "bitsandbytes", "load_in_8bit": True}


def test_a_checkpoint_that_brings_its_own_quantisation_is_given_no_second_one(tmp_path):
    config = tiny_model().config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    model_args = ModelArguments(model_name_or_path=str(tmp_path), use_peft=True, load_in_4bit=True)
    assert "quantization_config" not in model_init_kwargs(model_args, training_args(tmp_path))


@pytest.mark.parametrize(
    ("launch", "placed"),
    [({}, True), ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, False), ({"ACCELERATE_USE_FSDP": "false"}, True)],
    ids=["whole", "FSDP", "FSDP off"],
)
def test_quantised_weights_are_loaded_onto_the_processs_device_unless_they_are_sharded(
    launch, placed, unquantised, tmp_path, monkeypatch
):
    args = training_args(tmp_path)
    for key, value in launch.items():
        monkeypatch.setenv(key, value)
    kwargs = model_init_kwargs(ModelArguments(model_name_or_path=unquantised, use_peft=True, load_in_8bit=True), args)
    assert kwargs.get("device_map") == ({"": "cpu"} if placed else None)


def test_weights_that_are_not_quantised_are_placed_by_the_trainer(tmp_path):
    assert "device_map" not in model_init_kwargs(ModelArguments(), training_args(tmp_path))


# ---- Dropout ----


def with_lora(model: PreTrainedModel) -> nn.Module:
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5, init_lora_weights=False))


DROPOUTS = {
    "a number that attention reads": (
        lambda: tiny_model(attention_dropout=0.5),
        2,
        "model.layers.*.self_attn.attention_dropout = 0.5 (2 of them)",
    ),
    "modules and *_pdrop": (
        lambda: tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.4, attn_pdrop=0.3),
        7,
        "transformer.drop = 0.4",
    ),
    "LoRA, layer by layer alike": (lambda: with_lora(tiny_model()), 2, "q_proj.lora_dropout.default = 0.5 (2 of them)"),
}
every_dropout = pytest.mark.parametrize(("build", "count", "line"), DROPOUTS.values(), ids=DROPOUTS)


def differs_from_itself(model: nn.Module) -> bool:
    model.train()
    first, second = (model(input_ids=IDS).logits for _ in range(2))
    return not torch.equal(first, second)


@every_dropout
def test_two_passes_in_train_mode_are_equal_once_dropout_is_off(build, count, line):
    model = build()
    assert differs_from_itself(model)
    disable_dropout(model)
    assert not differs_from_itself(model)


@every_dropout
def test_every_dropout_that_was_on_is_listed_with_its_rate(build, count, line):
    listed = disable_dropout(build())
    assert any(entry.endswith(line) for entry in listed)
    assert len(listed) >= count


def test_nothing_is_listed_where_nothing_was_on():
    assert disable_dropout(tiny_model()) == []


def test_the_config_says_that_dropout_is_off():
    model = tiny_model(attention_dropout=0.5)
    disable_dropout(model)
    assert model.config.attention_dropout == 0.0


# ---- What is refused ----


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_on_a_cpu_is_refused_with_what_to_set_instead(kernel):
    with pytest.raises(UserError, match=rf"attn_implementation = {kernel}: needs a GPU .* set attn_implementation: sdpa"):
        check_attention(kernel, use_cpu=True)


def test_flex_attention_on_a_cpu_is_refused_because_it_cannot_train_there():
    with pytest.raises(UserError, match=r"attn_implementation = flex_attention: has no backward on a CPU; set .*: eager"):
        check_attention("flex_attention", use_cpu=True)


@pytest.mark.parametrize("kernel", [None, "sdpa", "eager"])
def test_the_other_kernels_run_anywhere(kernel):
    check_attention(kernel, use_cpu=True)


def test_flash_attention_that_is_not_installed_is_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="flash_attn is not installed; give --attn_implementation=sdpa, which is as fast"):
        check_attention("flash_attention_2", use_cpu=False)


def test_a_path_without_a_model_is_refused_by_name(tmp_path):
    path = str(tmp_path / "nothing")
    for load in (
        lambda: load_policy(path),
        lambda: check_model_path(ModelArguments(model_name_or_path=path)),
        lambda: load_tokenizer(ModelArguments(model_name_or_path=path), DataArguments()),
    ):
        with pytest.raises(UserError, match=rf"model_name_or_path = '{path}': its .* cannot be loaded"):
            load()


def test_a_folder_without_weights_is_refused_although_its_config_is_there(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    check_model_path(ModelArguments(model_name_or_path=str(tmp_path)))
    with pytest.raises(UserError, match="its weights cannot be loaded"):
        load_policy(str(tmp_path))


# ---- Tokenizers ----


def saved_tokenizer(folder, **changes) -> str:
    tokenizer = bpe_tokenizer()
    for key, value in changes.items():
        setattr(tokenizer, key, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_padding_falls_back_on_eos_and_a_padding_token_of_its_own_is_kept(tmp_path):
    bare = saved_tokenizer(tmp_path / "bare", pad_token=None)
    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=bare), DataArguments())
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    whole = load_tokenizer(ModelArguments(model_name_or_path=saved_tokenizer(tmp_path / "whole")), DataArguments())
    assert whole.pad_token == bpe_tokenizer().pad_token


def test_the_recipes_tokenizer_and_truncation_side_win(tmp_path):
    other = saved_tokenizer(tmp_path / "other", chat_template="{{ 'other' }}")
    model_args = ModelArguments(model_name_or_path=str(tmp_path / "model"), tokenizer_name_or_path=other)
    tokenizer = load_tokenizer(model_args, DataArguments(truncation_side="left"))
    assert tokenizer.chat_template == "{{ 'other' }}"
    assert tokenizer.truncation_side == "left"


WAYS = {
    "socks5://127.0.0.1:9": ("socks", "refused"),  # needs a package
    "http://127.0.0.1:9": ("refused",),
    "carrier-pigeon://home": ("proxy URL",),
}


@pytest.mark.parametrize("proxy", WAYS)
def test_a_way_to_the_hub_that_does_not_work_is_one_error_with_the_reason(proxy):
    script = """
        import time
        time.sleep = lambda seconds: None  # what waits before it tries again
        from alignment.data.sources import open_source
        from alignment.errors import UserError
        from alignment.model.loading import check_model_path
        from alignment.recipe.configs import ModelArguments
        for look in (lambda: check_model_path(ModelArguments("some/model")), lambda: open_source("some/pairs", None)):
            try:
                look()
            except UserError as error:
                print(str(error).replace("\\n", " "))
    """
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower() and "OFFLINE" not in key}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**environment, "ALL_PROXY": proxy}, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    of_model, of_data = done.stdout.splitlines()
    assert of_model.startswith("model_name_or_path = 'some/model': its configuration cannot be loaded (")
    assert of_data.startswith("some/pairs: no file or folder of this name")
    assert any(word.lower() in of_model.lower() for word in WAYS[proxy])


def test_the_reason_behind_a_failed_connection_is_told():
    def fail() -> None:
        try:
            raise ConnectionError("certificate verify failed: self-signed certificate")
        except ConnectionError as error:
            raise OSError("We couldn't connect to the Hub.\nCheck your connection.") from error

    with pytest.raises(OSError, match="connect") as raised:
        fail()
    assert reason_of(raised.value) == "We couldn't connect to the Hub: certificate verify failed: self-signed certificate"
    assert reason_of(ValueError("no config\nmore")) == "no config"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda whole: whole[:1000], "model.safetensors is damaged ("),
        (lambda whole: whole[:-1], "model.safetensors is damaged ("),
        (lambda whole: b"", "model.safetensors is damaged ("),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "is a pointer of Git LFS: run `git lfs pull`"),
    ],
    ids=["its beginning", "a byte less", "empty", "a pointer"],
)
def test_weights_that_came_in_part_are_refused_before_any_data_is_read(content, said, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    check_model_path(ModelArguments(str(tmp_path)))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(content(weights.read_bytes()))
    with pytest.raises(UserError) as refusal:
        check_model_path(ModelArguments(str(tmp_path)))
    assert str(refusal.value).startswith(f"model_name_or_path = {str(tmp_path)!r}: ")
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"version": "1.0", "trunc', "tokenizer.json is damaged ("),
        ("version https://git-lfs.github.com/spec/v1\nsize 9\n", "tokenizer.json is a pointer of Git LFS: run `git lfs pull`"),
    ],
)
def test_a_tokenizer_that_came_in_part_is_refused(content, said, tmp_path):
    bpe_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as refusal:
        load_tokenizer(ModelArguments(str(tmp_path)), DataArguments())
    assert str(refusal.value).startswith(f"model_name_or_path = {str(tmp_path)!r}: its tokenizer cannot be loaded ({said}")


@pytest.mark.parametrize(("key", "words"), [("model_name_or_path", "configuration"), ("tokenizer_name_or_path", "tokenizer")])
def test_a_folder_that_there_is_not_is_named_by_its_key_and_not_taken_for_the_hubs(key, words, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    names = {"model_name_or_path": str(tmp_path / "model")} | {key: str(tmp_path / "nowhere")}
    model_args = ModelArguments(**names)
    look = check_model_path if key == "model_name_or_path" else partial(load_tokenizer, data_args=DataArguments())
    with pytest.raises(UserError) as raised:
        look(model_args)
    assert str(raised.value).startswith(
        f"{key} = {names[key]!r}: its {words} cannot be loaded (there is no folder of this name, and no name on the Hub"
    )
