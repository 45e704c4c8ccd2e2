"""Checkpoints of EasyDeL: made from the tiny checkpoints of Hugging Face by their layout, and written by EasyDeL itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore

from fastgen_jax.checkpoint import load_params, open_checkpoint, open_easydel
from fastgen_jax.checkpoint.easydel import INDEX
from fastgen_jax.cli import main
from tests.checkpoint.test_export import assert_same_tensors, tensors_of
from tests.models.parity import Runs, folder
from tests.text.vocabularies import write_json

MODELS = [("llama", "default"), ("qwen2", "tied"), ("qwen3", "default"), ("gemma2", "default"), ("gemma3", "default")]


def save(source: Path, out: Path) -> Path:
    """Writes a tiny checkpoint as EasyDeL does."""
    for name, values in tensors_of(source).items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            leaf = "embedding" if module.endswith("embed_tokens") else "kernel"
        array = values.T if leaf == "kernel" and values.ndim == 2 else values
        place = out / "model" / module.replace(".", "/") / leaf
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{place}/"}}
        store = tensorstore.open(spec, create=True, dtype=array.dtype.name, shape=array.shape).result()
        store.write(np.ascontiguousarray(array)).result()
    shutil.copy(source / "config.json", out)
    (out / INDEX).write_text("{}")
    return out


@pytest.mark.parametrize("names", MODELS, ids="-".join)
def test_weights_are_those_of_transformers(names, tmp_path) -> None:
    source = folder(*names)
    saved = open_checkpoint(save(source, tmp_path / "saved"))
    got, want = (load_params(each, dtype="float32") for each in (saved, open_checkpoint(source)))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_command_exports_it(tmp_path) -> None:
    source = folder("qwen3", "default")
    saved = save(source, tmp_path / "saved")
    write_json(saved)
    command = ["convert", f"easydel:{saved}", str(tmp_path / "out"), "--format", "safetensors"]
    assert main(command) == 0
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(source))


def test_what_is_not_supported_is_refused_with_a_remedy(tmp_path) -> None:
    with pytest.raises(ValueError, match=f"has no {INDEX}"):
        open_easydel(folder("llama", "default"))
    saved = save(folder("llama", "default"), tmp_path / "saved")
    with pytest.raises(ValueError, match="with experts or states"):
        open_easydel(saved, folder("mixtral", "default"))
    shutil.rmtree(saved / "model" / "model" / "norm")
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        load_params(open_easydel(saved), dtype="float32")
    shutil.rmtree(saved / "model")
    (saved / "model").mkdir()
    with pytest.raises(ValueError, match="cannot be read as arrays of EasyDeL"):
        open_easydel(saved)


LIBRARY = {
    "Llama": {"rope_theta": 10_000.0},
    "Qwen2": {"rope_theta": 1_000_000.0},
    "Qwen3": {"rope_theta": 1_000_000.0, "tie_word_embeddings": True},
    "Gemma2": {"sliding_window": 32, "query_pre_attn_scalar": 8},  # a shorter window, EasyDeL computes in another way
}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the library and what it imports
@pytest.mark.parametrize("family", LIBRARY)
def test_logits_are_those_of_easydel(family, tmp_path) -> None:
    easydel = pytest.importorskip("easydel", reason="easydel is not installed")
    from flax import nnx

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": family == "Gemma2",
        "attn_mechanism": "vanilla",
        "attn_dtype": np.float32,
    }
    tokens = np.random.default_rng(0).integers(3, 64, 20)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        config = getattr(easydel, f"{family}Config")(**(sizes | LIBRARY[family]))
        of_family = getattr(easydel, f"{family}ForCausalLM")
        with config.mesh:
            model = of_family(config=config, dtype=np.float32, param_dtype=np.float32, rngs=nnx.Rngs(0))
            expected = np.asarray(model(input_ids=jax.numpy.asarray(tokens[None])).logits)[0]
            model.save_pretrained(str(tmp_path / "saved"))
    checkpoint = open_checkpoint(tmp_path / "saved")
    runs = Runs(load_params(checkpoint, dtype="float32"), checkpoint.config, len(tokens))
    logits = runs.logits(tokens, [len(tokens)], prompt_length=len(tokens))
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=3e-4)
