"""ArmoRM (Wang, Xiong, Xie, Zhao, Zhang 2024, "Interpretable Preferences via Multi-Objective Reward Modeling and
Mixture-of-Experts") over its published weights, whose own code no longer imports with transformers 5.
"""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel, PreTrainedTokenizerBase

from alignment.errors import UserError

ARCHITECTURE = "LlamaForRewardModelWithGating"
# What stands between the last prompt turn and the reply in Llama-3's template; the gate reads its first token.
GATE_MARK = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


class Gate(nn.Module):
    """How much each objective counts for a prompt: a small network behind the prompt's last hidden state."""

    def __init__(self, width: int, objectives: int, *, hidden: int, layers: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.ones(1))
        sizes = [width, *[hidden] * layers]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, [*sizes[1:], objectives], strict=True))

    def forward(self, prompt: Tensor) -> Tensor:
        """(B, width) float32 -> (B, objectives), which add up to logit_scale."""
        *hidden, last = self.layers
        for layer in hidden:
            prompt = layer(prompt).relu()
        return (last(prompt) / self.temperature).softmax(-1) * self.logit_scale


class ArmoRM(LlamaPreTrainedModel):
    """A Llama, a reward for each objective at the conversation's last token, and a gate that weighs them by the prompt."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        objectives = getattr(config, "num_objectives", 19)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.zeros(objectives, objectives), requires_grad=False)
        self.gating = Gate(
            config.hidden_size,
            objectives,
            hidden=getattr(config, "gating_hidden_dim", 1024),
            layers=getattr(config, "gating_n_hidden", 3),
            temperature=getattr(config, "gating_temperature", 10),
        )
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, gate_at: Tensor) -> Tensor:
        """Scores, (B,) float32, of conversations padded on the right.

        input_ids, attention_mask: (B, T). gate_at: (B,), the place whose hidden state the gate reads.
        The heads work in float32, whatever the model does: in bfloat16 scores near 0.15 come in steps of 0.001, and tie.
        """
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()  # (B, T, H)
        rows = torch.arange(len(input_ids), device=hidden.device)
        rewards = self.regression_layer(hidden[rows, attention_mask.sum(-1) - 1])  # (B, objectives)
        # The matrix takes from each reward what it shares with the length of the response.
        return (self.gating(hidden[rows, gate_at]) * (rewards @ self.reward_transform_matrix)).sum(-1)

    def heads_in_float32(self) -> "ArmoRM":
        self.regression_layer.float()
        self.gating.float()
        self.reward_transform_matrix.data = self.reward_transform_matrix.data.float()
        return self


def gate_place(ids: list[int], mark: list[int]) -> int:
    """Where the last GATE_MARK begins. Raises UserError for a conversation without one."""
    for place in range(len(ids) - len(mark), -1, -1):
        if ids[place : place + len(mark)] == mark:
            return place
    raise UserError("a conversation in ArmoRM's template has no assistant header; this tokenizer is not ArmoRM's")


def gate_mark(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(GATE_MARK, add_special_tokens=False)["input_ids"]
