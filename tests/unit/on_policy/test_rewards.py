"""Scores: ArmoRM against its equations spelled out, one-label heads whatever the padding; which responses become pairs."""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaModel

from alignment.errors import UserError
from on_policy_data_gen.armorm import ARCHITECTURE, ArmoRM
from on_policy_data_gen.configs import PairArguments, RewardArguments
from on_policy_data_gen.pairing import DUPLICATE, MARGIN, NONE_LEFT, TIE, UNSCORED, Pair, PairRule, choose_pairs, held_out
from on_policy_data_gen.reward_models import load_reward_model
from on_policy_data_gen.scoring import read_responses
from tests import builders

CPU = torch.device("cpu")
OBJECTIVES, HIDDEN = 5, 16


@pytest.fixture(scope="module")
def armo_folder(tmp_path_factory):
    """A checkpoint as the published one is laid out: its names, its config, and code that must not be run."""
    folder = tmp_path_factory.mktemp("armo")
    config = LlamaConfig(
        **builders.SIZES, num_objectives=OBJECTIVES, gating_hidden_dim=HIDDEN, gating_n_hidden=3, gating_temperature=2,
        architectures=[ARCHITECTURE],
    )  # fmt: skip
    torch.manual_seed(1)
    tensors = {f"model.{name}": value for name, value in LlamaModel(config).state_dict().items()}
    width = config.hidden_size
    tensors |= {
        "regression_layer.weight": torch.randn(OBJECTIVES, width), "gating.logit_scale": torch.tensor([1.7]),
        "reward_transform_matrix": torch.eye(OBJECTIVES) - 0.3 * torch.rand(OBJECTIVES, OBJECTIVES),
    }  # fmt: skip
    sizes = [width, HIDDEN, HIDDEN, HIDDEN, OBJECTIVES]
    for layer in range(4):
        tensors[f"gating.layers.{layer}.weight"] = torch.randn(sizes[layer + 1], sizes[layer]) / 3
        tensors[f"gating.layers.{layer}.bias"] = torch.randn(sizes[layer + 1])
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    code = {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"}
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": [ARCHITECTURE], "auto_map": code}))
    (folder / "modeling_custom.py").write_text("raise SystemExit('remote code was run')\n")
    builders.bpe_tokenizer().save_pretrained(folder)
    return folder


def conversations() -> list:
    return [row["chosen"] for row in builders.pairs(5)]


def plain_score(folder, ids: list[int], mark: list[int]) -> float:
    """ArmoRM's equations, one conversation at a time, unpadded, in float64."""
    weights = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    config = LlamaConfig.from_pretrained(folder)
    backbone = LlamaModel(config).double()
    backbone.load_state_dict({name[6:]: value for name, value in weights.items() if name.startswith("model.")})
    with torch.no_grad():
        hidden = backbone(torch.tensor([ids])).last_hidden_state[0]
    place = max(n for n in range(len(ids)) if ids[n : n + len(mark)] == mark)
    gate = hidden[place]
    for layer in range(4):
        gate = weights[f"gating.layers.{layer}.weight"] @ gate + weights[f"gating.layers.{layer}.bias"]
        gate = gate.clamp(min=0) if layer < 3 else gate
    gate = torch.exp(gate / 2) / torch.exp(gate / 2).sum() * weights["gating.logit_scale"]
    rewards = [sum(weights["regression_layer.weight"][k] * hidden[-1]) for k in range(OBJECTIVES)]
    matrix = weights["reward_transform_matrix"]
    adjusted = [sum(rewards[k] * matrix[k, n] for k in range(OBJECTIVES)) for n in range(OBJECTIVES)]
    return float(sum(gate[n] * adjusted[n] for n in range(OBJECTIVES)))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_armorm_scores_as_its_equations_say_and_runs_no_code_of_the_checkpoint(armo_folder, batch_size):
    model = load_reward_model(RewardArguments(reward_model=str(armo_folder)), CPU)
    assert model.kind == "ArmoRM"
    rows = model.encode(conversations())
    expected = [plain_score(armo_folder, ids, model.head.mark) for ids in rows]
    assert model.scores(rows, batch_size=batch_size) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_armorm_has_the_tensors_of_the_published_checkpoint():
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_objectives=19)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in ArmoRM(config).state_dict().items() if "model." not in name}
    assert shapes == {
        "regression_layer.weight": (19, 4096), "reward_transform_matrix": (19, 19), "gating.logit_scale": (1,),
        "gating.layers.0.weight": (1024, 4096), "gating.layers.0.bias": (1024,),
        "gating.layers.1.weight": (1024, 1024), "gating.layers.1.bias": (1024,),
        "gating.layers.2.weight": (1024, 1024), "gating.layers.2.bias": (1024,),
        "gating.layers.3.weight": (19, 1024), "gating.layers.3.bias": (19,),
    }  # fmt: skip


@pytest.mark.parametrize("pad", [None, 2])
def test_a_one_label_head_scores_in_a_batch_as_alone(pad, tmp_path):
    builders.tiny_reward_model(pad_token_id=pad).save_pretrained(tmp_path)
    builders.bpe_tokenizer().save_pretrained(tmp_path)
    model = load_reward_model(RewardArguments(reward_model=str(tmp_path)), CPU)
    rows = model.encode(conversations())
    assert all(row.count(model.tokenizer.bos_token_id) == 1 for row in rows)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = [float(plain(input_ids=torch.tensor([row])).logits) for row in rows]
    assert model.scores(rows, batch_size=5) == pytest.approx(expected, abs=1e-4)


def test_what_has_no_trained_head_or_several_labels_is_no_reward_model(tmp_path):
    builders.tiny_model().save_pretrained(tmp_path / "policy")
    builders.tiny_reward_model(num_labels=3).save_pretrained(tmp_path / "three")
    for name in ("policy", "three"):
        builders.bpe_tokenizer().save_pretrained(tmp_path / name)
    with pytest.raises(UserError, match="has 3 labels"):
        load_reward_model(RewardArguments(reward_model=str(tmp_path / "three")), CPU)
    with pytest.raises(UserError, match=r"labels|weights lack"):
        load_reward_model(RewardArguments(reward_model=str(tmp_path / "policy")), CPU)


# ---- Pairs ----

RESPONSES = ["a", "b", "c", "d"]
REWARDS = [0.1, 0.4, 0.3, 0.35]


def rule(name: str = "best_worst", least: float = 0.0, most: float | None = None) -> PairRule:
    return PairRule(name, least, most, 1)


@pytest.mark.parametrize(
    ("asked", "pairs"),
    [
        (rule(), [(1, 0)]),
        (rule("all_pairs"), [(1, 3), (1, 2), (1, 0), (3, 2), (3, 0), (2, 0)]),
        (rule("all_pairs", 0.08, 0.22), [(1, 2), (2, 0)]),
        (rule("margin", 0.0, 0.2), [(1, 2)]),
        (rule("best_worst", 0.5), []),
    ],
)
def test_each_rule_pairs_what_it_says(asked, pairs):
    found, counts = choose_pairs("p", RESPONSES, REWARDS, asked)
    assert found == [Pair(*pair) for pair in pairs]
    assert (counts[NONE_LEFT], counts[MARGIN] > 0) == (not pairs, asked.name != "margin" and asked.min_margin > 0)


def test_the_best_meets_random_lower_ones_the_same_in_every_run():
    found = [choose_pairs(str(n), RESPONSES, REWARDS, rule("best_random"))[0][0] for n in range(60)]
    assert found == [choose_pairs(str(n), RESPONSES, REWARDS, rule("best_random"))[0][0] for n in range(60)]
    assert Counter(pair.chosen for pair in found).keys() == {1}
    assert Counter(pair.rejected for pair in found).keys() == {0, 2, 3}


def test_ties_repeated_and_unscored_responses_are_left_out_and_counted():
    found, counts = choose_pairs("p", ["a", "a", "b", "c"], [0.2, 0.2, 0.2, None], rule())
    assert found == []
    assert counts == {DUPLICATE: 1, UNSCORED: 1, TIE: 1, NONE_LEFT: 1}


def test_held_out_prompts_are_a_share_and_the_same_ones_in_any_order():
    ids = [str(n) for n in range(100)]
    assert held_out(ids, 0.1, 1) == held_out(ids[::-1], 0.1, 1)
    assert (len(held_out(ids, 0.1, 1)), len(held_out(ids[:3], 0.01, 1)), held_out(ids, 0.0, 1)) == (10, 1, set())


@pytest.mark.parametrize(("prompts", "share", "held"), [(10, 0.99, 9), (2, 0.9, 1), (1, 0.5, 0), (0, 0.5, 0)])
def test_a_large_share_leaves_a_prompt_to_train_on(prompts, share, held):
    assert len(held_out([str(n) for n in range(prompts)], share, 1)) == held


@pytest.mark.parametrize(
    "scores", ["3", '"ab"', "[1]", "[1, NaN]", "[1, true]", '[1, "2"]', "[1, Infinity]", f"[1, {10**400}]", "{}"]
)
def test_rewards_that_are_no_numbers_are_refused_at_their_row(scores, tmp_path):
    file = tmp_path / "scored.json"
    file.write_text(f'[{{"prompt": "Hello", "all_generated_responses": ["a", "b"], "all_rm_scores": {scores}}}]')
    with pytest.raises(
        UserError, match=r"scored\.json.*all_rm_scores needs a finite number, or null, for each of its 2 responses"
    ):
        read_responses(file)


def test_a_response_with_half_of_a_character_is_refused_at_its_row(tmp_path):
    file = tmp_path / "responses.json"
    file.write_text('[{"prompt": "Hello", "all_generated_responses": ["a", "b \\ud83d"]}]')
    with pytest.raises(UserError, match=r"responses\.json.*all_generated_responses is .* with half of a character"):
        read_responses(file)


def test_a_margin_rule_needs_a_margin():
    with pytest.raises(UserError, match="needs min_margin or max_margin"):
        PairArguments(pair_rule="margin")
