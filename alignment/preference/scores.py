"""What one forward says of preference pairs, and what an objective makes of it. B pairs."""

from typing import NamedTuple

import torch
from torch import Tensor


class PairScores(NamedTuple):
    """Log-probabilities in nats, summed over a response, and tokens per response; all (B,).

    reference_*: the same sums by the reference, for objectives that have one.
    """

    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_mean_logit: Tensor  # over response tokens and vocabulary
    rejected_mean_logit: Tensor
    whole_chosen_logp: Tensor | None = None  # of prompt and response, where the prompt is scored
    whole_chosen_tokens: Tensor | None = None
    router_loss: Tensor | None = None  # (), the load balancing of a mixture of experts that asks for it
    reference_chosen_logp: Tensor | None = None
    reference_rejected_logp: Tensor | None = None

    @classmethod
    def of(cls, columns: dict[str, Tensor]) -> "PairScores":
        """What was kept of earlier scores; their logits were not."""
        kept = {name: columns[name] for name in ("chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens")}
        unknown = torch.full_like(kept["chosen_logp"], torch.nan)
        return cls(**kept, chosen_mean_logit=unknown, rejected_mean_logit=unknown)

    @property
    def chosen_mean_logp(self) -> Tensor:
        return self.chosen_logp / self.chosen_tokens

    @property
    def rejected_mean_logp(self) -> Tensor:
        return self.rejected_logp / self.rejected_tokens

    def logps(self, *, per_token: bool) -> tuple[Tensor, Tensor]:
        """Of chosen and rejected responses: means over their tokens, or sums."""
        if per_token:
            return self.chosen_mean_logp, self.rejected_mean_logp
        return self.chosen_logp, self.rejected_logp

    def reference_logps(self, *, per_token: bool) -> tuple[Tensor, Tensor]:
        reference = self._replace(chosen_logp=self.reference_chosen_logp, rejected_logp=self.reference_rejected_logp)
        return reference.logps(per_token=per_token)

    def per_pair(self) -> dict[str, Tensor]:
        """What there is of each pair by the policy: field -> (B,)."""
        apart = ("router_loss", "reference_chosen_logp", "reference_rejected_logp")
        return {name: value for name, value in self._asdict().items() if value is not None and name not in apart}


class PairLosses(NamedTuple):
    """What an objective says of B pairs; all (B,)."""

    losses: Tensor
    chosen_rewards: Tensor  # without gradient
    rejected_rewards: Tensor
    metrics: dict[str, Tensor] | None = None  # logged beside the published ones


class CrossEntropy(NamedTuple):
    """A mean over tokens that is added to the loss; nats and tokens (B,).

    scale: (B,), what a pair's nats are multiplied by where each micro-batch averages over its own tokens.
    """

    name: str  # in the log
    weight: float
    nats: Tensor
    tokens: Tensor
    scale: Tensor
    step_tokens: float | Tensor | None  # of the whole step, on all processes; None outside of training

    def terms(self, preprocessing: str) -> tuple[Tensor, Tensor]:
        """Numerator and weight, both (B,), whose ratio of sums is the mean.

        `published`: every pair weighs 1 and its nats are scaled by its micro-batch's mean length. `exact`: every pair
        weighs its tokens, so that the mean is over all tokens of the step, however it is split.
        """
        if preprocessing == "exact":
            return self.nats, self.tokens
        return self.nats * self.scale, torch.ones_like(self.tokens)


def pair_metrics(scores: PairScores, outcome: PairLosses, *, per_token: bool) -> dict[str, Tensor]:
    """The published metrics, pair by pair, and the objective's own; each (B,)."""
    chosen_logps, rejected_logps = scores.logps(per_token=per_token)
    return {
        "rewards/chosen": outcome.chosen_rewards,
        "rewards/rejected": outcome.rejected_rewards,
        "rewards/accuracies": (outcome.chosen_rewards > outcome.rejected_rewards).float(),
        "rewards/margins": outcome.chosen_rewards - outcome.rejected_rewards,
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
        "logits/chosen": scores.chosen_mean_logit,
        "logits/rejected": scores.rejected_mean_logit,
        "lengths/chosen": scores.chosen_tokens.float(),
        "lengths/rejected": scores.rejected_tokens.float(),
        **(outcome.metrics or {}),
    }
