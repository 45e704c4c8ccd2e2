"""What is known about a model before its weights are read: enough to plan for it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

from fastgen_jax.checkpoint import open_checkpoint, quantized_weights, resolve_model
from fastgen_jax.checkpoint.hub_files import WEIGHT_FILES
from fastgen_jax.checkpoint.quantized import settings_beside, split_settings
from fastgen_jax.checkpoint.quantized.declared import declared_weights
from fastgen_jax.checkpoint.snapshot import MARKER, read_marker
from fastgen_jax.checkpoint.snapshot_blocks import kind_of
from fastgen_jax.engine.kept_forms import Stored
from fastgen_jax.json_types import JsonObject
from fastgen_jax.models.families import family_of

_PLAIN = ("F32", "F16", "BF16", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """A model, described by its config."""

    config: JsonObject  # the fields of a config.json
    stored_as: str  # how a GGUF file quantizes most weights, which are dequantized while loading; "" if it does not
    quantize: str | None  # what a snapshot was quantized to: "int8", "int4" or "fp8"
    stored: Stored = ()  # the weights that are quantized on disk, by path


def describe(name: str) -> Described:
    """Describes a model: a name that `resolve_model` accepts, or a config.json by itself or in a directory.

    For a repository on the hub only config.json is downloaded. Raises ValueError if nothing usable is found.
    """
    path = resolve_model(name, files=("config.json",))
    if path.is_dir():
        config = _read_config(path / "config.json")
        if (path / MARKER).exists():
            marker = read_marker(path)
            stored = [(weight, kind_of(format)) for weight, format in marker["blocks"].items() if weight != "embed"]
            return Described(config=config, stored_as="", quantize=marker["quantize"], stored=tuple(stored))
        has_weights = any(file for pattern in WEIGHT_FILES for file in path.glob(pattern))
        return Described(config=config, stored_as="", quantize=None, stored=_stored(config, path if has_weights else None))
    if path.suffix == ".json":
        config = _read_config(path)
        return Described(config=config, stored_as="", quantize=None, stored=_stored(config, None))
    checkpoint = open_checkpoint(path)
    numbers: Counter[str] = Counter()
    for tensor in checkpoint.tensor_names:
        numbers[checkpoint.dtype(tensor)] += math.prod(checkpoint.shape(tensor))
    kind = numbers.most_common(1)[0][0]
    return Described(
        config=dict(checkpoint.config_json),
        stored_as="" if kind in _PLAIN else kind,
        quantize=None,
        stored=tuple(quantized_weights(checkpoint).items()),
    )


def _stored(config: JsonObject, folder: Path | None) -> Stored:
    """The quantized weights of a checkpoint: by the headers of the files in `folder`, or without them by its settings."""
    settings, fields = split_settings(config)
    if folder is not None and (settings or settings_beside(folder)):
        return tuple(quantized_weights(open_checkpoint(folder)).items())
    if settings is None:
        return ()
    model = family_of(fields["architectures"][0]).config_from_hf(fields)
    dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "float16")
    return tuple(declared_weights(settings, model, dtype).items())


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
