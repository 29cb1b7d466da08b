"""The SimPO objective as pure functions of tensors. B pairs, T tokens."""

import torch.nn.functional as F
from torch import Tensor


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
    Returns (B,), unreduced: the trainer weighs micro-batches, not this function.
    """
    scaled_margin = beta * (chosen - rejected - gamma_beta_ratio)  # (B,)
    if loss_type == "hinge":
        return F.relu(1 - scaled_margin)
    return -(1 - label_smoothing) * F.logsigmoid(scaled_margin) - label_smoothing * F.logsigmoid(-scaled_margin)


def response_sums(token_values: Tensor, is_response: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of each response.

    token_values: (2B, T), a row per response, or (1, T), one row for all; is_response: (2B, T) bool.
    Returns (2B,) sums and (2B,) tokens per response.
    """
    return token_values.where(is_response, 0).sum(-1), is_response.sum(-1)
