"""Engines to compare with ours, each in its own process and given the same token ids.

A `Peer` describes how to start a worker; a `Worker` is a running one. Loading and compiling happen before the first run, so
that only generation is timed for every engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import fastgen_jax
from fastgen_jax.bench.machine import ForeignLoad
from fastgen_jax.bench.metrics import RequestTimes
from fastgen_jax.bench.workloads import Workload
from fastgen_jax.json_types import JsonObject

WORKERS = Path(__file__).with_name("workers")
LOAD_SECONDS = 900.0  # compiling whole models takes minutes on few cores
RUN_SECONDS = 1800.0
END_SECONDS = 10.0  # an engine that takes longer to exit is killed
LOG_TAIL = 2000  # characters of a failed worker's log quoted in the error message


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How to start one engine's worker."""

    name: str
    python: str
    script: Path
    options: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        """The worker's command line, which can also be run by hand."""
        return [self.python, str(self.script), json.dumps(self.options)]


def fastgen_peer(model: str, *, config: Mapping[str, Any], name: str = "fastgen_jax", checkout: Path | None = None) -> Peer:
    """This engine. Prefix caching is off unless `config` enables it, because rounds repeat the same prompts.

    `checkout` is the root of another version's source tree, to compare with; ValueError if it has no such worker.
    """
    root = Path(fastgen_jax.__file__).parent.parent if checkout is None else checkout.absolute()
    script = root / WORKERS.relative_to(Path(fastgen_jax.__file__).parent.parent) / "fastgen_worker.py"
    if not script.is_file():
        raise ValueError(f"{checkout} is not a source tree of fastgen_jax: it has no {script.relative_to(root)}")
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return Peer(
        name=name,
        python=sys.executable,
        script=script,
        options={"model": model, "config": {"prefix_caching": False, **config}},
        environment={"PYTHONPATH": path},
    )


def vllm_peer(
    python: str,
    model: str,
    *,
    threads: int,
    max_model_len: int,
    dtype: str = "float32",
    enforce_eager: bool = False,
    max_num_batched_tokens: int = 2048,
    max_num_seqs: int = 32,
    kv_gb: int = 2,
    engine_process: bool = True,
    preload: str | None = None,
    name: str = "vllm",
) -> Peer:
    """vLLM's engine; `model` is a Hugging Face directory, `preload` the libraries that its CPU guide recommends."""
    options = {
        "model": model,
        "threads": threads,
        "dtype": dtype,
        "enforce_eager": enforce_eager,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
        "kv_gb": kv_gb,
        "engine_process": engine_process,
    }
    environment = {"LD_PRELOAD": preload} if preload else {}
    return Peer(name=name, python=python, script=WORKERS / "vllm_worker.py", options=options, environment=environment)


def llama_server_peer(
    server: str, gguf: str, *, threads: int, slots: int, context_per_slot: int, name: str = "llama.cpp"
) -> Peer:
    """llama.cpp's server over HTTP on this machine, one slot per request."""
    options = {
        "server": server,
        "model": gguf,
        "threads": threads,
        "slots": slots,
        "context_per_slot": context_per_slot,
        "extra": [],
    }
    return Peer(name=name, python=sys.executable, script=WORKERS / "llama_server_worker.py", options=options)


def transformers_peer(
    python: str,
    model: str,
    *,
    threads: int,
    mode: Literal["static", "continuous"] = "static",
    batch_size: int = 32,
    dtype: str = "float32",
    name: str = "transformers",
) -> Peer:
    """transformers' `generate` over left-padded batches ("static") or its own continuous batching."""
    options = {"model": model, "threads": threads, "dtype": dtype, "mode": mode, "batch_size": batch_size}
    return Peer(
        name=name,
        python=python,
        script=WORKERS / "transformers_worker.py",
        options=options,
        environment={"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
    )


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of one run of a workload: times and tokens of each request, and the engine's own counters if any."""

    times: tuple[RequestTimes, ...]
    token_ids: dict[str, list[int]]
    extras: dict[str, Any]
    foreign_cores: float
    """CPU cores that other programs kept busy during the run; near 0, or the figures cannot be trusted."""


class Worker:
    """A running engine; a context manager that starts and ends its processes.

    Between runs the processes are stopped (SIGSTOP): some engines spin while idle and would slow down the next one.
    """

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.description: JsonObject = {}
        """Engine, version and options, reported by the worker once it is loaded."""

    def __enter__(self) -> Worker:
        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"bench-{self.peer.name.replace('/', '-')}-", suffix=".log")
        self._process = subprocess.Popen(
            self.peer.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            env={**os.environ, **self.peer.environment},
        )
        try:
            self.description = self._read(LOAD_SECONDS)
        except BaseException:
            self._end()
            raise
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def run(self, workload: Workload) -> RunResult:
        """Runs `workload` once; raises RuntimeError if the engine fails or returns a wrong number of tokens."""
        assert self._process.stdin is not None
        requests = workload.to_jsonable()["requests"]
        foreign = ForeignLoad(self._process.pid)
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"requests": requests}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError(self._failure("ended")) from error
        reply = self._read(RUN_SECONDS)
        self._signal(signal.SIGSTOP)
        foreign_cores = foreign.cores()
        records = {record["request_id"]: record for record in reply.pop("requests")}
        for request in workload.requests:
            got = len(records[request.request_id]["token_ids"])
            if got != request.max_new_tokens:
                raise RuntimeError(
                    f"{self.peer.name} generated {got} tokens for {request.request_id} instead of "
                    f"{request.max_new_tokens}; its figures would not be comparable"
                )
        return RunResult(
            times=tuple(RequestTimes.from_record(record) for record in records.values()),
            token_ids={request_id: record["token_ids"] for request_id, record in records.items()},
            extras=reply,
            foreign_cores=foreign_cores,
        )

    def _read(self, seconds: float) -> JsonObject:
        """Waits at most `seconds` for the worker's next line."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            raise RuntimeError(self._failure(f"did not answer within {seconds:.0f} s"))
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._failure("ended"))
        return json.loads(line)

    def _failure(self, what: str) -> str:
        self._log.flush()
        tail = Path(self._log.name).read_text(errors="replace")[-LOG_TAIL:]
        return f"the worker of {self.peer.name} {what}; the end of its log:\n{tail}"

    def _signal(self, number: signal.Signals) -> None:
        """Sends a signal to the worker and everything it started, which share a process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=END_SECONDS)
        self._signal(signal.SIGKILL)  # whatever is left of the group: servers and engine processes
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


def run_llama_bench(binary: str, gguf: str, *, threads: int, prompt: int = 512, output: int = 128) -> dict[str, float]:
    """llama.cpp's own benchmark without server or batching: tokens per second, e.g. {"pp512": ..., "tg128": ...}."""
    command = [binary, *f"-t {threads} -p {prompt} -n {output} -r 3 -o json".split(), "-m", gguf]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{binary} ended with code {finished.returncode}: {finished.stderr[-LOG_TAIL:]}")
    rows = json.loads(finished.stdout)
    return {f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}": float(row["avg_ts"]) for row in rows}
