"""The model card: what it names, and whether the Hub can read its header."""

import pytest
from huggingface_hub import ModelCard

from alignment.report.card import run_card, warned
from scripts.sft_config import SFTConfig
from scripts.simpo_config import SimPOConfig

OBJECTIVE = SimPOConfig(use_cpu=True, beta=2.5, gamma_beta_ratio=0.55).objective
SETTINGS = {"learning rate": 1e-06}
HELD_OUT = {"loss": 1.234567, "rewards/accuracies": 0.75, "runtime": 12.5}


def card(**changes) -> str:
    given = {
        "name": "tiny-simpo",
        "base_model": "me/tiny-sft",
        "datasets": ["me/pairs", "me/more-pairs"],
        "settings": SETTINGS,
        "held_out": HELD_OUT,
    }
    return run_card(OBJECTIVE, **{**given, **changes})


def test_the_card_names_method_paper_base_model_data_and_settings():
    text = card()
    for part in (
        "# tiny-simpo",
        "`me/tiny-sft` trained on `me/pairs`, `me/more-pairs` with [SimPO](https://arxiv.org/abs/2405.14734)",
        "| objective | SimPO |",
        "| reference | none |",
        "| beta | 2.5 |",
        "| gamma_beta_ratio | 0.55 |",
        "| learning rate | 1e-06 |",
        "Meng, Yu and Xia, Mengzhou and Chen, Danqi",
    ):
        assert part in text


def test_held_out_figures_stand_under_readable_names_and_others_stay_out():
    text = card()
    assert "| Loss | 1.2346 |\n| Reward accuracy | 0.7500 |\n" in text
    assert "12.5" not in text


def test_a_run_without_evaluation_claims_no_figures():
    assert "Held-out" not in card(held_out={})


def test_the_header_is_metadata_that_the_hub_reads():
    data = ModelCard(card()).data
    assert (data.base_model, data.datasets) == ("me/tiny-sft", ["me/pairs", "me/more-pairs"])
    assert data.model_name == "tiny-simpo"
    assert "simpo" in data.tags


@pytest.mark.parametrize("name", ["a: b", "# no comment", "naïve 模型", "'quoted'", "null"])
def test_names_that_yaml_would_misread_survive(name):
    assert ModelCard(card(name=name)).data.model_name == name


def test_an_unknown_base_model_and_unknown_data_are_left_out_of_the_header():
    text = card(base_model=None, datasets=[])
    assert ModelCard(text).data.base_model is None
    assert ModelCard(text).data.datasets is None
    assert "`A language model` trained on preference pairs" in text


def test_local_paths_stay_out_of_the_header_where_the_hub_would_refuse_them(tmp_path):
    """The Hub rejects a whole commit whose base_model or datasets are no Hub names."""
    (tmp_path / "pairs.jsonl").touch()
    data = ModelCard(card(base_model=str(tmp_path), datasets=[str(tmp_path / "pairs.jsonl"), "me/pairs"])).data
    assert data.base_model is None
    assert data.datasets == ["me/pairs"]


def test_a_card_tells_what_the_run_warned_of_and_nothing_where_it_did_not():
    assert warned([]) == ""
    assert warned([{"step": 10, "text": "half as likely"}]) == "\n## Warnings\n\n- Step 10: half as likely.\n"


def test_a_card_of_supervised_tuning_speaks_of_conversations_and_of_no_rewards():
    objective = SFTConfig(use_cpu=True).objective
    figures = {"loss": 1.5, "mean_token_accuracy": 0.25}
    text = run_card(objective, name="tiny-sft", base_model=None, datasets=[], settings=SETTINGS, held_out=figures)
    assert "A language model` trained on conversations with SFT, Supervised fine-tuning: every token" in text
    assert "## Held-out conversations" in text
    assert "| Accuracy of the next token | 0.2500 |" in text
    assert not [word for word in ("None", "eward", "pair", "Citation", "reference") if word in text]
    assert ModelCard(text).data.tags == ["sft", "alignment"]
