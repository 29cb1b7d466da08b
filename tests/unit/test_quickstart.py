"""The quickstart's task: what it prefers is what its rule says, and nothing simpler tells the two sides apart."""

from pathlib import Path

import pytest

from alignment.recipe.configs import DataArguments, ModelArguments
from alignment.recipe.parser import H4ArgumentParser
from scripts.quickstart import run as quickstart
from scripts.quickstart.model import MAX_NEW_TOKENS, train_tokenizer
from scripts.quickstart.task import (
    conversation,
    conversation_rows,
    follows_rule,
    named,
    preference_rows,
    split_orders,
)
from scripts.sft_config import SFTConfig
from scripts.simpo_config import SimPOConfig

RECIPES = Path(__file__).parents[2] / "training_configs" / "quickstart"
REQUEST = "Could I have two red cups, please?"


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str, str]]:
    """(request, chosen, rejected) of the training pairs."""
    rows = preference_rows(0, split_orders(0)[0], 2000)
    return [(row["chosen"][0]["content"], row["chosen"][1]["content"], row["rejected"][1]["content"]) for row in rows]


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


def test_every_chosen_response_follows_the_rule_and_no_rejected_one_does(pairs):
    assert all(follows_rule(request, chosen) for request, chosen, _ in pairs)
    assert not any(follows_rule(request, rejected) for request, _, rejected in pairs)


def test_choosing_by_length_is_a_coin_toss(pairs):
    tokenizer = train_tokenizer([text for pair in pairs for text in pair])
    for length in (len, lambda text: len(tokenizer.tokenize(text))):
        assert 0.4 < share([length(chosen) > length(rejected) for _, chosen, rejected in pairs]) < 0.6
        assert 0.4 < share([length(chosen) < length(rejected) for _, chosen, rejected in pairs]) < 0.6


def test_each_way_of_failing_is_a_third_of_the_rejected_responses(pairs):
    evasive = share([not named(rejected) for _, _, rejected in pairs])
    wrong = share([named(rejected) not in ([], named(request)) for request, _, rejected in pairs])
    assert evasive == pytest.approx(1 / 3, abs=0.04)
    assert wrong == pytest.approx(1 / 3, abs=0.04)


def test_held_out_requests_are_never_trained_on():
    train, held_out = split_orders(0)
    trained = {row["chosen"][0]["content"] for row in preference_rows(0, train, 2000)}
    trained |= {row["messages"][0]["content"] for row in conversation_rows(0, train, 2000)}
    assert len(held_out) > 100
    assert trained.isdisjoint(row["chosen"][0]["content"] for row in preference_rows(0, held_out, 2000))


def test_a_seed_decides_every_row():
    train, _ = split_orders(0)
    assert split_orders(0)[0] == train
    for rows in (preference_rows, conversation_rows):
        assert rows(0, train, 50) == rows(0, train, 50)
        assert rows(0, train, 50) != rows(1, train, 50)


def test_the_supervised_responses_are_mostly_not_what_the_pairs_prefer():
    rows = conversation_rows(0, split_orders(0)[0], 2000)
    followed = share([follows_rule(*(turn["content"] for turn in row["messages"])) for row in rows])
    assert 0.1 < followed < 0.3


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Certainly, two red cups. I am glad to help.", True),
        ("Two red cups, thank you!", True),
        ("Certainly, three red cups. I am glad to help.", False),
        ("Certainly, two red cups. Or two blue cups? I am glad to help.", False),
        ("Thank you. Here are two red cups. Now please move along.", False),
        ("Somebody else may know more about that. Thank you for your visit.", False),
        ("Two cups. Thank you.", False),
        ("", False),
    ],
)
def test_the_rule_judges_any_text(response, expected):
    assert follows_rule(REQUEST, response) is expected


def test_no_response_of_the_data_is_longer_than_what_is_sampled(pairs):
    tokenizer = train_tokenizer([text for pair in pairs for text in pair])
    assert max(len(tokenizer.tokenize(text)) for pair in pairs for text in pair[1:]) < MAX_NEW_TOKENS


def test_the_prompt_that_is_sampled_from_begins_the_tokens_that_were_trained_on(pairs):
    tokenizer = train_tokenizer([text for pair in pairs for text in pair])
    for request, chosen, rejected in pairs[:50]:
        question = conversation(request, chosen)[:1]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        for response in (chosen, rejected):
            whole = tokenizer.apply_chat_template(conversation(request, response), return_dict=False)
            assert whole[: len(prompt)] == prompt


@pytest.mark.parametrize(("recipe", "config"), [("sft.yaml", SFTConfig), ("simpo.yaml", SimPOConfig)])
def test_the_recipes_read_what_the_quickstart_writes(recipe, config):
    parser = H4ArgumentParser((ModelArguments, DataArguments, config))
    model_args, data_args, args = parser.parse([str(RECIPES / recipe)])
    folder, model, run = {
        "sft.yaml": ("conversations", quickstart.MODEL, quickstart.SFT),
        "simpo.yaml": ("pairs", quickstart.SFT, quickstart.SIMPO),
    }[recipe]
    assert data_args.dataset_mixer == {str(quickstart.DATA / folder): 1.0}
    assert Path(model_args.model_name_or_path) == model
    assert Path(args.output_dir) == run


def test_the_summary_compares_the_first_evaluation_with_the_last():
    records = [{"eval_rewards/accuracies": value / 100, "eval_rewards/margins": value} for value in (55, 70, 95)]
    good, bad = "Certainly, two red cups. I am glad to help.", "That depends on many things. I have no time. " * 4
    text = quickstart.summary([{"step": 1, "loss": 1.0}, *records], [REQUEST] * 4, [good, bad, bad, bad], [good] * 4)
    cells = {line[:32].strip(): line[32:].split() for line in text.splitlines()[:5]}
    assert cells == {
        "": ["before", "after"],
        "reward accuracy": ["55.0%", "95.0%"],
        "reward margin": ["55.00", "95.00"],
        "responses that follow the rule": ["25.0%", "100.0%"],
        "words per response": ["29.2", "9.0"],  # (9 + 3 x 36) / 4
    }
    assert max(map(len, text.splitlines())) <= quickstart.WIDTH


def test_a_stage_that_fails_ends_the_quickstart_with_its_status_and_no_traceback(capfd, monkeypatch):
    monkeypatch.chdir(quickstart.ROOT)
    with pytest.raises(SystemExit) as stopped:
        quickstart.launch("scripts/no_such_stage.py", "recipe.yaml")
    assert stopped.value.code == 1
    assert "Traceback" not in capfd.readouterr().err
