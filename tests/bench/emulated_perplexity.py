"""The perplexity of formats that a CPU's kernels do not multiply: XLA computes the same numbers on it, slowly.

    python -m tests.bench.emulated_perplexity w8a8 --text sotu

"halves" is int8 on a T4. The other arguments are those of `fastgen bench perplexity`.
"""

from __future__ import annotations

import sys

from fastgen_jax.cli import main
from fastgen_jax.engine import machine
from pallas_kernels import native, tpu_target
from pallas_kernels.matmul import halves

FORMATS = {"int8": "int8", "halves": "int8", "w8a8": "w8a8", "fp8": "fp8"}


def emulate(form: str) -> None:
    """Makes this CPU pass for a device that multiplies 8 bits by 8 bits, without kernels of its own."""
    native.available = lambda: False
    machine.multiplies_int8 = lambda device: form == "w8a8"
    machine.multiplies_float8 = lambda device: form == "fp8"
    tpu_target.multiplies = lambda name: name == form
    if form == "halves":
        halves.is_used = lambda shape, capability=None: halves.fits(shape)


if __name__ == "__main__":
    if sys.argv[1] not in FORMATS:
        raise SystemExit(f"{sys.argv[1]} is not one of {', '.join(FORMATS)}")
    emulate(sys.argv[1])
    sys.exit(main(["bench", "perplexity", "--quantize", FORMATS[sys.argv[1]], *sys.argv[2:]]))
