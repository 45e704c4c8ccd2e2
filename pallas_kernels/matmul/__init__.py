"""Matrix products of activations with weights that are stored the way the platform reads them fastest.

`prepare` turns a checkpoint's weight into a plain array, an `Int8Weight` or, on CPUs with a C++ compiler, a
`PackedWeight`; `linear` and `swiglu` accept all of them.
"""

from pallas_kernels.matmul.ops import linear, swiglu
from pallas_kernels.matmul.weights import Int8Weight, PackedWeight, Weight, prepare, quantize_int8

__all__ = ["Int8Weight", "PackedWeight", "Weight", "linear", "prepare", "quantize_int8", "swiglu"]
