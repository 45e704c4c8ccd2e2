"""The parts that run under Ray Serve: engines, one per replica, and the ingress that sends each prompt to one of them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any  # of Ray's handles, which are untyped here, and of options

from fastapi import FastAPI

from fastgen_jax.api.async_engine import AsyncEngine, ClosedError, QueueFullError, RequestFailedError, Stream
from fastgen_jax.api.deployment import check_name, default_name
from fastgen_jax.api.engine_thread import Event, Failure
from fastgen_jax.api.pooling import Pooled, Pooling
from fastgen_jax.checkpoint import open_checkpoint, resolve_model
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.intake import Intake
from fastgen_jax.engine.prompts import TokenIds
from fastgen_jax.engine.resolve import ResolvedConfig
from fastgen_jax.engine.updating import PauseMode
from fastgen_jax.scheduling import Request
from fastgen_jax.serving.app import create_app
from fastgen_jax.serving.remote import RoutedRequest
from fastgen_jax.serving.settings import ServedModel, ServerConfig
from fastgen_jax.serving.state import ServerState
from fastgen_jax.serving.work import Snapshot, beside
from fastgen_jax.text import load_tokenizer
from fastgen_jax.text.grammar import Grammar, GrammarMatcher

SNAPSHOT_SECONDS = 5.0
RETRY_SECONDS = 0.2  # until Ray notices that a replica is gone


class EngineReplica:
    """A replica: an engine that answers requests on the machine that Ray chooses."""

    async def __init__(self, model: str, engine: Mapping[str, Any], max_queue: int) -> None:
        loaded = await asyncio.to_thread(Engine.from_pretrained, model, EngineConfig.from_options(dict(engine)))
        self._config = loaded.config
        self._engine = AsyncEngine(loaded, max_queue=max_queue)

    def check_health(self) -> None:
        """Called by Ray from time to time; Ray starts another replica if it raises."""
        if not self._engine.is_ready:
            raise RuntimeError("the engine has ended")

    def config(self) -> ResolvedConfig:
        """Returns the engine's resolved config."""
        return self._config

    async def generate(
        self, request: Request, grammar: Grammar | None, seconds: float | None
    ) -> AsyncIterator[Sequence[Event]]:
        """Yields the events of a request, which has `seconds` left; leaving the loop early aborts it."""
        # Times of another machine's clock and ids given by an earlier server are not valid here.
        here = replace(request, request_id=uuid.uuid4().hex, arrival_time=time.monotonic())
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            matcher = None if grammar is None else await beside(self._engine.intake.matcher, grammar)
            stream = self._engine.submit(here, matcher=matcher, deadline=deadline)
        except QueueFullError as error:
            yield [Failure(here.request_id, "refused", str(error), retry_after=error.retry_after)]
            return
        except ValueError as error:
            yield [Failure(here.request_id, "step", str(error))]
            return
        try:
            async for outputs in stream.batches():
                yield outputs
        except RequestFailedError as error:
            yield [error.failure]
        finally:
            stream.close()

    async def pool(self, texts: Sequence[TokenIds], pooling: Pooling, token_ids: tuple[int, ...]) -> list[Pooled]:
        """See `AsyncEngine.pool`."""
        return await self._engine.pool(texts, pooling, token_ids=token_ids)

    async def snapshot(self, since_step: int | None) -> Snapshot:
        """See `take_snapshot`."""
        (snapshot,) = await self._engine.snapshots(since_step=since_step)
        return snapshot


class RayBackend:
    """A backend of the server that runs engines under Ray Serve, which chooses a replica with `PrefixRouter`.

    If a replica dies, its requests run elsewhere, and a partial answer continues where it stopped.
    """

    failure = None  # Ray restarts replicas without limit

    def __init__(self, engines: Any, intake: Intake, *, max_queue: int) -> None:
        self.intake = intake
        self.max_queue = max_queue
        self._engines = engines
        self._running: dict[str, asyncio.Task[None]] = {}
        self._closed = False

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return not self._closed

    @property
    def is_asleep(self) -> bool:
        """Always False: the cluster, not an engine, decides what memory is for."""
        return False

    @property
    def num_unfinished(self) -> int:
        """Number of requests that have not ended."""
        return len(self._running)

    def submit(
        self,
        request: Request,
        *,
        grammar: Grammar | None = None,
        matcher: GrammarMatcher | None = None,
        deadline: float | None = None,
    ) -> Stream:
        """See `AsyncEngine.submit`. Only the replica knows whether its queue is full, so the stream reports that."""
        if self._closed:
            raise ClosedError("this server accepts no more requests: it is shutting down")
        stream = Stream(request, self._on_stream_closed)
        routed = RoutedRequest(request, grammar, deadline, stream, [], 0)
        self._running[request.request_id] = asyncio.create_task(self._run(routed))
        return stream

    async def snapshots(self, *, since_step: int | None = None) -> list[Snapshot]:
        """Returns one snapshot per replica; none while a replica is being replaced."""
        answers = self._engines.broadcast("snapshot", since_step)
        try:
            return await asyncio.to_thread(answers.results, timeout_s=SNAPSHOT_SECONDS)
        except Exception:  # Ray's, of several kinds: a replica is being replaced
            return []

    async def update_params(self, params: str, *, version: int | None = None, recompute: bool = False) -> int:
        """ValueError: a replica that Ray starts later would have other weights."""
        raise ValueError("the weights of replicas under Ray cannot be replaced; use `fastgen serve --replicas`")

    async def pause(self, mode: PauseMode = "keep") -> None:
        """ValueError, as for `update_params`."""
        raise ValueError("replicas under Ray cannot be paused; use `fastgen serve --replicas`")

    async def resume(self) -> None:
        """ValueError, as for `pause`."""
        raise ValueError("replicas under Ray cannot be paused; use `fastgen serve --replicas`")

    async def pool(self, texts: Sequence[TokenIds], pooling: Pooling, *, token_ids: tuple[int, ...] = ()) -> list[Pooled]:
        """See `AsyncEngine.pool`."""
        return await self._engines.pool.remote(list(texts), pooling, token_ids)

    async def drain(self, timeout: float) -> bool:
        """Accepts no more requests and waits for the running ones; returns whether all have ended."""
        self._closed = True
        if self._running:
            await asyncio.wait(self._running.values(), timeout=timeout)
        return not self._running

    async def close(self) -> None:
        """Aborts the running requests. Ray stops the replicas."""
        self._closed = True
        for task in list(self._running.values()):
            task.cancel()

    async def _run(self, routed: RoutedRequest) -> None:
        ray_error: type[Exception] = importlib.import_module("ray.exceptions").RayError
        failure: Event | None = None
        try:
            while failure is None:
                try:
                    if await self._follow(routed):
                        return
                except ray_error:
                    failure = routed.note_replica_death()
                    await asyncio.sleep(RETRY_SECONDS)
        except Exception as error:
            failure = Failure(routed.request.request_id, "lost", f"Ray could not run this request: {error}")
        finally:
            self._running.pop(routed.request.request_id, None)
        routed.stream.put(failure)

    async def _follow(self, routed: RoutedRequest) -> bool:
        """Runs the request on a replica; returns whether it ended there."""
        seconds = None if routed.deadline is None else routed.deadline - time.monotonic()
        answer = self._engines.options(stream=True).generate.remote(routed.request, routed.grammar, seconds)
        try:
            async for events in answer:
                for event in events:
                    accepted = routed.accept(event)
                    if accepted is not None:
                        routed.stream.put(accepted)
                    if isinstance(accepted, Failure) or event.finished:
                        return True
        finally:
            with contextlib.suppress(Exception):  # Ray's, if it has ended
                answer.cancel()
        return False

    def _on_stream_closed(self, stream: Stream) -> None:
        task = self._running.pop(stream.request.request_id, None)
        if task is not None:
            task.cancel()


class Ingress:
    """The HTTP server. It loads the model's config and tokenizer, and needs no accelerator."""

    async def __init__(self, engines: Any, model: str, server: Mapping[str, Any]) -> None:
        self._engines, self._model = engines, model
        self._server = ServerConfig(**server)
        self._config: ResolvedConfig = await engines.config.remote()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray after `__init__`."""
        config = self._server
        checkpoint = open_checkpoint(resolve_model(self._model))
        intake = Intake(load_tokenizer(checkpoint.tokenizer_source), checkpoint.config, self._config)
        name, *others = config.served_model_name or (default_name(self._model),)
        served = ServedModel(
            name=name,
            deployment=check_name(config.deployment_name or name),
            config=config,
            other_names=tuple(others),
            root=self._model,
        )
        return create_app(ServerState(served, RayBackend(self._engines, intake, max_queue=config.max_queue)))
