"""Messages between the router and its replicas: pickles, each preceded by its length.

Unpickling is safe here: the router makes the socket pair and the replica inherits its end, so no other process can write to
it.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from typing import Any  # of messages: anything that can be pickled

_LENGTH = struct.Struct("<I")


def pack(message: object) -> bytes:
    """Returns a message as bytes."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


async def read(reader: asyncio.StreamReader) -> Any:
    """Returns the next message; asyncio.IncompleteReadError or OSError when the other side has closed."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return pickle.loads(await reader.readexactly(length))


def receive(connection: socket.socket) -> Any:
    """Waits for the next message and returns it; EOFError when the other side has closed."""
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return pickle.loads(_exactly(connection, length))


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
