"""Activation functions against those of transformers: their values, and the logits of a model with each of them."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.engine.config import EngineConfig, resolve
from fastgen_jax.engine.weights import prepare_params
from fastgen_jax.models.families.common import activation
from fastgen_jax.models.families.fields import Fields
from fastgen_jax.models.layers import ACTIVATIONS
from fastgen_jax.models.moe_config import Activation
from tests.models.parity import REFERENCE, Runs, error, load, random_cut
from tests.models.test_families import TOLERANCE

SAVED = dict(np.load(REFERENCE / "activations.npz"))  # see make_activations.py
NAMES = sorted(name for name in SAVED if name != "x" and "/" not in name)
OF_A_MODEL = [name.removeprefix("logits/") for name in SAVED if name.startswith("logits/")]
QUICK = {("quick_gelu", False), ("relu2", True)}


def known_as(name: str) -> Activation:
    """The function that config.json calls `name`."""
    return activation(Fields({"hidden_act": name}), default="silu")


def all_values(x: jax.Array) -> dict[str, jax.Array]:
    """Of all functions, by our names."""
    return {name: function(x) for name, function in ACTIVATIONS.items()}


def test_functions_have_the_values_of_transformers() -> None:
    assert set(map(known_as, NAMES)) == ACTIVATIONS.keys()
    values = jax.jit(all_values)(SAVED["x"])
    for name in NAMES:
        np.testing.assert_allclose(values[known_as(name)], SAVED[name], rtol=2e-5, atol=2e-6, err_msg=name)


def test_functions_keep_the_dtype() -> None:
    for dtype in ("bfloat16", "float16"):
        shapes = jax.eval_shape(all_values, jax.ShapeDtypeStruct((4,), dtype))
        assert {shape.dtype for shape in shapes.values()} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    ("name", "prepared"),
    [
        pytest.param(name, prepared, marks=() if (name, prepared) in QUICK else pytest.mark.slow)
        for name in OF_A_MODEL
        for prepared in (False, True)
    ],
)
def test_a_model_with_it_has_the_logits_of_transformers_in_chunks_and_token_by_token(name: str, prepared: bool) -> None:
    params, config = load("llama", "default")
    config = replace(config, activation=known_as(name))
    if prepared:  # packed for the native kernels, which have SwiGLU only
        params = prepare_params(params, config, resolve(EngineConfig(dtype="float32", num_blocks=8), config))
    want = SAVED[f"logits/{name}"]
    tokens = np.load(REFERENCE / "tiny" / "default" / "expected.npz")["token_ids"][: len(want)]
    runs = Runs(params, config, len(want))
    for sizes in ([len(want)], random_cut(len(want), seed=0), [30] + [1] * (len(want) - 30)):
        assert error(runs.logits(tokens, sizes, prompt_length=30), want) < TOLERANCE
