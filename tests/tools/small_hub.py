"""A hub on the loopback: the part of the Hugging Face hub's protocol that fetching a model needs."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

#: Bytes of a file between two pauses.
_PIECE = 1 << 16
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class SmallHub:
    """Repositories by name, their files by name.

    ``cuts``: how many answers end after ``cut_after`` bytes of a file; ``damaged``: files that are sent with
    a byte changed; ``gated``: repositories that want their terms accepted; ``failing``: the status of every
    answer; ``lfs``: hashes are SHA-256, else git's; ``pause``: seconds after each piece of a file.
    ``requests``: method, path and range of those that came.
    """

    files: dict[str, dict[str, bytes]]
    commit: str = COMMIT
    cut_after: int = -1
    cuts: int = 0
    damaged: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    failing: int = 0
    lfs: bool = True
    pause: float = 0.0
    endpoint: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    def bodies(self, name: str) -> list[str]:
        """The ``Range`` of every GET of a file of that name."""
        return [span for method, path, span in self.requests if method == "GET" and path.endswith(f"/{name}")]

    @contextmanager
    def serving(self) -> Iterator[SmallHub]:
        """Serve until the block ends."""

        class Handler(_Handler):
            hub = self

        server = _Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that leave."""


class _Handler(BaseHTTPRequestHandler):
    hub: SmallHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        parts = path.strip("/").split("/")
        if hub.failing:
            return self._refuse(hub.failing, "", "broken")
        if len(parts) < 4:
            return self._refuse(404, "", "not found")
        api = parts[0] == "api"
        owner, name = parts[2:4] if api else parts[:2]
        repository = f"{owner}/{name}"
        if repository in hub.gated:
            return self._refuse(403, "GatedRepo", "gated")
        if repository not in hub.files:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if api:
            return self._send(
                json.dumps(self._listing(repository)).encode(), {"Content-Type": "application/json"}
            )
        file = "/".join(parts[4:])
        if file not in hub.files[repository]:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        return self._send_file(file, hub.files[repository][file])

    def _listing(self, repository: str) -> dict[str, object]:
        siblings = []
        for name, data in self.hub.files[repository].items():
            entry: dict[str, object] = {
                "rfilename": name,
                "size": len(data),
                "blobId": _digest(data, lfs=False),
            }
            if self.hub.lfs:
                entry["lfs"] = {"sha256": _digest(data, lfs=True), "size": len(data), "pointerSize": 100}
            siblings.append(entry)
        return {"_id": "1", "id": repository, "sha": self.hub.commit, "siblings": siblings}

    def _send_file(self, name: str, data: bytes) -> None:
        hub, start = self.hub, 0
        digest = _digest(data, lfs=hub.lfs)
        span = self.headers.get("Range", "")
        headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if span:
            start = int(span.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if name in hub.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._send(data[start:], headers, status=206 if span else 200)

    def _send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        hub = self.hub
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if hub.cuts and 0 <= hub.cut_after < len(data) and "ETag" in headers:
            hub.cuts -= 1
            self.wfile.write(data[: hub.cut_after])
            self.wfile.flush()
            self.close_connection = True
            return
        step = _PIECE if hub.pause and "ETag" in headers else len(data) or 1
        for first in range(0, len(data), step):
            self.wfile.write(data[first : first + step])
            time.sleep(hub.pause)

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _digest(data: bytes, *, lfs: bool) -> str:
    if lfs:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
