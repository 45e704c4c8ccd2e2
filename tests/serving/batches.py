"""A fake server for batches, and helpers for the files of a batch."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx

from fastgen_jax.serving.batch import run_batch
from tests.serving.tiny_server import MODEL


def answers(path: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {int(line["id"].removeprefix("batch-")): line for line in lines}
    assert len(found) == len(lines), "a line was answered twice"
    return found


def write_prompts(path: Path, count: int) -> list[str]:
    prompts = [f"Prompt {i}" for i in range(count)]
    path.write_text("\n".join(prompts) + "\n")
    return prompts


GOOD = {"custom_id": "good", "method": "POST", "url": "/v1/completions", "body": {"model": MODEL, "prompt": "x"}}


class Echo(httpx.AsyncBaseTransport):
    """Answers each request with its own body; a prompt of three digits is the status, otherwise it is 200."""

    def __init__(self):
        self.bodies = []

    async def handle_async_request(self, request):
        body = json.loads(await request.aread())
        self.bodies.append(body)
        prompt = str(body.get("prompt"))
        return httpx.Response(int(prompt) if prompt.isdigit() and len(prompt) == 3 else 200, json={"asked": body})


def run(source: Path, target: Path, transport: httpx.AsyncBaseTransport | None = None, **options):
    async def scenario():
        async with httpx.AsyncClient(transport=transport or Echo(), base_url="http://x") as http:
            return await run_batch(http, source, target, **{"model": MODEL, "concurrency": 2, **options})

    return asyncio.run(scenario())


def line(**changes) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()
