"""Vocabularies that accelerators fill up to whole tiles, and that stay the same for everyone else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.engine.weights import prepare_leaf
from fastgen_jax.models.division import divided, divided_array
from fastgen_jax.models.params import all_specs
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.training import Options, logprobs, pack
from pallas_kernels.matmul import Float8Weight, Int8Weight
from tests.models.parity import Runs
from tests.tiny import random_params, tiny_model, weights_config

ODD = 250
MODELS = {
    "untied": replace(tiny_model()[1], vocab_size=ODD, tie_embeddings=False, head_bias=True),
    "tied": replace(tiny_model()[1], vocab_size=ODD, tie_embeddings=True),
}


def filled_up(params: Params, name: str, platform: str) -> Params:
    specs = all_specs(MODELS[name])

    def fill(path: str, leaf: jax.Array) -> np.ndarray:
        axes = range(-len(specs[path].axes), 0)
        return divided_array(specs[path], np.asarray(leaf), MODELS[name], 1, axes=axes, fill=0, platform=platform)

    return {name: leaf if name == "layers" else jnp.asarray(fill(name, leaf)) for name, leaf in params.items()}


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_logprobs_are_those_of_the_vocabulary(name: str, platform: str) -> None:
    config = MODELS[name]
    params = random_params(config)
    wide = filled_up(params, name, platform)
    assert divided(config, 1, platform).vocab_size == wide["embed"].shape[0] == 256
    assert wide["embed"].shape == all_specs(divided(config, 1, platform))["embed"].shape
    assert wide["embed"].shape[1] == (128 if platform == "tpu" else config.embed_dim)
    assert divided(config, 1) == config
    tokens = np.arange(3, 11)
    plain, filled = (Runs(p, config, 8).logits(tokens, [8], prompt_length=8) for p in (params, wide))
    assert filled.shape == (8, ODD)
    np.testing.assert_allclose(filled, plain, rtol=1e-5, atol=1e-5)

    batch, options = pack([[5, 6, 7, 8, 9]], [3]), Options(dtype="float32")
    plain, filled = (logprobs(p, batch, config=config, options=options) for p in (params, wide))
    np.testing.assert_allclose(filled, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_the_head_of_an_engine_on_a_gpu_has_whole_tiles(monkeypatch: pytest.MonkeyPatch, quantize: str) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config: Any = weights_config(quantize)
    model = MODELS["untied"]
    spec = all_specs(model)["lm_head"]
    array = np.random.default_rng(0).standard_normal(spec.shape, np.float32)
    leaf = prepare_leaf(spec, array, model, config)
    assert isinstance(leaf, Int8Weight | Float8Weight)
    assert leaf.shape == (spec.shape[0], 256)
    values = np.asarray(leaf.values, np.float32)
    found = (values.T if quantize == "fp8" else values) * np.asarray(leaf.scales)
    assert not found[:, ODD:].any()
    assert np.abs(found[:, :ODD] - array).max() <= 2.0**-4 * np.abs(array).max()
