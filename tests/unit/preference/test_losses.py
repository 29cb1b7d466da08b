"""Objectives against arithmetic done by hand."""

import math
from functools import partial

import pytest
import torch

from alignment.preference.losses import (
    alphapo_reward,
    dpo_loss,
    log1mexp,
    log_odds_ratio,
    orpo_loss,
    response_sums,
    simper_loss,
    simpo_loss,
)


def loss(chosen: list[float], rejected: list[float], **settings) -> list[float]:
    settings = {"beta": 2.0, "gamma_beta_ratio": 0.5, **settings}
    return simpo_loss(torch.tensor(chosen), torch.tensor(rejected), **settings).tolist()


def test_the_loss_of_each_pair_is_the_one_computed_by_hand():
    """beta = 2, gamma / beta = 0.5.

    pair  chosen  rejected  beta * (difference - 0.5)  -log sigmoid
    1     -1.0    -1.5      2 * ( 0.5 - 0.5) =  0      log 2        = 0.693147
    2     -1.0    -2.0      2 * ( 1.0 - 0.5) =  1      log(1 + 1/e) = 0.313262
    3     -2.0    -1.0      2 * (-1.0 - 0.5) = -3      log(1 + e^3) = 3.048587
    """
    assert loss([-1.0, -1.0, -2.0], [-1.5, -2.0, -1.0]) == pytest.approx([0.693147, 0.313262, 3.048587], abs=1e-6)


def test_the_hinge_is_zero_once_the_margin_is_one():
    """The same pairs: relu(1 - 0) = 1, relu(1 - 1) = 0, relu(1 + 3) = 4; and one beyond, relu(1 - 2) = 0."""
    losses = loss([-1.0, -1.0, -2.0, -1.0], [-1.5, -2.0, -1.0, -2.5], loss_type="hinge")
    assert losses == pytest.approx([1.0, 0.0, 4.0, 0.0])


def test_label_smoothing_mixes_in_the_loss_of_the_swapped_label():
    """Pair 2 above, a tenth of the labels wrong: 0.9 * log(1 + 1/e) + 0.1 * log(1 + e) = 0.9 * 0.313262 + 0.1 * 1.313262."""
    assert loss([-1.0], [-2.0], label_smoothing=0.1) == pytest.approx([0.413262], abs=1e-6)


def test_label_smoothing_is_ignored_by_the_hinge():
    pair = [-1.0], [-1.7]
    assert loss(*pair, loss_type="hinge", label_smoothing=0.4) == loss(*pair, loss_type="hinge")


def test_the_target_margin_is_gamma_over_beta_before_it_is_scaled():
    """beta = 2.5, gamma = 1.375: sigmoid of 2.5 * 0.3 - 1.375 = -0.625."""
    (value,) = loss([-1.0], [-1.3], beta=2.5, gamma_beta_ratio=1.375 / 2.5)
    assert value == pytest.approx(math.log1p(math.exp(0.625)), abs=1e-6)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"loss_type": "hinge"}])
def test_the_gradient_is_that_of_finite_differences(settings):
    torch.manual_seed(0)
    pair = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda c, r: simpo_loss(c, r, beta=2.0, gamma_beta_ratio=0.3, **settings), pair)


def test_the_gradient_pushes_both_sides_by_beta_times_the_chance_of_being_wrong():
    chosen, rejected = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (-1.0, -1.5))
    simpo_loss(chosen, rejected, beta=2.0, gamma_beta_ratio=0.0).sum().backward()
    push = 2.0 * (1 - 1 / (1 + math.exp(-1.0)))  # the scaled margin is 2 * 0.5
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-push, push), abs=1e-12)


def test_an_enormous_margin_gives_a_finite_loss_and_gradient():
    chosen = torch.tensor([-1000.0, -1.0], requires_grad=True)
    losses = simpo_loss(chosen, torch.tensor([-1.0, -1000.0]), beta=10.0, gamma_beta_ratio=0.0)
    losses.sum().backward()
    assert losses.tolist() == [9990.0, 0.0]
    assert chosen.grad.tolist() == [-10.0, 0.0]


def test_a_longer_response_of_equally_likely_tokens_earns_the_same_reward():
    is_response = torch.ones(2, 9, dtype=torch.bool)
    is_response[0, 3:] = False
    sums, tokens = response_sums(torch.full((2, 9), -0.7), is_response)
    assert tokens.tolist() == [3, 9]
    assert (sums / tokens).tolist() == pytest.approx([-0.7, -0.7])


def test_what_stands_outside_the_response_counts_nothing_and_gets_no_gradient():
    logps = torch.tensor([[math.nan, -1.0, -2.0, -math.inf]], requires_grad=True)
    sums, tokens = response_sums(logps, torch.tensor([[False, True, True, False]]))
    sums.sum().backward()
    assert (sums.item(), tokens.item()) == (-3.0, 2)
    assert logps.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_one_row_that_holds_several_responses_is_summed_for_each():
    """Tokens of chosen, nobody, rejected, rejected: -1; -3 - 4 = -7."""
    owner = torch.tensor([[0, -1, 1, 1]])
    sums, tokens = response_sums(torch.tensor([[-1.0, -2.0, -3.0, -4.0]]), owner == torch.tensor([[0], [1]]))
    assert (sums.tolist(), tokens.tolist()) == ([-1.0, -7.0], [1, 2])


# ---- SimPO's reference-free kin ----


def test_alphapo_bends_the_reward_before_it_is_scaled():
    """alpha = 0.25, beta = 2, gamma / beta = 0.5, mean log-probabilities -1 and -2.

    (1 - exp(0.25)) / 0.25 = -1.136102 and (1 - exp(0.5)) / 0.25 = -2.594885; 2 * (1.458783 - 0.5) = 1.917567.
    """
    rewards = [alphapo_reward(torch.tensor([value]), alpha=0.25) for value in (-1.0, -2.0)]
    assert [reward.item() for reward in rewards] == pytest.approx([-1.136102, -2.594885], abs=1e-6)
    (value,) = simpo_loss(*rewards, beta=2.0, gamma_beta_ratio=0.5)
    assert value.item() == pytest.approx(math.log1p(math.exp(-1.917567)), abs=1e-6)


def test_alphapo_tends_to_simpo_as_alpha_does_to_0():
    logps = torch.linspace(-30, -0.01, 50, dtype=torch.float64)
    torch.testing.assert_close(alphapo_reward(logps, alpha=1e-9), logps, rtol=1e-6, atol=0)
    assert alphapo_reward(logps, alpha=0.0) is logps


def test_simper_is_the_difference_of_inverse_perplexities():
    """exp(-2) - exp(-1) = 0.135335 - 0.367879."""
    assert simper_loss(torch.tensor([-1.0]), torch.tensor([-2.0])).tolist() == pytest.approx([-0.232544], abs=1e-6)


def test_orpos_odds_are_those_of_the_mean_probability():
    """p = 0.5 and 0.2: odds 1 and 0.25, log odds ratio log 4; -0.1 * log(4 / 5) = 0.0223144."""
    chosen, rejected = torch.tensor([0.5]).log(), torch.tensor([0.2]).log()
    assert log_odds_ratio(chosen, rejected).tolist() == pytest.approx([math.log(4)], abs=1e-6)
    assert orpo_loss(chosen, rejected, beta=0.1).tolist() == pytest.approx([0.0223144], abs=1e-6)


@pytest.mark.parametrize("logp", [-1e-9, -1e-4, -0.5, -math.log(2), -5.0, -80.0, -1000.0])
def test_the_log_of_the_counter_probability_and_its_gradient_are_finite_everywhere(logp):
    x = torch.tensor([logp], dtype=torch.float64, requires_grad=True)
    value = log1mexp(x)
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(-math.expm1(logp)), rel=1e-9, abs=1e-30)
    assert x.grad.item() == pytest.approx(1 / math.expm1(-logp) * -1 if logp > -700 else 0.0, rel=1e-9)


# ---- With a reference ----


def dpo(policy: tuple[float, float], reference: tuple[float, float], **settings) -> float:
    return dpo_loss(*(torch.tensor([value]) for value in (*policy, *reference)), **{"beta": 0.1, **settings}).item()


PAIR = (-40.0, -60.0), (-45.0, -58.0)  # log-ratios 5 and -2; their difference is 7


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 0.1 * 7 = 0.7: log(1 + exp(-0.7))
        ({}, 0.403186),
        # Nine tenths of 0.403186 and one of log(1 + exp(0.7)) = 1.103186.
        ({"label_smoothing": 0.1}, 0.473186),
        # 1 - 0.7
        ({"loss_type": "hinge"}, 0.3),
        # (7 - 1 / 0.2)^2 = 2^2
        ({"loss_type": "ipo"}, 4.0),
        # Nine tenths of the one minus one of the other, 0.252549, over 0.8.
        ({"loss_type": "robust", "label_smoothing": 0.1}, 0.315686),
    ],
)
def test_the_loss_of_a_pair_by_its_log_ratios_is_the_one_computed_by_hand(settings, expected):
    assert dpo(*PAIR, **settings) == pytest.approx(expected, abs=1e-5)


def test_per_token_the_same_function_is_length_normalized_dpo():
    """Log-ratios of 5 over 10 tokens and -2 over 20, beta 5: 5 * (0.5 + 0.1) = 3; log(1 + exp(-3)) = 0.0485874."""
    assert dpo((-4.0, -3.0), (-4.5, -2.9), beta=5.0) == pytest.approx(0.0485874, abs=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust"])
def test_only_what_the_policy_adds_to_the_reference_counts(loss_type):
    """Responses that both find likelier by 7 nats change nothing."""
    settings = {"loss_type": loss_type, "label_smoothing": 0.1}
    (chosen, rejected), (reference_chosen, reference_rejected) = PAIR
    shifted = (chosen + 7, rejected), (reference_chosen + 7, reference_rejected)
    assert dpo(*shifted, **settings) == pytest.approx(dpo(*PAIR, **settings), abs=1e-5)


def test_a_robust_loss_is_unbiased_where_labels_are_wrong_as_often_as_it_thinks():
    """Mixed as the labels are, 0.8 of it and 0.2 of it with the labels swapped, it is the loss of the right labels."""
    swapped = (PAIR[0][::-1], PAIR[1][::-1])
    settings = {"loss_type": "robust", "label_smoothing": 0.2}
    assert 0.8 * dpo(*PAIR, **settings) + 0.2 * dpo(*swapped, **settings) == pytest.approx(dpo(*PAIR), abs=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        lambda c, r: simper_loss(-c.abs(), -r.abs()),
        lambda c, r: orpo_loss(-c.abs() - 0.1, -r.abs() - 0.1, beta=0.3),
        lambda c, r: simpo_loss(alphapo_reward(c, alpha=0.3), alphapo_reward(r, alpha=0.3), beta=2.0, gamma_beta_ratio=0.1),
        *(partial(dpo_loss, reference_chosen=torch.tensor(0.3), reference_rejected=torch.tensor(-0.2), beta=0.4,
                  label_smoothing=0.1, loss_type=kind) for kind in ("sigmoid", "hinge", "ipo", "robust")),
    ],
)  # fmt: skip
def test_the_gradient_of_every_objective_is_that_of_finite_differences(objective):
    torch.manual_seed(0)
    pair = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(objective, pair)
