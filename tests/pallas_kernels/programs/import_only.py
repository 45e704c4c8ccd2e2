"""Imports kernels and prints whether that started a backend of JAX."""

from __future__ import annotations

from jax._src import xla_bridge

import pallas_kernels.matmul
import pallas_kernels.native
import pallas_kernels.ragged_attention  # noqa: F401

print(xla_bridge.backends_are_initialized())
