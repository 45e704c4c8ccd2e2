"""Prints the largest growth of this process's resident memory, in bytes, while it loads the checkpoint argv[1]."""

import sys
from pathlib import Path

import jax.numpy as jnp

from fastgen_jax.checkpoint import load_params, open_checkpoint


def resident() -> dict[str, int]:
    """Bytes resident at most (VmHWM) and now (VmRSS)."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[0] in ("VmHWM:", "VmRSS:")}


jnp.zeros(8).block_until_ready()
checkpoint = open_checkpoint(sys.argv[1])
before = resident()["VmRSS"]
params = load_params(checkpoint, dtype=jnp.float32, stack_layers=False)
print(resident()["VmHWM"] - before)
