"""Every architecture that packed batches are allowed for is scored as in its padded, plain forward."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.model.head import add_lm_head
from alignment.model.shared_prompt import PROVEN, use_shared_prompts
from alignment.preference.collate import PackedCollator
from alignment.preference.losses import response_sums
from alignment.preference.trainer import FORWARD_COLUMNS
from tests import builders, reference

WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}  # shorter than the prompts
EXPERTS = {"num_experts_per_tok": 2, "sliding_window": 5}
OWN = {
    "cohere2": WINDOWS,
    "cwm": {**WINDOWS, "bos_token_id": 0},
    "ernie4_5": {"head_dim": 8},
    "exaone4": {**WINDOWS, "sliding_window_pattern": "LG"},
    "gemma": {"head_dim": 8},
    "gemma2": {**WINDOWS, "head_dim": 8, "attn_implementation": "eager"},
    "gemma3_text": {**WINDOWS, "head_dim": 8},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hyperclovax": {"head_dim": 8},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "ministral3": {"head_dim": 8, "sliding_window": 5},
    "mistral": {"sliding_window": 5},
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "olmo3": WINDOWS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"sliding_window": 5},
    "qwen2": {**WINDOWS, "use_sliding_window": True},
    "qwen3": {**WINDOWS, "use_sliding_window": True, "head_dim": 8},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "use_sliding_window": True, "head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 5},
    "vaultgemma": {**WINDOWS, "head_dim": 8, "attn_implementation": "eager"},
}
ROWS = builders.token_rows([(9, 3, 9), (2, 12, 4), (20, 6, 6), (1, 1, 5)])


@pytest.mark.parametrize("architecture", sorted(PROVEN))
def test_packed_scores_are_the_padded_ones(architecture):
    settings = {**builders.SIZES, **OWN.get(architecture, {})}
    attention = settings.pop("attn_implementation", "sdpa")
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        expected = torch.cat(reference.mean_logps(model, ROWS))
        add_lm_head(model)
        use_shared_prompts(model)
        batch = PackedCollator()(ROWS)
        output = model(**{key: batch[key] for key in FORWARD_COLUMNS if key in batch}, use_cache=False, fused_lm_head=True)
        sums, tokens = response_sums(output.log_probs, batch["is_response"])
    torch.testing.assert_close(sums / tokens, expected, rtol=1e-5, atol=1e-5)
