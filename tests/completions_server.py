"""A stand-in for an OpenAI-compatible server of completions, as `vllm serve` is one: it answers, or fails as it is told."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class CompletionsServer:
    """Answers every request with words that depend on its ids and seed alone."""

    def __init__(self, model: str, delay: float):
        self.model, self.delay = model, delay
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failures: list[int] = []  # statuses that the next requests get
        self.refuse_after: int | None = None  # from then on connections are dropped
        self.under_way, self.most_under_way, self.lock = 0, 0, threading.Lock()
        self.url = ""

    def answer(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.failures:
            return self.failures.pop(0), {"error": {"message": "busy", "code": 503}}
        if request["model"] != self.model:
            return 404, {"error": {"message": f"The model `{request['model']}` does not exist.", "code": 404}}
        text = reply(request["prompt"], request["seed"])
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        usage = {"prompt_tokens": len(request["prompt"]), "completion_tokens": 4, "total_tokens": len(request["prompt"]) + 4}
        about = {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": self.model}
        return 200, {**about, "choices": [choice], "usage": usage}


def reply(ids: list[int], seed: int) -> str:
    return f"reply {seed % 7} to {sum(ids) % 1000} of {len(ids)}"


@contextmanager
def completions_server(model: str, *, delay: float = 0.0) -> Iterator[CompletionsServer]:
    state = CompletionsServer(model, delay)

    class Handler(BaseHTTPRequestHandler):
        """One request."""

        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append({**request, "path": self.path})
                state.keys.append(self.headers.get("Authorization"))
                number = len(state.requests)
                state.under_way += 1
                state.most_under_way = max(state.most_under_way, state.under_way)
            time.sleep(state.delay)
            with state.lock:
                state.under_way -= 1
                is_gone = state.refuse_after is not None and number > state.refuse_after
                status, body = state.answer(request)
            if is_gone:
                self.close_connection = True
                return
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
