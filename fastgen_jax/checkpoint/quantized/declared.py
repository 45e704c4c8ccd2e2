"""What the settings of a quantized checkpoint say about its matrices, when its files are not at hand."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fastgen_jax.checkpoint.block_kind import BlockKind
from fastgen_jax.checkpoint.quantized import quantization_method
from fastgen_jax.checkpoint.quantized.float8 import float8_of_weights_alone, inputs_of_scale
from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import FAMILIES
from fastgen_jax.models.params import layer_specs, model_specs
from fastgen_jax.models.weight_spec import Kind
from pallas_kernels.matmul import BLOCK_SIZES


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
    if (block := inputs_of_scale(settings)) is not None:
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


def _float8_kind(block: int, inputs: int, *, only_weights: bool) -> BlockKind | None:
    """Of 8-bit floats with a scale for each output, or for so many of its inputs."""
    size = next((each for each in reversed(BLOCK_SIZES) if (block or inputs) % each == 0), 0)
    if not size or inputs % (block or 1):
        return None
    name = f"8-bit floats in groups of {size}, float32 scales"
    return BlockKind(name, 8 + 32 / size, size, is_float=True, of_outputs=block in (0, inputs), only_weights=only_weights)


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
