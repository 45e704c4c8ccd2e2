"""Images that requests name by URL: data: always, files and remote ones if the operator allows them."""

from __future__ import annotations

import ipaddress
import re
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import httpcore
import httpx

from fastgen_jax.images.decode import MAX_BYTES, bytes_of_data_url, read_file
from fastgen_jax.serving.settings import ServerConfig

REDIRECTS = 3
_MOVED = (301, 302, 303, 307, 308)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.ASCII | re.IGNORECASE)
_HEADERS = [(b"User-Agent", b"fastgen"), (b"Accept", b"image/*"), (b"Accept-Encoding", b"identity")]


def image_bytes(url: str, what: str, *, config: ServerConfig) -> bytes:
    """The bytes that a URL in a request names; ValueError, which calls it `what`, with the reason if there are none.

    May wait for another server, for `remote_image_seconds` at most.
    """
    scheme = found[1].lower() if (found := _SCHEME.match(url)) else ""
    match scheme:
        case "data":
            return bytes_of_data_url(url, what=what)
        case "file":
            return _local(url, what, config.image_folder)
        case "http" | "https":
            if not config.remote_images:
                raise ValueError(
                    f"{what} has a remote address, which this server does not fetch; send the image as "
                    "data:image/png;base64,..., or start the server with --remote-images"
                )
            return fetch(url, what, seconds=config.remote_image_seconds)
    raise ValueError(f"{what} has the URL {url[:40]!r}; the form is data:image/png;base64,...")


def _local(url: str, what: str, folder: str | None) -> bytes:
    if folder is None:
        raise ValueError(f"{what} names a file of the server, which reads none; start it with --image-folder to allow that")
    parts = urllib.parse.urlsplit(url)
    try:
        path, root = Path(urllib.request.url2pathname(parts.path)).resolve(), Path(folder).resolve()
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} names no file: {error}") from None
    if parts.netloc not in ("", "localhost") or not path.is_relative_to(root):
        raise ValueError(f"{what} names a file outside of the server's image folder; only those in it may be read")
    return read_file(path, what=what)


def fetch(url: str, what: str, *, seconds: float, is_allowed: Callable[[str], bool] | None = None) -> bytes:
    """The answer to a GET, from addresses that `is_allowed` accepts; by default those of the public internet.

    The check applies to the address that is connected to, also after a redirect, whatever a name resolves to at another
    time. Raises ValueError for another address, another status than 200, more than `MAX_BYTES`, and after `seconds`.
    """
    deadline = time.monotonic() + seconds
    backend = _Guarded(is_allowed or is_public)
    with httpcore.ConnectionPool(network_backend=backend) as pool:
        for _ in range(REDIRECTS + 1):
            if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
                raise ValueError(f"{what} is redirected to {url[:80]!r}, which is no address of the web")
            try:
                found = _get(pool, url, what, deadline)
            except (httpcore.TimeoutException, TimeoutError):
                raise ValueError(f"{what} was not received within {seconds:g} seconds; send it as a data: URL") from None
            except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError) as error:
                raise ValueError(f"{what} cannot be fetched: {error or type(error).__name__}") from None
            if isinstance(found, bytes):
                return found
            url = urllib.parse.urljoin(url, found)
    raise ValueError(f"{what} is redirected more than {REDIRECTS} times; use the address of the picture itself")


def _get(pool: httpcore.ConnectionPool, url: str, what: str, deadline: float) -> bytes | str:
    """The body of an answer, or the address of a redirect."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    timeouts = dict.fromkeys(("connect", "read", "write", "pool"), left)
    try:
        target = httpx.URL(url).raw_path and httpcore.URL(str(httpx.URL(url)))
    except (httpx.InvalidURL, ValueError, TypeError) as error:
        raise ValueError(f"{what} has the URL {url[:80]!r}, which is not valid: {error}") from None
    headers = [(b"Host", httpx.URL(url).netloc), *_HEADERS]
    with pool.stream("GET", target, headers=headers, extensions={"timeout": timeouts}) as response:
        if response.status in _MOVED:
            places = [value for name, value in response.headers if name.lower() == b"location"]
            if not places:
                raise ValueError(f"{what} is redirected to nowhere")
            return places[0].decode("ascii", "replace")
        if response.status != 200:
            raise ValueError(f"{what} cannot be fetched: the other server answers with status {response.status}")
        body = bytearray()
        for piece in response.iter_stream():
            body += piece
            if len(body) > MAX_BYTES:
                raise ValueError(f"{what} has more than {MAX_BYTES:,} bytes; send a smaller file")
            if time.monotonic() > deadline:
                raise TimeoutError
        return bytes(body)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, and not to this machine or its networks."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    for inner in (getattr(ip, "ipv4_mapped", None), getattr(ip, "sixtofour", None)):
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


class _Guarded(httpcore.SyncBackend):
    """Connects to allowed addresses only: a name is resolved here, once, and the connection is to what was checked."""

    def __init__(self, is_allowed: Callable[[str], bool]) -> None:
        self._is_allowed = is_allowed

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        found: Sequence[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        refused = [address for address in addresses if not self._is_allowed(address)]
        if refused or not addresses:
            raise ValueError(
                f"the address {host} leads to {', '.join(refused) or 'nothing'}, which is not on the public internet"
            )
        return super().connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    def connect_unix_socket(self, path: str, *args: Any, **kwargs: Any) -> httpcore.NetworkStream:
        """Refused."""
        raise ValueError("sockets of this machine are not fetched")
