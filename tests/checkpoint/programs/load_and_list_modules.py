"""Loads the checkpoint argv[1] and prints every module that is then loaded, one per line."""

import sys

from fastgen_jax.checkpoint import load_params, open_checkpoint

load_params(open_checkpoint(sys.argv[1]), dtype="float32")
print(*sorted(sys.modules), sep="\n")
