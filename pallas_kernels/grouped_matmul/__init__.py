"""Matrix products of rows sorted by group, with one weight per group: the experts of a model.

`prepare` turns a checkpoint's stack of weights into what the platform multiplies with fastest. `BlockGroups` are weights in
4 or 8 bits as a checkpoint has them; `PairedGroups` are
differentiable and have the products of `PackedGroups`. `grouped_matmul` and `grouped_swiglu` pick the implementation when
the program is lowered. All are tested against `reference.py`.
"""

from pallas_kernels.grouped_matmul.ops import IMPLEMENTATIONS, grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.paired import PairedGroups, pair
from pallas_kernels.grouped_matmul.weights import BlockGroups, GroupedWeight, PackedGroups, prepare

__all__ = [
    "IMPLEMENTATIONS",
    "BlockGroups",
    "GroupedWeight",
    "PackedGroups",
    "PairedGroups",
    "grouped_matmul",
    "grouped_swiglu",
    "pair",
    "prepare",
]
