"""Request bodies: checking their content type and decompressing them."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from starlette.types import Message, Receive

from fastgen_jax.serving.errors import ApiError
from fastgen_jax.serving.fields import short

if TYPE_CHECKING:
    from zlib import _Decompress

_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": zlib.MAX_WBITS}  # zlib's window sizes, which select the format
_ACCEPTED = {"Accept-Encoding": "gzip, deflate"}
PIECE = 2**18  # bytes decompressed at a time, about a millisecond, so that streams continue in between


def check_type(headers: Mapping[bytes, bytes], allowed_origins: Sequence[str]) -> None:
    """ApiError 415 unless the body is JSON. A body without a type is accepted, but not from a web page of another origin.

    A browser asks the server for permission before it sends JSON to another origin, but not for a body without a type.
    """
    kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if not kind:
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or "*" in allowed_origins or origin in allowed_origins:
            return
    elif kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return
    raise ApiError(
        f"the Content-Type is {short(kind)}, but only JSON is accepted; send the header 'Content-Type: application/json'",
        status=415,
        code="unsupported_media_type",
    )


def decompressed(headers: Sequence[tuple[bytes, bytes]], receive: Receive, *, max_bytes: int) -> Receive:
    """Returns `receive` with the decompressed body; ApiError 415 for an unknown encoding.

    Receiving raises ApiError 413 after `max_bytes`, beyond which nothing is decompressed, and 400 for a damaged body.
    """
    names = [value for name, value in headers if name == b"content-encoding"]
    encodings = [part.strip().lower() for part in b",".join(names).decode("latin-1").split(",")]
    encodings = [encoding for encoding in encodings if encoding not in ("", "identity")]
    if not encodings:
        return receive
    if len(encodings) > 1 or encodings[0] not in _WINDOWS:
        raise ApiError(
            f"the Content-Encoding is {short(', '.join(encodings))}; send gzip, deflate, or an uncompressed body",
            status=415,
            code="unsupported_content_encoding",
            headers=_ACCEPTED,
        )
    return _Decompressor(receive, encodings[0], max_bytes)


class _Decompressor:
    def __init__(self, receive: Receive, encoding: str, max_bytes: int) -> None:
        self._receive = receive
        self._encoding = encoding
        self._max_bytes = max_bytes
        self._zlib: _Decompress | None = None  # of the current gzip member
        self._packed = b""
        self._more_packed = True
        self._is_full = False  # the last piece was; zlib may hold more
        self._size = 0
        self._ended = False

    async def __call__(self) -> Message:
        """Returns the next piece of the body; other messages pass unchanged."""
        if self._ended:
            return await self._receive()
        while not self._packed and not self._is_full and self._more_packed:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._packed, self._more_packed = message.get("body", b""), message.get("more_body", False)
        await asyncio.sleep(0)
        piece = self._piece()
        self._size += len(piece)
        if self._size > self._max_bytes:
            raise ApiError(
                f"the decompressed body exceeds the limit of {self._max_bytes} bytes; send less, or start the server "
                "with a larger max_body_mb",
                status=413,
                code="body_too_large",
            )
        self._ended = not self._packed and not self._is_full and not self._more_packed
        if self._ended and self._zlib is not None and not self._zlib.eof:
            raise self._damaged("it ends too early")
        return {"type": "http.request", "body": piece, "more_body": not self._ended}

    def _piece(self) -> bytes:
        if self._packed and (self._zlib is None or self._zlib.eof):  # a gzip body may have several members
            window = _WINDOWS[self._encoding]
            if self._encoding == "deflate" and self._packed[0] & 15 != 8:  # some clients omit zlib's header
                window = -zlib.MAX_WBITS
            self._zlib = zlib.decompressobj(window)
        if self._zlib is None:
            return b""
        try:
            piece = self._zlib.decompress(self._packed, PIECE)
        except zlib.error as error:
            raise self._damaged(str(error)) from None
        self._is_full = len(piece) == PIECE and not self._zlib.eof
        self._packed = self._zlib.unused_data if self._zlib.eof else self._zlib.unconsumed_tail
        return piece

    def _damaged(self, reason: str) -> ApiError:
        return ApiError(
            f"the body is not valid {self._encoding} ({reason}); compress it again, or send it uncompressed",
            code="invalid_content_encoding",
        )
