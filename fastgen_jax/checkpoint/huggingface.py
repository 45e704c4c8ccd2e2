"""Checkpoint directories of Hugging Face: config.json with one or more safetensors or .bin files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fastgen_jax.checkpoint.base import is_buffer, missing_tensor
from fastgen_jax.checkpoint.block_kind import BlockKind
from fastgen_jax.checkpoint.hub_files import WEIGHT_FILES, is_of_model
from fastgen_jax.checkpoint.quantized import PackedTensor, settings_beside, shown, split_settings, unpack
from fastgen_jax.checkpoint.quantized.float8 import float8_of_weights_alone
from fastgen_jax.checkpoint.tensor_files import StoredTensor, read_safetensors, read_torch
from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import FAMILIES, family_of
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.experts import by_expert
from fastgen_jax.models.families.fields import is_multimodal
from fastgen_jax.models.params import all_specs
from fastgen_jax.models.weight_spec import Kind

if TYPE_CHECKING:
    from pallas_kernels.matmul import BlockWeight

_FLOATS = ("float32", "float16", "bfloat16")
RENAMED = {"backbone.embedding.weight": "backbone.embeddings.weight"}  # Nemotron-H as transformers 5 saves it
_SAFETENSORS_INDEX = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
T = TypeVar("T")
_TORCH_INDEX = "pytorch_model.bin.index.json"
# Parts of multimodal models beside their text model.
_VISION = (
    *("vision_tower.", "vision_model.", "visual.", "multi_modal_projector.", "mm_projector.", "connector."),
    "image_newline",
)
_AUDIO = ("audio_tower.", "embed_vision.", "embed_audio.")  # and more, of models that also hear
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceCheckpoint:
    """See `Checkpoint` and `HoldsBlocks`. Tensors are memory-mapped; reading one touches only its own pages."""

    path: Path
    config: ModelConfig
    config_json: JsonFields
    tensors: Mapping[str, StoredTensor | PackedTensor]
    quantization: str
    only_weights: bool
    """Whether 8-bit floats are weights alone; see `BlockKind`."""
    around_text: Mapping[str, StoredTensor | PackedTensor]
    """The other tensors of a multimodal model, under the names that they have in the file."""

    @classmethod
    def open(cls, path: Path, *, strict_config: bool = False) -> HuggingFaceCheckpoint:
        """Reads config.json, generation_config.json and the headers of all shards; ValueError names a damaged file."""
        hf = config_json(path)
        quantization, hf = split_settings(hf)  # tensors are dequantized when they are read
        quantization = quantization or settings_beside(path)
        config = model_config(hf, path / "config.json", strict=strict_config)
        tensors: dict[str, StoredTensor] = {}
        for file, expected in _shards(path).items():
            found = read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
            if expected is not None and expected - found.keys():
                raise ValueError(
                    f"the index of {path} says that {file.name} holds {min(expected - found.keys())!r}, "
                    "but it does not; download the checkpoint again"
                )
            for name, tensor in found.items():
                if name in tensors:
                    raise ValueError(f"the tensor {name!r} is in two files of {path}; remove the stale one")
                tensors[name] = tensor
        try:
            plain = _as_in_model(unpack(tensors, quantization), config) if quantization else tensors
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        around = {name: plain[name] for name in plain if is_multimodal(hf) and text_name(name, hf) is None}
        plain = decoder_tensors(plain, hf, config)
        for name, tensor in plain.items():
            if isinstance(tensor, StoredTensor) and tensor.dtype not in _FLOATS and not is_buffer(name):
                raise ValueError(
                    f"{tensor.file}: tensor {name!r} has dtype {tensor.dtype}; supported: "
                    f"{', '.join(_FLOATS)}, or a quantized dtype with its quantization_config in config.json"
                )
        said = shown(quantization) if quantization else ""
        alone = quantization is not None and float8_of_weights_alone(quantization)
        return cls(
            path=path,
            config=config,
            config_json=hf,
            tensors=plain,
            quantization=said,
            only_weights=alone,
            around_text=around,
        )

    @property
    def generation_config(self) -> JsonFields:
        return read_generation_config(self.path)

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    @property
    def sources(self) -> Mapping[str, Source]:
        return by_expert(self.config, FAMILIES[self.config.family].sources(self.config), self.tensors)

    @property
    def tokenizer_source(self) -> Path:
        return self.path

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def dtype(self, name: str) -> str:
        return self._stored(name).dtype

    def read(self, name: str) -> np.ndarray:
        return self._stored(name).map()

    def block_kind(self, name: str) -> BlockKind | None:
        stored = self.tensors.get(name)
        kind = stored.block_kind if isinstance(stored, PackedTensor) else None
        return kind and kind._replace(only_weights=self.only_weights and kind.is_float8)

    def read_blocks(self, name: str, entry: int | None = None) -> BlockWeight:
        stored = self._stored(name)
        assert isinstance(stored, PackedTensor), "it has a block_kind"
        return stored.blocks(entry)

    def _stored(self, name: str) -> StoredTensor | PackedTensor:
        if name not in self.tensors:
            raise missing_tensor(name, self.path, self.tensors)
        return self.tensors[name]


def how_to_replace(file: Path) -> str:
    """The remedy for a damaged file. A clone without Git LFS has pointers in place of large files."""
    with file.open("rb") as stream:
        is_pointer = stream.read(30).startswith(b"version https://git-lfs")
    return "it is a pointer of Git LFS: run `git lfs pull` in its folder" if is_pointer else "download it again"


def read_json(path: Path) -> JsonObject:
    """The JSON object in a file; ValueError names the file if it is absent, invalid or not an object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a Hugging Face checkpoint directory requires it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {how_to_replace(path)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def config_json(path: Path) -> JsonObject:
    """config.json, with the end-of-sequence ids of generation_config.json added to its own."""
    hf = read_json(path / "config.json")
    eos = [*_as_list(hf.get("eos_token_id")), *_as_list(read_generation_config(path).get("eos_token_id"))]
    return {**hf, "eos_token_id": list(dict.fromkeys(eos))}


def read_generation_config(folder: Path) -> JsonObject:
    """generation_config.json of a folder; empty if it has none."""
    file = folder / GENERATION_FILE
    return read_json(file) if file.exists() else {}


def model_config(hf: JsonFields, where: object, *, strict: bool = False) -> ModelConfig:
    """The `ModelConfig` of the fields of a config.json; errors begin with `where` it came from."""
    architectures = hf.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ValueError(f"{where}: 'architectures' must name one architecture, got {architectures!r}")
    try:
        return family_of(architectures[0]).config_from_hf(hf, strict=strict)
    except KeyError as error:
        raise ValueError(f"{where} lacks the field {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def decoder_tensors(tensors: Mapping[str, T], hf: JsonFields, config: ModelConfig) -> dict[str, T]:
    """The tensors of a checkpoint that belong to its text model, under the names that they have there.

    The others are those of the parts for images and audio, of multi-token prediction, which is not used, and keys of layers
    that read those of others.
    """
    if is_multimodal(hf):
        tensors = {inner: tensor for name, tensor in tensors.items() if (inner := text_name(name, hf)) is not None}
        tensors = _without_layers(tensors, hf.get("text_config", {}).get("cross_attention_layers") or ())
    if config.kv_sources:
        unused = tuple(
            f"model.layers.{layer}.self_attn.{part}."
            for layer in range(config.num_layers)
            if layer not in config.kv_layers
            for part in ("k_proj", "v_proj", "k_norm", "v_norm")
        )
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}
    extra = range(config.num_layers, config.num_layers + (hf.get("num_nextn_predict_layers") or 0))
    tensors = {RENAMED.get(name, name): tensor for name, tensor in tensors.items()}
    predictors = ("model.mtp_layers.", "model.mtp.", "mtp.", *(f"model.layers.{layer}." for layer in extra))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(predictors)}


def _without_layers(tensors: Mapping[str, T], left_out: Collection[int]) -> dict[str, T]:
    """The tensors without those of some layers; the others are numbered as if these did not exist."""
    kept: dict[str, T] = {}
    for name, tensor in tensors.items():
        layer = _LAYER.match(name)
        number = int(layer.group(1)) if layer else -1
        if number in left_out:
            continue
        smaller = sum(other < number for other in left_out)
        kept[f"model.layers.{number - smaller}.{name[layer.end() :]}" if layer else name] = tensor
    return kept


def text_name(name: str, hf: JsonFields = MappingProxyType({})) -> str | None:
    """The name in the text model of a tensor of a multimodal model with the config `hf`; None if it is not of that model."""
    name = name.removeprefix("model.")  # since transformers 4.52 all parts except the head are in "model."
    if name.startswith(_VISION) or ("audio_config" in hf and name.startswith(_AUDIO)):
        return None
    inner = name.removeprefix("language_model.").removeprefix("text_model.")
    return inner if inner.startswith(("model.", "lm_head.")) else f"model.{inner}"


def _as_in_model(
    tensors: Mapping[str, StoredTensor | PackedTensor], config: ModelConfig
) -> dict[str, StoredTensor | PackedTensor]:
    """The tensors of a quantized checkpoint in the layout of the model: GPT-2's matrices are transposed."""
    specs, sources = all_specs(config), FAMILIES[config.family].sources(config)
    modules = {
        name.format(layer=layer).partition(".")[2]  # without the prefix of the model, which some checkpoints leave out
        for path, source in sources.items()
        if specs[path].kind is Kind.MATRIX and not source.transpose
        for name in source.names
        for layer in range(config.num_layers)
    }

    def in_layout(name: str, tensor: StoredTensor | PackedTensor) -> StoredTensor | PackedTensor:
        if isinstance(tensor, PackedTensor) and (name in modules or name.partition(".")[2] in modules):
            return dataclasses.replace(tensor, shape=tensor.shape[::-1], transposed=True)
        return tensor

    return {name: in_layout(name, tensor) for name, tensor in tensors.items()}


def _as_list(value: list[int] | int | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _shards(path: Path) -> dict[Path, set[str] | None]:
    """The weight files and, if there is an index, the tensors that each must hold; safetensors are preferred to .bin."""
    for index in (path / _SAFETENSORS_INDEX, path / _TORCH_INDEX):
        if index.exists():
            return _indexed(index)
    for pattern in WEIGHT_FILES:
        found = [file for file in sorted(path.glob(pattern)) if is_of_model(file.name)]
        index = _SAFETENSORS_INDEX if pattern.endswith(".safetensors") else _TORCH_INDEX
        if len(found) == 1:
            return {found[0]: None}
        if found:
            raise ValueError(f"{path} has {len(found)} {pattern} files but no {index}; download the checkpoint again")
    raise ValueError(
        f"{path} has no weights: neither .safetensors nor pytorch_model.bin; pass the directory that holds "
        "config.json and model.safetensors"
    )


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no 'weight_map'; download it again")
    shards: dict[Path, set[str] | None] = {}
    for file in sorted(set(weight_map.values())):
        if not (index.parent / file).exists():
            raise ValueError(f"{index} names {file}, which is absent; download the checkpoint again")
        shards[index.parent / file] = {name for name, other in weight_map.items() if other == file}
    return shards
