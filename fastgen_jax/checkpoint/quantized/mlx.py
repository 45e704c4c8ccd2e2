"""What mlx-lm writes: integers of 2 to 8 bits in groups with a scale and a bias, or MXFP4, MXFP8 and NVFP4."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np

from fastgen_jax.checkpoint.quantized.numbers import Groups, e8m0, fp4, unpack_bits
from fastgen_jax.checkpoint.quantized.packed import Format, PackedTensor, Parts, assemble, expect_shape, only
from fastgen_jax.checkpoint.tensor_files import StoredTensor, number_type
from fastgen_jax.json_types import JsonFields

_BITS = (2, 3, 4, 5, 6, 8)
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_FLOATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, and inputs in a group


def read_mlx(tensors: Mapping[str, StoredTensor], settings: JsonFields) -> dict[str, StoredTensor | PackedTensor]:
    """`settings` are the `quantization` of config.json, which may have other settings for single modules.

    Of experts, which are stacked, all have those of their stack.
    """

    apart, stacks = _experts_apart(tensors)

    def weight(module: str, parts: Parts) -> PackedTensor:
        own = settings.get(stacks.get(module, module))
        of_module = {**settings, **own} if isinstance(own, dict) else settings
        mode = of_module.get("mode") or "affine"
        only(of_module, {"mode": ("affine", *_FLOATS, None), "bits": _BITS})
        bits, size = _FLOATS.get(mode) or (of_module["bits"], of_module["group_size"])
        packed, scales, biases = parts[".weight"], parts[".scales"], parts.get(".biases")
        outputs, words = packed.shape
        inputs = 32 * words // bits
        for ending in (".scales", ".biases"):
            if ending in parts:
                expect_shape(module, ending, parts[ending], (outputs, inputs // size))
        values = functools.partial(affine_values, bits=bits) if mode == "affine" else _float_values[mode]
        name = f"MLX{bits}" if mode == "affine" else mode.upper()
        return PackedTensor(dtype=name, shape=(outputs, inputs), parts=(packed, scales, biases), values=values)

    needs = (".weight", ".scales")
    form = Format(needs=needs, may_have=(".biases",), dtypes=("uint32",), weight=weight)
    return assemble(apart, [form])


def _experts_apart(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors with stacks over experts divided under the names of Hugging Face, and the stack of each such module."""
    apart, stacks = {}, {}
    for name, tensor in tensors.items():
        layer, found, rest = name.partition(".switch_mlp.")
        if not found:
            apart[name] = tensor
            continue
        projection, _, ending = rest.partition(".")
        count, *shape = tensor.shape
        size = math.prod(shape) * number_type(tensor.dtype).itemsize
        own_name = _MIXTRAL[projection] if layer.endswith("block_sparse_moe") else projection
        for expert in range(count):
            module = f"{layer}.experts.{expert}.{own_name}"
            apart[f"{module}.{ending}"] = dataclasses.replace(
                tensor, shape=tuple(shape), offset=tensor.offset + expert * size
            )
            stacks[module] = f"{layer}.switch_mlp.{projection}"
    return apart, stacks


def affine_values(packed: np.ndarray, scales: np.ndarray, biases: np.ndarray, *, bits: int) -> Groups:
    """[out, in] of u32[out, in * bits/32], and scales and biases [out, groups]."""
    inputs = 32 * packed.shape[1] // bits
    rows = functools.partial(_integers, packed, bits=bits, inputs=inputs)
    return Groups(shape=(len(packed), inputs), rows=rows, scales=scales, biases=biases, bits=bits)


def _integers(packed: np.ndarray, some: slice, *, bits: int, inputs: int) -> np.ndarray:
    return unpack_bits(packed[some], bits, inputs)


def _mxfp4(packed: np.ndarray, scales: np.ndarray, _biases: None) -> Groups:
    return Groups(shape=(len(packed), 8 * packed.shape[1]), rows=lambda some: fp4(_bytes(packed[some])), scales=e8m0(scales))


def _mxfp8(packed: np.ndarray, scales: np.ndarray, _biases: None) -> Groups:
    return Groups(
        shape=(len(packed), 4 * packed.shape[1]), rows=lambda some: _fp8(_bytes(packed[some])), scales=e8m0(scales)
    )


def _nvfp4(packed: np.ndarray, scales: np.ndarray, _biases: None) -> Groups:
    return Groups(shape=(len(packed), 8 * packed.shape[1]), rows=lambda some: fp4(_bytes(packed[some])), scales=_fp8(scales))


def _bytes(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(np.uint8)


def _fp8(codes: np.ndarray) -> np.ndarray:
    import ml_dtypes

    return codes.view(ml_dtypes.float8_e4m3fn)


_float_values = {"mxfp4": _mxfp4, "mxfp8": _mxfp8, "nvfp4": _nvfp4}
