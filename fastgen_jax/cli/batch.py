"""`fastgen batch`: answers a file of requests into a file of responses."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from fastgen_jax.cli.parser import Options
from fastgen_jax.flags import add_fields, add_model_flag, given_options, name_value

if TYPE_CHECKING:
    from fastgen_jax.serving.batch import Batch, BatchResult

INTERRUPTED = 130  # exit code of a process ended by SIGINT, as shells report it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    from fastgen_jax.engine.config import EngineConfig

    parser.add_argument(
        "input", type=Path, help="file with one request per line: OpenAI's batch format, other JSON, or plain text"
    )
    parser.add_argument("output", type=Path, help="file for one response per line; if it exists, the batch is resumed")
    add_model_flag(parser)
    parser.add_argument("--deployment", metavar="NAME", help="send the requests to this running deployment instead")
    parser.add_argument("--replicas", type=int, default=1, help="engines that share the work (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=256, help="requests in flight at a time (default: %(default)s)")
    parser.add_argument(
        "--format",
        choices=("auto", "jsonl", "text"),
        default="auto",
        help="format of the input; auto looks at its name (.jsonl, .ndjson, .json; .txt) and its first line",
    )
    parser.add_argument(
        "--set",
        action="append",
        type=name_value,
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="a field for every request body that lacks it, such as max_tokens=64; may be repeated",
    )
    add_fields(parser.add_argument_group("engine"), EngineConfig)


def run(options: Options) -> int:
    """Runs the command and returns the exit code: 0 if every line was answered, 1 if some failed."""
    from fastgen_jax.serving.batch import Batch

    if options["concurrency"] < 1 or options["replicas"] < 1:
        raise ValueError(
            f"concurrency is {options['concurrency']} and replicas {options['replicas']}; both must be at least 1"
        )
    with Batch(options["input"], options["output"], form=options["format"]) as batch:
        try:
            asyncio.run(_interruptible(_run(options, batch)))
        except BaseException as error:
            if batch.result.answered:
                print(f"{_summary(batch.result, options['output'])}; run the same command to resume", file=sys.stderr)
            if isinstance(error, asyncio.CancelledError):
                raise KeyboardInterrupt from None
            raise
    for failure in batch.result.failures:
        print(failure, file=sys.stderr)
    print(_summary(batch.result, options["output"]))
    return 1 if batch.result.failed else 0


async def _interruptible(work: Coroutine[object, None, None]) -> None:
    """Cancels `work` on the first interrupt; the second one ends the process immediately, with the output still valid."""
    task = asyncio.ensure_future(work)

    def stop() -> None:
        if task.cancelling():
            os._exit(INTERRUPTED)
        task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop)
    await task


def _summary(result: BatchResult, output: Path) -> str:
    left = result.total - result.resumed - result.answered
    parts = [f"{result.answered - result.failed} answered", f"{result.failed} failed"]
    parts += [f"{result.resumed} already answered before"] if result.resumed else []
    parts += [f"{left} remaining"] if left else []
    end = f"; {output} has the reasons, and the same command retries the failed lines" if result.failed else ""
    return f"{result.total} lines: {', '.join(parts)}{end}"


async def _run(options: Options, batch: Batch) -> None:
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

            def progress(result: BatchResult) -> None:
                bar.update(result.answered + result.resumed - bar.n)

            await batch.run(
                http,
                model=model,
                options=dict(options["settings"]),
                concurrency=options["concurrency"],
                on_progress=progress,
            )

    if options["deployment"] is not None:
        deployment = find_deployment(options["deployment"])
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(**http_settings(deployment), limits=limits) as http:
            try:
                await answer(http, deployment.name)
            except ConnectionError as error:
                raise ValueError(f"{error}; {explain(deployment)}") from error
        return
    engine = EngineConfig.from_options(given_options(options, EngineConfig))
    config = ServerConfig(replicas=options["replicas"], max_queue=max(1024, options["concurrency"]))
    backend = await load_backend(options["model"], config, engine, progress=sys.stderr.isatty())
    name = default_name(options["model"])
    app = create_app(ServerState(ServedModel(name=name, deployment=name, config=config), backend))
    try:
        # The server's own application without sockets, so that requests are validated and answered as a server would.
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as http:
            try:
                await answer(http, name)
            except ConnectionError as error:
                raise ValueError(f"the engine has stopped: {backend.failure or error}") from error
    finally:
        await backend.close()
