"""Matrix products of activations with weights that are stored the way the platform reads them fastest.

`prepare` turns a checkpoint's weight into a plain array, an `Int8Weight` or, on CPUs with a C++ compiler, a
`PackedWeight`; `linear` and `swiglu` accept all of them. A `BlockWeight` is a checkpoint's weight in 4 or 8 bits, with a
scale for every few inputs. A `PairedWeight` is differentiable and has the products of a `PackedWeight`.
"""

from pallas_kernels.matmul import halves
from pallas_kernels.matmul.blocks import BLOCK_SIZES, INT4_BLOCK, BlockFormat, BlockWeight, concatenate, quantize_int4, widen
from pallas_kernels.matmul.division import DividedArray, Division
from pallas_kernels.matmul.int4 import INT4_ROWS, Int4Weight, pack_int4
from pallas_kernels.matmul.int4_kernels import Int4Kernel, int4_fits, int4_kernel, int4_needs
from pallas_kernels.matmul.ops import gated, linear, reads_in_place, swiglu
from pallas_kernels.matmul.paired import PairedWeight, pair
from pallas_kernels.matmul.weights import (
    FLOAT8_BLOCK,
    Float8Weight,
    Int8Weight,
    PackedWeight,
    ScaledWeight,
    Weight,
    inputs_last,
    prepare,
    quantize_float8,
    quantize_int8,
)

__all__ = [
    "BLOCK_SIZES",
    "FLOAT8_BLOCK",
    "INT4_BLOCK",
    "INT4_ROWS",
    "BlockFormat",
    "BlockWeight",
    "DividedArray",
    "Division",
    "Float8Weight",
    "Int4Kernel",
    "Int4Weight",
    "Int8Weight",
    "PackedWeight",
    "PairedWeight",
    "ScaledWeight",
    "Weight",
    "concatenate",
    "gated",
    "halves",
    "inputs_last",
    "int4_fits",
    "int4_kernel",
    "int4_needs",
    "linear",
    "pack_int4",
    "pair",
    "prepare",
    "quantize_float8",
    "quantize_int4",
    "quantize_int8",
    "reads_in_place",
    "swiglu",
    "widen",
]
