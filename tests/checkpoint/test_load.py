from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fastgen_jax.checkpoint import load as loading
from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.core import progress
from fastgen_jax.models.params import param_specs
from tests.checkpoint.tiny_files import write_gguf, write_hf


def test_params_have_the_shapes_of_their_specs_with_projections_of_one_input_fused(tmp_path):
    made = write_hf(tmp_path, attention_bias=True)
    checkpoint = open_checkpoint(tmp_path)
    params = load_params(checkpoint, dtype=jnp.float32, stack_layers=False)
    specs = param_specs(checkpoint.config)
    assert params.keys() == specs.keys()
    assert len(params["layers"]) == 3
    for layer in params["layers"]:
        assert {name: leaf.shape for name, leaf in layer.items()} == {
            name: spec.shape for name, spec in specs["layers"].items()
        }
    attention = "model.layers.2.self_attn."
    np.testing.assert_array_equal(
        params["layers"][2]["qkv"], np.concatenate([made[f"{attention}{x}_proj.weight"].T for x in "qkv"], axis=1)
    )
    np.testing.assert_array_equal(
        params["layers"][2]["qkv_bias"], np.concatenate([made[f"{attention}{x}_proj.bias"] for x in "qkv"])
    )
    np.testing.assert_array_equal(
        params["layers"][0]["gate_up"],
        np.concatenate([made[f"model.layers.0.mlp.{x}_proj.weight"].T for x in ("gate", "up")], axis=1),
    )
    np.testing.assert_array_equal(params["embed"], made["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head"], made["lm_head.weight"].T)


def test_stacked_layers_hold_the_same_values_as_separate_ones(tmp_path):
    write_hf(tmp_path)
    separate = load_params(open_checkpoint(tmp_path), dtype=jnp.float32, stack_layers=False)
    stacked = load_params(open_checkpoint(tmp_path), dtype=jnp.float32, stack_layers=True)
    for i, layer in enumerate(separate["layers"]):
        jax.tree.map(np.testing.assert_array_equal, layer, {name: x[i] for name, x in stacked["layers"].items()})


def test_gguf_and_safetensors_of_the_same_tensors_load_alike(tmp_path):
    write_hf(tmp_path / "hf")
    write_gguf(tmp_path / "m.gguf")
    one, other = (load_params(open_checkpoint(p), dtype=jnp.float32) for p in (tmp_path / "hf", tmp_path / "m.gguf"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_dtype_is_the_dtype_of_every_leaf(tmp_path):
    write_hf(tmp_path, dtype=np.float16)
    params = load_params(open_checkpoint(tmp_path), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_prepare_sees_every_weight_as_stored_and_makes_its_leaf(tmp_path):
    write_hf(tmp_path, dtype=ml_dtypes.bfloat16)
    seen: dict[str, list[tuple[int, ...]]] = {}

    def prepare(spec, array):
        assert array.dtype == ml_dtypes.bfloat16
        seen.setdefault(spec.path, []).append(array.shape)
        return {"half": jnp.asarray(array, jnp.float32) / 2, "rows": jnp.asarray(array.shape[0])}

    params = load_params(open_checkpoint(tmp_path), dtype=jnp.float32, prepare=prepare)
    assert seen["layers.o"] == [(64, 32)] * 3
    assert seen["embed"] == [(96, 32)]
    assert params["layers"]["o"]["half"].shape == (3, 64, 32)
    assert params["layers"]["o"]["rows"].tolist() == [64, 64, 64]
    plain = load_params(open_checkpoint(tmp_path), dtype=jnp.float32)
    np.testing.assert_array_equal(params["layers"]["o"]["half"] * 2, plain["layers"]["o"])


def test_layers_that_prepare_makes_differently_cannot_be_stacked(tmp_path):
    write_hf(tmp_path)
    count = iter(range(1000))

    def prepare(spec, array):
        return (jnp.asarray(array),) * (next(count) % 5 + 1)

    with pytest.raises(ValueError, match=r"prepare\('layers.*use stack_layers=False"):
        load_params(open_checkpoint(tmp_path), dtype=jnp.float32, prepare=prepare)


def _set(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"has no tensor 'model.layers.1.mlp.up_proj.weight'"),
        (lambda t: t.pop("lm_head.weight"), r"has no tensor 'lm_head.weight'"),
        (
            _set("model.layers.0.self_attn.k_proj.weight", np.zeros((16, 32), np.float32)),
            r"'model.layers.0.self_attn.k_proj.weight' has shape \(16, 32\), but the config requires \(32, 32\)",
        ),
        (
            _set("model.norm.weight", np.zeros((32, 1), np.float32)),
            r"'model.norm.weight' has shape \(32, 1\), but the config requires \(32,\)",
        ),
        (
            _set("model.layers.3.mlp.up_proj.weight", np.zeros((64, 32), np.float32)),
            r"holds 1 tensors that the llama family does not know \('model.layers.3.mlp.up_proj.weight'\)",
        ),
        (_set("model.layers.0.self_attn.q_proj.bias", np.ones(64, np.float32)), r"'model.layers.0.self_attn.q_proj.bias'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused_with_the_tensor(tmp_path, change, message):
    write_hf(tmp_path, change=change)
    with pytest.raises(ValueError, match=message):
        load_params(open_checkpoint(tmp_path), dtype=jnp.float32)


def test_buffers_of_rotary_embeddings_are_ignored(tmp_path):
    write_hf(tmp_path, change=_set("model.layers.0.self_attn.rotary_emb.inv_freq", np.zeros(8, np.float32)))
    assert load_params(open_checkpoint(tmp_path), dtype=jnp.float32)["embed"].shape == (96, 32)


def test_a_tied_checkpoint_may_repeat_the_embedding_but_not_contradict_it(tmp_path):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def contradict(tensors):
        repeat(tensors)
        tensors["lm_head.weight"][5, 5] += 1

    write_hf(tmp_path / "same", tie_word_embeddings=True, change=repeat)
    assert "lm_head" not in load_params(open_checkpoint(tmp_path / "same"), dtype=jnp.float32)
    write_hf(tmp_path / "other", tie_word_embeddings=True, change=contradict)
    with pytest.raises(ValueError, match=r"'lm_head.weight' differs.*tie_word_embeddings to false"):
        load_params(open_checkpoint(tmp_path / "other"), dtype=jnp.float32)


def test_progress_is_shown_only_on_request(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "is_interactive", lambda: True)
    write_hf(tmp_path)
    load_params(open_checkpoint(tmp_path), dtype=jnp.float32, progress=False)
    assert capsys.readouterr().err == ""
    load_params(open_checkpoint(tmp_path), dtype=jnp.float32, progress=True)
    assert "21/21" in capsys.readouterr().err  # 6 weights a layer, 3 layers, embedding, norm, head


class AtOnce:
    """A pool that does what it gets at once, and notes what."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def submit(self, load, weight) -> Future:
        future: Future = Future()
        future.set_result(load(weight))
        self.done.append(weight.number)
        return future


def test_behind_a_large_weight_small_ones_go_on_up_to_its_size() -> None:
    sizes = [100, *[10] * 30, *[60] * 6]
    weights: Any = [SimpleNamespace(number=i, num_bytes=size) for i, size in enumerate(sizes)]
    pool: Any = AtOnce()
    ahead, load = [], cast("Any", lambda weight: -weight.number)
    weight: Any
    for weight, leaf in loading._loaded(load, weights, pool):
        assert leaf == -weight.number
        ahead.append(len(pool.done) - weight.number - 1)
    assert pool.done == list(range(len(sizes)))
    assert ahead[0] == 10
    assert ahead[10] == ahead[20] == ahead[-4] == 3, "at least three"
    assert ahead[-1] == 0
