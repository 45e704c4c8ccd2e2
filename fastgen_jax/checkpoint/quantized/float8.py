"""What the settings of a checkpoint say about 8-bit floats."""

from __future__ import annotations

from fastgen_jax.checkpoint.quantized import quantization_method
from fastgen_jax.json_types import JsonFields

_FP8_BLOCKS = "FP8_PB_WO"  # of modelopt: blocks, and weights only


def float8_of_weights_alone(settings: JsonFields) -> bool:
    """Whether a checkpoint with 8-bit floats was made for activations that stay as they are."""
    method = quantization_method(settings)
    if method == "modelopt":
        return _FP8_BLOCKS in _modelopt_algorithms(settings)
    if method == "compressed-tensors":
        return any(_of_floats(group) and not group.get("input_activations") for group in _groups(settings))
    return False


def inputs_of_scale(settings: JsonFields) -> int | None:
    """Inputs of 8-bit floats that share a scale, 0 for all of an output; None if matrices have other numbers."""
    method = quantization_method(settings)
    if method in ("fp8", "fbgemm_fp8"):
        block = settings.get("weight_block_size")
        return block[1] if block else 0
    if method == "modelopt":
        algorithms = _modelopt_algorithms(settings)
        if algorithms == {_FP8_BLOCKS}:
            return settings.get("group_size") or 128
        return 0 if algorithms and algorithms <= {"FP8", "FP8_PER_CHANNEL_PER_TOKEN"} else None
    if method != "compressed-tensors" or not (groups := _groups(settings)) or not all(map(_of_floats, groups)):
        return None
    found = {_inputs_of_group(group["weights"]) for group in groups}
    return found.pop() if len(found) == 1 else None


def _inputs_of_group(weights: JsonFields) -> int | None:
    structure = weights.get("block_structure")
    if structure:
        return structure[1]
    return 0 if weights.get("strategy") in ("tensor", "channel") else None


def _of_floats(group: JsonFields) -> bool:
    weights = group.get("weights") or {}
    return weights.get("type") == "float" and weights.get("num_bits") == 8


def _groups(settings: JsonFields) -> list[JsonFields]:
    return list((settings.get("config_groups") or {}).values())


def _modelopt_algorithms(settings: JsonFields) -> set[str]:
    settings = settings.get("quantization") or settings  # as in hf_quant_config.json
    layers = (settings.get("quantized_layers") or {}).values()
    return {str(each.get("quant_algo")).upper() for each in (*layers, settings)} - {"MIXED_PRECISION", "NONE"}
