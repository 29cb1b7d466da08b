"""Generation by vLLM, which wants other versions of torch and transformers than the suite: a process in its environment."""

import json
import logging
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from alignment.data.prompts import row_seed
from alignment.errors import TrainingStopped, UserError
from alignment.model.loading import find_adapter

from .configs import PolicyArguments
from .sampling import Answer, Request, Sampling

logger = logging.getLogger(__name__)

WORKER = Path(__file__).with_name("vllm_worker.py")
KEPT = "What is finished is kept; the same command goes on"


class VLLMEngine:
    """A vLLM process and the lines to and from it."""

    def __init__(self, args: PolicyArguments, sampling: Sampling):
        if (adapter := find_adapter(args.model_arguments())) is not None:
            raise UserError(
                f"model = {args.model!r}: is an adapter of {adapter.base.name}, and vLLM is given whole models here; merge it "
                "first, or sample with engine: transformers"
            )
        self.sampling = sampling
        # -P: the folder of the worker is none that vLLM's environment should import from.
        command = [args.vllm_python, "-P", str(WORKER)]
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        environment["VLLM_NO_USAGE_STATS"] = "1"
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self.send(engine_settings(args))
        logger.info("vLLM %s is ready.", self.next_answer()["ready"])

    def answers(self, requests: Sequence[Request], seed: int) -> Iterator[Answer]:
        """As they come. Raises TrainingStopped if vLLM fails."""
        Thread(target=self.send_all, args=(requests, seed), daemon=True).start()
        for _ in requests:
            row = self.next_answer()
            yield Answer(row["id"], row["text"], row["tokens"], row["finish_reason"])

    def send_all(self, requests: Sequence[Request], seed: int) -> None:
        for request in requests:
            sampling = {
                "temperature": self.sampling.temperature,
                "top_p": self.sampling.top_p,
                "top_k": self.sampling.top_k,
                "max_tokens": request.max_tokens,
                "stop_token_ids": self.sampling.stop_ids,
                "seed": row_seed(seed, request.id),
            }
            self.send({"id": request.id, "ids": request.ids, "sampling": sampling})

    def send(self, row: dict[str, Any]) -> None:
        try:
            self.process.stdin.write(json.dumps(row) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):  # it has ended, which whoever waits for its answer will say
            return

    def next_answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            status = self.process.wait()
            raise TrainingStopped(f"vLLM ended with status {status}; what it said last stands above. {KEPT}")
        row = json.loads(line)
        if "error" in row:
            raise TrainingStopped(f"vLLM failed on prompt {row['id']}: {row['error']}. {KEPT}")
        return row

    def close(self) -> None:
        """The end of its input is the end of the process."""
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()


def engine_settings(args: PolicyArguments) -> dict[str, Any]:
    settings = {
        "model": args.model,
        "revision": None if Path(args.model).is_dir() else args.model_revision,
        "tokenizer": args.tokenizer_name_or_path,
        "dtype": args.torch_dtype or "auto",
        "trust_remote_code": args.trust_remote_code,
        "tensor_parallel_size": args.tensor_parallel,
        "data_parallel_size": args.data_parallel,
    }
    return {key: value for key, value in settings.items() if value is not None} | (args.vllm_options or {})
