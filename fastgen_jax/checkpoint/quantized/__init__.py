"""Quantized safetensors as plain tensors, in the formats in which models are published.

`unpack` presents the tensors of one matrix under the name that the unquantized checkpoint has; its values are computed when
it is read. Activations and caches are not quantized, whatever the checkpoint says about them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from fastgen_jax.checkpoint.quantized.bitsandbytes import read_bitsandbytes
from fastgen_jax.checkpoint.quantized.compressed_tensors import read_compressed_tensors
from fastgen_jax.checkpoint.quantized.floats import read_fp8, read_modelopt, read_mxfp4
from fastgen_jax.checkpoint.quantized.integers import read_auto_round, read_awq, read_gptq, read_marlin
from fastgen_jax.checkpoint.quantized.mlx import read_mlx
from fastgen_jax.checkpoint.quantized.packed import REMEDY, PackedTensor
from fastgen_jax.checkpoint.tensor_files import StoredTensor
from fastgen_jax.json_types import JsonFields, JsonObject

__all__ = ["PackedTensor", "quantization_method", "settings_beside", "shown", "split_settings", "unpack"]

_METHODS: dict[str, Callable[[Mapping[str, StoredTensor], JsonFields], dict[str, StoredTensor | PackedTensor]]] = {
    "mxfp4": read_mxfp4,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
    "compressed-tensors": read_compressed_tensors,
    "awq": read_awq,
    "gptq": read_gptq,
    "marlin": read_marlin,
    "auto-round": read_auto_round,
    "bitsandbytes": read_bitsandbytes,
    "modelopt": read_modelopt,
    "mlx": read_mlx,
}
_FIELDS = ("quantization_config", "compression_config", "quantization")
_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
_AWQ_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}
_IMPLIED = {  # fields that only one method has; it was not named in 2023
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "config_groups": "compressed-tensors",
}
_SHOWN = (
    *("format", "version", "checkpoint_format", "packing_format", "quant_algo", "mode", "bits", "group_size", "desc_act"),
    *("weight_block_size", "activation_scheme", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type"),
)
_OTHER_NAMES = {"compressed_tensors": "compressed-tensors", "intel/auto-round": "auto-round", "modelopt_fp4": "modelopt"}


def unpack(tensors: Mapping[str, StoredTensor], settings: JsonFields) -> dict[str, StoredTensor | PackedTensor]:
    """The tensors of a checkpoint with the settings of `split_settings` under the names of an unquantized one.

    ValueError for a method or setting that is not supported.
    """
    return _METHODS[quantization_method(settings)](tensors, settings)


def quantization_method(settings: JsonFields) -> str:
    """The `quant_method` of a `quantization_config`; ValueError if it is not supported."""
    method = settings.get("quant_method") or next((name for field, name in _IMPLIED.items() if settings.get(field)), None)
    method = _OTHER_NAMES.get(str(method), method)
    if method not in _METHODS:
        raise ValueError(f"quantization_config.quant_method is {method!r}; supported: {', '.join(_METHODS)}; {REMEDY}")
    return method


def settings_beside(folder: Path) -> JsonObject | None:
    """The settings in a file of their own, which older tools wrote instead of a field of config.json; None without one."""
    for name, method in _FILES.items():
        if (folder / name).exists():
            found: JsonObject
            try:
                found = json.loads((folder / name).read_bytes())
            except ValueError as error:
                raise ValueError(f"{folder / name} is not valid JSON ({error}); download it again") from error
            renamed = {_AWQ_NAMES.get(field, field): value for field, value in found.items()}
            return {"quant_method": method, **renamed}
    return None


def shown(settings: JsonFields) -> str:
    """The method and its main settings in one line."""
    settings = {**settings, **(settings.get("quantization") or {})}  # as in hf_quant_config.json
    values = ", ".join(f"{name}={settings[name]}" for name in _SHOWN if settings.get(name) is not None)
    return f"{quantization_method(settings)} ({values})" if values else quantization_method(settings)


def split_settings(config: JsonFields) -> tuple[JsonObject | None, JsonObject]:
    """The fields of a config.json that say how the weights are quantized, with a `quant_method`, and the other fields.

    The first are None if the weights are not quantized.
    """
    found: JsonObject | None = None
    rest = {name: value for name, value in config.items() if name not in _FIELDS}
    if isinstance(rest.get("text_config"), dict):
        found, rest["text_config"] = split_settings(rest["text_config"])
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and "group_size" in mlx:  # mlx-lm writes a copy as quantization_config
        return {"quant_method": "mlx", **mlx}, rest
    return config.get("quantization_config") or config.get("compression_config") or found, rest
