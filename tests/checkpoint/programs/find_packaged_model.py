"""Prints where the packaged model argv[1] is; the exit code is 1 if finding it imported the module argv[2]."""

import sys

from fastgen_jax.checkpoint import resolve_model

print(resolve_model(sys.argv[1]))
sys.exit(sys.argv[2] in sys.modules)
