"""What transformers saves of models quantized with bitsandbytes: NF4 and FP4 in blocks, and int8 per output."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping

import numpy as np

from fastgen_jax.checkpoint.quantized.floats import channel_values
from fastgen_jax.checkpoint.quantized.numbers import Groups
from fastgen_jax.checkpoint.quantized.packed import Format, PackedTensor, Parts, assemble, expect_shape
from fastgen_jax.checkpoint.tensor_files import StoredTensor
from fastgen_jax.json_types import JsonFields

_STATE = ".weight.quant_state.bitsandbytes__"
_BLOCKS = 1 << 14  # dequantized at a time


def read_bitsandbytes(tensors: Mapping[str, StoredTensor], settings: JsonFields) -> dict[str, StoredTensor | PackedTensor]:
    """See the module."""
    four_bits = [
        Format(
            needs=(".weight", ".weight.absmax", ".weight.quant_map", _STATE + kind),
            may_have=(".weight.nested_absmax", ".weight.nested_quant_map"),
            dtypes=("uint8",),
            weight=functools.partial(_four_bits, kind=kind),
        )
        for kind in ("nf4", "fp4")
        if any(name.endswith(_STATE + kind) for name in tensors)
    ]
    int8 = Format(needs=(".weight", ".SCB"), may_have=(".weight_format",), dtypes=("int8",), weight=_int8)
    return assemble(tensors, [*four_bits, int8])


def _int8(module: str, parts: Parts) -> PackedTensor:
    weight, largest = parts[".weight"], parts[".SCB"]
    order = parts.get(".weight_format")
    if order is not None and int(order.map().reshape(())) != 0:
        raise ValueError(
            f"{module + '.weight_format'!r} is {int(order.map().reshape(()))}; supported: 0, rows; save the model with "
            "bitsandbytes 0.43 or later"
        )
    expect_shape(module, ".SCB", largest, weight.shape[:1])
    return PackedTensor(dtype="int8", shape=weight.shape, parts=(weight, largest), values=int8_values)


def int8_values(weight: np.ndarray, largest: np.ndarray) -> Groups:
    """[out, in] of i8[out, in] and the largest magnitude of each output, which 127 stands for."""
    return channel_values(weight, largest.astype(np.float32) / 127)


def _four_bits(module: str, parts: Parts, *, kind: str) -> PackedTensor:
    state = json.loads(parts[_STATE + kind].map().tobytes())
    shape = tuple(state["shape"])
    weight, largest = parts[".weight"], parts[".weight.absmax"]
    expect_shape(module, ".weight", weight, (-(-math.prod(shape) // 2), 1))
    expect_shape(module, ".weight.absmax", largest, (-(-math.prod(shape) // state["blocksize"]),))
    nested = (parts.get(".weight.nested_absmax"), parts.get(".weight.nested_quant_map"))
    return PackedTensor(
        dtype=kind.upper(),
        shape=shape,
        parts=(weight, largest, parts[".weight.quant_map"], *nested),
        values=functools.partial(
            four_bit_values,
            shape=shape,
            block=state["blocksize"],
            nested_block=state.get("nested_blocksize", 1),
            nested_offset=state.get("nested_offset", 0.0),
        ),
    )


def four_bit_values(
    packed: np.ndarray,
    largest: np.ndarray,
    table: np.ndarray,
    nested_largest: np.ndarray | None,
    nested_table: np.ndarray | None,
    *,
    shape: tuple[int, ...],
    block: int,
    nested_block: int,
    nested_offset: float,
) -> np.ndarray | Groups:
    """Of `shape`, from u8[n/2, 1], the first number in the high bits: a table's entries times those of blocks.

    The largest magnitudes of blocks are float32, or indices of a second table, in blocks, around an offset.
    """
    if nested_largest is not None and nested_table is not None:
        scales = nested_table[largest] * np.repeat(nested_largest, nested_block)[: len(largest)] + np.float32(nested_offset)
    else:
        scales = largest.astype(np.float32)
    if len(shape) == 2 and shape[1] % block == 0:
        return Groups(
            shape=(shape[0], shape[1]),
            rows=lambda some: _codes(packed.reshape(shape[0], -1)[some]),
            scales=scales.reshape(shape[0], -1),
            table=table.astype(np.float32),
        )
    count = math.prod(shape)
    pairs = np.stack([table[np.arange(256) >> 4], table[np.arange(256) & 15]], axis=-1).astype(np.float32)
    out = np.empty(count, np.float32)
    codes = packed.reshape(-1)
    for start in range(0, len(scales), _BLOCKS):
        first, last = start * block, min((start + _BLOCKS) * block, count)
        values = pairs[codes[first // 2 : -(-last // 2)]].reshape(-1)[: last - first]
        np.multiply(values, np.repeat(scales[start : start + _BLOCKS], block)[: last - first], out=out[first:last])
    return out.reshape(shape)


def _codes(packed: np.ndarray) -> np.ndarray:
    """u8[rows, 2 n] of u8[rows, n]: the first number of a byte is in the high bits."""
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(len(packed), -1)
