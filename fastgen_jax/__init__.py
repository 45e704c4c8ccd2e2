"""High-throughput generation of text with large language models, in JAX, on TPUs, GPUs and CPUs.

    import fastgen_jax

    pipe = fastgen_jax.pipeline("smollm2-135m-instruct")  # or a directory, a .gguf file, a Hugging Face repo id
    print(pipe("The three primary colors are", max_new_tokens=32)[0])
    for output in pipe.stream("Once upon a time", temperature=0.7):
        print(output.text, end="")

Where to start:

    pipeline, Pipeline      prompts in, responses out; help(fastgen_jax.Pipeline)
    SamplingParams          how a prompt is continued: lengths, temperature, stops, seed
    EngineConfig            how a model runs: data types, devices, KV cache, steps
    serve, client           a server that outlives the program, and its clients
    Engine, AsyncEngine     the engine itself, one step at a time or for asyncio
    Research                logits, forks, hidden states

In a terminal: `fastgen --help`, and `fastgen doctor` if something does not work. Importing this package is cheap: JAX is
imported with the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastgen_jax.version import VERSION

if TYPE_CHECKING:
    from fastgen_jax.api.async_engine import AsyncEngine, ClosedError, QueueFullError, RequestFailedError
    from fastgen_jax.api.client import AsyncClient, Client, ServerError, async_client, client, serve
    from fastgen_jax.api.pipeline import Pipeline, Response, pipeline
    from fastgen_jax.api.research import Research
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.engine.engine import Engine
    from fastgen_jax.engine.outputs import RequestOutput, TokenLogprob
    from fastgen_jax.scheduling import SamplingParams

__version__ = VERSION

# The imports above for run time, where a module is imported with the first use of one of its names.
_EXPORTS = {
    "fastgen_jax.api.async_engine": ("AsyncEngine", "ClosedError", "QueueFullError", "RequestFailedError"),
    "fastgen_jax.api.client": ("AsyncClient", "Client", "ServerError", "async_client", "client", "serve"),
    "fastgen_jax.api.pipeline": ("Pipeline", "Response", "pipeline"),
    "fastgen_jax.api.research": ("Research",),
    "fastgen_jax.engine.config": ("EngineConfig",),
    "fastgen_jax.engine.engine": ("Engine",),
    "fastgen_jax.engine.outputs": ("RequestOutput", "TokenLogprob"),
    "fastgen_jax.scheduling": ("SamplingParams",),
}
_HOMES = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = [  # a literal, which type checkers can read
    "AsyncClient",
    "AsyncEngine",
    "Client",
    "ClosedError",
    "Engine",
    "EngineConfig",
    "Pipeline",
    "QueueFullError",
    "RequestFailedError",
    "RequestOutput",
    "Research",
    "Response",
    "SamplingParams",
    "ServerError",
    "TokenLogprob",
    "__version__",
    "async_client",
    "client",
    "pipeline",
    "serve",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
