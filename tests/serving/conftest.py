from __future__ import annotations

import socket
import threading

import pytest
import uvicorn

from fastgen_jax.api.async_engine import AsyncEngine
from fastgen_jax.serving.app import create_app
from fastgen_jax.serving.settings import ServedModel
from fastgen_jax.serving.state import ServerState
from tests.serving.tiny_server import MODEL, engine


@pytest.fixture(scope="module")
def url():
    """The URL of a server on a real socket, in a thread of this process, without an API key."""
    backend = AsyncEngine(engine())
    server = uvicorn.Server(
        uvicorn.Config(create_app(ServerState(ServedModel(name=MODEL, deployment=MODEL), backend)), log_config=None)
    )
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # from here on connections are accepted
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    backend._thread.close()
    listener.close()
