"""GPTQ, AWQ, AutoRound and Marlin: unsigned integers in words, with a scale and a zero point for each group of inputs."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import numpy as np

from fastgen_jax.checkpoint.quantized.numbers import Groups, unpack_bits
from fastgen_jax.checkpoint.quantized.packed import REMEDY, Format, PackedTensor, Parts, assemble, expect_shape, only
from fastgen_jax.checkpoint.tensor_files import StoredTensor
from fastgen_jax.json_types import JsonFields

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble of a 32-bit word, from the lowest, holds each of its eight columns
_GPTQ_BITS = (2, 3, 4, 5, 6, 7, 8)
_AUTO_ROUND = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq",
}


def read_gptq(tensors: Mapping[str, StoredTensor], settings: JsonFields) -> dict[str, StoredTensor | PackedTensor]:
    """GPTQ, in any order of inputs. The original format stores zero points minus one."""
    form = "marlin" if settings.get("is_marlin_format") else settings.get("checkpoint_format") or settings.get("format")
    if form == "marlin":
        return read_marlin(tensors, settings)
    only({"checkpoint_format": form}, {"checkpoint_format": ("gptq", "gptq_v2", None)})
    return _gptq(tensors, settings, offset=0 if form == "gptq_v2" else 1)


def _gptq(
    tensors: Mapping[str, StoredTensor], settings: JsonFields, *, offset: int
) -> dict[str, StoredTensor | PackedTensor]:
    def weight(module: str, parts: Parts) -> PackedTensor:
        of_module = _settings_of(module, settings)
        only(of_module, {"bits": _GPTQ_BITS})
        bits = of_module["bits"]
        packed, zeros, scales = parts[".qweight"], parts[".qzeros"], parts[".scales"]
        order = parts.get(".g_idx")
        words, outputs = packed.shape
        inputs = 32 * words // bits if order is None else order.shape[0]
        expect_shape(module, ".qweight", packed, (-(-inputs * bits // 32), outputs))
        groups = scales.shape[0]
        size = of_module.get("group_size", -1)
        if order is None:
            groups = 1 if size == -1 else -(-inputs // size)
        expect_shape(module, ".scales", scales, (groups, outputs))
        expect_shape(module, ".qzeros", zeros, (groups, -(-outputs * bits // 32)))
        return PackedTensor(
            dtype=f"GPTQ{bits}",
            shape=(outputs, inputs),
            parts=(packed, zeros, scales, order),
            values=functools.partial(gptq_values, bits=bits, offset=offset, inputs=inputs),
        )

    needs = (".qweight", ".qzeros", ".scales")
    return assemble(tensors, [Format(needs=needs, may_have=(".g_idx",), dtypes=("int32",), weight=weight)])


def gptq_values(
    packed: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    group: np.ndarray | None,
    *,
    bits: int,
    offset: int,
    inputs: int,
) -> Groups:
    """[out, in] of i32[words of in, out], i32[groups, words of out], f16[groups, out] and the groups of inputs.

    `offset` is added to the zero points.
    """
    outputs, groups = packed.shape[1], len(scales)
    if group is not None and np.array_equal(group, np.arange(inputs) * groups // inputs):
        group = None
    return Groups(
        shape=(outputs, inputs),
        rows=lambda some: unpack_bits(packed[:, some].T, bits, inputs),
        scales=scales.T,
        zeros=_one_for_all(unpack_bits(zeros, bits, outputs).T.astype(np.uint16) + np.uint16(offset), bits),
        group=group,
        bits=bits,
    )


def _one_for_all(zeros: np.ndarray, bits: int) -> np.ndarray | float:
    """The zero points, as one number if all are in the middle."""
    middle = 2 ** (bits - 1)
    return float(middle) if (zeros == middle).all() else zeros


def _settings_of(module: str, settings: JsonFields) -> JsonFields:
    """The settings with those of this module: GPTQModel's `dynamic`, and AutoRound's `extra_config`."""
    for pattern, changes in (settings.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), module):
            return {**settings, **changes}
    extra = settings.get("extra_config") or {}
    if module in extra:
        return {**settings, **extra[module]}
    for pattern, changes in extra.items():
        try:
            found = changes and re.search(pattern, module)
        except re.error:  # a name, not a pattern
            continue
        if found:
            return {**settings, **changes}
    return settings


def read_awq(tensors: Mapping[str, StoredTensor], settings: JsonFields) -> dict[str, StoredTensor | PackedTensor]:
    """AutoAWQ's layouts; that of its exllama versions is gemm."""
    names = ("version", "checkpoint_format", "format")  # AutoAWQ's, GPTQModel's
    layout = str(next((settings[name] for name in names if settings.get(name)), "gemm")).lower()
    if layout == "marlin":
        only(settings, {"bits": (4,), "zero_point": (False, None)})
        return read_marlin(tensors, settings)
    known = {"gemm": _awq_gemm, "exllama": _awq_gemm, "gemv": _awq_gemv, "gemv_fast": _awq_gemv_fast}
    if layout not in known:
        raise ValueError(f"quantization_config has version={layout!r}; supported: {', '.join([*known, 'marlin'])}; {REMEDY}")
    only(settings, {"bits": (4,), "zero_point": (True, None)})
    size = settings.get("group_size", settings.get("q_group_size", -1))
    form = Format(
        needs=(".qweight", ".qzeros", ".scales"),
        dtypes=("int16",) if layout == "gemv_fast" else ("int32",),
        weight=functools.partial(known[layout], size=size),
    )
    return assemble(tensors, [form])


def _awq_gemm(module: str, parts: Parts, *, size: int) -> PackedTensor:
    packed, zeros, scales = parts[".qweight"], parts[".qzeros"], parts[".scales"]
    inputs, words = packed.shape
    groups = scales.shape[0]
    expect_shape(module, ".scales", scales, (groups, 8 * words))
    expect_shape(module, ".qzeros", zeros, (groups, words))
    return PackedTensor(dtype="AWQ4", shape=(8 * words, inputs), parts=(packed, zeros, scales), values=awq_values)


def awq_values(packed: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> Groups:
    """[out, in] of i32[in, out/8], i32[groups, out/8] and f16[groups, out]; eight columns per word, in AWQ order."""

    def outputs_of(words: np.ndarray, some: slice) -> np.ndarray:
        numbers = unpack_bits(words[:, some.start // 8 : -(-some.stop // 8)], 4, some.stop - some.start)
        return numbers.reshape(len(words), -1, 8)[..., _AWQ_ORDER].reshape(len(words), -1).T

    outputs = 8 * packed.shape[1]
    return Groups(
        shape=(outputs, len(packed)),
        rows=lambda some: outputs_of(packed, some),
        scales=scales.T,
        zeros=_one_for_all(outputs_of(zeros, slice(0, outputs)), 4),
        bits=4,
    )


def _awq_gemv(module: str, parts: Parts, *, size: int) -> PackedTensor:
    packed, zeros, scales = parts[".qweight"], parts[".qzeros"], parts[".scales"]
    outputs, words = packed.shape
    groups = 1 if size == -1 else 8 * words // size
    padded = zeros.shape[1]
    expect_shape(module, ".qzeros", zeros, (outputs, max(padded, -(-groups // 8))))
    expect_shape(module, ".scales", scales, (outputs, 8 * padded))
    values = functools.partial(gemv_values, groups=groups)
    return PackedTensor(dtype="AWQ4", shape=(outputs, 8 * words), parts=(packed, zeros, scales), values=values)


def gemv_values(packed: np.ndarray, zeros: np.ndarray, scales: np.ndarray, *, groups: int) -> Groups:
    """[out, in] of i32[out, in/8], i32[out, groups/8] and f16[out, groups], with padding after the groups."""
    inputs = 8 * packed.shape[1]
    return Groups(
        shape=(len(packed), inputs),
        rows=lambda some: unpack_bits(packed[some], 4, inputs),
        scales=scales[:, :groups],
        zeros=_one_for_all(unpack_bits(zeros, 4, groups), 4),
        bits=4,
    )


def _awq_gemv_fast(module: str, parts: Parts, *, size: int) -> PackedTensor:
    packed, zeros, scales = parts[".qweight"], parts[".qzeros"], parts[".scales"]
    outputs, inputs = 4 * packed.shape[0], packed.shape[1]
    groups = 1 if size == -1 else inputs // size
    expect_shape(module, ".scales", scales, (max(scales.shape[0], groups), outputs))
    expect_shape(module, ".qzeros", zeros, scales.shape)
    values = functools.partial(gemv_fast_values, groups=groups)
    return PackedTensor(dtype="AWQ4", shape=(outputs, inputs), parts=(packed, zeros, scales), values=values)


def gemv_fast_values(packed: np.ndarray, zeros: np.ndarray, scales: np.ndarray, *, groups: int) -> Groups:
    """[out, in] of i16[out/4, in], and scales and minus zeros times scales, f16[padded groups, out].

    Four outputs are interleaved in pieces of 64 inputs; within 32 inputs, pairs are stored in another order.
    """
    outputs, inputs = 4 * packed.shape[0], packed.shape[1]

    def rows(some: slice) -> np.ndarray:
        numbers = unpack_bits(packed[some.start // 4 : some.stop // 4], 4, 4 * inputs)
        count = some.stop - some.start
        of_outputs = numbers.reshape(count // 4, inputs // 64, 4, 64).swapaxes(1, 2).reshape(count, inputs // 32, 4, 2, 4)
        pairs = of_outputs.swapaxes(-1, -2)  # [..., 4, 4, 2]
        return pairs.swapaxes(2, 3).reshape(count, inputs)

    return Groups(shape=(outputs, inputs), rows=rows, scales=scales[:groups].T, biases=zeros[:groups].T, bits=4)


def read_marlin(tensors: Mapping[str, StoredTensor], settings: JsonFields) -> dict[str, StoredTensor | PackedTensor]:
    """Symmetric 4-bit integers in the order of the Marlin kernel, under AutoGPTQ's names or AutoAWQ's."""
    only(settings, {"bits": (4, None), "desc_act": (False, None)})
    names = (".B", ".s") if any(name.endswith(".B") for name in tensors) else (".qweight", ".scales")

    def weight(module: str, parts: Parts) -> PackedTensor:
        packed, scales = parts[names[0]], parts[names[1]]
        inputs, outputs = 16 * packed.shape[0], packed.shape[1] // 2
        expect_shape(module, names[1], scales, (scales.shape[0], outputs))
        return PackedTensor(dtype="Marlin4", shape=(outputs, inputs), parts=(packed, scales), values=marlin_values)

    return assemble(tensors, [Format(needs=names, dtypes=("int32",), weight=weight)], unused=(".workspace",))


def marlin_values(packed: np.ndarray, scales: np.ndarray) -> Groups:
    """[out, in] of i32[in/16, 2 out] and f16[groups, out], both permuted.

    Tiles of 16 x 16 lie beside each other; four of them, 1,024 numbers, are in the order in which a warp's threads use them.
    Source: the layout of IST-DASLab's Marlin.
    """
    inputs, outputs = 16 * packed.shape[0], packed.shape[1] // 2
    thread, tile, number = np.ogrid[:32, :4, :8]
    number = np.array([0, 2, 4, 6, 1, 3, 5, 7])[number]
    row = 2 * (thread % 4) + number % 2 + 8 * (number // 2 % 2)
    order = (16 * row + thread // 4 + 8 * (number // 4) + 256 * tile).reshape(-1)
    if len(scales) > 1:
        of_scales = np.arange(64).reshape(8, 8).T.reshape(-1)
    else:
        of_scales = (2 * np.arange(4)[:, None] + np.array([0, 1, 8, 9, 16, 17, 24, 25])).reshape(-1)
    plain = scales.reshape(-1, len(of_scales))[:, np.argsort(of_scales)].reshape(scales.shape)

    @functools.cache
    def tiles() -> np.ndarray:
        """Rows and columns of tiles, then those in a tile; not read before a row is."""
        numbers = unpack_bits(packed, 4, 16 * outputs).reshape(-1, 1024)[:, np.argsort(order)]
        return numbers.reshape(inputs // 16, outputs // 16, 16, 16)

    def rows(some: slice) -> np.ndarray:
        return tiles()[:, some.start // 16 : some.stop // 16].transpose(1, 3, 0, 2).reshape(-1, inputs)

    return Groups(shape=(outputs, inputs), rows=rows, scales=plain.T, zeros=8.0, bits=4)


def read_auto_round(tensors: Mapping[str, StoredTensor], settings: JsonFields) -> dict[str, StoredTensor | PackedTensor]:
    """Intel's AutoRound, which stores matrices as GPTQ or AWQ do."""
    only(settings, {"data_type": ("int", None)})
    packing = settings.get("packing_format") or settings.get("backend") or "auto_round:auto_gptq"
    if packing not in _AUTO_ROUND:
        raise ValueError(
            f"quantization_config has packing_format={packing!r}; supported: {', '.join(_AUTO_ROUND)}; {REMEDY}"
        )
    if _AUTO_ROUND[packing] == "awq":
        return read_awq(tensors, {"bits": settings.get("bits"), "group_size": settings.get("group_size")})
    return _gptq(tensors, settings, offset=1 if _AUTO_ROUND[packing] == "gptq" else 0)
