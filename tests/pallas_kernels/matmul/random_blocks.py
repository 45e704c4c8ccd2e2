"""Random weights in blocks of every format."""

from __future__ import annotations

import numpy as np
from ml_dtypes import float4_e2m1fn, float8_e4m3fn, float8_e8m0fnu

from pallas_kernels.matmul import BlockWeight

FORMATS = [
    ("uint4", False, "float16"),
    ("uint4", True, "float16"),
    ("uint4", True, "float32"),
    ("int8", False, "float16"),
    ("int8", False, "float32"),
    ("int8", True, "float32"),
    ("float4_e2m1fn", False, "float8_e8m0fnu"),
    ("float4_e2m1fn", False, "float32"),
    ("float8_e4m3fn", False, "float32"),
    ("nf4", False, "float32"),
]
_DTYPES = {"float4_e2m1fn": float4_e2m1fn, "float8_e4m3fn": float8_e4m3fn}


def random_blocks(
    k: int, n: int, size: int, numbers: str, has_offsets: bool, scale_dtype: str, *, seed: int = 0
) -> BlockWeight:
    """A weight [k, n]; of its values, all that the format has occur if there are enough."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 16 if numbers in ("uint4", "float4_e2m1fn", "nf4") else 256, (n, k), np.uint8)
    if numbers == "float8_e4m3fn":
        codes[codes & 127 == 127] -= 1  # NaN
    values = codes.view(np.int8) if numbers == "int8" else codes.view(_DTYPES.get(numbers, np.uint8))
    if scale_dtype == "float8_e8m0fnu":
        return BlockWeight(values=values, scales=generator.integers(118, 125, (n, k // size), np.uint8).view(float8_e8m0fnu))
    scales = generator.uniform(-1, 1, (2, n, k // size)) / 8
    scales[0, 0, 0] = 3e-6  # subnormal in float16
    if numbers in (*_DTYPES, "nf4"):  # any float32, because there is one rounding only
        return BlockWeight(values=values, scales=scales[0].astype(np.float32), is_nf4=numbers == "nf4")
    # Other float32 scales come from products of float16 and a few bits, so that scale * value is exact.
    scale, offset = (scales.astype(np.float16) * (np.float32(1 if scale_dtype == "float16" else 63))).astype(scale_dtype)
    return BlockWeight(values=values, scales=scale, offsets=offset if has_offsets else None)
