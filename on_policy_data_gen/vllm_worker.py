"""vLLM in the environment that it is installed in: requests come as lines of JSON, responses go as lines of JSON.

Started by vllm_process.py under the interpreter of --vllm_python, as a file: nothing of the suite is imported. The first line
holds the engine's arguments; the answer to it says which vLLM is ready. Each further line is a request, answered when it is
finished. vLLM divides the work among its GPUs and copies of the model itself.
"""

import asyncio
import json
import os
import sys

from vllm import AsyncEngineArgs, AsyncLLMEngine, SamplingParams, __version__
from vllm.sampling_params import RequestOutputKind


async def serve(answers, lines) -> None:
    settings = json.loads(await next_line(lines))
    engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(**settings))
    write(answers, {"ready": __version__})
    under_way = set()
    try:
        while line := await next_line(lines):
            task = asyncio.create_task(respond(engine, json.loads(line), answers))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            for failed in [task for task in under_way if task.done() and task.exception()]:
                raise failed.exception()
        await asyncio.gather(*under_way)
    finally:
        engine.shutdown()


async def next_line(lines) -> str:
    return await asyncio.get_running_loop().run_in_executor(None, lines.readline)


async def respond(engine, request, answers) -> None:
    """The text of one request. Its ids hold the only bos: vLLM adds none to prompts that are ids."""
    sampling = SamplingParams(**request["sampling"], output_kind=RequestOutputKind.FINAL_ONLY)
    try:
        async for output in engine.generate({"prompt_token_ids": request["ids"]}, sampling, request["id"]):
            response = output.outputs[0]
            last = {"text": response.text, "tokens": len(response.token_ids), "finish_reason": response.finish_reason}
    except Exception as error:
        write(answers, {"id": request["id"], "error": f"{type(error).__name__}: {error}"})
        raise
    write(answers, {"id": request["id"], **last})


def write(answers, row) -> None:
    answers.write(json.dumps(row) + "\n")
    answers.flush()


if __name__ == "__main__":
    # What vLLM and its processes print must not come between the answers.
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asyncio.run(serve(own, sys.stdin))
