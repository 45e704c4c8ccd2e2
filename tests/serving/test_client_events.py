"""The clients read server-sent events as the standard defines them."""

from __future__ import annotations

import asyncio
import json

import pytest

from fastgen_jax.api.client import AsyncClient, Client
from tests.serving.test_dead_servers import deployment, listening

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nconnection: close\r\n\r\n"
DONE = "data: [DONE]\n\n"


def event(text: str, *, finish: str | None = None) -> str:
    fields = {
        "index": 0,
        "text": text,
        "token_ids": [1],
        "finish_reason": finish,
        "prompt_length": 1,
        "cached_length": 0,
        "weight_version": 0,
    }
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


def read_both(body: str) -> list[list[str]]:
    """The texts that each client reads from a server that sends `body`."""

    async def read_async(url: str) -> list[str]:
        client = AsyncClient(deployment(url))
        texts = [output.text async for output in client.stream("x")]
        await client.close()
        return texts

    with listening(HEAD + body.encode()) as url:
        client = Client(deployment(url))
        texts = [output.text for output in client.stream("x")]
        client.close()
        return [texts, asyncio.run(read_async(url))]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_text_with_a_unicode_line_separator_is_one_event(separator):
    # JSON allows these characters inside a string, and only CR and LF end a line of an event stream.
    text = f"one{separator}two"
    assert read_both(event(text) + event("", finish="length") + DONE) == [[text, ""]] * 2


def test_comments_crlf_and_a_missing_space_after_the_colon_are_read():
    body = ": ping\n\n" + event("a") + event("b", finish="stop").replace("data: ", "data:").replace("\n", "\r\n") + DONE
    assert read_both(body) == [["a", "b"]] * 2
