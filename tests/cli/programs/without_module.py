"""Runs `fastgen` as if the module in the first argument were not installed; the other arguments are the command line."""

import sys

sys.modules[sys.argv[1]] = None
from fastgen_jax.cli import main

sys.exit(main(sys.argv[2:]))
