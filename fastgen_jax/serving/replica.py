"""A replica: an engine in a separate process, connected by a socket. Run as `python -m fastgen_jax.serving.replica FD`.

It receives ("submit", request, grammar, deadline), ("abort", id), ("snapshot", number, since_step), ("pool", number, texts,
pooling, token_ids), ("call", number, name of a method of the engine, options) and ("stop",). It sends ("ready", resolved
config), ("events", events, load), ("answer", number, answer or exception) and ("failed", message).
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from fastgen_jax.serving.frames import pack, receive


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """What a replica runs, and on which part of the machine."""

    model: str
    engine: Mapping[str, Any]
    """Options of `EngineConfig`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that choose its accelerator."""
    cpus: tuple[int, ...] | None = None
    """CPUs that it may use; None: all."""
    sleep_idle: float | None = None
    """Seconds without a request after which it gives its memory back; None: never."""
    name: str = "replica"
    """Its name in the log."""
    log_format: Literal["text", "json"] | None = None
    """Format of its log; None: no log."""
    log_file: str | None = None
    """File that the log goes to in addition to standard error."""


def share_machine(count: int) -> list[tuple[dict[str, str], tuple[int, ...] | None]]:
    """Returns environment and CPUs of `count` replicas: equal shares of the accelerators, or of the CPUs without any."""
    for pattern, variable in (("nvidia", "CUDA_VISIBLE_DEVICES"), ("accel", "TPU_VISIBLE_CHIPS")):
        found = sorted(n for n in os.listdir("/dev") if n.startswith(pattern) and n[len(pattern) :].isdigit())
        if found and os.environ.get("JAX_PLATFORMS") != "cpu":
            given = os.environ.get(variable)
            devices = given.split(",") if given else [str(i) for i in range(len(found))]
            if len(devices) < count:
                raise ValueError(
                    f"replicas is {count} but there are {len(devices)} accelerators; use at most {len(devices)} replicas"
                )
            each = len(devices) // count
            return [({variable: ",".join(devices[i * each : (i + 1) * each])}, None) for i in range(count)]
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if count == 1 or len(cpus) < count:
        return [({}, None)] * count
    each = len(cpus) // count
    return [({}, tuple(cpus[i * each : (i + 1) * each])) for i in range(count)]


def main(descriptor: int) -> None:
    """Runs the engine until the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the router decides when the replica ends
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=descriptor)
    plan: ReplicaPlan = receive(connection)
    os.environ.update(plan.environment)
    if plan.cpus is not None:
        os.sched_setaffinity(0, plan.cpus)  # before JAX is imported and counts them

    from fastgen_jax.api.engine_thread import EngineThread, Event, Failure
    from fastgen_jax.api.pooling import Pooling, pool
    from fastgen_jax.api.snapshot import take_snapshot
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.engine.engine import Engine
    from fastgen_jax.engine.prompts import TokenIds
    from fastgen_jax.scheduling import Request
    from fastgen_jax.serving.logs import set_up_logging
    from fastgen_jax.text.grammar import Grammar, compile_threads

    if plan.log_format is not None:
        set_up_logging(plan.log_format, file=plan.log_file, source=plan.name)
    try:
        engine = Engine.from_pretrained(plan.model, EngineConfig.from_options(dict(plan.engine)))
    except Exception as error:
        connection.sendall(pack(("failed", f"{type(error).__name__}: {error}")))
        return
    gc.collect()
    gc.freeze()  # these objects live until the process ends
    outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_write, args=(connection, outbox), daemon=True).start()

    def deliver(events: Sequence[Event]) -> None:
        outbox.put(pack(("events", list(events), thread.load)))

    thread = EngineThread(engine, deliver, sleep_idle=plan.sleep_idle)
    # If the engine cannot recover, the process ends and the router starts another replica.
    threading.Thread(target=lambda: (thread.wait(), os._exit(3)), daemon=True).start()
    outbox.put(pack(("ready", engine.config)))

    def snapshot(number: int, since_step: int | None) -> None:
        plain = take_snapshot(engine, since_step=since_step)
        plain["counters"]["failed_steps"] = thread.num_failed_steps
        outbox.put(pack(("answer", number, plain)))

    def call(number: int, name: str, options: Mapping[str, Any]) -> None:
        try:
            method = {"update_params": engine.update_params, "pause": engine.pause, "resume": engine.resume}[name]
            answer: object = method(**options)
        except Exception as error:
            answer = error if isinstance(error, ValueError) else ValueError(f"{type(error).__name__}: {error}")
        outbox.put(pack(("answer", number, answer)))

    pooler = ThreadPoolExecutor(1)

    def answer_pool(number: int, texts: Sequence[TokenIds], pooling: Pooling, token_ids: tuple[int, ...]) -> None:
        try:
            answer: object = pool(engine, texts, pooling, token_ids=token_ids)
        except Exception as error:
            answer = error if isinstance(error, ValueError) else ValueError(f"{type(error).__name__}: {error}")
        outbox.put(pack(("answer", number, answer)))

    compiling: set[str] = set()  # ids of requests; changed with the lock
    lock = threading.Lock()

    def submit(request: Request, grammar: Grammar, deadline: float | None) -> None:
        try:
            matcher = engine.intake.matcher(grammar)
        except ValueError as error:
            deliver([Failure(request.request_id, "step", str(error))])
            return
        with lock:
            if request.request_id in compiling:  # it was not aborted
                compiling.discard(request.request_id)
                thread.submit(request, matcher, deadline=deadline)

    while True:
        try:
            kind, *rest = receive(connection)
        except (EOFError, OSError):
            return  # the router has closed; the thread is a daemon
        if kind == "submit":
            request, grammar, deadline = rest
            if grammar is None:
                thread.submit(request, None, deadline=deadline)
                continue
            with lock:
                compiling.add(request.request_id)
            compile_threads().submit(submit, request, grammar, deadline)  # a heavy grammar delays no other request
        elif kind == "abort":
            with lock:
                compiling.discard(*rest)
            thread.abort(*rest)
        elif kind == "snapshot":
            thread.call(lambda _, rest=rest: snapshot(*rest))
        elif kind == "call":
            threading.Thread(target=call, args=rest, daemon=True).start()  # beside the steps
        elif kind == "pool":
            pooler.submit(answer_pool, *rest)
        else:  # "stop"
            thread.close()
            return


def _write(connection: socket.socket, outbox: queue.SimpleQueue[bytes]) -> None:
    """Sends the messages of the outbox, so that the engine never waits for the router."""
    while True:
        try:
            connection.sendall(outbox.get())
        except OSError:
            os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)
