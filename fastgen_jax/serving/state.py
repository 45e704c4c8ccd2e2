"""The state that the endpoints of one server share."""

from __future__ import annotations

import functools
import hashlib
import time

from fastgen_jax import __version__
from fastgen_jax.serving.errors import ApiError
from fastgen_jax.serving.metrics import ServerMetrics
from fastgen_jax.serving.settings import ServedModel
from fastgen_jax.serving.stored_chats import ChatStore
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
        self.chats = ChatStore()

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

    def name_of(self, name: str | None) -> str:
        """The model's name in answers: the one that the request has, else the first served one."""
        return name or self.model.name

    def check_model(self, name: str | None) -> None:
        """ApiError 404 if `name` is not the served model itself; None is accepted."""
        if not self._is_model(name):
            raise self._unknown(name)

    def adapter_of(self, name: str | None) -> str | None:
        """The adapter that `name`, of the form model:adapter, selects; None for the model itself.

        The name of an adapter alone is accepted too, as vLLM has it. ApiError 404 for any other name.
        """
        if name is None or self._is_model(name):
            return None
        model, _, adapter = name.rpartition(":")
        names_model = bool(model) and self._is_model(model)
        if names_model:
            self.ready()  # it may be one of those that are being loaded
        chosen = adapter if names_model else name
        if self.backend is not None and chosen in self.backend.adapters:
            return chosen
        raise self._unknown(name)

    def _is_model(self, name: str | None) -> bool:
        return name is None or name in (*self.model.names, self.model.deployment)

    def _unknown(self, name: str | None) -> ApiError:
        adapters = self.backend.adapters if self.backend is not None else {}
        loaded = f", or {self.model.name}:ADAPTER with one of the loaded adapters: {', '.join(sorted(adapters))}"
        return ApiError(
            f"the model {name!r} is not served here; use {' or '.join(map(repr, self.model.names))}"
            f"{loaded if adapters else ''}",
            status=404,
            param="model",
            code="model_not_found",
        )
