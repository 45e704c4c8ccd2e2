"""Quantized safetensors as plain tensors: MXFP4 and FP8 as released, AWQ and GPTQ as their tools write them.

The model computes with the dequantized weights; activations are not quantized. `unpack` presents the tensors of one matrix
under the name that the unquantized checkpoint has. Nothing is read until the matrix is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from fastgen_jax.checkpoint.tensor_files import StoredTensor
from fastgen_jax.json_types import JsonFields

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # values of the low three bits of a 4-bit float; the fourth is the sign
_E8M0_BIAS = 127
_FP8_SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")
_ROWS = 256  # inputs that are dequantized at a time
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble of a 32-bit word, from the lowest, holds each of its eight columns


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """One tensor that is stored as several. `dtype` is how it is stored; `map` returns its values."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[StoredTensor, ...]
    values: Callable[..., np.ndarray]

    def map(self) -> np.ndarray:
        return self.values(*(part.map() for part in self.parts))


def unpack(tensors: Mapping[str, StoredTensor], settings: JsonFields) -> dict[str, StoredTensor | PackedTensor]:
    """The tensors of a checkpoint with `quantization_config` = `settings` under the names of an unquantized one.

    ValueError for a method or setting that is not supported.
    """
    return _METHODS[quantization_method(settings)](tensors, settings)


def quantization_method(settings: JsonFields) -> str:
    """The `quant_method` of a `quantization_config`; ValueError if it is not supported."""
    method = settings.get("quant_method")
    if method not in _METHODS:
        raise ValueError(
            f"quantization_config.quant_method is {method!r}; supported: "
            f"{', '.join(_METHODS)}; otherwise pass the original checkpoint (quantize='int8' applies while "
            "loading) or a GGUF file"
        )
    return method


def _mxfp4(tensors: Mapping[str, StoredTensor], settings: JsonFields) -> dict[str, StoredTensor | PackedTensor]:
    def packed(name: str, blocks: StoredTensor, scales: StoredTensor) -> PackedTensor:
        *lead, rows, groups, size = blocks.shape
        if scales.shape != blocks.shape[:-1]:
            raise ValueError(f"the scales of {name!r} have shape {scales.shape}; its blocks require {blocks.shape[:-1]}")
        return PackedTensor(
            dtype="MXFP4", shape=(*lead, 2 * groups * size, rows), parts=(blocks, scales), values=mxfp4_values
        )

    return _grouped(tensors, ("_blocks", "_scales"), packed, rename=lambda stem: stem)


def mxfp4_values(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bfloat16[X, in, out] of u8[X, out, in/32, 16], two numbers per byte, and their exponents u8[X, out, in/32]; exact.

    Source: OCP Microscaling Formats 1.0, and the layout of the gpt-oss release.
    """
    pairs = _mxfp4_pairs()
    experts, rows, groups, size = blocks.shape
    out = np.empty((experts, 2 * groups * size, rows), ml_dtypes.bfloat16)
    for expert in range(experts):  # temporaries have the size of one expert
        index = (scales[expert].astype(np.uint16) << 8)[..., None] | blocks[expert]
        out[expert] = pairs[index].view(ml_dtypes.bfloat16).reshape(rows, -1).T
    return out


@functools.cache
def _mxfp4_pairs() -> np.ndarray:
    """Both numbers of every byte at every exponent, as two bfloat16 in a u32: [exponent * 256 + byte]."""
    number = np.array((*_E2M1, *(-value for value in _E2M1)), np.float32)
    byte = np.arange(256)
    both = np.stack([number[byte & 15], number[byte >> 4]], axis=-1)
    with np.errstate(over="ignore"):  # for exponents that do not occur
        scaled = np.ldexp(both, np.arange(256)[:, None, None] - _E8M0_BIAS)
        return scaled.astype(ml_dtypes.bfloat16).reshape(-1, 2).view(np.uint32)[:, 0]


def _fp8(tensors: Mapping[str, StoredTensor], settings: JsonFields) -> dict[str, StoredTensor | PackedTensor]:
    block = settings.get("weight_block_size")
    if not block or settings.get("activation_scheme", "dynamic") != "dynamic":
        raise ValueError(
            f"quantization_config has weight_block_size={block!r} and "
            f"activation_scheme={settings.get('activation_scheme')!r}; FP8 is supported with a block size and "
            "scheme 'dynamic'"
        )

    def packed(name: str, weight: StoredTensor, scales: StoredTensor) -> PackedTensor:
        expected = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
        if weight.dtype != "float8_e4m3fn" or scales.dtype not in _FP8_SCALES:
            raise ValueError(
                f"{name!r} is stored as {weight.dtype} with scales of {scales.dtype}; FP8 is supported as "
                f"float8_e4m3fn with scales of {', '.join(_FP8_SCALES)}"
            )
        if scales.shape != expected:
            raise ValueError(f"the scales of {name!r} have shape {scales.shape}; blocks of {block} require {expected}")
        return PackedTensor(
            dtype=weight.dtype,
            shape=weight.shape,
            parts=(weight, scales),
            values=functools.partial(fp8_values, block=tuple(block)),
        )

    return _grouped(tensors, (".weight", ".weight_scale_inv"), packed, rename=lambda stem: f"{stem}.weight")


def fp8_values(weight: np.ndarray, scales: np.ndarray, *, block: tuple[int, int]) -> np.ndarray:
    """float32[out, in] of an 8-bit matrix with one scale per block; blocks at the edges may be partial."""
    out = weight.astype(np.float32)
    for row in range(0, out.shape[0], block[0]):  # by rows of blocks, without a temporary as large as the matrix
        of_columns = np.repeat(scales[row // block[0]].astype(np.float32), block[1])[: out.shape[1]]
        out[row : row + block[0]] *= of_columns
    return out


def _awq(tensors: Mapping[str, StoredTensor], settings: JsonFields) -> dict[str, StoredTensor | PackedTensor]:
    _only(settings, {"bits": (4,), "version": ("gemm", "GEMM", None), "zero_point": (True, None)})

    def packed(name: str, weight: StoredTensor, zeros: StoredTensor, scales: StoredTensor) -> PackedTensor:
        inputs, words = weight.shape
        return PackedTensor(dtype="AWQ4", shape=(8 * words, inputs), parts=(weight, zeros, scales), values=awq_values)

    return _grouped(tensors, (".qweight", ".qzeros", ".scales"), packed, rename=lambda stem: f"{stem}.weight")


def awq_values(weight: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32[out, in] of i32[in, out/8], i32[groups, out/8] and f16[groups, out]; eight columns per word, in AWQ order."""

    def columns(words: np.ndarray) -> np.ndarray:
        return _nibbles(words)[..., _AWQ_ORDER].reshape(len(words), -1)

    group = np.arange(len(weight)) // (len(weight) // len(scales))
    return _affine(columns(weight), columns(zeros), scales, group)


def _gptq(tensors: Mapping[str, StoredTensor], settings: JsonFields) -> dict[str, StoredTensor | PackedTensor]:
    _only(settings, {"bits": (4,), "checkpoint_format": ("gptq", "gptq_v2", None)})
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1  # the original format stores zero points minus one

    def packed(name: str, weight: StoredTensor, *others: StoredTensor) -> PackedTensor:
        words, outputs = weight.shape
        return PackedTensor(
            dtype="GPTQ4",
            shape=(outputs, 8 * words),
            parts=(weight, *others),
            values=functools.partial(gptq_values, offset=offset),
        )

    return _grouped(tensors, (".qweight", ".qzeros", ".scales", ".g_idx"), packed, rename=lambda stem: f"{stem}.weight")


def gptq_values(weight: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group: np.ndarray, *, offset: int) -> np.ndarray:
    """float32[out, in] of i32[in/8, out], i32[groups, out/8], f16[groups, out] and the group of each input, i32[in].

    `offset` is added to the zero points.
    """
    rows = _nibbles(weight).swapaxes(1, 2).reshape(-1, weight.shape[1])
    return _affine(rows, _nibbles(zeros).reshape(len(zeros), -1) + offset, scales, group)


def _affine(values: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(values - zero) * scale with the zero and scale of each row's group, transposed to [out, in]."""
    out = np.empty(values.shape[::-1], np.float32)
    zeros, scales = zeros.astype(np.float32), scales.astype(np.float32)
    for start in range(0, len(values), _ROWS):
        of = group[start : start + _ROWS]
        out[:, start : start + _ROWS] = ((values[start : start + _ROWS] - zeros[of]) * scales[of]).T
    return out


def _nibbles(words: np.ndarray) -> np.ndarray:
    """The eight 4-bit numbers of each 32-bit word, from the lowest, along a new last axis."""
    return (words.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).astype(np.int8)


def _only(settings: JsonFields, supported: Mapping[str, tuple[object, ...]]) -> None:
    for name, values in supported.items():
        if settings.get(name) not in values:
            known = ", ".join(repr(value) for value in values if value is not None)
            raise ValueError(f"quantization_config has {name}={settings.get(name)!r}; supported: {known}")


def _grouped(
    tensors: Mapping[str, StoredTensor],
    endings: tuple[str, ...],
    packed: Callable[..., PackedTensor],
    *,
    rename: Callable[[str], str],
) -> dict[str, StoredTensor | PackedTensor]:
    """The tensors, with each set of names that differ only in `endings` replaced by one. The last ending identifies sets."""
    found: dict[str, StoredTensor | PackedTensor] = dict(tensors)
    for last in [name for name in tensors if name.endswith(endings[-1])]:
        stem = last.removesuffix(endings[-1])
        names = [stem + ending for ending in endings]
        if missing := [name for name in names if name not in tensors]:
            raise ValueError(f"there is a tensor {last!r}, but {missing[0]!r} is absent; download the checkpoint again")
        for name in names:
            found.pop(name)
        found[rename(stem)] = packed(stem, *(tensors[name] for name in names))
    return found


_METHODS = {"mxfp4": _mxfp4, "fp8": _fp8, "awq": _awq, "gptq": _gptq}
