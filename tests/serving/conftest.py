from __future__ import annotations

import pytest

from tests.serving.tiny_server import engine, serving


@pytest.fixture(scope="module")
def url():
    """The URL of a server on a real socket, in a thread of this process, without an API key."""
    with serving(engine()) as url:
        yield url
