"""What llm-compressor and other users of the compressed-tensors library write.

A group of `config_groups` says how the matrices of its targets are stored. Activations and caches are not quantized.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastgen_jax.checkpoint.quantized.floats import (
    ACTIVATIONS,
    FP8,
    channel_values,
    fp8_values,
    mxfp4_rows,
    mxfp8_values,
    nvfp4_weight,
)
from fastgen_jax.checkpoint.quantized.numbers import Groups, unpack_bits, unpack_sequential
from fastgen_jax.checkpoint.quantized.packed import REMEDY, Format, PackedTensor, Parts, assemble, expect_shape
from fastgen_jax.checkpoint.tensor_files import StoredTensor
from fastgen_jax.json_types import JsonFields

_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized"),
    *("mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense"),
)
_CLASSES = {"Linear": "", "Embedding": "embed"}  # names of classes as targets -> what a module of the class has in its name


def read_compressed_tensors(
    tensors: Mapping[str, StoredTensor], settings: JsonFields
) -> dict[str, StoredTensor | PackedTensor]:
    """See the module."""
    groups = list((settings.get("config_groups") or {}).values())
    for form in [settings.get("format"), *(group.get("format") for group in groups if isinstance(group, dict))]:
        if form is not None and form not in _FORMATS:
            raise ValueError(f"quantization_config has format={form!r}; supported: {', '.join(_FORMATS)}; {REMEDY}")
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise ValueError(f"quantization_config has sparsity_config.format={sparsity!r}; supported: 'dense'; {REMEDY}")
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise ValueError(
            "quantization_config has a transform_config with config_groups, which rotates activations; supported: none; "
            f"{REMEDY}"
        )

    def integers(module: str, parts: Parts) -> PackedTensor:
        return _integers(module, parts, _weights(groups, module))

    def naive(module: str, parts: Parts) -> PackedTensor:
        return _naive(module, parts, _weights(groups, module))

    def floats(module: str, parts: Parts) -> PackedTensor:
        return _four_bit_floats(module, parts)

    return assemble(
        tensors,
        [
            Format(
                needs=(".weight_packed", ".weight_scale", ".weight_shape"),
                may_have=(".weight_zero_point", ".weight_g_idx"),
                dtypes=("int32",),
                weight=integers,
            ),
            Format(
                needs=(".weight_packed", ".weight_scale"),
                may_have=(".weight_global_scale",),
                dtypes=("uint8",),
                weight=floats,
            ),
            Format(
                needs=(".weight", ".weight_scale"),
                may_have=(".weight_zero_point", ".weight_g_idx"),
                dtypes=("int8", FP8),
                weight=naive,
            ),
        ],
        unused=ACTIVATIONS,
    )


def _weights(groups: list[Any], module: str) -> JsonFields:
    """The `weights` of the group that has the module as a target: by its name, by a pattern, or by its class."""
    targets = [(target, group.get("weights") or {}) for group in groups for target in group.get("targets") or ()]
    for matches in (
        lambda target: target == module,
        lambda target: target.startswith("re:") and re.match(target.removeprefix("re:"), module) is not None,
        lambda target: target in _CLASSES and _CLASSES[target] in module.rpartition(".")[2],
    ):
        for target, weights in targets:
            if matches(target):
                return weights
    raise ValueError(
        f"{module!r} is stored as quantized, but it is in no group of quantization_config.config_groups, whose targets are "
        f"{', '.join(repr(target) for target, _ in targets) or 'empty'}; correct them in config.json"
    )


def _strategy(weights: JsonFields) -> str:
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in ("tensor", "channel", "group", "block"):
        raise ValueError(
            f"quantization_config has weights.strategy={strategy!r}; supported: 'tensor', 'channel', 'group', 'block'; "
            f"{REMEDY}"
        )
    return strategy


def _group_of_scales(module: str, shape: tuple[int, ...], weights: JsonFields, scales: StoredTensor) -> int:
    """Groups of each output; checks the shape of the scales of a matrix of this `shape`."""
    outputs, inputs = shape
    strategy = _strategy(weights)
    if strategy == "group":
        size = weights["group_size"]
        expect_shape(module, ".weight_scale", scales, (outputs, -(-inputs // size)))
        return scales.shape[1]
    if strategy == "channel":
        expect_shape(module, ".weight_scale", scales, (outputs, 1), (outputs,))
    else:
        expect_shape(module, ".weight_scale", scales, (), (1,), (1, 1))
    return 1


def _integers(module: str, parts: Parts, weights: JsonFields) -> PackedTensor:
    """Numbers of 2 to 8 bits, stored with their middle added."""
    bits = weights.get("num_bits")
    if weights.get("type", "int") != "int" or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(
            f"quantization_config has weights.type={weights.get('type')!r} and weights.num_bits={bits!r} for {module!r}; "
            f"supported: 'int' with 2 to 8 bits; {REMEDY}"
        )
    packed, scales = parts[".weight_packed"], parts[".weight_scale"]
    outputs, inputs = (int(size) for size in parts[".weight_shape"].map())
    dense, sparse = -(-inputs * bits // 32), -(-inputs // (32 // bits))
    expect_shape(module, ".weight_packed", packed, (outputs, dense), (outputs, sparse))
    _group_of_scales(module, (outputs, inputs), weights, scales)
    zeros = parts.get(".weight_zero_point")
    return PackedTensor(
        dtype=f"INT{bits}",
        shape=(outputs, inputs),
        parts=(packed, scales, zeros, parts.get(".weight_g_idx")),
        values=functools.partial(integer_values, bits=bits, shape=(outputs, inputs)),
    )


def integer_values(
    packed: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    group: np.ndarray | None,
    *,
    bits: int,
    shape: tuple[int, int],
) -> Groups:
    """[out, in] of i32[out, words], scales [out, groups] and zero points, packed along the outputs or int8.

    A word holds whole numbers only (older versions of the library), or numbers continue in the next word.
    """
    outputs, inputs = shape
    middle = 2 ** (bits - 1)
    dense = packed.shape[1] == -(-inputs * bits // 32)

    def unpacked(words: np.ndarray, count: int) -> np.ndarray:
        return unpack_bits(words, bits, count) if dense else unpack_sequential(words, bits)[..., :count]

    scales = scales.reshape(-1, scales.shape[-1]) if scales.ndim == 2 else scales.reshape(-1, 1)
    scales = np.broadcast_to(scales, (outputs, scales.shape[1]))
    offsets = float(middle)
    if zeros is not None and zeros.dtype == np.int32:
        offsets = unpacked(np.ascontiguousarray(zeros.T), outputs).T
    elif zeros is not None:
        offsets = offsets + zeros.astype(np.float32).reshape(-1, scales.shape[1])
    return Groups(
        shape=shape,
        rows=lambda some: unpacked(packed[some], inputs),
        scales=scales,
        zeros=offsets,
        group=group,
        bits=bits,
    )


def _naive(module: str, parts: Parts, weights: JsonFields) -> PackedTensor:
    """8-bit integers or floats in a tensor of their own dtype."""
    weight, scales = parts[".weight"], parts[".weight_scale"]
    if weight.dtype == FP8 and scales.dtype == "uint8":
        expect_shape(module, ".weight_scale", scales, (weight.shape[0], weight.shape[1] // 32))
        return PackedTensor(dtype="MXFP8", shape=weight.shape, parts=(weight, scales), values=mxfp8_values)
    if _strategy(weights) == "block":
        block = tuple(weights["block_structure"])
        expect_shape(
            module,
            ".weight_scale",
            scales,
            tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True)),
        )
        values = functools.partial(fp8_values, block=block)
        return PackedTensor(dtype=weight.dtype, shape=weight.shape, parts=(weight, scales), values=values)
    groups = _group_of_scales(module, weight.shape, weights, scales)
    zeros, group = parts.get(".weight_zero_point"), parts.get(".weight_g_idx")
    if groups == 1:
        return PackedTensor(dtype=weight.dtype, shape=weight.shape, parts=(weight, scales, zeros), values=channel_values)
    return PackedTensor(dtype=weight.dtype, shape=weight.shape, parts=(weight, scales, zeros, group), values=_naive_values)


def _naive_values(weight: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, group: np.ndarray | None) -> Groups:
    return Groups(
        shape=(len(weight), weight.shape[1]),
        rows=lambda some: weight[some],
        scales=scales,
        zeros=zeros,
        group=group,
        bits=8 if weight.dtype == np.int8 else None,
    )


def _four_bit_floats(module: str, parts: Parts) -> PackedTensor:
    packed, scales, whole = parts[".weight_packed"], parts[".weight_scale"], parts.get(".weight_global_scale")
    if whole is not None:
        return nvfp4_weight(module, packed, scales, whole, divides=True)
    outputs, half = packed.shape
    expect_shape(module, ".weight_scale", scales, (outputs, half // 16))
    return PackedTensor(dtype="MXFP4", shape=(outputs, 2 * half), parts=(packed, scales), values=mxfp4_rows)
