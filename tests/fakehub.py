"""A Hub on this machine: repositories that can be made, written and listed, and every kind of trouble with them."""

import base64
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NamedTuple

OWNER = "somebody"
LARGE = (".safetensors", ".pt", ".pth", ".bin", ".png")


class Trouble(NamedTuple):
    """What a kind of request gets, so many times: after `seconds` its answer, or `status` instead."""

    status: int | None = None
    seconds: float = 0.0
    times: int = 1_000_000


class FakeHub:
    """Listens while it is up. What was pushed, by repository and path; who asked for what; the trouble that it makes."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.trouble: dict[str, Trouble] = {}
        self.asked: Counter[str] = Counter()
        self.commits: list[str] = []
        self.tokens: set[str | None] = set()
        self.port = 0
        self.server: ThreadingHTTPServer | None = None
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        hub = self

        class Bound(Requests):
            """Requests of this Hub."""

            pass_on = staticmethod(hub.answer)

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Bound)
        self.port = self.server.server_port
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def down(self) -> None:
        """From now on connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    def reset(self) -> None:
        self.repositories.clear()
        self.blobs.clear()
        self.trouble.clear()
        self.asked.clear()
        self.commits.clear()
        self.tokens.clear()

    # ---- Answers: status and JSON ----

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, Any]:
        for pattern, respond in self.routes().items():
            if found := re.fullmatch(pattern, f"{method} {path}"):
                kind = respond.__name__
                self.asked[kind] += 1
                if kind != "blob":  # storage has links that are signed
                    self.tokens.add(token)
                trouble = self.trouble.get(kind)
                if trouble and self.asked[kind] <= trouble.times:
                    time.sleep(trouble.seconds)
                    if trouble.status:
                        return trouble.status, {"error": f"trouble with {token}"}
                if found.groups() and kind != "blob" and found[1] not in self.repositories:
                    return 404, {"error": f"there is no {found[1]}"}
                return respond(body, *found.groups())
        return 404, {"error": f"{method} {path} is nothing that this Hub knows"}

    def routes(self) -> dict[str, Callable[..., tuple[int, Any]]]:
        name = "([^/]+/[^/]+)"
        return {
            "POST /api/repos/create": self.create,
            f"GET /api/models/{name}/auth-check/write": self.permission,
            "POST /api/validate-yaml": self.card,
            f"POST /api/models/{name}/branch/([\\w.-]+)": self.branch,
            f"POST /api/models/{name}/preupload/([\\w.-]+)": self.preupload,
            f"POST /{name}\\.git/info/lfs/objects/batch": self.batch,
            "PUT /blobs/(\\w+)": self.blob,
            f"POST /api/models/{name}/commit/([\\w.-]+)": self.commit,
            f"GET /api/models/{name}/tree/main": self.tree,
            f"GET /api/models/{name}(?:/revision/main)?": self.repository,
        }

    def create(self, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        known = name in self.repositories
        self.repositories.setdefault(name, {})
        return 409 if known else 200, {"url": f"{self.url}/{name}", "name": name}

    def permission(self, body: bytes, name: str) -> tuple[int, Any]:
        return 200, {}

    def card(self, body: bytes) -> tuple[int, Any]:
        return 200, {"errors": [], "warnings": []}

    def branch(self, body: bytes, name: str, revision: str) -> tuple[int, Any]:
        known = revision == "main" or f"{name}@{revision}" in self.repositories
        if not known:
            self.repositories[f"{name}@{revision}"] = {}
        return (409, {"error": f"there is {revision}"}) if known else (201, {})

    def preupload(self, body: bytes, name: str, revision: str) -> tuple[int, Any]:
        paths = [file["path"] for file in json.loads(body)["files"]]
        return 200, {
            "files": [
                {"path": path, **self.how_to_send(name if revision == "main" else f"{name}@{revision}", path)} for path in paths
            ]
        }

    def how_to_send(self, name: str, path: str) -> dict[str, Any]:
        stored = self.repositories[name].get(path)
        oid = None if stored is None else hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
        return {"uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self, body: bytes, name: str) -> tuple[int, Any]:
        objects = [{key: entry[key] for key in ("oid", "size")} for entry in json.loads(body)["objects"]]
        for entry in objects:
            if entry["oid"] not in self.blobs:
                entry["actions"] = {"upload": {"href": f"{self.url}/blobs/{entry['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}

    def blob(self, body: bytes, oid: str) -> tuple[int, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "these are not the bytes that were announced"}
        self.blobs[oid] = body
        return 200, {}

    def commit(self, body: bytes, name: str, revision: str) -> tuple[int, Any]:
        files = self.repositories[name if revision == "main" else f"{name}@{revision}"]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.commits.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = f"{self.asked['commit']:040x}"
        return 200, {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}", "hookOutput": ""}

    def tree(self, body: bytes, name: str) -> tuple[int, Any]:
        return 200, [
            {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            for path, content in self.repositories[name].items()
        ]

    def repository(self, body: bytes, name: str) -> tuple[int, Any]:
        return 200, {"id": name, "modelId": name, "sha": f"{self.asked['commit']:040x}", "private": False, "siblings": []}


class Requests(BaseHTTPRequestHandler):
    """Reads one request after the other, and writes what it is answered."""

    protocol_version = "HTTP/1.1"
    pass_on: Callable[[str, str, str | None, bytes], tuple[int, Any]]

    def handle_any(self) -> None:
        body = self.read_body()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        status, answer = self.pass_on(self.command, self.path.split("?")[0], token, body)
        sent = json.dumps(answer).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(sent)
        except ConnectionError:  # whoever asked has gone
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""
