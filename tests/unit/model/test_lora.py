"""What kinds of adapter do to the objective, and what is refused before anything is loaded."""

import copy
import json
import weakref
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations import deepspeed

from alignment.errors import ConfigError, UserError
from alignment.model import adapters
from alignment.model.adapter_checks import check_adapters
from alignment.model.adapters import add_adapter, keep_4bit_layout, lora_config, whole_models
from alignment.model.loading import check_model_path, find_adapter, load_policy, load_tokenizer
from alignment.recipe.configs import DataArguments, ModelArguments
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests import reference
from tests.builders import bpe_tokenizer, tiny_model, token_rows

IDS = torch.arange(5, 25)[None]
ROWS = token_rows([(5, 3, 9), (2, 12, 4), (1, 1, 1), (9, 6, 6), (4, 20, 2), (3, 2, 15)])
LOSS = {"beta": 2.5, "gamma_beta_ratio": 0.4}


def training_args(folder: Path, **settings) -> SimPOConfig:
    return SimPOConfig(output_dir=str(folder / "run"), use_cpu=True, report_to="none", disable_tqdm=True, **settings)


# ---- The recipe's adapter ----


def test_the_recipes_lora_settings_are_the_adapters():
    settings = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "use_rslora": True, "use_dora": True}
    config = lora_config(ModelArguments(use_peft=True, **settings, lora_target_modules=["q_proj"]))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (4, 8, 0.1, {"q_proj"})
    assert (config.use_rslora, config.use_dora, config.task_type) == (True, True, "CAUSAL_LM")


def test_rank_stabilised_lora_scales_by_the_root_of_the_rank():
    model = get_peft_model(tiny_model(), lora_config(ModelArguments(use_peft=True, lora_r=16, lora_alpha=8, use_rslora=True)))
    scales = {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)}
    assert scales == {2.0}


def adapted(**settings) -> set[str]:
    model = get_peft_model(tiny_model(), lora_config(ModelArguments(use_peft=True, **settings)))
    return {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}


def test_all_linear_means_every_linear_layer_but_the_head():
    everything = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted(lora_target_modules=["all-linear"]) == everything


def test_without_target_modules_the_architectures_usual_layers_are_adapted():
    assert adapted() == {"q_proj", "v_proj"}


def test_without_use_peft_there_is_no_adapter():
    assert lora_config(ModelArguments(lora_target_modules=["q_proj"])) is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_adapter_and_only_that(checkpointing, tmp_path):
    args = training_args(tmp_path, gradient_checkpointing=checkpointing)
    model = add_adapter(tiny_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False), args)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})  # the kind that needs inputs with a gradient
    model.train()
    model(input_ids=IDS).logits.sum().backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())


def test_head_and_embeddings_that_are_one_matrix_stay_one_when_they_are_trained():
    base = tiny_model(tie=True)
    model = get_peft_model(base, lora_config(ModelArguments(use_peft=True, lora_modules_to_save=["embed_tokens"]), base.config))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.get_output_embeddings().weight.requires_grad


def test_a_second_adapter_is_not_put_over_the_first(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="the model has an adapter already"):
        add_adapter(get_peft_model(tiny_model(), config), config, training_args(tmp_path))


# ---- The objective ----

EVERYWHERE = {"target_modules": "all-linear"}
KINDS = {
    "LoRA": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA on all linear layers": {**EVERYWHERE, "use_dora": True},
    "embeddings and head whole": {**EVERYWHERE, "modules_to_save": ["lm_head", "embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA on the head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
}
TIED_KINDS = {
    "tied": {},
    "tied, whole": {"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "tied, LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    ("tie", "kind"),
    [*((False, kind) for kind in KINDS.values()), *((True, kind) for kind in TIED_KINDS.values())],
    ids=[*KINDS, *TIED_KINDS],
)
def test_every_kind_of_adapter_gets_the_gradients_of_the_plain_path(tie, kind, layout, tmp_path):
    torch.manual_seed(1)
    settings = {"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False, "lora_dropout": 0.0, **kind}
    model = get_peft_model(tiny_model(dtype=torch.float64, tie=tie), LoraConfig(**settings))
    plain = copy.deepcopy(model)
    reference.simpo_step_loss(plain, ROWS, **LOSS).backward()

    args = training_args(
        tmp_path, pair_layout=layout, max_length=200, max_prompt_length=100, gradient_checkpointing=True, **LOSS
    )
    trainer = SimPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=bpe_tokenizer())
    trainer.model.train()
    trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset))).backward()
    ours = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# ---- What a config refuses ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora = True: is a kind of LoRA; add use_peft: true"),
        ({"use_rslora": True}, "use_rslora = True: is a kind of LoRA; add use_peft: true"),
        ({"load_in_4bit": True}, "load_in_4bit = True: quantised weights cannot be trained; add use_peft: true"),
        ({"use_peft": True, "use_bnb_nested_quant": True}, "use_bnb_nested_quant = True: is about 4-bit weights"),
        ({"use_peft": True, "load_in_4bit": True, "bnb_4bit_quant_storage": "int4"}, "must be one of uint8, float16"),
        ({"sft_adapter": "continue"}, "sft_adapter = 'continue': trains an adapter; add use_peft: true, or choose merge"),
        ({"sft_adapter": "stack"}, "sft_adapter = 'stack': must be one of merge, continue"),
        ({"use_peft": True, "lora_target_modules": ["all-linear", "q_proj"]}, "all-linear stands alone"),
    ],
)
def test_settings_that_say_nothing_possible_are_refused_when_the_recipe_is_read(settings, message):
    with pytest.raises(ConfigError, match=message):
        ModelArguments(**settings)


# ---- What is refused before anything is loaded ----


def refused(model_args: ModelArguments, args: SimPOConfig) -> str:
    """The message, proven to come without loading weights: there are none."""
    with pytest.raises(UserError) as error:
        check_adapters(model_args, args, check_model_path(model_args))
    return str(error.value)


def config_folder(folder: Path, kind: str = "llama", **changes) -> Path:
    config = tiny_model(kind).config
    for key, value in changes.items():
        setattr(config, key, value)
    config.save_pretrained(folder)
    return folder


FSDP1 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO3 = {"ZERO3": "true"}
Q4, Q8 = {"load_in_4bit": True}, {"load_in_8bit": True}
ON_THE_HEAD = {"lora_target_modules": ["q_proj", "lm_head"]}


def launched_under(launch: dict[str, str], monkeypatch) -> None:
    for key, value in launch.items():
        monkeypatch.setenv(key, value)
    if launch is ZERO3:
        monkeypatch.setattr("alignment.model.loading.is_deepspeed_zero3_enabled", lambda: True)


@pytest.mark.parametrize(
    ("launch", "settings", "message"),
    [
        (FSDP1, Q8, "load_in_8bit = True: FSDP 1 cannot shard integer weights"),
        (FSDP2, Q8, "load_in_8bit = True: FSDP 2 cannot shard integer weights"),
        (FSDP1, Q4, "'uint8': FSDP 1 shards 4-bit weights together with layers that stay in float32"),
        (FSDP1, {**Q4, "bnb_4bit_quant_storage": "bfloat16"}, "set bnb_4bit_quant_storage: float32"),
        (FSDP2, {**Q4, "bnb_4bit_quant_storage": "float16"}, "set bnb_4bit_quant_storage: bfloat16 or uint8, which"),
        (ZERO3, {**Q4, "bnb_4bit_quant_storage": "float32"}, "ZeRO-3 casts floating weights to bfloat16"),
        (FSDP1, {"use_dora": True}, "use_dora = True: DoRA needs whole weight matrices"),
        (ZERO3, {**Q4, "use_dora": True}, "use_dora = True: DoRA copies each 4-bit layer"),
        ({}, {**Q8, "use_dora": True}, "use_dora = True: reading 8-bit weights"),
        (FSDP1, ON_THE_HEAD, "an adapter on lm_head cannot be trained under FSDP 1"),
        (ZERO3, ON_THE_HEAD, "use FSDP 2, or lora_modules_to_save: [lm_head]"),
    ],
)
def test_what_a_strategy_cannot_shard_is_refused_with_the_reason(launch, settings, message, tmp_path, monkeypatch):
    args = training_args(tmp_path, bf16=True)
    launched_under(launch, monkeypatch)
    model_args = ModelArguments(model_name_or_path=str(config_folder(tmp_path / "model")), use_peft=True, **settings)
    assert message in refused(model_args, args)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize(
    ("launch", "settings"),
    [
        (FSDP1, {**Q4, "bnb_4bit_quant_storage": "float32"}),
        (FSDP2, Q4),
        (FSDP2, {**Q4, "bnb_4bit_quant_storage": "bfloat16"}),
        (ZERO3, {**Q4, "bnb_4bit_quant_storage": "bfloat16"}),
        (FSDP2, {**Q4, "use_dora": True}),
        (FSDP2, {"use_dora": True}),
        (ZERO3, Q4),
        (ZERO3, Q8),
        (ZERO3, {"use_dora": True}),
        ({}, {**Q4, "use_dora": True}),
    ],
)
def test_what_the_libraries_can_train_is_let_through(launch, settings, bf16, tmp_path, monkeypatch):
    args = training_args(tmp_path, bf16=bf16)
    launched_under(launch, monkeypatch)
    model_args = ModelArguments(model_name_or_path=str(config_folder(tmp_path / "model")), use_peft=True, **settings)
    check_adapters(model_args, args, check_model_path(model_args))


def test_a_quantised_checkpoint_is_not_trained_whole_nor_quantised_again(tmp_path):
    folder = config_folder(tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": 4})
    args = training_args(tmp_path)
    message = refused(ModelArguments(model_name_or_path=str(folder)), args)
    assert "its weights are quantised (gptq), and quantised weights cannot be trained; add use_peft: true" in message
    message = refused(ModelArguments(model_name_or_path=str(folder), use_peft=True, load_in_4bit=True), args)
    assert "are quantised already (gptq); remove load_in_4bit" in message


def test_quantisation_without_bitsandbytes_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model_args = ModelArguments(model_name_or_path=str(config_folder(tmp_path / "model")), use_peft=True, load_in_4bit=True)
    assert "load_in_4bit = True: needs the package bitsandbytes; run `pip install" in refused(
        model_args, training_args(tmp_path)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_target_modules": ["q_proj", "qproj"]}, "the model has no layer qproj; it has down_proj, embed_tokens"),
        ({"lora_modules_to_save": ["head"]}, "lora_modules_to_save = ['head']: the model has no layer head"),
    ],
)
def test_names_that_are_no_layer_are_refused_though_peft_ignores_them_among_others(settings, message, tmp_path):
    model_args = ModelArguments(model_name_or_path=str(config_folder(tmp_path / "model")), use_peft=True, **settings)
    assert message in refused(model_args, training_args(tmp_path))


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_an_adapter_on_one_end_of_tied_embeddings_is_refused_with_what_trains_both(layer, tmp_path):
    folder = str(config_folder(tmp_path / "model", tie_word_embeddings=True))
    targets = {"lora_target_modules": ["q_proj", layer]}
    message = refused(ModelArguments(model_name_or_path=folder, use_peft=True, **targets), training_args(tmp_path))
    assert f"an adapter on {layer}, which in this model is one matrix" in message
    with pytest.raises(UserError, match="lora_modules_to_save"):
        add_adapter(tiny_model(tie=True), LoraConfig(target_modules=["q_proj", layer]), training_args(tmp_path))
    check_adapters(
        ModelArguments(model_name_or_path=folder, use_peft=True, lora_modules_to_save=[layer.split(".")[-1]]),
        training_args(tmp_path),
        check_model_path(ModelArguments(model_name_or_path=folder)),
    )


def test_an_architecture_that_peft_does_not_know_needs_target_modules(tmp_path):
    folder = str(config_folder(tmp_path / "model", "granite"))
    message = refused(ModelArguments(model_name_or_path=folder, use_peft=True), training_args(tmp_path))
    assert "peft knows no usual layers for the architecture 'granite'" in message
    assert "set lora_target_modules: [all-linear]" in message
    named = ModelArguments(model_name_or_path=folder, use_peft=True, lora_target_modules=["all-linear"])
    check_adapters(named, training_args(tmp_path), check_model_path(named))


def test_all_that_is_wrong_is_said_at_once(tmp_path, monkeypatch):
    args = training_args(tmp_path)
    launched_under(FSDP1, monkeypatch)
    model_args = ModelArguments(
        model_name_or_path=str(config_folder(tmp_path / "model")), use_peft=True, load_in_8bit=True,
        use_dora=True, lora_target_modules=["nothing"], sft_adapter="merge",
    )  # fmt: skip
    keys = [line.split(" = ")[0] for line in refused(model_args, args).splitlines()]
    assert keys == ["use_dora", "load_in_8bit", "use_dora", "sft_adapter", "lora_target_modules"]


# ---- An adapter to begin with ----


def saved_adapter(folder: Path, base: Path, *, tie: bool = False, **settings) -> Path:
    """A LoRA adapter of a tiny model whose configuration lies in `base`."""
    model = tiny_model(tie=tie)
    model.config.save_pretrained(base)
    model.name_or_path = str(base)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings)).save_pretrained(folder)
    return folder


def test_a_folder_with_whole_weights_beside_an_adapter_is_a_model(tmp_path):
    folder = saved_adapter(tmp_path / "sft", tmp_path / "base")
    model_args = ModelArguments(model_name_or_path=str(folder))
    assert find_adapter(model_args).base.name == str(tmp_path / "base")
    tiny_model().save_pretrained(folder)
    assert find_adapter(model_args) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_r": 8}, "lora_r = 8: the adapter '{}' is trained on, and it has 4; remove lora_r, or set sft_adapter: merge"),
        ({"use_dora": True}, "use_dora = True: the adapter '{}' is trained on, and it has False"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules = ['q_proj']: the adapter '{}' is trained on"),
    ],
)
def test_an_adapter_that_is_trained_on_keeps_its_settings(settings, message, tmp_path):
    folder = saved_adapter(tmp_path / "sft", tmp_path / "base")
    args = training_args(tmp_path)
    model_args = ModelArguments(model_name_or_path=str(folder), use_peft=True, sft_adapter="continue", **settings)
    assert message.format(folder) in refused(model_args, args)
    agreeing = ModelArguments(
        model_name_or_path=str(folder),
        use_peft=True,
        sft_adapter="continue",
        lora_r=4,
        lora_target_modules=["v_proj", "q_proj"],
    )
    check_adapters(agreeing, args, check_model_path(agreeing))


def test_a_merged_adapter_whose_base_would_be_a_folder_here_is_not_pushed(tmp_path):
    model_args = ModelArguments(model_name_or_path=str(saved_adapter(tmp_path / "sft", tmp_path / "base")), use_peft=True)
    message = refused(model_args, training_args(tmp_path, push_to_hub=True))
    assert "push_to_hub = True" in message
    assert "sft_adapter: continue" in message
    whole = ModelArguments(model_name_or_path=model_args.model_name_or_path)
    check_adapters(whole, training_args(tmp_path, push_to_hub=True), check_model_path(whole))


def test_an_adapter_of_a_tied_head_is_not_merged_because_that_would_change_the_embeddings_too(tmp_path):
    folder = saved_adapter(tmp_path / "sft", tmp_path / "base", tie=True, target_modules=["q_proj", "lm_head"])
    assert "adapts lm_head alone" in refused(ModelArguments(model_name_or_path=str(folder)), training_args(tmp_path))


def test_an_adapter_of_a_quantised_base_is_not_merged(tmp_path):
    folder = saved_adapter(tmp_path / "sft", tmp_path / "base")
    config_folder(tmp_path / "base", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    args = training_args(tmp_path)
    merged = ModelArguments(model_name_or_path=str(folder), use_peft=True, sft_adapter="merge")
    assert "whose weights are quantised: the sum would be rounded to them" in refused(merged, args)
    continued = ModelArguments(model_name_or_path=str(folder), use_peft=True)
    check_adapters(continued, args, check_model_path(continued))


def test_an_adapter_whose_base_is_missing_is_refused_with_the_bases_name(tmp_path):
    folder = saved_adapter(tmp_path / "sft", tmp_path / "base")
    (tmp_path / "base/config.json").unlink()
    with pytest.raises(UserError, match=f"'{folder}': is a LoRA adapter of '{tmp_path / 'base'}', which cannot be loaded"):
        check_model_path(ModelArguments(model_name_or_path=str(folder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"base_model_name_or_path": None}, "names no base"), ({"peft_type": "IA3"}, "is an adapter of type IA3")],
)
def test_an_adapter_that_cannot_be_trained_on_is_refused(changes, message, tmp_path):
    folder = saved_adapter(tmp_path / "sft", tmp_path / "base")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        find_adapter(ModelArguments(model_name_or_path=str(folder)))


def test_an_adapter_without_safetensors_is_refused(tmp_path):
    folder = saved_adapter(tmp_path / "sft", tmp_path / "base")
    (folder / "adapter_model.safetensors").unlink()
    message = refused(ModelArguments(model_name_or_path=str(folder)), training_args(tmp_path))
    assert "is a LoRA adapter without adapter_model.safetensors" in message


def test_the_tokenizer_of_an_adapter_is_its_own_or_its_bases(tmp_path):
    folder = saved_adapter(tmp_path / "sft", tmp_path / "base")
    for place, template in ((tmp_path / "base", "base"), (folder, "own")):
        tokenizer = bpe_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(place)
        loaded = load_tokenizer(ModelArguments(model_name_or_path=str(folder)), DataArguments())
        assert loaded.chat_template == template


def test_an_adapter_is_not_loaded_as_if_it_were_a_model(tmp_path):
    folder = saved_adapter(tmp_path / "sft", tmp_path / "base")
    tiny_model().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="is a LoRA adapter; load it with peft's AutoPeftModelForCausalLM"):
        load_policy(str(folder))


def test_4_bit_layers_are_told_to_keep_the_layout_that_has_a_backward():
    layer = nn.Linear(2, 2)
    layer.support_avx512bf16_for_cpu = True
    keep_4bit_layout(nn.Sequential(layer))
    assert layer.support_avx512bf16_for_cpu is False


def test_a_config_without_quantisation_is_told_from_one_with():
    assert adapters.quantised_by(PreTrainedConfig()) is None
    assert adapters.quantised_by(PreTrainedConfig(quantization_config={"load_in_4bit": True})) == "bitsandbytes"


@pytest.mark.parametrize("is_gone", [True, False])
def test_models_are_loaded_whole_though_an_earlier_recipe_of_the_process_named_deepspeed(is_gone, monkeypatch):
    class ZeRO3:
        def is_zero3(self) -> bool:
            return True

    config = ZeRO3()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", before := weakref.ref(config))
    if is_gone:
        del config
    with whole_models():
        assert not deepspeed.is_deepspeed_zero3_enabled()
    assert deepspeed._hf_deepspeed_config_weak_ref is before
