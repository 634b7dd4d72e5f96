"""A Hugging Face hub on 127.0.0.1: as much of its API as a download asks for, and its ways of refusing.

What it answers follows the hub: model info and file listing under /api/models, files under /{repo}/resolve/{revision},
large files by a redirect to a store that understands Range, refusals by status and X-Error-Code.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
OLD_COMMIT = "0ddba11" + "0" * 33


@dataclass
class Repository:
    """What the hub stores under one name."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    readers: set[str] = field(default_factory=set)
    """Tokens that may read it, if it is gated or private."""
    old_files: dict[str, bytes] = field(default_factory=dict)
    """The files at the tag "v1"."""

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in ("main", COMMIT):
            return COMMIT, self.files
        if revision in ("v1", OLD_COMMIT) and self.old_files:
            return OLD_COMMIT, self.old_files
        return None


@dataclass
class Request:
    """One request that the hub received."""

    method: str
    path: str
    range: str | None
    token: str | None


class FakeHub:
    """Serves `repositories` until `close()`; `requests` is the log."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str] = set()
        """Tokens that belong to an account."""
        self.requests: list[Request] = []
        self.cuts: dict[str, list[int]] = {}
        """File name → after how many bytes its next deliveries break off, one number each."""
        self.status: int | None = None
        """If set, every answer is this."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.store = f"http://localhost:{self._server.server_address[1]}/store"
        """The store of large files has another host name, by which a client knows to keep the token from it."""
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def delivered(self, ending: str) -> list[Request]:
        """The requests for the contents of files whose name ends so."""
        return [request for request in self.requests if request.method == "GET" and request.path.endswith(ending)]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
        if self.hub.status is not None:
            return self._refuse(self.hub.status)
        if token is not None and token not in self.hub.tokens:
            return self._refuse(401, message="Invalid credentials in Authorization header")
        parts = path.strip("/").split("/")
        if parts[0] == "store":
            return self._send_stored(parts[1], parts[2])
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repository = self.hub.repositories.get("/".join(parts[:2]))
        allowed = repository is not None and token in repository.readers
        if repository is None or (repository.private and not allowed):
            # Whoever is not logged in is not even told that there is nothing.
            return self._refuse(401) if token is None else self._refuse(404, "RepoNotFound")
        kind = parts[2] if len(parts) > 2 else "revision"
        version = repository.at(parts[3] if len(parts) > 3 else "main")
        if version is None:
            return self._refuse(404, "RevisionNotFound")
        commit, files = version
        if api and kind == "revision":
            return self._send_info("/".join(parts[:2]), commit, files)
        if repository.gated and not allowed:
            return self._refuse(401 if token is None else 403, "GatedRepo")
        name = "/".join(parts[4:])
        if kind != "resolve" or name not in files:
            return self._refuse(404, "EntryNotFound")
        self._resolve(commit, name, files[name])

    def _send_info(self, repo_id: str, commit: str, files: dict[str, bytes]) -> None:
        siblings = []
        for name, data in files.items():
            file: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if name.endswith(".safetensors"):
                file["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
            siblings.append(file)
        self._send(200, json.dumps({"id": repo_id, "sha": commit, "siblings": siblings}).encode())

    def _resolve(self, commit: str, name: str, data: bytes) -> None:
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not name.endswith(".safetensors"):
            return self._send(200, data, {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        digest = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        self._send(302, b"", {**headers, "Location": f"{self.hub.store}/{digest}/{name.rsplit('/', 1)[-1]}"})

    def _send_stored(self, digest: str, name: str) -> None:
        contents = {
            hashlib.sha256(data).hexdigest(): data
            for repository in self.hub.repositories.values()
            for data in [*repository.files.values(), *repository.old_files.values()]
        }
        data = contents[digest]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{digest}"'}
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cuts = self.hub.cuts.get(name)
        cut = cuts.pop(0) if cuts and self.command == "GET" else None
        self._send(206 if "Range" in self.headers else 200, data[start:], headers, cut=cut)

    def _refuse(self, status: int, code: str | None = None, message: str | None = None) -> None:
        headers = {} if code is None else {"X-Error-Code": code}
        if message is not None:
            headers["X-Error-Message"] = message
        self._send(status, json.dumps({"error": message or code or "refused"}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True
