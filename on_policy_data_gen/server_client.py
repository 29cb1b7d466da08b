"""Generation by a server that speaks OpenAI's completions interface, as `vllm serve` does: prompts as token ids."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

from alignment.data.prompts import row_seed
from alignment.errors import TrainingStopped, UserError

from .configs import PolicyArguments
from .sampling import Answer, Request, Sampling

RETRIES = 6  # waiting half a second and then twice as long, up to 8 s: half a minute in which a server may come back
KEY_VARIABLE = "ON_POLICY_SERVER_KEY"


class ServerEngine:
    """A server's model. Several requests are under way at a time."""

    def __init__(self, args: PolicyArguments, sampling: Sampling, *, retries: int = RETRIES):
        try:
            import openai
        except ImportError as error:
            raise UserError("--server needs the package openai; run `pip install 'simpo-suite[server]'`") from error
        self.openai, self.sampling, self.concurrency = openai, sampling, args.concurrency
        self.url = args.server.rstrip("/") if args.server.rstrip("/").endswith("/v1") else f"{args.server.rstrip('/')}/v1"
        self.model = args.served_model or args.model
        # Not OPENAI_API_KEY, which openai would send to any server by itself.
        key = os.environ.get(KEY_VARIABLE, "none")
        # A long response at a busy server may take an hour.
        self.client = openai.OpenAI(base_url=self.url, api_key=key, max_retries=retries, timeout=3600.0)

    def answers(self, requests: Sequence[Request], seed: int) -> Iterator[Answer]:
        """As they come. Raises UserError for what the server refuses, TrainingStopped if it is gone."""
        waiting = iter(requests)
        with ThreadPoolExecutor(self.concurrency) as threads:
            under_way: set[Future] = {threads.submit(self.ask, one, seed) for one in islice(waiting, 2 * self.concurrency)}
            try:
                while under_way:
                    finished, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    under_way |= {threads.submit(self.ask, one, seed) for one in islice(waiting, len(finished))}
                    for future in sorted(finished, key=lambda one: one.exception() is not None):  # what came is kept
                        yield future.result()
            except self.openai.APIConnectionError as error:
                raise TrainingStopped(
                    f"{self.url}: does not answer ({error.__cause__ or error}), asked {self.client.max_retries + 1} times. "
                    "What is finished is kept; the same command goes on"
                ) from error
            except self.openai.APIStatusError as error:
                told = f"{self.url}: answers {error.status_code}: {reason(error)}"
                if error.status_code >= 500 or error.status_code == 429:
                    raise TrainingStopped(
                        f"{told}, also when asked again. What is finished is kept; the same command goes on"
                    ) from error
                raise UserError(
                    f"{told}. The server must serve {self.model!r} (--served_model names another), and be given the key in "
                    f"{KEY_VARIABLE} where it asks for one"
                ) from error
            finally:
                threads.shutdown(wait=True, cancel_futures=True)

    def ask(self, request: Request, seed: int) -> Answer:
        sampling = self.sampling
        completion = self.client.completions.create(
            model=self.model,
            prompt=request.ids,
            max_tokens=request.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=row_seed(seed, request.id),
            # Said outright: a server fills what is left open with the model's generation_config.json.
            extra_body={
                "top_k": sampling.top_k or -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "stop_token_ids": sampling.stop_ids,
                "skip_special_tokens": True,
            },
        )
        choice, usage = completion.choices[0], completion.usage
        return Answer(request.id, choice.text, usage.completion_tokens if usage else 0, choice.finish_reason)

    def close(self) -> None:
        self.client.close()


def reason(error: Exception) -> str:
    """The message in the answer's body, or the body."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else body
    return " ".join(str(message or error).split())[:400]
