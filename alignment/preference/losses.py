"""Objectives over preference pairs, and what they are made of, as pure functions of tensors. B pairs, T tokens.

All return (B,), unreduced: the trainer weighs micro-batches, not these functions. Log-probabilities are in nats, float32 or
wider: summed over a response, or as the mean of its tokens, as each function says.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- Without a reference, of mean log-probabilities ----


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float,
    gamma_beta_ratio: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(beta * (chosen - rejected - gamma_beta_ratio)): the SimPO objective, pair by pair (Meng et al. 2024, eq. 6).

    chosen, rejected: (B,) float32, mean log-probability per response token, in nats.
    gamma_beta_ratio: the target margin gamma divided by beta.
    loss_type: "sigmoid" or "hinge", relu(1 - beta * (chosen - rejected - gamma_beta_ratio)).
    label_smoothing: share of pairs taken to be labelled the wrong way round; "sigmoid" only.
    """
    scaled_margin = beta * (chosen - rejected - gamma_beta_ratio)  # (B,)
    if loss_type == "hinge":
        return F.relu(1 - scaled_margin)
    return smoothed(scaled_margin, label_smoothing)


def alphapo_reward(mean_logp: Tensor, *, alpha: float) -> Tensor:
    """(1 - p^-alpha) / alpha of p = exp(mean_logp), a response's mean log-probability per token (Gupta et al. 2025).

    alpha bends SimPO's reward: 0 is log p, the reward itself, to which this tends as alpha does.
    """
    return mean_logp if alpha == 0 else -torch.expm1(-alpha * mean_logp) / alpha


def simper_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """exp(rejected) - exp(chosen), of mean log-probabilities: inverse perplexities (Xiao et al. 2025)."""
    return rejected.exp() - chosen.exp()


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log(odds of chosen / odds of rejected), odds = p / (1 - p), of p = exp(mean log-probability) (Hong et al. 2024)."""
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def orpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """-beta * log sigmoid(log odds ratio): what ORPO adds to the cross-entropy (Hong et al. 2024, lambda = beta).

    chosen, rejected: (B,) float32, mean log-probability per response token.
    """
    return -beta * F.logsigmoid(log_odds_ratio(chosen, rejected))


# ---- With a reference ----


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected))), and its kin.

    The four: (B,) float32 log-probabilities of the responses, by the policy and by the reference; summed (Rafailov et al.
    2023, eq. 7), or means over their tokens, which is length-normalized DPO (Lambert et al. 2024, eq. 6) and, with "ipo",
    what IPO's authors confirm.
    loss_type: of d = the difference of the two log-ratios,
      "sigmoid"  -log sigmoid(beta d), smoothed by the share of pairs that are labelled the wrong way round;
      "hinge"    relu(1 - beta d) (Zhao et al. 2023);
      "ipo"      (d - 1 / (2 beta))^2 (Azar et al. 2024, eq. 17, tau = beta);
      "robust"   ((s - 1) log sigmoid(beta d) + s log sigmoid(-beta d)) / (1 - 2 s), without the bias that the wrong labels
                 of a share s bring (Chowdhury et al. 2024).
    """
    difference = (chosen - reference_chosen) - (rejected - reference_rejected)  # (B,)
    if loss_type == "ipo":
        return (difference - 1 / (2 * beta)) ** 2
    if loss_type == "hinge":
        return F.relu(1 - beta * difference)
    if loss_type == "robust":
        right, wrong = -F.logsigmoid(beta * difference), -F.logsigmoid(-beta * difference)
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return smoothed(beta * difference, label_smoothing)


# ---- Parts ----


def smoothed(scaled_margin: Tensor, label_smoothing: float) -> Tensor:
    """The loss of both labels, weighed by how often each is right."""
    return -(1 - label_smoothing) * F.logsigmoid(scaled_margin) - label_smoothing * F.logsigmoid(-scaled_margin)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, without cancellation on either side of -log 2, in its value or its gradient."""
    near = x > -math.log(2)
    # Each branch sees only its own side: the gradient of the other, 0 x inf, would be NaN.
    return torch.where(near, (-x.where(near, -1.0).expm1()).log(), (-x.where(~near, -1.0).exp()).log1p())


def response_sums(token_values: Tensor, is_response: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of each response.

    token_values: (2B, T), a row per response, or (1, T), one row for all; is_response: (2B, T) bool.
    Returns (2B,) sums and (2B,) tokens per response.
    """
    return token_values.where(is_response, 0).sum(-1), is_response.sum(-1)
