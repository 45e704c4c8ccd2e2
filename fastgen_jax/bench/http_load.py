"""A minimal HTTP client for load tests, which takes as little CPU time as possible from the measured machine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

from fastgen_jax.json_types import JsonFields, JsonObject


class HttpError(Exception):
    """A response with a status other than 200."""

    def __init__(self, status: int, body: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{status}: {body[:300]}")
        self.status = status
        self.body = body
        self.headers = headers or {}


async def stream_events(
    url: str,
    path: str,
    body: JsonFields | bytes,
    *,
    headers: Mapping[str, str] | None = None,
    pause: float = 0.0,
) -> AsyncIterator[JsonObject]:
    """Yields the events of a streamed response; a `pause` in seconds between two reads simulates a slow reader.

    Leaving the loop early closes the connection. Raises HttpError, and OSError or asyncio.IncompleteReadError if the
    connection breaks.
    """
    address = urlsplit(url)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {
        "Host": address.netloc,
        "Content-Type": "application/json",
        "Content-Length": str(len(data)),
        "Connection": "close",
        **(headers or {}),
    }
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    # A slow reader has a small buffer, so that the server's buffer fills up and it must wait.
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=2**12 if pause else 2**20)
    try:
        writer.write(head.encode() + data)
        await writer.drain()
        first = await reader.readline()
        if not first:
            raise asyncio.IncompleteReadError(first, None)
        status = int(first.split()[1])
        answer_headers = {}
        while (line := await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            answer_headers[name.lower()] = value.strip()
        if status != 200:
            size = int(answer_headers.get("content-length", 0))
            raise HttpError(status, (await reader.readexactly(size)).decode("utf-8", "replace"), answer_headers)
        async for line in _lines(reader):
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line[6:])
                if pause:
                    await asyncio.sleep(pause)
            elif line == b"data: [DONE]":
                return
        raise asyncio.IncompleteReadError(b"", None)  # a complete response ends with [DONE]
    finally:
        writer.close()


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yields the lines of a body in chunked transfer encoding."""
    rest = b""
    while size := int((await reader.readuntil(b"\r\n")), 16):
        *lines, rest = (rest + await reader.readexactly(size)).split(b"\n")
        await reader.readexactly(2)
        for line in lines:
            yield line
