"""fastgen_jax: high-throughput text generation with JAX.

    import fastgen_jax
    pipe = fastgen_jax.pipeline("smollm2-135m-instruct")
    print(pipe("DeepSpeed is", max_new_tokens=32)[0])

Importing it is cheap: JAX is loaded with the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastgen_jax.version import VERSION

if TYPE_CHECKING:
    from fastgen_jax.api.async_engine import AsyncEngine as AsyncEngine
    from fastgen_jax.api.async_engine import ClosedError as ClosedError
    from fastgen_jax.api.async_engine import QueueFullError as QueueFullError
    from fastgen_jax.api.async_engine import RequestFailedError as RequestFailedError
    from fastgen_jax.api.client import AsyncClient as AsyncClient
    from fastgen_jax.api.client import Client as Client
    from fastgen_jax.api.client import ServerError as ServerError
    from fastgen_jax.api.client import async_client as async_client
    from fastgen_jax.api.client import client as client
    from fastgen_jax.api.client import serve as serve
    from fastgen_jax.api.pipeline import Pipeline as Pipeline
    from fastgen_jax.api.pipeline import Response as Response
    from fastgen_jax.api.pipeline import pipeline as pipeline
    from fastgen_jax.api.research import Research as Research
    from fastgen_jax.engine.config import EngineConfig as EngineConfig
    from fastgen_jax.engine.engine import Engine as Engine
    from fastgen_jax.engine.outputs import RequestOutput as RequestOutput
    from fastgen_jax.engine.outputs import TokenLogprob as TokenLogprob
    from fastgen_jax.scheduling import SamplingParams as SamplingParams

__version__ = VERSION

_HOMES = {
    "AsyncClient": "fastgen_jax.api.client",
    "AsyncEngine": "fastgen_jax.api.async_engine",
    "Client": "fastgen_jax.api.client",
    "ClosedError": "fastgen_jax.api.async_engine",
    "QueueFullError": "fastgen_jax.api.async_engine",
    "RequestFailedError": "fastgen_jax.api.async_engine",
    "ServerError": "fastgen_jax.api.client",
    "async_client": "fastgen_jax.api.client",
    "client": "fastgen_jax.api.client",
    "serve": "fastgen_jax.api.client",
    "Pipeline": "fastgen_jax.api.pipeline",
    "Response": "fastgen_jax.api.pipeline",
    "pipeline": "fastgen_jax.api.pipeline",
    "Research": "fastgen_jax.api.research",
    "EngineConfig": "fastgen_jax.engine.config",
    "Engine": "fastgen_jax.engine.engine",
    "RequestOutput": "fastgen_jax.engine.outputs",
    "TokenLogprob": "fastgen_jax.engine.outputs",
    "SamplingParams": "fastgen_jax.scheduling",
}
__all__ = [
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
