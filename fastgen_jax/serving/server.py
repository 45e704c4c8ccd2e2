"""The server process of a deployment: it listens immediately, loads the model, serves, and shuts down in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Literal, TypeVar

import uvicorn

from fastgen_jax.api.async_engine import AsyncEngine
from fastgen_jax.api.deployment import Deployment, check_name, default_name, process_start, recorded
from fastgen_jax.checkpoint import open_checkpoint, resolve_model
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.serving.app import create_app
from fastgen_jax.serving.connections import Connection
from fastgen_jax.serving.router import Router
from fastgen_jax.serving.settings import ServedModel, ServerConfig
from fastgen_jax.serving.state import ServerState
from fastgen_jax.serving.work import Backend
from fastgen_jax.text import load_tokenizer

log = logging.getLogger(__name__)
T = TypeVar("T")

CLOSE_SECONDS = 5  # to send finished answers to slow clients
LOADING_LOG_SECONDS = 10.0  # between two log entries while the model loads
_STOPPING = (signal.SIGTERM, signal.SIGINT)


def run_server(
    model: str,
    config: ServerConfig,
    engine_config: EngineConfig,
    *,
    log_file: str | None = None,
    progress: bool = False,
    on_ready: Callable[[str], object] = lambda url: None,
) -> int:
    """Serves `model` until a signal stops it; returns the exit code, 2 if the model could not be loaded.

    `progress` shows progress bars while it loads. `on_ready` is called with the base URL when requests are accepted.
    Raises ValueError if the port is in use or a deployment of that name is running.
    """
    _check_tls(config)
    _raise_file_limit()
    name, *others = config.served_model_name or (default_name(model),)
    served = ServedModel(
        name=name,
        deployment=check_name(config.deployment_name or default_name(model)),
        config=config,
        other_names=tuple(others),
        root=model,
    )
    listener = _listen(config.host, config.port)
    port = listener.getsockname()[1]
    host = config.host if config.host not in ("0.0.0.0", "::") else "127.0.0.1"
    record = Deployment(
        name=served.deployment,
        model=model,
        url=f"{'https' if config.tls_certificate else 'http'}://{host}:{port}",
        pid=os.getpid(),
        started=time.time(),
        process_start=process_start(os.getpid()) or "",
        log=log_file,
        replicas=config.replicas,
    )
    with listener, recorded(record), _noted_signals() as early:
        log.info("deployment %s listens on %s and is loading %s", record.name, record.url, model)
        server = ServerState(served)

        async def serve() -> None:
            loading = asyncio.create_task(
                load_backend(
                    model,
                    config,
                    engine_config,
                    log_format=None if progress else config.log_format,
                    log_file=log_file,
                    progress=progress,
                )
            )
            progress_log = asyncio.create_task(_log_progress(loading))
            await _serve(server, listener, loading, early, on_ready=lambda: on_ready(record.url))
            await progress_log

        with asyncio.Runner(loop_factory=_fast_loop()) as runner:
            runner.run(serve())
    if server.failure is not None:
        log.error("%s", server.failure)
        return 2
    return 0


async def _serve(
    server: ServerState,
    listener: socket.socket,
    loading: asyncio.Task[Backend],
    early_signals: list[int],
    *,
    on_ready: Callable[[], object],
) -> None:
    config = server.model.config
    http = _Uvicorn(
        uvicorn.Config(
            create_app(server),
            http=Connection,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=CLOSE_SECONDS,
            ssl_certfile=config.tls_certificate,
            ssl_keyfile=config.tls_key,
            timeout_keep_alive=75,
            backlog=2048,
        )
    )
    loop = asyncio.get_running_loop()
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stop_now.is_set():  # third signal
            http.should_exit = http.force_exit = True
        elif stop.is_set():  # second signal: running requests fail instead of finishing
            stop_now.set()
        stop.set()

    for number in _STOPPING:
        loop.add_signal_handler(number, on_signal)
    if early_signals:
        on_signal()
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    stopping, stopping_now = asyncio.create_task(stop.wait()), asyncio.create_task(stop_now.wait())
    await asyncio.wait({serving, loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
    else:
        try:
            backend = loading.result()
        except Exception as error:
            server.failure = f"the model could not be loaded: {error}"
            if not isinstance(error, ValueError):
                log.exception("the model could not be loaded")
        else:
            # These objects stay. A collection that scans a loaded model and JAX would stop every stream for 0.1 s.
            gc.collect()
            gc.freeze()
            server.backend = backend
            resolved = backend.intake.config
            log.info(
                "ready: %d KV blocks of %d tokens, at most %d tokens per request",
                resolved.num_blocks,
                resolved.block_size,
                resolved.longest_sequence,
            )
            on_ready()
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            log.info("shutting down: finishing %d requests within %g s", backend.num_unfinished, config.drain_seconds)
            draining = asyncio.create_task(backend.drain(config.drain_seconds))
            await asyncio.wait({serving, draining, stopping_now}, return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
            await backend.close()
            log.info("shut down with %d unfinished requests", backend.num_unfinished)
    http.should_exit = True
    await serving
    stopping.cancel()
    stopping_now.cancel()


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Notes the signals that arrive before the event loop handles them.

    A KeyboardInterrupt could be lost instead: Python ignores exceptions in finalizers and callbacks, where it may arise.
    """
    received: list[int] = []
    usual = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in _STOPPING}
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's event loop if it is installed: its socket writes cost half as much, and streams consist of them."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: a stopping server first finishes its running requests."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _loader(
    model: str,
    config: ServerConfig,
    engine_config: EngineConfig,
    *,
    progress: bool,
    log_format: Literal["text", "json"] | None,
    log_file: str | None,
) -> Callable[[], Callable[[], Awaitable[Backend]]]:
    """Returns a function that loads the model in a thread and returns one that makes the backend in the event loop."""

    def one() -> Callable[[], Awaitable[Backend]]:
        engine = Engine.from_pretrained(model, engine_config, progress=progress)

        async def backend() -> Backend:
            return AsyncEngine(engine, max_queue=config.max_queue, sleep_idle=config.sleep_idle)

        return backend

    def several() -> Callable[[], Awaitable[Backend]]:
        # Config and tokenizer only: this process must not use an accelerator that belongs to a replica.
        checkpoint = open_checkpoint(resolve_model(model))
        tokenizer = load_tokenizer(checkpoint.tokenizer_source).with_template(engine_config.chat_template)
        router = Router(
            model,
            engine_config,
            tokenizer,
            checkpoint.config,
            replicas=config.replicas,
            max_queue=config.max_queue,
            sleep_idle=config.sleep_idle,
            log_format=log_format,
            log_file=log_file,
        )
        return router.start

    return one if config.replicas == 1 else several


async def _log_progress(loading: asyncio.Task[Backend]) -> None:
    """Logs every few seconds that the model is still loading, and finally how long it took."""
    start = time.monotonic()
    while not (await asyncio.wait({loading}, timeout=LOADING_LOG_SECONDS))[0]:
        log.info("still loading after %.0f s", time.monotonic() - start)
    if not loading.cancelled() and loading.exception() is None:
        log.info("loaded and compiled in %.1f s", time.monotonic() - start)


async def load_backend(
    model: str,
    config: ServerConfig,
    engine_config: EngineConfig,
    *,
    log_format: Literal["text", "json"] | None = None,
    log_file: str | None = None,
    progress: bool = False,
) -> Backend:
    """Returns the backend for `model` when it is ready: one engine in this process, or several behind a router.

    With `log_format`, replicas log in this format, to `log_file` too. `progress` shows progress bars while a single engine
    loads and compiles, or the log of several.
    """
    log_format = log_format or ("text" if progress else None)
    make = await _in_daemon_thread(
        _loader(model, config, engine_config, progress=progress, log_format=log_format, log_file=log_file)
    )
    return await make()


def _in_daemon_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Runs `function` in a thread that does not keep the process alive; returns its result as a future."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            settle = partial(future.set_result, function())
        except Exception as error:
            settle = partial(future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the event loop has closed
            loop.call_soon_threadsafe(lambda: None if future.done() else settle())

    threading.Thread(target=run, name="fastgen-load", daemon=True).start()
    return future


def _check_tls(config: ServerConfig) -> None:
    """ValueError if the certificate and key cannot be used."""
    if config.tls_certificate is None or config.tls_key is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.tls_certificate, config.tls_key, password=lambda: "")  # never prompts
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(
            f"tls_certificate {config.tls_certificate!r} with tls_key {config.tls_key!r} cannot be used "
            f"({error}); pass PEM files with the certificate chain and its key, without a password"
        ) from error


def _raise_file_limit() -> None:
    """Raises the limit of open files to the system's maximum: each connection is one."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems report a higher limit than they allow
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another port, or 0 for a free one"
        ) from error
    return listener
