"""Matrices in blocks, as snapshots store them: in plain arrays of dtypes that every version of the libraries knows.

A matrix is stored by outputs, as in a `BlockWeight`, those of experts one after another:

    numbers   uint8 [..., N, K / 2], two numbers of 4 bits in a byte, the first in its lower half; or int8 or, for 8-bit
              floats, their bits in uint8 [..., N, K]
    scales    float16 or float32 [..., N, K / size], or the bits of exponents in uint8
    offsets   like the scales, if there are any
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from fastgen_jax.checkpoint.block_kind import BlockKind
from fastgen_jax.json_types import JsonFields, JsonObject

if TYPE_CHECKING:
    from pallas_kernels.grouped_matmul import BlockGroups
    from pallas_kernels.matmul import BlockFormat, BlockWeight

PREFIX = "block_"
"""Of the names of the arrays of a matrix in blocks, so that they differ from those of int8."""
_DTYPES = {
    "uint4": np.dtype(np.uint8),
    "nf4": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "float4_e2m1fn": np.dtype(ml_dtypes.float4_e2m1fn),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}


@dataclass(frozen=True, kw_only=True)
class StoredBlocks:
    """A matrix, or those of experts, in blocks, in the arrays that a snapshot stores."""

    format: BlockFormat
    arrays: Mapping[str, np.ndarray]
    """By name, without `PREFIX`."""


def stored_blocks(weight: BlockWeight | BlockGroups) -> StoredBlocks:
    """The arrays of a weight in blocks. Those of experts are read one by one."""
    from pallas_kernels.matmul import BlockWeight

    if isinstance(weight, BlockWeight):
        return StoredBlocks(format=weight.format, arrays=_arrays(weight))
    first = weight.read(0)
    each = [_arrays(first), *(_arrays(weight.read(number)) for number in range(1, weight.shape[0]))]
    return StoredBlocks(format=first.format, arrays={name: np.stack([arrays[name] for arrays in each]) for name in each[0]})


def _arrays(weight: BlockWeight) -> dict[str, np.ndarray]:
    numbers = np.ascontiguousarray(weight.values)
    if weight.format.bits == 4:
        bits = numbers.view(np.uint8)
        numbers = bits[:, ::2] | bits[:, 1::2] << 4
    elif numbers.dtype != np.int8:
        numbers = numbers.view(np.uint8)
    scales = weight.scales.view(np.uint8) if weight.scales.dtype.itemsize == 1 else weight.scales
    arrays = {"numbers": numbers, "scales": np.ascontiguousarray(scales)}
    return arrays if weight.offsets is None else {**arrays, "offsets": np.ascontiguousarray(weight.offsets)}


def read_stored(format: BlockFormat, read: Callable[[str], np.ndarray]) -> BlockWeight:
    """The matrix [in, out] whose arrays `read` returns by name."""
    from pallas_kernels.matmul import BlockWeight

    numbers, scales = read("numbers"), read("scales")
    if format.bits == 4:
        pairs = numbers
        numbers = np.empty((len(pairs), 2 * pairs.shape[1]), np.uint8)
        numbers[:, ::2], numbers[:, 1::2] = pairs & 15, pairs >> 4
    return BlockWeight(
        values=numbers.view(_DTYPES[format.numbers]),
        scales=scales.view(ml_dtypes.float8_e8m0fnu) if format.scale_dtype == "float8_e8m0fnu" else scales,
        offsets=read("offsets") if format.has_offsets else None,
        is_nf4=format.numbers == "nf4",
    )


def kind_of(format: BlockFormat) -> BlockKind:
    """How a matrix of this format is stored in memory."""
    numbers = {"uint4": "4 bits", "int8": "8 bits", "nf4": "NF4"}.get(format.numbers, f"{format.bits}-bit floats")
    scales = f" with {format.scale_dtype} scales{' and offsets' * format.has_offsets}"
    return BlockKind(
        f"{numbers} in groups of {format.size}{scales}",
        format.bits_with_scales,
        format.size,
        format.bits,
        is_float=format.numbers not in ("uint4", "int8"),
        has_offsets=format.has_offsets,
        scale_dtype=format.scale_dtype,
    )


def problem_of(format: BlockFormat | None, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with the arrays, given by name, of a weight in blocks of this format, or in none; empty: nothing."""
    wanted = () if format is None else ("numbers", "scales", "offsets")[: 2 + format.has_offsets]
    if {*shapes} != {*wanted}:
        found, needed = (", ".join(sorted(names)) or "none" for names in (shapes, wanted))
        return f"the arrays of blocks {found}, but its format requires {needed}"
    if format is None:
        return ""
    inputs = shapes["numbers"][-1] * (2 if format.bits == 4 else 1)
    expected = (*shapes["numbers"][:-1], inputs // format.size)
    if inputs % format.size or {shapes[name] for name in wanted[1:]} != {expected}:
        return f"scales of shape {shapes['scales']} for {inputs} inputs, but its format has blocks of {format.size}"
    return ""


def as_json(formats: Mapping[str, BlockFormat]) -> JsonObject:
    """The formats of weights by path, for fastgen.json."""
    return {path: format._asdict() for path, format in formats.items()}


def from_json(blocks: object) -> dict[str, BlockFormat]:
    """The inverse of `as_json`; ValueError for a format that this version does not know."""
    if not isinstance(blocks, dict):
        raise ValueError(f"blocks is {blocks!r}, but must be an object")
    return {path: _format(path, fields) for path, fields in blocks.items()}


def _format(path: str, fields: JsonFields) -> BlockFormat:
    from pallas_kernels.matmul import BLOCK_SIZES, BlockFormat

    try:
        found = BlockFormat(**fields)
        _ = found.number, found.bits_with_scales
    except (TypeError, KeyError) as error:
        raise ValueError(f"blocks has {fields!r} for {path!r}, which this version does not know") from error
    if found.size not in BLOCK_SIZES:
        raise ValueError(f"blocks has size={found.size!r} for {path!r}; known: {', '.join(map(str, BLOCK_SIZES))}")
    return found
