"""The operator's settings of a server."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from fastgen_jax.api.deployment import SERVER_KEYS_VARIABLE

TOOL_FORMATS = (
    "hermes",
    "llama",
    "pythonic",
    "mistral",
    "mistral-v11",
    "qwen3-coder",
    "glm",
    "deepseek-v3",
    "deepseek-v3.1",
    "harmony",
)
REASONING_FORMATS = ("think", "mistral", "seed", "harmony", "none")


def _keys_of_environment() -> tuple[str, ...]:
    return tuple(filter(None, os.environ.get(SERVER_KEYS_VARIABLE, "").split(",")))


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of a deployment: address, security, load limits, logs. Those of the engine are in `EngineConfig`."""

    deployment_name: str | None = None
    """Name by which clients on this machine find the server. None: the last part of the model's path or id."""
    served_model_name: tuple[str, ...] = ()
    """Names of the model in requests; metrics have the first. None: the last part of the model's path or id."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 accepts connections from other machines; set `api_key` with it."""
    port: int = 8000
    """TCP port; 0 chooses a free one."""
    replicas: int = 1
    """Number of engines; with more than one, each runs in a separate process."""
    api_key: tuple[str, ...] = field(default_factory=_keys_of_environment)
    """Bearer tokens that requests may use; none: no key is required. Defaults to FASTGEN_SERVER_KEYS (comma-separated),
    which does not appear in the process list."""
    cors_origin: tuple[str, ...] = ()
    """Web origins whose pages may call the server; * allows all."""
    tls_certificate: str | None = None
    """PEM file with the certificate chain; enables HTTPS."""
    tls_key: str | None = None
    """PEM file with the certificate's private key."""
    max_body_mb: float = 16.0
    """Maximum size of a request body, in MiB."""
    max_queue: int = 1024
    """Maximum number of waiting requests per replica; further ones get status 429 and a Retry-After header."""
    drain_seconds: float = 60.0
    """Seconds that running requests have to finish after the server is told to stop."""
    sleep_idle: float | None = None
    """Seconds without a request after which an engine gives the memory of its weights and KV cache back; the next request
    wakes it. None: never."""
    weights_folder: str | None = None
    """Folder of checkpoints that POST /v1/weights, and of adapters that POST /v1/load_lora_adapter may load into the running
    engine; it also allows /v1/unload_lora_adapter, /v1/pause and /v1/resume. None: these are refused."""
    tool_format: str | None = None
    """How the model writes tool calls: hermes, llama, pythonic, mistral, mistral-v11, qwen3-coder, glm, deepseek-v3,
    deepseek-v3.1 or harmony. None: chosen by the chat template."""
    reasoning_format: str | None = None
    """How the model marks its reasoning: think, mistral, seed, harmony, or none. None: chosen by the chat template."""
    pooling: Literal["last", "mean"] = "last"
    """What /v1/embeddings returns: the vector of the last token, or the average over all tokens."""
    scoring: Literal["cosine", "yes-no"] | None = None
    """How /v1/score and /rerank compare texts: the cosine of their vectors, or the probability of "yes", as
    Qwen3-Reranker does. None: yes-no if the model's name contains "rerank", otherwise cosine."""
    trust_request_chat_template: bool = False
    """Lets requests replace the model's chat template. A template is a program; it runs in a sandbox, but without a limit
    on its time and memory."""
    image_folder: str | None = None
    """Folder of pictures that requests may name as file:///path. None: they are refused."""
    remote_images: bool = False
    """Fetch pictures that requests name by http and https addresses on the public internet. Off: they are refused."""
    remote_image_seconds: float = 10.0
    """Seconds within which such a picture must be received."""
    log_format: Literal["text", "json"] = "text"
    """Format of the log; json writes one object per line."""

    def __post_init__(self) -> None:
        if isinstance(self.served_model_name, str):  # the usual case of one name
            object.__setattr__(self, "served_model_name", (self.served_model_name,))
        for name, lowest in (("port", 0), ("replicas", 1), ("max_queue", 1), ("drain_seconds", 0), ("max_body_mb", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {lowest}")
        if self.sleep_idle is not None and self.sleep_idle <= 0:
            raise ValueError(f"sleep_idle is {self.sleep_idle}; it must be a positive number of seconds, or None")
        if self.weights_folder is not None and not os.path.isdir(self.weights_folder):
            raise ValueError(f"weights_folder is {self.weights_folder!r}, which is not a folder; create it, or omit it")
        if self.image_folder is not None and not os.path.isdir(self.image_folder):
            raise ValueError(f"image_folder is {self.image_folder!r}, which is not a folder; create it, or omit it")
        if not self.remote_image_seconds > 0:
            raise ValueError(f"remote_image_seconds is {self.remote_image_seconds}; it must be positive")
        if self.port > 65535:
            raise ValueError(f"port is {self.port}; it must be at most 65535")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; set both or neither")
        for name, known in (("tool_format", TOOL_FORMATS), ("reasoning_format", REASONING_FORMATS)):
            if getattr(self, name) not in (None, *known):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; choose {', '.join(known[:-1])} or {known[-1]}, or omit it"
                )
        if self.pooling not in ("last", "mean"):
            raise ValueError(f"pooling is {self.pooling!r}; choose last or mean")
        if self.scoring not in (None, "cosine", "yes-no"):
            raise ValueError(f"scoring is {self.scoring!r}; choose cosine or yes-no, or omit it")
        if self.log_format not in ("text", "json"):
            raise ValueError(f"log_format is {self.log_format!r}; choose text or json")


@dataclass(kw_only=True)
class ServedModel:
    """Names of the served model, and the settings it is served with."""

    name: str
    """The model's name in requests and metrics."""
    deployment: str
    """The deployment's name on this machine."""
    config: ServerConfig = field(default_factory=ServerConfig)
    other_names: tuple[str, ...] = ()
    """Further names in requests."""
    root: str | None = None
    """Where the model comes from: its directory, file or repo id."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names in requests."""
        return (self.name, *self.other_names)
