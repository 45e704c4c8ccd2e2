"""Quantized GGUF files on a CPU: weights stay in the blocks of the file; results are those of their values."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from fastgen_jax import Engine, EngineConfig, Research
from fastgen_jax.checkpoint import kept_in_blocks, load_params, open_checkpoint
from fastgen_jax.checkpoint.block_kind import BlockKind
from fastgen_jax.engine.fit import candidates, choose_formats
from pallas_kernels import native
from pallas_kernels.matmul import BlockWeight, PackedWeight
from tests.checkpoint.tiny_files import write_gguf
from tests.engine.fit_cases import MACHINES, model
from tests.tiny import drain, greedy, tokens_of

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))

SMALL = {"token_budget": 16, "budget_ladder": (), "max_num_seqs": 4, "block_size": 4, "num_blocks": 32}
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [*(chr(ord("0") + i) for i in range(95)), "01"],
    "tokenizer.ggml.merges": ["0 1"],
}
PROMPT = [5, 3, 77, 12, 40, 41, 42, 8, 90, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
KEPT = {"layers.qkv", "layers.o", "layers.gate_up", "layers.down", "lm_head"}


def _engine(path, **options) -> Engine:
    return Engine.from_pretrained(path, **SMALL, **options)


def _packed(engine: Engine) -> dict[str, PackedWeight]:
    params = engine.params
    named = {f"layers.{name}": leaf for name, leaf in params["layers"].items()} | {"lm_head": params["lm_head"]}
    return {name: leaf for name, leaf in named.items() if isinstance(leaf, PackedWeight)}


OTHERS = [pytest.param(each, marks=pytest.mark.slow) for each in (("Q4_0", True), ("Q8_0", True), ("Q4_1", False))]


@pytest.fixture(scope="module", params=[("Q4_1", True), *OTHERS], ids=str)
def path(request, tmp_path_factory):
    kind, tied = request.param
    path = tmp_path_factory.mktemp("blocks") / f"{kind}.gguf"
    write_gguf(path, kind=kind, arrays=TOKENIZER, tie_word_embeddings=tied)
    return path


@pytest.fixture(scope="module")
def kept(path):
    return _engine(path)


def test_an_engine_computes_with_the_blocks_of_a_file_what_it_computes_with_their_values(path, kept):
    plain = _engine(path, quantize="none")
    assert {name for name, leaf in _packed(kept).items() if leaf.blocks} == KEPT
    assert not any(leaf.blocks for leaf in _packed(plain).values())
    assert "in the blocks of the file" in repr(kept)
    assert "in the blocks of the file" not in repr(plain)
    results = []
    for engine in (kept, plain):
        logits = Research(engine).put(["a"], [PROMPT])  # more tokens than one step
        Research(engine).flush("a")
        ids = [engine.add(PROMPT[:n], greedy(5)) for n in (2, 7, 19)]
        outputs = drain(engine)
        results.append((logits, [tokens_of(outputs[i]) for i in ids]))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_an_engine_with_blocks_sleeps_and_wakes_and_refuses_other_weights(path, kept):
    engine = kept
    before = Research(engine).put(["a"], [PROMPT])
    Research(engine).flush("a")
    engine.release_memory(weights="dropped")
    engine.restore_memory()
    np.testing.assert_array_equal(Research(engine).put(["a"], [PROMPT]), before)
    Research(engine).flush("a")
    with pytest.raises(ValueError, match=r"blocks of its checkpoint.*quantize='none'"):
        engine.update_params(load_params(open_checkpoint(path), dtype="float32"))
    engine.update_params(path)
    np.testing.assert_array_equal(Research(engine).put(["a"], [PROMPT]), before)
    Research(engine).flush("a")


def test_int4_weights_take_four_bits_in_layers_and_eight_in_the_head(path):
    engine = _engine(path, quantize="int4")
    packed = _packed(engine)
    assert {name for name, leaf in packed.items() if leaf.blocks} == KEPT - {"lm_head"}
    assert packed["lm_head"].panels.dtype == np.int8
    assert "int4 weights" in repr(engine)
    request = engine.add(PROMPT, greedy(3))
    assert len(tokens_of(drain(engine)[request])) == 3


def test_a_model_in_blocks_fits_where_its_values_do_not():
    q4_0 = BlockKind("Q4_0", 4.5, 32, 4, scale_dtype="float16")
    stored = [("lm_head", q4_0), *((f"layers.{name}", q4_0) for name in ("qkv", "o", "gate_up", "down"))]
    here = MACHINES["CPU, 16 GiB free"]
    llama = model("Llama-3-8B")
    assert choose_formats(EngineConfig(), llama, here).quantize == "int8"
    chosen = choose_formats(EngineConfig(), llama, here, stored=stored)
    assert (chosen.quantize, chosen.kept) == (None, tuple((path, 4.5) for path, _ in stored))
    assert choose_formats(EngineConfig(quantize="int8"), llama, here, stored=stored).kept == ()
    options = candidates(EngineConfig(), here, llama, stored=stored)
    assert all(formats.quantize is None for formats in options), "int8 takes more memory"


def test_layers_of_different_kinds_take_a_common_one_with_the_same_values(tmp_path):
    def kind(name: str) -> str:
        return "Q8_0" if "layers.1." in name and ("v_proj" in name or "down_proj" in name) else "Q4_1"

    write_gguf(tmp_path / "mixed.gguf", kind=kind)
    checkpoint = open_checkpoint(tmp_path / "mixed.gguf")
    kept = kept_in_blocks(checkpoint)
    assert {path for path, kind in kept.items() if kind.is_common} == {"layers.qkv", "layers.down"}
    assert kept.keys() == KEPT
    values = load_params(
        checkpoint,
        dtype="float32",
        keep_blocks=True,
        prepare=lambda spec, array: array.dequantize() if isinstance(array, BlockWeight) else np.asarray(array),
    )
    jax.tree.map(np.testing.assert_array_equal, values, {**load_params(checkpoint, dtype="float32")})


def test_a_file_with_other_kinds_in_some_layers_is_dequantized(tmp_path):
    write_gguf(tmp_path / "f16.gguf", kind="F16", arrays=TOKENIZER)
    assert kept_in_blocks(open_checkpoint(tmp_path / "f16.gguf")) == {}
