"""Replicas on several machines: Ray Serve places, balances and restarts them.

    from fastgen_jax.serving.ray_app import deploy
    deploy("smollm2-135m-instruct", replicas=4, engine={"token_budget": 256}, actor_options={"num_cpus": 8})

One process, the ingress, serves HTTP and sends each prompt, rather than each call, to the engine that will finish it first,
taking cached prefixes into account. A request whose engine dies runs on another one. Deadlines, queue limits and everything
else work as under `fastgen serve`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any  # of Ray, an optional package, and of options

from fastgen_jax.api.deployment import default_name

MAX_ONGOING = 4096  # requests per replica: higher than its own queue limit, which answers with Retry-After
ROUTER = "fastgen_jax.serving.ray_router:PrefixRouter"
REPLICA_OPTIONS = ("api_key", "cors_origin", "deployment_name", "max_body_mb", "max_queue", "served_model_name")


def build(
    model: str,
    *,
    replicas: int = 1,
    max_replicas: int | None = None,
    autoscaling: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    server: Mapping[str, Any] | None = None,
    actor_options: Mapping[str, Any] | None = None,
) -> Any:
    """Returns the Ray Serve application, for `ray.serve.run` or a config file.

    `engine` has options of `EngineConfig`, `server` those of `ServerConfig` that Ray does not control (REPLICA_OPTIONS),
    and `actor_options` the resources that Ray reserves for an engine (num_cpus, num_gpus, resources). With
    `max_replicas` the number of engines follows the load, between `replicas` and that: each is to run as many requests as
    it has slots (`max_num_seqs`). `autoscaling` has further fields of Ray's AutoscalingConfig, such as upscale_delay_s.
    Raises ValueError if Ray is not installed, or for an unknown option.
    """
    serve = _ray_serve()
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.serving.ray_backend import EngineReplica, Ingress
    from fastgen_jax.serving.settings import ServerConfig

    choices = EngineConfig.from_options(dict(engine or {}))  # reports a mistake here instead of in a replica's log
    for name in server or {}:
        if name not in REPLICA_OPTIONS:
            raise ValueError(f"server has the option {name!r}; with Ray, use {', '.join(REPLICA_OPTIONS)}")
    config = ServerConfig(**(server or {}))
    if replicas < 1:
        raise ValueError(f"replicas is {replicas}; it must be at least 1")
    engines = serve.deployment(
        EngineReplica,
        **_number(replicas, max_replicas, autoscaling, slots=choices.max_num_seqs),
        request_router_config=_ray_config().RequestRouterConfig(request_router_class=ROUTER),
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options=dict(actor_options or {}),
    ).bind(model, dict(engine or {}), config.max_queue)
    # The ingress computes nothing, so it reserves nothing.
    ingress = serve.deployment(
        serve.ingress(None)(Ingress),
        name="Ingress",
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(engines, model, dict(server or {}))


def deploy(model: str, *, name: str | None = None, route_prefix: str = "/", **options: Any) -> Any:
    """Runs `build(model, **options)` on the Ray cluster; returns its handle when it is ready."""
    return _ray_serve().run(build(model, **options), name=name or default_name(model), route_prefix=route_prefix)


def _number(replicas: int, max_replicas: int | None, autoscaling: Mapping[str, Any] | None, *, slots: int) -> dict[str, Any]:
    """The arguments of Ray's deployment for a fixed number of replicas, or for one that follows the load."""
    if max_replicas is None:
        if autoscaling:
            raise ValueError(f"autoscaling is {dict(autoscaling)}, which requires max_replicas; set it, or omit autoscaling")
        return {"num_replicas": replicas}
    if max_replicas < replicas:
        raise ValueError(f"max_replicas is {max_replicas} but replicas, the least number, is {replicas}; raise max_replicas")
    limits = {"min_replicas": replicas, "max_replicas": max_replicas, "target_ongoing_requests": slots}
    return {"autoscaling_config": {**limits, **(autoscaling or {})}}


def _ray_config() -> Any:
    return importlib.import_module("ray.serve.config")


def _ray_serve() -> Any:
    try:
        return importlib.import_module("ray.serve")
    except ImportError:
        raise ValueError("replicas on several machines require Ray; pip install 'fastgen_jax[ray]'") from None
