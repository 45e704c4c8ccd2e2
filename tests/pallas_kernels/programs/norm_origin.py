"""Normalizes rows and prints the origin of the kernel. Arguments: a folder of prebuilt kernels; "no-compiler", if wanted."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.native import compiler, prebuilt
from pallas_kernels.norm import rms_norm

logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
prebuilt.FOLDER = Path(sys.argv[1])
if sys.argv[2:] == ["no-compiler"]:
    compiler._candidates = list
x = np.random.default_rng(0).standard_normal((5, 40), np.float32)
y = rms_norm(jnp.asarray(x), jnp.ones(40), eps=1e-6)
np.testing.assert_allclose(y, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6), rtol=1e-5)
print(native.origin())
