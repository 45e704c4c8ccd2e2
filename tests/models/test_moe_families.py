"""The families with experts against transformers, on tiny random checkpoints of every variant."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.params import Params
from tests.models.test_decoder import LOGIT_TOLERANCE, run_chunks

HOME = Path(__file__).parent.parent / "reference" / "families"
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "granitemoe")
VARIANTS = [f"{family}/{path.name}" for family in FAMILIES for path in sorted((HOME / family).iterdir())]


@cache
def model(variant: str, *, stack_layers: bool = False) -> tuple[Params, ModelConfig]:
    """Float32 weights and config of a variant."""
    checkpoint = open_checkpoint(HOME / variant)
    return load_params(checkpoint, dtype="float32", stack_layers=stack_layers), checkpoint.config


def expected(variant: str) -> dict[str, np.ndarray]:
    return dict(np.load(HOME / variant / "expected.npz"))


def check(variant: str, sizes: list[int], *, stack_layers: bool = False) -> None:
    params, config = model(variant, stack_layers=stack_layers)
    want = expected(variant)
    got = run_chunks(params, config, want["token_ids"], sizes)
    np.testing.assert_allclose(got, want["logits"], atol=LOGIT_TOLERANCE * np.abs(want["logits"]).max(), rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_prompt_and_generation_equal_those_of_transformers(variant: str):
    check(variant, [70])
