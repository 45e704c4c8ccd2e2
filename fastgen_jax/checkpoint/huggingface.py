"""Directories as Hugging Face writes them: config.json beside one or several safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen_jax.checkpoint.base import missing_tensor
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import family_of

_FLOATS = ("F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class HuggingFaceCheckpoint:
    """See `Checkpoint`. Tensors are memory-mapped; reading one touches its own pages alone."""

    path: Path
    config: ModelConfig
    files: Mapping[str, Any]  # tensor name -> the open safetensors file that holds it
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, path: Path) -> HuggingFaceCheckpoint:
        """Reads config.json, generation_config.json and the headers of all shards; ValueError names a broken file."""
        hf = read_json(path / "config.json")
        config = _model_config(hf, path)
        files: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file, expected in _shards(path).items():
            shard = _open_shard(file)
            names = set(shard.keys())
            if expected is not None and expected - names:
                raise ValueError(f"{path / _INDEX} says that {file.name} holds {min(expected - names)!r}, "
                                 "but it does not; download the checkpoint again")
            for name in names:
                if name in files:
                    raise ValueError(f"the tensor {name!r} lies in two files of {path}; remove the stale one")
                piece = shard.get_slice(name)
                if piece.get_dtype() not in _FLOATS and not name.endswith(".inv_freq"):
                    raise ValueError(f"{file}: tensor {name!r} has dtype {piece.get_dtype()}; supported: "
                                     f"{', '.join(_FLOATS)} (quantised checkpoints only as GGUF)")
                files[name], shapes[name] = shard, tuple(piece.get_shape())
        return cls(path=path, config=config, files=files, shapes=shapes)

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self.files)

    @property
    def tokenizer_source(self) -> Path:
        return self.path

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise missing_tensor(name, self.path, self.shapes)
        return self.shapes[name]

    def read(self, name: str) -> np.ndarray:
        self.shape(name)
        return self.files[name].get_tensor(name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError names the file if it is absent, broken or something else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a Hugging Face checkpoint directory needs it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def _model_config(hf: dict[str, Any], path: Path) -> ModelConfig:
    architectures = hf.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ValueError(f"{path / 'config.json'}: 'architectures' must name one architecture, got {architectures!r}")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method", "unknown")
        raise ValueError(f"{path / 'config.json'}: the weights are quantised ({method}); pass the original checkpoint "
                         "(it can be quantised while loading) or a GGUF file")
    generation = path / "generation_config.json"
    eos = [*_as_list(hf.get("eos_token_id"))]
    if generation.exists():
        eos += _as_list(read_json(generation).get("eos_token_id"))
    hf = {**hf, "eos_token_id": list(dict.fromkeys(eos))}
    try:
        return family_of(architectures[0]).config_from_hf(hf)
    except KeyError as error:
        raise ValueError(f"{path / 'config.json'} lacks the field {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from error


def _as_list(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _shards(path: Path) -> dict[Path, set[str] | None]:
    """The safetensors files and, where an index says so, the tensors that each must hold."""
    index = path / _INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no 'weight_map'; download it again")
        shards: dict[Path, set[str] | None] = {}
        for file in sorted(set(weight_map.values())):
            if not (path / file).exists():
                raise ValueError(f"{index} names {file}, which is absent; download the checkpoint again")
            shards[path / file] = {name for name, other in weight_map.items() if other == file}
        return shards
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: None}
    if found:
        raise ValueError(f"{path} has {len(found)} safetensors files but no {_INDEX}; download the checkpoint again")
    pickled = [file.name for file in sorted(path.glob("*.bin"))]
    raise ValueError(
        f"{path} has no .safetensors file"
        + (f", only {', '.join(pickled[:3])}; pickled weights are not read because they can run code: "
           "load them with transformers and save_pretrained them as safetensors" if pickled else
           "; pass the directory that holds config.json and model.safetensors")
    )


def _open_shard(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or corrupt ({error}); download it again") from error
