"""vllm.sampling_params, as far as the worker reads it."""

from enum import Enum


class RequestOutputKind(Enum):
    """As in vLLM 0.33."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class SamplingParams:
    """Refuses what the real one does not know."""

    def __init__(self, *, temperature, top_p, top_k, max_tokens, stop_token_ids, seed, output_kind):
        assert output_kind is RequestOutputKind.FINAL_ONLY
        self.given = {
            "temperature": temperature, "top_p": top_p, "top_k": top_k, "max_tokens": max_tokens,
            "stop_token_ids": stop_token_ids, "seed": seed,
        }  # fmt: skip
