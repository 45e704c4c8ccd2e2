"""Layers with a state whose arrays are filled up for a TPU or a GPU."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.models.division import divided, divided_array, divided_parts, divided_shape
from fastgen_jax.models.params import param_specs
from fastgen_jax.models.state_config import DeltaNet, Mamba2
from fastgen_jax.models.states import state_shapes
from tests.models.parity import Runs, error, expected, folder

TOLERANCE = 1e-4  # of the largest logit: the recurrence in pieces of 64 tokens, in another order than in transformers
FAMILIES = ("granitemoehybrid", "qwen3_next")


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_states_keep_on_a_tpu_fills_whole_rows_of_each_device(family: str, num_devices: int) -> None:
    config = open_checkpoint(folder(family, "default")).config
    assert isinstance(config.state, Mamba2 | DeltaNet)
    config = dataclasses.replace(config, state=dataclasses.replace(config.state, num_heads=config.state.num_heads * 2))
    wide = divided(config, num_devices, "tpu")
    on_gpu = divided(config, num_devices, "gpu").state
    if isinstance(config.state, Mamba2):
        (mix_in,) = (spec for name, spec in param_specs(config)["layers"].items() if name == "mix_in")
        assert divided_shape(mix_in, config, num_devices, "gpu")[-1] % (64 * num_devices) == 0
    else:
        assert on_gpu == divided(config, num_devices).state
    assert state_shapes(wide, "tpu").of_layer["recent"][1] % (128 * num_devices) == 0
    shapes = {name: spec.shape for name, spec in param_specs(wide)["layers"].items()}
    for name, spec in param_specs(config)["layers"].items():
        if not name.startswith("mix_") and not name.startswith("conv"):
            continue
        shape = divided_shape(spec, config, num_devices, "tpu")
        assert shape == shapes[name]
        assert sum(divided_parts(spec, config, num_devices, "tpu")) in (0, shape[-1])
        axes = range(-len(spec.shape), 0)
        filled = divided_array(spec, np.ones(spec.shape), config, num_devices, axes=axes, fill=0, platform="tpu")
        assert filled.shape == shape
        if name == ("mix_in" if isinstance(config.state, Mamba2) else "mix_gates"):
            assert shape[-1] % (128 * num_devices) == 0
            assert shape[-1] > spec.shape[-1]
            assert (filled[:, spec.shape[-1] :] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_states_that_are_filled_up_for_a_tpu_compute_the_same(family: str) -> None:
    checkpoint = open_checkpoint(folder(family, "default"))
    config = checkpoint.config
    assert isinstance(config.state, Mamba2 | DeltaNet)
    params = load_params(checkpoint, dtype="float32", stack_layers=True)
    wide = divided(config, 1, "tpu")
    assert wide.state != config.state
    # The experts stay as they are: they are filled up in tests of their own.
    wide = dataclasses.replace(config, state=wide.state)
    layers = {}
    for name, spec in param_specs(config)["layers"].items():
        axes = range(-len(spec.shape), 0)
        leaf = np.asarray(params["layers"][name])
        if name in ("mix_in", "mix_gates"):
            leaf = divided_array(spec, leaf, config, 1, axes=axes, fill=0, platform="tpu")
        layers[name] = jnp.asarray(leaf)
    tokens, logits, prompt = expected(family, "default")
    runs = Runs({**params, "layers": layers}, wide, len(tokens), platform="tpu")
    for sizes in ([len(tokens)], [prompt, *[1] * (len(tokens) - prompt)]):
        assert error(runs.logits(tokens, sizes, prompt_length=prompt), logits) < TOLERANCE
