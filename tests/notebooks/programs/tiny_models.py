"""Run as the first cell of a notebook: makes the built-in models the tiny checkpoint in TINY_CHECKPOINT, with few programs.

The sizes are those that the notebooks about steps and logits set themselves, so that all of them share compiled programs.
"""

import functools
import os
from pathlib import Path

import fastgen_jax
from fastgen_jax.checkpoint import BUILT_IN

for name in BUILT_IN:
    BUILT_IN[name] = Path(os.environ["TINY_CHECKPOINT"])
fastgen_jax.pipeline = functools.partial(
    fastgen_jax.pipeline, token_budget=64, budget_ladder=(16,), max_num_seqs=8, block_size=16, num_blocks=256
)
