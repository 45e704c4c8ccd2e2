"""A server with the part of Google Cloud Storage's JSON API that TensorStore uses: read, write, list, with preconditions.

Objects are kept in memory. `clients(server)` are the environment variables that send a process to it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class BucketServer:
    """Objects of all buckets by "bucket/name", and what clients asked for."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        """Contents and generation."""
        self.requests: Counter[str] = Counter()
        """How many were "list", "read" and "write"."""
        self.refuse: Counter[str] = Counter()
        """How many of each kind to answer with 403."""
        self.gate = threading.Event()
        """Writes wait for it; set by default."""
        self.gate.set()
        self.url = ""
        self._lock = threading.Lock()
        self._generations = itertools.count(1)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that send TensorStore in another process to this server."""
        return {"TENSORSTORE_GCS_HTTP_URL": self.url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token"}

    def names(self, bucket: str) -> list[str]:
        """The names of a bucket's objects."""
        return sorted(key.removeprefix(f"{bucket}/") for key in self.objects if key.startswith(f"{bucket}/"))

    def get(self, key: str) -> tuple[int, dict[str, str], bytes]:
        with self._lock:
            if key not in self.objects:
                return 404, {}, b""
            contents, generation = self.objects[key]
            return 200, {"x-goog-generation": str(generation)}, contents

    def put(self, key: str, contents: bytes, expected: int | None) -> tuple[int, dict[str, str], bytes]:
        self.gate.wait(60)
        with self._lock:
            found = self.objects.get(key, (b"", 0))[1]
            if expected is not None and expected != found:
                return 412, {}, b"{}"
            generation = next(self._generations)
            self.objects[key] = (contents, generation)
        return 200, {}, json.dumps({"name": key.partition("/")[2], "generation": str(generation)}).encode()

    def list(self, bucket: str, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        with self._lock:
            names = self.names(bucket)
        names = [name for name in names if name.startswith(query.get("prefix", "")) and name >= query.get("startOffset", "")]
        if "endOffset" in query:
            names = [name for name in names if name < query["endOffset"]]
        items = [{"name": name, "size": str(len(self.objects[f"{bucket}/{name}"][0]))} for name in names]
        return 200, {}, json.dumps({"items": items}).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: BucketServer

    def do_GET(self) -> None:
        parts, query = self._parts()
        bucket = parts[4]  # "", storage, v1, b, bucket, o, name
        if len(parts) == 6:
            self._answer("list", lambda: self.store.list(bucket, query))
        else:
            self._answer("read", lambda: self.store.get(f"{bucket}/{parts[6]}"))

    def do_POST(self) -> None:
        contents = self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts, query = self._parts()
        expected = int(query["ifGenerationMatch"]) if "ifGenerationMatch" in query else None
        self._answer("write", lambda: self.store.put(f"{parts[5]}/{query['name']}", contents, expected))

    def _parts(self) -> tuple[list[str], dict[str, str]]:
        address = urlsplit(self.path)
        return [unquote(part) for part in address.path.split("/")], {k: v[0] for k, v in parse_qs(address.query).items()}

    def _answer(self, kind, action) -> None:
        self.store.requests[kind] += 1
        if self.store.refuse[kind] > 0:
            self.store.refuse[kind] -= 1
            status, headers, body = 403, {}, b'{"error": {"message": "access denied"}}'
        else:
            status, headers, body = action()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def bucket_server() -> Iterator[BucketServer]:
    """A running server on a free port."""
    store = BucketServer()
    handler = type("Handler", (_Handler,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
