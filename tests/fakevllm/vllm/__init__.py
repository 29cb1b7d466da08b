"""The parts of vLLM 0.33 that the worker calls, without a model: vLLM itself cannot be installed beside the suite.

Names, arguments and results are those of its AsyncLLMEngine. What it is asked is written to the file FAKE_VLLM_LOG.
"""

import asyncio
import json
import os
import sys
from types import SimpleNamespace

from .sampling_params import SamplingParams

__version__ = "0.33.0+fake"
__all__ = ["AsyncEngineArgs", "AsyncLLMEngine", "SamplingParams"]
KNOWN = {
    "model", "revision", "tokenizer", "dtype", "trust_remote_code", "tensor_parallel_size", "data_parallel_size",
    "gpu_memory_utilization",
}  # fmt: skip


def log(row):
    with open(os.environ["FAKE_VLLM_LOG"], "a") as file:  # noqa: PTH123
        file.write(json.dumps(row) + "\n")


class AsyncEngineArgs:
    """Refuses what the real one does not know."""

    def __init__(self, **settings):
        if unknown := settings.keys() - KNOWN:
            raise TypeError(f"unexpected arguments {unknown}")
        self.settings = settings


class AsyncLLMEngine:
    """Answers with words that depend on ids and seed alone, the last request first."""

    def __init__(self, settings):
        print("INFO: vLLM prints to stdout, between the answers")
        log({"settings": settings, "modules": sorted(name for name in sys.modules if name.startswith("alignment"))})
        self.asked = 0

    @classmethod
    def from_engine_args(cls, engine_args):
        return cls(engine_args.settings)

    async def generate(self, prompt, sampling_params, request_id):
        self.asked += 1
        log({"ids": prompt["prompt_token_ids"], "sampling": sampling_params.given, "request_id": request_id})
        await asyncio.sleep(max(0.0, 0.2 - 0.02 * self.asked))
        if self.asked > int(os.environ.get("FAKE_VLLM_FAILS_AFTER", "1000000")):
            os._exit(7)
        ids = prompt["prompt_token_ids"]
        text = f"reply {sampling_params.given['seed'] % 7} to {sum(ids) % 1000} of {len(ids)}"
        response = SimpleNamespace(text=text, token_ids=[5, 6, 7], finish_reason="stop")
        yield SimpleNamespace(outputs=[response], finished=True)

    def shutdown(self):
        log({"shutdown": True})
