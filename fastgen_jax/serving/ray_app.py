"""Replicas on several machines: the server's application under Ray Serve, which places, balances and restarts them.

    from fastgen_jax.serving.ray_app import deploy
    deploy("smollm2-135m-instruct", replicas=4, engine={"token_budget": 256}, actor_options={"num_cpus": 8})

Ray's proxy sends each call, not each prompt, to the less busy of two replicas; the router of `fastgen serve` belongs to
one machine. Deadlines, queue limits and the rest work in each replica as they do there.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastgen_jax.api.deployment import check_name, default_name

MAX_ONGOING = 4096  # calls in a replica: its own queue limit refuses before, with a time to come back


def build(
    model: str,
    *,
    replicas: int = 1,
    engine: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
    actor_options: dict[str, Any] | None = None,
) -> Any:
    """The Ray Serve application, for `ray.serve.run` or a config file.

    `engine` are options of `EngineConfig`, `server` those of `ServerConfig` that a replica knows (api_key, max_queue,
    cors_origin, max_body_mb, served_model_name, deployment_name), `actor_options` what Ray is to reserve for a replica
    (num_cpus, num_gpus, resources). Raises ValueError if Ray is not installed, or for an option that does not exist.
    """
    serve = _ray_serve()
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.serving.settings import ServerConfig

    EngineConfig.from_options(engine or {})  # a mistake should show here, not in a replica's log
    ServerConfig(**(server or {}))
    if replicas < 1:
        raise ValueError(f"replicas is {replicas}; it must be at least 1")

    def application() -> Any:
        # Runs in the replica: what is above must not load JAX on the machine that only deploys.
        from fastgen_jax.api.async_engine import AsyncEngine
        from fastgen_jax.engine.engine import Engine
        from fastgen_jax.serving.app import Server, create_app
        from fastgen_jax.serving.settings import Served

        config = ServerConfig(**(server or {}))
        name = config.served_model_name or default_name(model)
        served = Served(name=name, deployment=check_name(config.deployment_name or name), config=config)
        loaded = Engine.from_pretrained(model, EngineConfig.from_options(engine or {}))
        return create_app(Server(served, AsyncEngine(loaded, max_queue=config.max_queue)))

    @serve.deployment(num_replicas=replicas, max_ongoing_requests=MAX_ONGOING, ray_actor_options=actor_options or {})
    @serve.ingress(application)
    class FastGen:
        """A replica."""

    deployed: Any = FastGen  # the decorators made something else of the class
    return deployed.bind()


def _ray_serve() -> Any:
    try:
        return importlib.import_module("ray.serve")
    except ImportError:
        raise ValueError("replicas on several machines need Ray; pip install 'fastgen_jax[ray]'") from None


def deploy(model: str, *, name: str | None = None, route_prefix: str = "/", **options: Any) -> Any:
    """Runs `build(model, **options)` on the Ray cluster and returns its handle when it is ready."""
    return _ray_serve().run(build(model, **options), name=name or default_name(model), route_prefix=route_prefix)
