"""Regenerates `ggml_blocks.npz`: a row of every GGUF storage type that ggml can quantize, and the values it reads back.

    python tests/reference/make_ggml_blocks.py .../libggml-base.so      # a build of llama.cpp

The tests need only the arrays: `TYPE.rows` u8[1, bytes] and `TYPE.values` f32[1, 512].
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import gguf
import numpy as np

VALUES = 512


class TypeTraits(ctypes.Structure):
    """The beginning of ggml's struct ggml_type_traits."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("block_interleaved", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def main() -> None:
    """Quantizes one row of normally distributed numbers with every type."""
    ggml = ctypes.CDLL(sys.argv[1])
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    source = np.random.default_rng(0).standard_normal((1, VALUES)).astype(np.float32)
    importance = np.ones(VALUES, np.float32)
    arrays = {}
    for kind in gguf.GGMLQuantizationType:
        traits = ggml.ggml_get_type_traits(kind.value).contents
        if not traits.is_quantized or not traits.to_float:
            continue
        rows = np.zeros((1, VALUES // traits.block * traits.size), np.uint8)
        ggml.ggml_quantize_init(kind.value)
        ggml.ggml_quantize_chunk(kind.value, source.ctypes.data, rows.ctypes.data, 0, 1, VALUES, importance.ctypes.data)
        values = np.zeros_like(source)
        traits.to_float(rows.ctypes.data, values.ctypes.data, VALUES)
        arrays |= {f"{kind.name}.rows": rows, f"{kind.name}.values": values}
        print(f"{kind.name}: largest error {np.abs(values - source).max():.3f}")
    np.savez_compressed(Path(__file__).with_name("ggml_blocks.npz"), **arrays)


if __name__ == "__main__":
    main()
