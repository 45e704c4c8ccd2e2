"""The operator's choices for a server."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from fastgen_jax.api.deployment import SERVER_KEYS_VARIABLE


def _keys_of_environment() -> tuple[str, ...]:
    return tuple(filter(None, os.environ.get(SERVER_KEYS_VARIABLE, "").split(",")))


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a deployment is reached and how it behaves under load; the engine's choices are in `EngineConfig`."""

    deployment_name: str | None = None
    """Name by which clients find it on this machine. None: the model's own name."""
    served_model_name: str | None = None
    """What requests call the model. None: the last part of the model's path or id."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is reachable from other machines: give an api_key then."""
    port: int = 8000
    """TCP port; 0 takes a free one."""
    replicas: int = 1
    """EngineReplica, each in a process of its own if there are several."""
    api_key: tuple[str, ...] = field(default_factory=_keys_of_environment)
    """Keys that a request may carry as a bearer token; none: no key is asked for. By default FASTGEN_SERVER_KEYS,
    separated by commas, which other users of the machine cannot see in its list of processes."""
    cors_origin: tuple[str, ...] = ()
    """Web origins that browsers may call from; * allows all."""
    tls_certificate: str | None = None
    """PEM file; the server speaks HTTPS with it."""
    tls_key: str | None = None
    """PEM file of the certificate's key."""
    max_body_mb: float = 16.0
    """Largest request body, MiB."""
    max_queue: int = 1024
    """Requests that may wait in a replica; more are refused with 429 and the time to come back."""
    drain_seconds: float = 60.0
    """How long a server that is told to end goes on with what runs."""
    log_format: Literal["text", "json"] = "text"
    """Form of log lines; json has one object a line."""

    def __post_init__(self) -> None:
        for name, lowest in (("port", 0), ("replicas", 1), ("max_queue", 1), ("drain_seconds", 0), ("max_body_mb", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {lowest}")
        if self.port > 65535:
            raise ValueError(f"port is {self.port}; ports end at 65535")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; give both, or neither")
        if self.log_format not in ("text", "json"):
            raise ValueError(f"log_format is {self.log_format!r}; choose text or json")


@dataclass(kw_only=True)
class ServedModel:
    """What a server knows about the model it serves."""

    name: str
    deployment: str
    config: ServerConfig = field(default_factory=ServerConfig)
