"""Connections of clients that speak HTTP/1.0."""

from __future__ import annotations

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Connection(HttpToolsProtocol):
    """uvicorn's fast protocol, except that the end of a stream to an HTTP/1.0 client is the end of its connection.

    Such clients do not know chunks, in which uvicorn's fast protocol sends every stream.
    """

    _is_new = True

    def data_received(self, data: bytes) -> None:
        if self._is_new:
            self._is_new = False
            if data.partition(b"\r\n")[0].endswith(b" HTTP/1.0"):
                self._hand_over(data)
                return
        super().data_received(data)

    def _hand_over(self, data: bytes) -> None:
        """Gives the connection to the protocol that follows the version of the client."""
        self.connections.discard(self)
        other = H11Protocol(self.config, self.server_state, self.app_state, self.loop)
        self.transport.set_protocol(other)
        other.connection_made(self.transport)
        other.data_received(data)
