"""The objective against arithmetic done by hand."""

import math

import pytest
import torch

from alignment.preference.losses import response_sums, simpo_loss


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
