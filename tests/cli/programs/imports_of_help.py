"""Prints version and help of `fastgen`, and then which of some expensive modules that imported."""

import sys

from fastgen_jax.cli import main

for flag in ("--version", "--help"):
    try:
        main([flag])
    except SystemExit as exit:
        if exit.code:
            raise
print(sorted(name for name in ("jax", "numpy", "tqdm") if name in sys.modules))
