"""Runs `fastgen` as if the module in the first argument were not installed; the other arguments are the command line."""

import importlib
import sys

sys.modules[sys.argv[1]] = None
sys.exit(importlib.import_module("fastgen_jax.cli").main(sys.argv[2:]))
