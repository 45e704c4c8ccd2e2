"""An engine that the tests of interactive commands share."""

from __future__ import annotations

import pytest

import fastgen_jax
from fastgen_jax import Engine
from tests.serving.checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The tiny model with the sizes of `test_faults.SMALL`, so that its programs are compiled once."""
    path = write_checkpoint(tmp_path_factory.mktemp("engine") / "tiny")
    return fastgen_jax.pipeline(
        path, token_budget=32, budget_ladder=(8,), max_num_seqs=8, block_size=4, num_blocks=64, progress=False
    ).engine
