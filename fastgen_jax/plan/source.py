"""What is known about a model before its weights are read: enough to plan for it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

from fastgen_jax.checkpoint import open_checkpoint, resolve_model
from fastgen_jax.checkpoint.snapshot import MARKER
from fastgen_jax.json_types import JsonObject

_PLAIN = ("F32", "F16", "BF16", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """A model, described by its config."""

    config: JsonObject  # the fields of a config.json
    stored_as: str  # how a GGUF file quantizes most weights, which are dequantized while loading; "" if it does not
    quantize: str | None  # "int8" for a snapshot whose weights are stored as int8


def describe(name: str) -> Described:
    """Describes a model: a name that `resolve_model` accepts, or a config.json by itself or in a directory.

    For a repository on the hub only config.json is downloaded. Raises ValueError if nothing usable is found.
    """
    path = resolve_model(name, files=("config.json",))
    if path.is_dir():
        marker = path / MARKER
        quantize = json.loads(marker.read_text()).get("quantize") if marker.exists() else None
        return Described(config=_read_config(path / "config.json"), stored_as="", quantize=quantize)
    if path.suffix == ".json":
        return Described(config=_read_config(path), stored_as="", quantize=None)
    checkpoint = open_checkpoint(path)
    numbers: Counter[str] = Counter()
    for tensor in checkpoint.tensor_names:
        numbers[checkpoint.dtype(tensor)] += math.prod(checkpoint.shape(tensor))
    kind = numbers.most_common(1)[0][0]
    return Described(config=dict(checkpoint.config_json), stored_as="" if kind in _PLAIN else kind, quantize=None)


def _read_config(file: Path) -> JsonObject:
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(
            f"cannot read {file}: {error.strerror}; pass a model, or a directory that contains a config.json"
        ) from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or not config.get("architectures"):
        raise ValueError(f"{file} has no architectures, so it is not the config.json of a model")
    return config
