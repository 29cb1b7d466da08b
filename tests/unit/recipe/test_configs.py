"""Cross-checks of the dataclasses: nonsense is refused when it is built, all of it at once."""

import math

import pytest

from alignment.errors import ConfigError, UserError
from alignment.recipe.configs import DataArguments, ModelArguments
from alignment.recipe.parser import H4ArgumentParser
from scripts.dpo_config import DPOConfig
from scripts.orpo_config import ORPOConfig
from scripts.sft_config import SFTConfig
from scripts.simpo_config import SimPOConfig


def refused(config: type, **settings) -> list[str]:
    """The keys that the config objects to."""
    with pytest.raises(ConfigError) as error:
        config(**settings)
    return [problem.key for problem in error.value.problems]


def simpo(**settings) -> SimPOConfig:
    return SimPOConfig(use_cpu=True, **settings)


def test_the_defaults_are_accepted_and_are_the_published_ones():
    ModelArguments()
    DataArguments()
    config = simpo()
    published = {
        "beta": 2.0,
        "gamma_beta_ratio": 0.25,
        "sft_weight": 0.0,
        "label_smoothing": 0,
        "loss_type": "sigmoid",
        "disable_dropout": True,
        "truncation_mode": "keep_end",
        "label_pad_token_id": -100,
        "length_limit": 512,
        "prompt_limit": 128,
        "preprocessing": "published",
    }
    assert {key: getattr(config, key) for key in published} == published


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_beta_is_a_positive_finite_number(value):
    assert refused(SimPOConfig, beta=value) == ["beta"]


@pytest.mark.parametrize("key", ["gamma_beta_ratio", "sft_weight"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_the_margin_and_the_weight_of_the_cross_entropy_are_finite_and_not_negative(key, value):
    assert refused(SimPOConfig, **{key: value}) == [key]
    assert getattr(simpo(**{key: 0.0}), key) == 0


@pytest.mark.parametrize("value", [-0.1, 0.5, math.nan])
def test_at_least_half_of_the_pairs_are_assumed_to_be_labelled_right(value):
    assert refused(SimPOConfig, label_smoothing=value) == ["label_smoothing"]


@pytest.mark.parametrize(
    ("lengths", "refusals"),
    [
        ({"max_length": 100, "max_prompt_length": 99}, []),
        ({"max_length": 100, "max_prompt_length": 100}, ["max_prompt_length"]),
        ({"max_prompt_length": 511}, []),
        ({"max_prompt_length": 512}, ["max_prompt_length"]),
        ({"max_length": 129}, []),
        ({"max_length": 128}, ["max_prompt_length"]),
        ({"max_length": 0}, ["max_length"]),
        ({"max_length": 100, "max_prompt_length": -1}, ["max_prompt_length"]),
    ],
)
def test_a_prompt_always_leaves_room_for_a_response(lengths, refusals):
    if refusals:
        assert refused(SimPOConfig, **lengths) == refusals
    else:
        assert simpo(**lengths).prompt_limit < simpo(**lengths).length_limit


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (SimPOConfig, "loss_type", "ipo"),
        (SimPOConfig, "truncation_mode", "keep_middle"),
        (SimPOConfig, "pair_layout", "square"),
        (SimPOConfig, "preprocessing", "new"),
        (SimPOConfig, "bad_rows", "keep"),
        (SimPOConfig, "on_save_failure", "ignore"),
        (ModelArguments, "torch_dtype", "float8"),
        (ModelArguments, "bnb_4bit_quant_type", "int4"),
        (DataArguments, "truncation_side", "middle"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(config, key, value):
    assert refused(config, **{key: value}) == [key]


@pytest.mark.parametrize(
    "key",
    [
        "total_train_batch_size",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "dataset_num_proc",
    ],
)
def test_what_counts_something_is_positive(key):
    assert refused(SimPOConfig, **{key: 0}) == [key]
    assert refused(SimPOConfig, **{key: -1}) == [key]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("label_pad_token_id", 0),
        ("max_completion_length", 64),
        ("max_target_length", 64),
        ("is_encoder_decoder", True),
        ("generate_during_eval", True),
        ("remove_unused_columns", True),
        ("logging_nan_inf_filter", True),
    ],
)
def test_what_the_trainer_would_have_to_ignore_is_refused(key, value):
    assert refused(SimPOConfig, **{key: value}) == [key]


def test_everything_wrong_is_named_in_one_error():
    keys = {"beta": -1.0, "loss_type": "ipo", "label_smoothing": 2.0, "total_train_batch_size": 0}
    assert set(refused(SimPOConfig, **keys)) == set(keys)


def test_an_error_names_key_value_and_what_would_be_right():
    with pytest.raises(UserError, match=r"beta = -1\.0: must be positive"):
        SimPOConfig(beta=-1.0)


@pytest.mark.parametrize("config", [SimPOConfig, SFTConfig])
def test_every_run_saves_four_times_keeps_two_and_trusts_nobody(config):
    defaults = {
        "save_strategy": "steps",
        "save_steps": 0.25,
        "save_minutes": None,
        "save_total_limit": 2,
        "on_save_failure": "continue",
        "resume_from_checkpoint": None,
        "trust_checkpoint": False,
    }
    config = config(use_cpu=True)
    assert {key: getattr(config, key) for key in defaults} == defaults


@pytest.mark.parametrize("value", [0, -5.0, math.nan])
def test_a_time_between_two_checkpoints_is_positive(value):
    assert refused(SimPOConfig, save_minutes=value) == ["save_minutes"]
    assert simpo(save_minutes=0.5).save_minutes == 0.5


@pytest.mark.parametrize("settings", [{"on_save_failure": "stop"}, {"save_total_limit": None}, {"save_steps": 500}])
def test_what_is_saved_and_kept_can_be_chosen(settings):
    [(key, value)] = settings.items()
    assert getattr(simpo(**settings), key) == value


@pytest.mark.parametrize("processes", [1, 4])
def test_the_total_batch_size_sets_the_accumulation_for_the_processes_that_were_launched(processes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    # What accelerate would wait for in a real launch; this process is alone.
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)
    config = simpo(total_train_batch_size=128, per_device_train_batch_size=2, accelerator_config={})
    assert config.gradient_accumulation_steps * 2 * processes == 128


def test_a_total_batch_size_that_cannot_be_reached_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert refused(SimPOConfig, total_train_batch_size=128) == ["total_train_batch_size"]


@pytest.mark.parametrize("share", [0, 0.0, -0.5, 1.5, -2, True, "half", None, math.nan, math.inf])
def test_a_share_is_a_fraction_up_to_1_or_a_number_of_rows(share):
    assert refused(DataArguments, dataset_mixer={"good": 0.5, "rows": 200, "bad": share}) == ["dataset_mixer.bad"]


def test_every_source_has_its_config_name_or_none_has():
    mixer = {"first": 1.0, "second": 0.5}
    assert refused(DataArguments, dataset_mixer=mixer, dataset_configs=["default"]) == ["dataset_configs"]
    assert DataArguments(dataset_mixer=mixer, dataset_configs=["a", "b"]).dataset_configs == ["a", "b"]


def test_quantised_weights_are_trained_with_an_adapter_and_in_one_precision():
    assert refused(ModelArguments, load_in_4bit=True) == ["load_in_4bit"]
    assert refused(ModelArguments, load_in_8bit=True, load_in_4bit=True, use_peft=True) == ["load_in_4bit"]
    assert ModelArguments(load_in_4bit=True, use_peft=True).load_in_4bit


@pytest.mark.parametrize("settings", [{"lora_r": 0}, {"lora_alpha": -1}, {"lora_dropout": 1.0}, {"lora_dropout": math.nan}])
def test_an_adapter_has_a_rank_a_scale_and_a_dropout_below_1(settings):
    assert refused(ModelArguments, **settings) == list(settings)


# ---- Objectives ----


def dpo(**settings) -> DPOConfig:
    return DPOConfig(use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("settings", "beta"),
    [
        ({}, 0.1),
        ({"loss_type": "ipo"}, 0.1),
        ({"length_normalized": True}, 5.0),
        ({"length_normalized": True, "beta": 2.0}, 2.0),
    ],
    ids=str,
)
def test_the_default_beta_is_the_objectives(settings, beta):
    assert dpo(**settings).beta == beta
    assert dpo(**settings).followed_defaults == {"beta": beta}  # for the recorded recipe


@pytest.mark.parametrize(
    ("config", "settings", "key"),
    [
        (SimPOConfig, {"alpha": 0.5}, "alpha"),
        (SimPOConfig, {"loss_type": "simper", "beta": 10.0}, "beta"),
        (SimPOConfig, {"loss_type": "simper", "gamma_beta_ratio": 0.5}, "gamma_beta_ratio"),
        (DPOConfig, {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        (DPOConfig, {"loss_type": "ipo", "length_normalized": True}, "length_normalized"),
    ],
    ids=str,
)
def test_a_key_that_the_chosen_objective_does_not_read_is_refused(config, settings, key):
    assert refused(config, **settings) == [key]


@pytest.mark.parametrize("settings", [{"loss_type": "simper"}, {"loss_type": "hinge"}, {"loss_type": "alphapo"}], ids=str)
def test_written_out_defaults_of_other_objectives_pass(settings):
    """As the recorded recipe of a run has them."""
    defaults = {"beta": 2.0, "gamma_beta_ratio": 0.25, "label_smoothing": 0.0, "alpha": 0.25}
    assert simpo(**defaults, **settings).loss_type == settings["loss_type"]


def test_published_hinge_with_label_smoothing_is_a_line():
    remarks = simpo(loss_type="hinge", label_smoothing=0.1).remarks()
    assert [remark.key for remark in remarks] == ["label_smoothing"]


@pytest.mark.parametrize(
    ("config", "noticed"),
    [
        (simpo(), False),
        (simpo(beta=10.0), False),
        (simpo(beta=0.1), True),
        (simpo(loss_type="simper"), False),
        (dpo(), False),
        (dpo(beta=2.5), True),
        (dpo(beta=2.5, length_normalized=True), False),
        (dpo(beta=0.1, length_normalized=True), True),
        (ORPOConfig(use_cpu=True), False),
        (ORPOConfig(use_cpu=True, beta=2.5), True),
    ],
    ids=str,
)
def test_a_beta_of_another_objective_is_noticed_with_the_authors_range(config, noticed):
    remarks = config.remarks()
    assert [remark.key for remark in remarks] == ["beta"] * noticed
    if noticed:
        assert f"the authors of {config.objective.name} use" in str(remarks[0])


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (simpo(beta=2.5), "SimPO, loss = -log sigmoid(beta * (mean logp_w - mean logp_l - gamma_beta_ratio)), beta = 2.5"),
        (simpo(loss_type="alphapo"), "AlphaPO, loss = -log sigmoid(beta * (reward_w - reward_l - gamma_beta_ratio))"),
        (simpo(loss_type="simper"), "SimPER, loss = exp(mean logp_l) - exp(mean logp_w); reference: none"),
        (dpo(), "DPO, loss = -log sigmoid(beta * (ratio_w - ratio_l)), beta = 0.1"),
        (dpo(loss_type="ipo"), "IPO, loss = (mean ratio_w - mean ratio_l - 1 / (2 beta))^2, beta = 0.1"),
        (dpo(length_normalized=True), "Length-normalized DPO, loss = -log sigmoid(beta * (mean ratio_w - mean ratio_l))"),
        (
            ORPOConfig(use_cpu=True),
            "ORPO, loss = NLL(prompt and chosen response) - beta * log sigmoid(log odds_w - log odds_l)",
        ),
    ],
    ids=lambda value: value.objective.name if hasattr(value, "objective") else "",
)
def test_a_run_says_what_it_optimizes_and_against_what(config, text):
    said = str(config.objective)
    assert said.startswith(text)
    assert ("reference: the policy at step 0" if isinstance(config, DPOConfig) else "reference: none") in said


# ---- TRL's and the handbook's spellings ----

DPO_PARSER = H4ArgumentParser((ModelArguments, DataArguments, DPOConfig))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--loss_type=hinge"], {"loss_type": "hinge"}),
        (['--loss_type=["ipo"]'], {"loss_type": "ipo"}),
        (["--loss_type=sigmoid,sft", "--loss_weights=1,0.2"], {"loss_type": "sigmoid", "sft_weight": 0.2}),
        (["--loss_type=sigmoid_norm"], {"loss_type": "sigmoid", "length_normalized": True, "beta": 5.0}),
        (['--loss_type=["sigmoid_norm", "sft"]', "--loss_weights=[1, 0.5]"], {"length_normalized": True, "sft_weight": 0.5}),
        (["--precompute_ref_log_probs"], {}),
        (["--rpo_alpha=0.3"], {"sft_weight": 0.3}),
        (["--rpo_alpha=null"], {"sft_weight": 0.0}),
    ],
    ids=str,
)
def test_other_libraries_spellings_are_read_and_said(options, expected):
    *_, config = DPO_PARSER.parse(["--use_cpu", *options])
    assert {key: getattr(config, key) for key in expected} == expected
    assert len(DPO_PARSER.notices) == (options != ["--loss_type=hinge"])


def test_a_line_says_what_trl_did_with_rpo_alpha():
    DPO_PARSER.parse(["--use_cpu", "--rpo_alpha=1"])
    assert "trl 0.9 weighed the DPO loss by it instead" in DPO_PARSER.notices[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss_type=sigmoid,hinge"], "expected loss_type [X] or [X, sft] with loss_weights [1, w]"),
        (["--loss_type=sigmoid,sft", "--loss_weights=0.5,1"], "expected loss_type [X] or [X, sft] with loss_weights [1, w]"),
        (["--loss_type=exo_pair"], "expected one of sigmoid, hinge, ipo, robust"),
        (["--rpo_alpha=1", "--sft_weight=0.5"], "rpo_alpha or sft_weight, its other spelling; keep one of them"),
        (["--f_divergence_type=js_divergence"], "'f_divergence_type' is not read: it is of TRL's DPOTrainer"),
        (["--sync_ref_model=true"], "'sync_ref_model' is not read: the reference is the policy itself at step 0"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_name(options, message):
    with pytest.raises(UserError) as error:
        DPO_PARSER.parse(["--use_cpu", *options])
    assert message in str(error.value)
