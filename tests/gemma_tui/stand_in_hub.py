"""A stand-in for the hub on this machine: the routes the client uses, and switches for what can go wrong.

The routes and headers are those of huggingface_hub 1.31 to 2.4; Xet is left out, so that files come over plain HTTP.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from gemma_tui.hub import cache

LFS = (".safetensors", ".gguf", ".bin")
COMMIT = "a" * 40
NEXT_COMMIT = "b" * 40
STALL_SECONDS = 60.0
ENDLESS = 256
"""Pieces that a body without an end has behind its end."""


def partial_files(repo: str) -> list[Path]:
    """Files of downloads into the cache that are unfinished, whether or not one goes on."""
    return sorted((cache.repo_folder(repo) / "blobs").glob("*.incomplete"))


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """A repository: its files, who may read it, and what is said of it in a search."""

    files: dict[str, bytes]
    gated: str | bool = False
    allowed: tuple[str, ...] = ()
    """Tokens that may read the files, if it is gated."""
    asked: tuple[str, ...] = ()
    """Tokens whose accounts have asked for access and wait."""
    commit: str = COMMIT
    info: dict[str, Any] = field(default_factory=dict)


@dataclass
class Faults:
    """What goes wrong, each of them off at first.

    Attributes:
        slow: seconds between two pieces of a body.
        piece: bytes of a piece.
        cut: how many bodies are cut in the middle.
        reset: whether a line that is cut is reset, so that what is on its way is lost.
        stall: how many bodies of whole files say no more from the middle on, while the line stays.
        elsewhere: the address of another server that has the files.
        flip: names of files that come with another byte than they should.
        short: names of files that come one byte short, as their headers say.
        statuses: for the next requests whose method and path contain the text, these in turn.
        moving: whether ``main`` is another commit at each question.
        endless: names of files that never end.
        no_ranges: whether a file comes whole, whatever part of it was asked for.
        message: what every refusal says, in place of its own words.
    """

    slow: float = 0.0
    piece: int = 1 << 16
    cut: int = 0
    reset: bool = False
    stall: int = 0
    elsewhere: str = ""
    flip: set[str] = field(default_factory=set)
    short: set[str] = field(default_factory=set)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    moving: bool = False
    endless: set[str] = field(default_factory=set)
    no_ranges: bool = False
    message: str = ""


class StandInHub:
    """Repositories by id, served while it is open.

    Attributes:
        asked: method, path and token (empty if none came along) of each request.
        tokens: the tokens that are valid, and whose they are.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults = Faults()
        self.tokens: dict[str, str] = {"hf_" + "g" * 34: "grace"}
        self.asked: list[tuple[str, str, str]] = []
        self.closing = threading.Event()
        self.served = 0
        """Bytes of bodies that went out."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def count(self, method: str, part: str) -> int:
        return sum(m == method and part in path for m, path, _ in self.asked)


@contextmanager
def serving() -> Iterator[StandInHub]:
    hub = StandInHub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.server.shutdown()
        hub.server.server_close()


def _handler(hub: StandInHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionResetError):  # a client that has heard enough
                super().handle()

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def _answer(self) -> None:
            try:
                _route(hub, self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def token(self) -> str:
            return str(self.headers.get("Authorization", "")).removeprefix("Bearer ")

        def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            given = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
            for name, value in given.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def refuse(self, status: int, code: str = "", message: str = "") -> None:
            headers = {"X-Error-Code": code} if code else {}
            if said := hub.faults.message or message:
                headers["X-Error-Message"] = said
            self.send(status, b"{}", headers)

        def json(self, value: Any, headers: dict[str, str] | None = None) -> None:
            self.send(200, json.dumps(value).encode(), headers)

    return Handler


def _route(hub: StandInHub, it: Any) -> None:
    parts = urlsplit(it.path)
    path, query = unquote(parts.path), {k: v[0] for k, v in parse_qs(parts.query).items()}
    hub.asked.append((it.command, path, it.token()))
    for part, statuses in hub.faults.statuses.items():
        if part in f"{it.command} {path}" and statuses and (status := statuses.pop(0)) != 200:
            return it.refuse(status)
    if it.token() and it.token() not in hub.tokens:
        return it.refuse(401, "", "Invalid credentials in Authorization header")
    if path == "/api/whoami-v2":
        if not it.token():
            return it.refuse(401)
        return it.json({"type": "user", "name": hub.tokens[it.token()], "auth": {"accessToken": {"role": "read"}}})
    if path == "/api/models":
        return _search(hub, it, query)
    if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
        return _about(hub, it, found[1], found[2] or "")
    if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
        return _file(hub, it, found[1], found[3])
    return it.refuse(404)


def _search(hub: StandInHub, it: Any, query: dict[str, str]) -> None:
    words = query.get("search", "").lower()
    found = [
        {"id": name, "gated": repo.gated, "downloads": 1, "likes": 0, "tags": [], "sha": repo.commit, **repo.info}
        for name, repo in hub.repos.items()
        if words in name.lower() and query.get("filter", "") in ("", *_tags(repo))
    ]
    limit, start = int(query.get("limit", 1000)), int(query.get("cursor", 0))
    page = min(limit, 100)
    asked = urlencode({**query, "limit": limit, "cursor": start + page})
    more = {"Link": f'<{hub.url}/api/models?{asked}>; rel="next"'}
    it.json(found[start : start + page], more if start + page < len(found) else None)


def _tags(repo: Repo) -> list[Any]:
    """What is said of it, and what the hub sees for itself: the kind of its config, and GGUF files."""
    try:
        config = {**json.loads(repo.files.get("config.json", b"{}")), **repo.info.get("config", {})}
    except (ValueError, TypeError, RecursionError):
        config = {}
    return [*repo.info.get("tags", ()), config.get("model_type"), "gguf" if "gguf" in repo.info else None]


def _gate(repo: Repo, it: Any, name: str) -> bool:
    """Whether a gated repository stays shut, which is then told in the hub's own words."""
    token = it.token()
    if not repo.gated or token in repo.allowed:
        return False
    if not token:
        said = f"Access to model {name} is restricted. You must have access to it and be authenticated to access it."
    elif token in repo.asked:
        said = f"Your request to access model {name} is awaiting a review from the repo authors."
    else:
        said = f"Access to model {name} is restricted and you are not in the authorized list."
    it.refuse(403 if token else 401, "GatedRepo", said)
    return True


def _about(hub: StandInHub, it: Any, name: str, rest: str) -> None:
    repo = hub.repos.get(name)
    if repo is None:
        return it.refuse(401 if not it.token() else 404, "RepoNotFound")
    if rest == "/auth-check":
        return None if _gate(repo, it, name) else it.json({})
    if hub.faults.moving and not rest.startswith("/tree"):
        repo.commit = NEXT_COMMIT if repo.commit == COMMIT else COMMIT
        repo.files["generation_config.json"] = json.dumps({"commit": repo.commit}).encode()
    if rest.startswith("/tree/"):
        return it.json([_entry(path, data) for path, data in repo.files.items()])
    revision = rest.removeprefix("/revision/") if rest.startswith("/revision/") else "main"
    if rest and not rest.startswith("/revision/"):
        return it.refuse(404)
    if revision not in ("main", "v1", COMMIT, NEXT_COMMIT):
        return it.refuse(404, "RevisionNotFound")
    siblings = [_sibling(path, data) for path, data in repo.files.items()]
    return it.json({"id": name, "sha": repo.commit, "gated": repo.gated, "siblings": siblings, "tags": [],
                    "private": False, **repo.info})  # fmt: skip


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
    if path.endswith(LFS):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _sibling(path: str, data: bytes) -> dict[str, Any]:
    entry = {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
    if path.endswith(LFS):
        sha256 = hashlib.sha256(data).hexdigest()
        return entry | {"lfs": {"sha256": sha256, "size": len(data), "pointerSize": 134}}
    return entry


def _file(hub: StandInHub, it: Any, name: str, path: str) -> None:
    repo, faults = hub.repos.get(name), hub.faults
    if repo is None:
        return it.refuse(404, "RepoNotFound")
    if _gate(repo, it, name):
        return None
    if path not in repo.files:
        return it.refuse(404, "EntryNotFound")
    data = repo.files[path]
    etag = hashlib.sha256(data).hexdigest() if path.endswith(LFS) else git_sha1(data)
    headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    if it.command == "HEAD":
        return it.send(200, headers=headers | {"Content-Length": str(len(data))})
    if faults.elsewhere:
        return it.send(302, headers={"Location": f"{faults.elsewhere}{it.path}"})
    if path in faults.flip:
        data = data[:-1] + bytes([data[-1] ^ 1])
    if path in faults.short:
        data = data[:-1]
    return _body(hub, it, path, data, headers)


def _body(hub: StandInHub, it: Any, path: str, data: bytes, headers: dict[str, str]) -> None:
    faults, status = hub.faults, 200
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", it.headers.get("Range", ""))
    if found and not faults.no_ranges:
        start, end = int(found[1]), int(found[2] or len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{min(end, len(data) - 1)}/{len(data)}"
        data, status = data[start : end + 1], 206
    it.send_response(status)
    if path in faults.endless:
        headers["Connection"] = "close"
        it.close_connection = True
    else:
        headers["Content-Length"] = str(len(data))
    for key, value in headers.items():
        it.send_header(key, value)
    it.end_headers()
    large = len(data) > faults.piece
    cut, stall = large and faults.cut > 0, large and faults.stall > 0 and not found
    faults.cut, faults.stall = faults.cut - cut, faults.stall - stall
    for start in range(0, len(data), faults.piece):
        if (cut or stall) and start >= len(data) // 2:
            if stall:
                hub.closing.wait(STALL_SECONDS)
            if faults.reset:
                it.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            it.close_connection = True
            it.connection.close()
            return
        piece = data[start : start + faults.piece]
        it.wfile.write(piece)
        hub.served += len(piece)
        if faults.slow:
            time.sleep(faults.slow)
    for _ in range(ENDLESS if path in faults.endless else 0):
        it.wfile.write(b"\0" * faults.piece)
