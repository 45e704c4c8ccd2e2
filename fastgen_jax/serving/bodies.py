"""Bodies of requests: what they say that they are, and what they are when they are unpacked."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from fastgen_jax.serving.errors import ApiError
from fastgen_jax.serving.protocol import short

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": zlib.MAX_WBITS}  # zlib's numbers for the formats
_ACCEPTED = {"Accept-Encoding": "gzip, deflate"}
PIECE = 2**18  # bytes that are unpacked at once, about a millisecond: streams go on in between


def check_type(headers: Mapping[bytes, bytes], allowed_origins: Sequence[str]) -> None:
    """ApiError 415 unless the body is JSON; one that says nothing is, but not from a stranger's page in a browser.

    A browser asks the server before it sends JSON to another origin, and does not ask for a body without a type.
    """
    kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if not kind:
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or "*" in allowed_origins or origin in allowed_origins:
            return
    elif kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return
    raise ApiError(
        f"the Content-Type is {short(kind)}, and only JSON is read here; send the header 'Content-Type: application/json'",
        status=415,
        code="unsupported_media_type",
    )


def unpacked(headers: Sequence[tuple[bytes, bytes]], receive: Receive, *, max_bytes: int) -> Receive:
    """`receive` with the body as it was before the client packed it; ApiError 415 for a packing not known here.

    The messages raise ApiError: 413 for more than `max_bytes`, of which no more is unpacked, and 400 for a damaged body.
    """
    names = [value for name, value in headers if name == b"content-encoding"]
    encodings = [part.strip().lower() for part in b",".join(names).decode("latin-1").split(",")]
    encodings = [encoding for encoding in encodings if encoding not in ("", "identity")]
    if not encodings:
        return receive
    if len(encodings) > 1 or encodings[0] not in _WINDOWS:
        raise ApiError(
            f"the Content-Encoding is {short(', '.join(encodings))}; send gzip, deflate, or the plain body",
            status=415,
            code="unsupported_content_encoding",
            headers=_ACCEPTED,
        )
    return _Unpacker(receive, encodings[0], max_bytes)


class _Unpacker:
    def __init__(self, receive: Receive, encoding: str, max_bytes: int) -> None:
        self._receive = receive
        self._encoding = encoding
        self._max_bytes = max_bytes
        self._zlib: Any = None  # of the member under way
        self._packed = b""
        self._more_packed = True
        self._is_full = False  # the last piece: more may be in zlib's own memory
        self._size = 0
        self._ended = False

    async def __call__(self) -> Message:
        """The next piece of the body; messages that are none pass."""
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
                f"the unpacked body has more than the {self._max_bytes} bytes of the limit; send less, or start "
                "the server with a larger max_body_mb",
                status=413,
                code="body_too_large",
            )
        self._ended = not self._packed and not self._is_full and not self._more_packed
        if self._ended and self._zlib is not None and not self._zlib.eof:
            raise self._damaged("it ends too early")
        return {"type": "http.request", "body": piece, "more_body": not self._ended}

    def _piece(self) -> bytes:
        if self._packed and (self._zlib is None or self._zlib.eof):  # gzip may have several members
            window = _WINDOWS[self._encoding]
            if self._encoding == "deflate" and self._packed[0] & 15 != 8:  # some clients leave zlib's header out
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
            f"the body is no {self._encoding} ({reason}); pack it again, or send it plain", code="invalid_content_encoding"
        )
