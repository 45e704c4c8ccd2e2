"""Runs a server for minutes under many clients, well-behaved and hostile: `make soak`.

    python -m tests.serving.soak --minutes 3 --clients 200

Clients stream, wait, cancel, read slowly, and send malformed requests and prompts that can never fit. There are more of
them than the server accepts, so some get a Retry-After header and follow it. A replica is killed with SIGKILL every 20
seconds, and halfway through the server gets SIGTERM and is restarted. At the end every valid request must have been answered
with the text of the offline engine, no token repeated, and no KV block leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

import fastgen_jax
from fastgen_jax.bench.http_load import HttpError, stream_events
from tests.serving.checkpoint import write_checkpoint
from tests.serving.tiny_server import offline

ENGINE = {"token_budget": 32, "budget_ladder": (8,), "max_num_seqs": 8, "block_size": 4, "num_blocks": 256}
MAX_TOKENS = 60
MAX_QUEUE = 4  # with two replicas and their running requests 24 in all, far fewer than the clients
RETRY = {429, 503}  # statuses of a loaded server, with a Retry-After header
LONGEST_WAIT = 10.0  # seconds: upper limit of a client's wait


class StreamError(Exception):
    """The server ended a stream with an error."""


class Soak:
    """The clients and their observations."""

    def __init__(self, url: str, model: str, answers: dict[str, str]) -> None:
        self.url, self.model, self.answers = url, model, answers
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.ending = False
        self.most_tries = 0

    async def client(self, seed: int) -> None:
        """Runs a client: it sends random requests until the end, and repeats each until it is answered."""
        rng = random.Random(seed)
        kinds = (self.stream, self.complete, self.cancel, self.slow, self.malformed, self.oversized)
        while not self.ending:
            kind = rng.choices(kinds, weights=(8, 4, 3, 1, 1, 1))[0]
            prompt = rng.choice(list(self.answers))
            tries = 0
            while not await self._try(kind, prompt, rng):
                tries += 1
            self.seen["answered after a retry"] += tries > 0
            self.most_tries = max(self.most_tries, tries)

    async def _try(self, kind: Any, prompt: str, rng: random.Random) -> bool:
        """Sends a request once; returns whether it is settled."""
        wait = 0.5
        try:
            await asyncio.wait_for(kind(prompt, rng), 120)
            self.seen[kind.__name__] += 1
            return True
        except TimeoutError:  # before OSError, of which it is one
            self.wrong.append(f"{kind.__name__}: no answer in 120 s")
            return True
        except HttpError as error:
            self.seen[f"status {error.status}"] += 1
            if error.status not in RETRY:
                self.wrong.append(f"{kind.__name__}: {error}")
                return True
            if not error.headers.get("retry-after", "").isdigit():
                self.wrong.append(f"{kind.__name__}: {error} has no Retry-After header")
                return True
            wait = min(LONGEST_WAIT, int(error.headers["retry-after"]))
        except (OSError, asyncio.IncompleteReadError, httpx.TransportError):
            self.seen["connection broken"] += 1
            if not self.down:
                self.wrong.append(f"{kind.__name__}: the connection broke while the server was up")
        except StreamError as error:
            self.seen["error in a stream"] += 1
            if not self.down:
                self.wrong.append(f"{kind.__name__}: {error}")
        await asyncio.sleep(wait * rng.uniform(0.5, 1))
        return False

    down = False
    """Whether the server is being stopped and restarted."""

    async def stream(self, prompt: str, rng: random.Random, *, pause: float = 0.0) -> None:
        """Reads a stream to its end."""
        text = ""
        async for event in stream_events(self.url, "/v1/completions", self._body(prompt, stream=True), pause=pause):
            if "error" in event:
                raise StreamError(event["error"]["message"])
            text += event["choices"][0]["text"]
        self._check(prompt, text)

    async def slow(self, prompt: str, rng: random.Random) -> None:
        """Reads a stream more slowly than it is generated."""
        await self.stream(prompt, rng, pause=0.1)

    async def complete(self, prompt: str, rng: random.Random) -> None:
        """Waits for the complete answer."""
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as http:
            response = await http.post("/v1/completions", json=self._body(prompt))
        if response.status_code != 200:
            raise HttpError(response.status_code, response.text, response.headers)
        self._check(prompt, response.json()["choices"][0]["text"])

    async def cancel(self, prompt: str, rng: random.Random) -> None:
        """Disconnects in the middle of a stream."""
        limit = rng.randrange(20)
        count = 0
        events = stream_events(self.url, "/v1/completions", self._body(prompt, stream=True))
        async for _ in events:
            count += 1
            if count > limit:
                break
        await events.aclose()

    async def malformed(self, prompt: str, rng: random.Random) -> None:
        """Sends a malformed request."""
        body = rng.choice([b"{", b"\xff\xfe", b"[]", b'{"model": 3}', b'{"model": "x", "prompt": "y", "n": 1e9}'])
        await self._refused(body, {400, 404})

    async def oversized(self, prompt: str, rng: random.Random) -> None:
        """Sends a prompt that can never fit, or a body above the limit."""
        if rng.random() < 0.5:
            await self._refused(self._body("x" * 500), {400})
        else:
            await self._refused(self._body("x" * 2_000_000), {413})

    async def _refused(self, body: Any, statuses: set[int]) -> None:
        try:
            async for _ in stream_events(self.url, "/v1/completions", body):
                pass
        except HttpError as error:
            if error.status not in statuses:
                raise
        except OSError:
            if 413 not in statuses:  # the server may close the connection before the client has sent all of the body
                raise

    def _body(self, prompt: str, **more: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            **more,
        }

    def _check(self, prompt: str, text: str) -> None:
        if text != self.answers[prompt]:
            self.wrong.append(f"{prompt!r} was answered {text!r} instead of {self.answers[prompt]!r}")


def start(checkpoint: Path, port: int) -> Any:
    """Starts a server with two replicas."""
    return fastgen_jax.serve(
        checkpoint,
        deployment_name="soak",
        replica_num=2,
        port=port,
        max_body_mb=1.0,
        max_queue=MAX_QUEUE,
        timeout=600,
        **ENGINE,
    )


async def run(args: argparse.Namespace, checkpoint: Path) -> int:
    """Runs everything; returns the exit code."""
    prompts = [f"Question number {i} is: " + "why " * (i % 12) for i in range(32)]
    answers = {p: offline(p, max_new_tokens=MAX_TOKENS, do_sample=False, ignore_eos=True) for p in prompts}
    client = await asyncio.to_thread(start, checkpoint, 0)
    url = client.deployment.url
    soak = Soak(url, "tiny", answers)
    begin = time.monotonic()
    end = begin + 60 * args.minutes
    clients = [asyncio.create_task(soak.client(seed)) for seed in range(args.clients)]
    kills = 0
    ended_once = False
    while time.monotonic() < end:
        await asyncio.sleep(min(args.kill_every, max(0.1, end - time.monotonic())))
        if not ended_once and time.monotonic() > begin + 30 * args.minutes:
            ended_once, soak.down = True, True
            await asyncio.to_thread(client.terminate_server, timeout=120)  # SIGTERM: running requests finish
            client = await asyncio.to_thread(start, checkpoint, int(url.rsplit(":", 1)[1]))
            await asyncio.sleep(2)
            soak.down = False
            continue
        children = [
            child
            for child in psutil.Process(client.deployment.pid).children()
            if "fastgen_jax.serving.replica" in child.cmdline()
        ]
        # Only when both are ready: a replica that dies three times during its start is given up.
        if len(children) == 2 and await _engines(url) == 2:
            random.choice(children).kill()
            kills += 1
    soak.ending = True
    await asyncio.gather(*clients)
    seconds = time.monotonic() - begin
    leaked = await _leaked(url)
    await asyncio.to_thread(client.terminate_server, timeout=120)
    print(f"{seconds:.0f} s, {args.clients} clients, {kills} replicas killed, the server restarted {int(ended_once)} times")
    for what, count in sorted(soak.seen.items()):
        print(f"  {count:7} {what}")
    for what in ("status 429", "answered after a retry"):
        if not soak.seen[what]:
            soak.wrong.append(f"no request had '{what}': there are too few clients for the server")
    print(f"  {soak.most_tries:7} refusals of one request at most")
    print(f"  {leaked:7} KV blocks leaked\n  {len(soak.wrong):7} wrong")
    for line in soak.wrong[:20]:
        print("   ", line)
    return 1 if soak.wrong or leaked else 0


async def _engines(url: str) -> int:
    """Returns the number of ready replicas."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        answer = await http.get("/stats")
    return len(answer.json()["engines"]) if answer.status_code == 200 else 0


async def _leaked(url: str) -> int:
    """Returns the KV blocks in use after the last request, from /metrics."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        for _ in range(600):
            gauges = [line.rsplit(" ", 1) for line in (await http.get("/metrics")).text.splitlines()]
            sums = {
                name: sum(float(v) for key, v in (g for g in gauges if len(g) == 2) if key.startswith(name + "{"))
                for name in ("fastgen:kv_blocks", "fastgen:kv_blocks_free")
            }
            if sums["fastgen:kv_blocks"] == 2 * ENGINE["num_blocks"] == sums["fastgen:kv_blocks_free"]:
                return 0
            await asyncio.sleep(0.1)
    return int(2 * ENGINE["num_blocks"] - sums["fastgen:kv_blocks_free"])


def main() -> int:
    """Runs the test with a tiny model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--kill-every", type=float, default=20.0, metavar="SECONDS")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_STATE_HOME"] = folder
        return asyncio.run(run(args, write_checkpoint(Path(folder) / "tiny")))


if __name__ == "__main__":
    raise SystemExit(main())
