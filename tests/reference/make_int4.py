"""Regenerates `int4.npz`: random 4-bit matrices as AWQ and GPTQ store them, and their values according to AutoAWQ.

    python tests/reference/make_int4.py .../awq/utils      # of the autoawq 0.2.9 source distribution; needs torch

For its exllama kernels, AutoAWQ converts its matrices to GPTQ's layout; this provides the second pair.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, sys.argv[1])
from packing_utils import dequantize_gemm, unpack_reorder_pack  # type: ignore[import-not-found]

INPUTS, OUTPUTS, GROUP = 64, 24, 32


def main() -> None:
    """Writes the file beside this script."""
    torch.manual_seed(0)
    weight = torch.randint(-(2**31), 2**31, (INPUTS, OUTPUTS // 8), dtype=torch.int64).to(torch.int32)
    # GPTQ stores zero points minus one, so they must be at least one.
    nibbles = torch.randint(1, 16, (INPUTS // GROUP, OUTPUTS // 8, 8), dtype=torch.int64)
    zeros = (nibbles << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
    scales = (torch.rand(INPUTS // GROUP, OUTPUTS) * 0.1).half()
    values = dequantize_gemm(weight, zeros, scales.float(), 4, GROUP)
    gptq_weight, gptq_zeros = unpack_reorder_pack(weight, zeros, 4)
    np.savez_compressed(
        Path(__file__).with_name("int4.npz"),
        awq_weight=weight,
        awq_zeros=zeros,
        scales=scales,
        values=values,
        gptq_weight=gptq_weight,
        gptq_zeros=gptq_zeros,
    )


if __name__ == "__main__":
    main()
