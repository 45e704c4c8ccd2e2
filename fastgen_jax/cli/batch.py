"""`fastgen batch`: a file of requests to a file of answers."""

from __future__ import annotations

import argparse
import asyncio
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastgen_jax.cli.options import DEFAULT_MODEL, MODEL_HELP, add_fields, given_options
from fastgen_jax.core.options import parse_option


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    from fastgen_jax.engine.config import EngineConfig

    parser.add_argument("input", type=Path, help="a request a line: OpenAI's batch format, JSON, or plain prompts")
    parser.add_argument("output", type=Path, help="gets an answer a line; if it exists, the batch goes on where it was")
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"{MODEL_HELP} (default: %(default)s)")
    parser.add_argument("--deployment", metavar="NAME", help="send the requests to this deployment instead")
    parser.add_argument("--replicas", type=int, default=1, help="engines that share the work (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=256, help="requests under way at a time (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings",
                        help="a field for every body that does not have it, such as max_tokens=64; may be repeated")
    add_fields(parser.add_argument_group("engine"), EngineConfig)


def run(options: dict[str, Any]) -> int:
    """Runs the command on its parsed options and returns the exit code: 1 if a line was answered by an error."""
    from fastgen_jax.serving.batch import count_lines

    source, target = options["input"], options["output"]
    if not source.is_file():
        raise ValueError(f"{source} is not a file; give the file of requests")
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"output is {target}, but " + ("that is a folder; name a file in it" if target.is_dir() else
                         f"the folder {target.parent} does not exist; make it first"))
    if options["concurrency"] < 1 or options["replicas"] < 1:
        raise ValueError("concurrency and replicas must be at least 1")
    with tqdm(total=count_lines(source), desc="answering", unit="line") as bar:
        result = asyncio.run(_run(options, bar))
    print(f"{result.answered} answered ({result.failed} by an error), {result.resumed} had been before")
    return 1 if result.failed else 0


async def _run(options: dict[str, Any], bar: Any) -> Any:
    import httpx

    from fastgen_jax.api.client import KEY_VARIABLE
    from fastgen_jax.api.deployment import default_name, find_deployment
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.serving.app import Server, create_app
    from fastgen_jax.serving.batch import run_batch
    from fastgen_jax.serving.server import load_backend
    from fastgen_jax.serving.settings import Served, ServerConfig

    def progress(result: Any) -> None:
        bar.n = result.answered + result.resumed
        bar.refresh()

    settings = dict(parse_option(pair, "--set") for pair in options["settings"])
    rest = {"options": settings, "concurrency": options["concurrency"], "on_progress": progress}
    limits = httpx.Limits(max_connections=None)
    if options["deployment"] is not None:
        deployment = find_deployment(options["deployment"])
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(base_url=deployment.url, headers=headers, timeout=None, limits=limits) as http:
            return await run_batch(http, options["input"], options["output"], model=deployment.name, **rest)
    names = {field.name for field in fields(EngineConfig)}
    engine = EngineConfig.from_options({name: value for name, value in given_options(options).items() if name in names})
    config = ServerConfig(replicas=options["replicas"], max_queue=max(1024, options["concurrency"]))
    backend = await load_backend(options["model"], config, engine)
    name = default_name(options["model"])
    app = create_app(Server(Served(name=name, deployment=name, config=config), backend))
    try:
        # The server's own application, without sockets: what it checks and answers is checked and answered here.
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://batch", timeout=None) as http:
            return await run_batch(http, options["input"], options["output"], model=name, **rest)
    finally:
        await backend.close()
