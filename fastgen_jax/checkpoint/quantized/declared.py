"""What the settings of a quantized checkpoint say about its matrices, when its files are not at hand."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fastgen_jax.checkpoint.block_kind import BlockKind
from fastgen_jax.checkpoint.quantized import quantization_method
from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import FAMILIES
from fastgen_jax.models.params import layer_specs, model_specs
from fastgen_jax.models.weight_spec import Kind
from pallas_kernels.matmul import BLOCK_SIZES

_FP8_BLOCKS = "FP8_PB_WO"  # of modelopt: blocks, and weights only


def declared_weights(settings: JsonFields, config: ModelConfig, dtype: str) -> dict[str, BlockKind | str]:
    """As `checkpoint.quantized_weights`, of a checkpoint with these settings and scales in `dtype`.

    The matrices of layers are quantized but for routers and those that the settings name as exceptions; the head is
    with MLX. Which zero points are all in the middle is known of symmetric numbers only.
    """
    method, sources = quantization_method(settings), FAMILIES[config.family].sources(config)
    specs = {spec.path: spec for layer in range(config.num_layers) for spec in layer_specs(config, layer).values()}
    if method == "mlx":
        specs |= {spec.path: spec for spec in model_specs(config).values()}
    found: dict[str, BlockKind | str] = {}
    for path, spec in specs.items():
        if spec.kind not in (Kind.MATRIX, Kind.EXPERTS) or not spec.quantizable:
            continue
        modules = [name.format(layer=0).removesuffix(".weight") for name in sources[path].names]
        if not any(_is_exception(module, settings) for module in modules):
            found[path] = declared_kind(settings, spec.shape[-2], dtype) or method
    return found


def declared_kind(settings: JsonFields, inputs: int, dtype: str) -> BlockKind | None:
    """The blocks of a matrix with so many inputs, if these are of 4 bits or 8-bit floats, and known; else None."""
    method = quantization_method(settings)
    if (block := _float8_inputs(settings)) is not None:
        return _float8_kind(block, inputs, only_weights=float8_of_weights_alone(settings))
    bits, size, symmetric = settings.get("bits"), settings.get("group_size", -1), settings.get("sym", True)
    has_offsets = not symmetric
    if method == "compressed-tensors":
        group = next(iter((settings.get("config_groups") or {}).values()), {})
        weights = group.get("weights") or {}
        bits = weights.get("num_bits") if weights.get("type", "int") == "int" else None
        size, symmetric = weights.get("group_size") or -1, weights.get("symmetric", True)
        has_offsets = not symmetric or dtype != "float16"
        if weights.get("actorder") in (True, "group"):
            return None
    elif method == "awq":
        size, bits = settings.get("group_size", settings.get("q_group_size", -1)), bits or 4
        has_offsets = settings.get("zero_point") is not False
    elif method == "mlx":
        has_offsets = True
        if settings.get("mode", "affine") != "affine":
            return None
    elif method == "marlin":
        has_offsets, bits = False, bits or 4
    elif method not in ("gptq", "auto-round") or settings.get("desc_act"):
        return None
    half = (method == "mlx" and dtype == "float16") or settings.get("version") == "gemv_fast"
    scales = "float32" if has_offsets and not half else "float16"
    size = inputs if size in (-1, None) else size
    size = next((each for each in reversed(BLOCK_SIZES) if size % each == 0), 0)
    if bits != 4 or not size or inputs % size:
        return None
    width = 32 if scales == "float32" else 16
    return BlockKind(
        f"4 bits in groups of {size}",
        4 + width * (1 + has_offsets) / size,
        size,
        4,
        has_offsets=has_offsets,
        scale_dtype=scales,
    )


def float8_of_weights_alone(settings: JsonFields) -> bool:
    """Whether a checkpoint with 8-bit floats was made for activations that stay as they are."""
    method = quantization_method(settings)
    if method == "modelopt":
        return _FP8_BLOCKS in _modelopt_algorithms(settings)
    if method == "compressed-tensors":
        return any(_of_floats(group) and not group.get("input_activations") for group in _groups(settings))
    return False


def _float8_kind(block: int, inputs: int, *, only_weights: bool) -> BlockKind | None:
    """Of 8-bit floats with a scale for each output, or for so many of its inputs."""
    size = next((each for each in reversed(BLOCK_SIZES) if (block or inputs) % each == 0), 0)
    if not size or inputs % (block or 1):
        return None
    name = f"8-bit floats in groups of {size}, float32 scales"
    return BlockKind(name, 8 + 32 / size, size, is_float=True, of_outputs=block in (0, inputs), only_weights=only_weights)


def _float8_inputs(settings: JsonFields) -> int | None:
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


def _is_exception(module: str, settings: JsonFields) -> bool:
    """Whether the settings leave a module as it is."""
    for name in _exceptions(settings):
        pattern = name.removeprefix("re:")
        if name != pattern and re.match(pattern, module):
            return True
        if name == module or (name == pattern and f".{name}." in f".{module}."):
            return True
    return False


def _exceptions(settings: JsonFields) -> Iterator[str]:
    for field in ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers"):
        yield from (str(name) for name in settings.get(field) or ())
