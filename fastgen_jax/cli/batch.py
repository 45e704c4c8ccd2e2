"""`fastgen batch`: a file of requests to a file of answers."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastgen_jax.cli.options import DEFAULT_MODEL, MODEL_HELP, add_fields, given_options
from fastgen_jax.core.options import parse_option

INTERRUPTED = 130  # the exit code, as shells count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    from fastgen_jax.engine.config import EngineConfig

    parser.add_argument("input", type=Path, help="a request a line: OpenAI's batch format, JSON, or plain text")
    parser.add_argument("output", type=Path, help="gets an answer a line; if it exists, the batch goes on where it was")
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"{MODEL_HELP} (default: %(default)s)")
    parser.add_argument("--deployment", metavar="NAME", help="send the requests to this deployment instead")
    parser.add_argument("--replicas", type=int, default=1, help="engines that share the work (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=256, help="requests under way at a time (default: %(default)s)")
    parser.add_argument(
        "--format",
        choices=("auto", "jsonl", "text"),
        default="auto",
        help="what the input holds; auto goes by its name (.jsonl, .ndjson, .json; .txt) and its first line",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="a field for every body that does not have it, such as max_tokens=64; may be repeated",
    )
    add_fields(parser.add_argument_group("engine"), EngineConfig)


def run(options: dict[str, Any]) -> int:
    """Runs the command on its parsed options and returns the exit code: 0 if each line is answered, 1 if some failed."""
    from fastgen_jax.serving.batch import Batch

    if options["concurrency"] < 1 or options["replicas"] < 1:
        raise ValueError("concurrency and replicas must be at least 1")
    settings = dict(parse_option(pair, "--set") for pair in options["settings"])
    with Batch(options["input"], options["output"], form=options["format"]) as batch:
        try:
            asyncio.run(_stoppable(_run(options, batch, settings)))
        except BaseException as error:
            if batch.result.answered:
                print(f"{_summary(batch, options['output'])}; the same command goes on from there", file=sys.stderr)
            if isinstance(error, asyncio.CancelledError):
                raise KeyboardInterrupt from None
            raise
    for failure in batch.result.failures:
        print(failure, file=sys.stderr)
    print(_summary(batch, options["output"]))
    return 1 if batch.result.failed else 0


async def _stoppable(work: Coroutine[Any, Any, None]) -> None:
    """Cancels `work` at the first interrupt; at the second one the process ends at once, and the output is still sound."""
    task = asyncio.ensure_future(work)

    def stop() -> None:
        if task.cancelling():
            os._exit(INTERRUPTED)
        task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop)
    await task


def _summary(batch: Any, output: Path) -> str:
    result = batch.result
    left = result.total - result.resumed - result.answered
    parts = [f"{result.answered - result.failed} answered", f"{result.failed} failed"]
    parts += [f"{result.resumed} had been answered before"] if result.resumed else []
    parts += [f"{left} are left"] if left else []
    end = f"; {output} says why, and the same command asks those that failed again" if result.failed else ""
    return f"{result.total} lines: {', '.join(parts)}{end}"


async def _run(options: dict[str, Any], batch: Any, settings: dict[str, Any]) -> None:
    import httpx

    from fastgen_jax.api.client import explain, http_settings
    from fastgen_jax.api.deployment import default_name, find_deployment
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.serving.app import create_app
    from fastgen_jax.serving.server import load_backend
    from fastgen_jax.serving.settings import ServedModel, ServerConfig
    from fastgen_jax.serving.state import ServerState

    async def answer(http: httpx.AsyncClient, model: str) -> None:
        with tqdm(total=batch.result.total, desc="answering", unit="line", disable=None) as bar:

            def progress(result: Any) -> None:
                bar.update(result.answered + result.resumed - bar.n)

            await batch.run(http, model=model, options=settings, concurrency=options["concurrency"], on_progress=progress)

    if options["deployment"] is not None:
        deployment = find_deployment(options["deployment"])
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(**http_settings(deployment), limits=limits) as http:
            try:
                await answer(http, deployment.name)
            except ConnectionError as error:
                raise ValueError(f"{error}; {explain(deployment)}") from error
        return
    names = {field.name for field in fields(EngineConfig)}
    engine = EngineConfig.from_options({name: value for name, value in given_options(options).items() if name in names})
    config = ServerConfig(replicas=options["replicas"], max_queue=max(1024, options["concurrency"]))
    backend = await load_backend(options["model"], config, engine, progress=sys.stderr.isatty())
    name = default_name(options["model"])
    app = create_app(ServerState(ServedModel(name=name, deployment=name, config=config), backend))
    try:
        # The server's own application, without sockets: what it checks and answers is checked and answered here.
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as http:
            try:
                await answer(http, name)
            except ConnectionError as error:
                raise ValueError(f"the engine has ended: {backend.failure or error}") from error
    finally:
        await backend.close()
