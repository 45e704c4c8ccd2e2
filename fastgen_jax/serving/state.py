"""The state that the endpoints of one server share."""

from __future__ import annotations

import functools
import hashlib
import time

from fastgen_jax import __version__
from fastgen_jax.serving.errors import ApiError
from fastgen_jax.serving.metrics import ServerMetrics
from fastgen_jax.serving.settings import ServedModel
from fastgen_jax.serving.work import Backend


class ServerState:
    """The served model, its metrics, and the backend that answers requests.

    `backend` is None until the model is loaded and compiled; `failure` says why it could not be.
    """

    def __init__(self, model: ServedModel, backend: Backend | None = None) -> None:
        self.model = model
        self.backend = backend
        self.failure: str | None = None
        self.started = time.time()
        self.metrics = ServerMetrics(model.name)

    def ready(self) -> Backend:
        """Returns the backend; ApiError 503 while there is none."""
        if self.backend is None:
            raise ApiError(
                self.failure or "the model is still loading and compiling; poll /health to see when it is ready",
                status=503,
                type="server_error",
                code="loading",
                headers={"Retry-After": "5"},
            )
        return self.backend

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with the version, the model and the engine's settings, and so with the tokens of a seed."""
        intake = self.ready().intake
        facts = repr((__version__, self.model.root, intake.model, intake.config))
        return f"fp_{hashlib.sha256(facts.encode()).hexdigest()[:10]}"

    def check_model(self, name: str | None) -> None:
        """ApiError 404 if `name` is not the served model; None is accepted."""
        if name is not None and name not in (*self.model.names, self.model.deployment):
            raise ApiError(
                f"the model {name!r} is not served here; use {' or '.join(map(repr, self.model.names))}",
                status=404,
                param="model",
                code="model_not_found",
            )
