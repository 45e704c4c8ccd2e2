from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from fastgen_jax.checkpoint import open_checkpoint, resolve_model
from fastgen_jax.checkpoint.gguf_file import dequantize, read_gguf
from fastgen_jax.checkpoint.gguf_metadata import llama3_factors
from tests.checkpoint.tiny_files import write_gguf

REFERENCE = Path(__file__).parents[1] / "reference"
# Largest error of a value as a share of the largest value in its block of 32: half a step of the format's grid,
# and for Q4_1 a 16-bit offset besides.
QUANTIZATION_ERROR = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.6 / 127, "Q4_1": 0.08}


@pytest.mark.parametrize("kind", QUANTIZATION_ERROR)
def test_every_tensor_is_read_under_its_hugging_face_name_with_heads_in_hugging_face_order(tmp_path, kind):
    made = write_gguf(tmp_path / "m.gguf", kind=kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.tensor_names == made.keys()
    for name, array in made.items():
        assert checkpoint.shape(name) == array.shape
        error = np.abs(np.float32(checkpoint.read(name)) - array).max()
        assert error <= QUANTIZATION_ERROR[kind] * np.abs(array).max(), name


def test_biases_of_q_and_k_are_reordered_too(tmp_path):
    made = write_gguf(tmp_path / "m.gguf", kind="Q8_0", attention_bias=True)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config.qkv_bias
    for name in ("model.layers.1.self_attn.q_proj.bias", "model.layers.1.self_attn.k_proj.bias"):
        np.testing.assert_array_equal(checkpoint.read(name), made[name])


def test_a_tensor_larger_than_one_piece_is_dequantized_whole(tmp_path, monkeypatch):
    made = write_gguf(tmp_path / "m.gguf", kind="Q8_0")
    monkeypatch.setattr("fastgen_jax.checkpoint.gguf_file._PIECE", 32 * 7)  # 7 rows of 32, which do not divide 96
    read = open_checkpoint(tmp_path / "m.gguf").read("lm_head.weight")
    assert np.abs(read - made["lm_head.weight"]).max() <= QUANTIZATION_ERROR["Q8_0"] * np.abs(read).max()


def test_metadata_becomes_the_model_config(tmp_path):
    write_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.eot_token_id": 7})
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert (config.num_layers, config.embed_dim, config.num_heads, config.num_kv_heads) == (3, 32, 4, 2)
    assert (config.head_dim, config.mlp_dim, config.vocab_size, config.max_context_len) == (16, 64, 96, 128)
    assert config.eos_token_ids == (2, 7)
    assert config.bos_token_id == 1
    assert not config.tie_embeddings


def test_a_file_without_an_output_matrix_has_tied_embeddings(tmp_path):
    write_gguf(tmp_path / "m.gguf", tie_word_embeddings=True)
    assert open_checkpoint(tmp_path / "m.gguf").config.tie_embeddings


@pytest.mark.parametrize(("scaling", "kind"), [("linear", "linear"), ("yarn", "yarn"), ("none", "default")])
def test_rope_scaling_keys_are_read(tmp_path, scaling, kind):
    write_gguf(
        tmp_path / "m.gguf",
        metadata={
            "llama.rope.scaling.type": scaling,
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 32,
        },
    )
    rope = open_checkpoint(tmp_path / "m.gguf").config.rope
    assert rope.kind == kind
    assert rope.factor == (1.0 if kind == "default" else 4.0)
    assert kind != "yarn" or rope.original_max_position == 32


def test_the_frequency_table_of_llama_3_becomes_its_scaling(tmp_path):
    rope = {
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama3_factors(head_dim=16, rope=rope).astype(np.float32)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
    write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": factors})
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert (config.rope.kind, config.rope.factor, config.rope.original_max_position) == ("llama3", 8.0, 8192)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba' is not supported; supported: llama"),
        ({"metadata": {"llama.expert_count": 8}}, "the metadata lacks llama.expert_used_count"),
        (
            {"metadata": {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}},
            "'longrope'.*linear, yarn",
        ),
        ({"metadata": {"llama.rope.scaling.attn_factor": 0.5}}, "scaling.attn_factor is not supported"),
        ({"extra": {"rope_freqs.weight": np.float32([1, 1, 1, 1, 1, 2, 3, 9])}}, "are not those of Llama 3"),
    ],
)
def test_unsupported_models_are_refused(tmp_path, options, message):
    write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


def test_missing_metadata_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"m.gguf: the metadata lacks llama.block_count"):
        open_checkpoint(tmp_path / "m.gguf")


def test_our_header_reader_agrees_with_the_gguf_library(tmp_path):
    write_gguf(tmp_path / "m.gguf", kind="Q4_1", metadata={"general.name": "Grüße 😀"})
    ours, theirs = read_gguf(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    assert ours.metadata == {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].offset == tensor.data_offset
        np.testing.assert_array_equal(ours.rows(tensor.name), np.ascontiguousarray(tensor.data).view(np.uint8))


def test_a_file_cut_anywhere_is_refused_with_its_name(tmp_path):
    write_gguf(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    for length in [*range(0, 4000, 97), len(data) // 2, len(data) - 64]:
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf.*(truncated|not a GGUF|empty)"):
            open_checkpoint(tmp_path / "cut.gguf")


def test_flipped_bytes_in_the_header_never_raise_anything_but_value_error(tmp_path):
    write_gguf(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    rng = np.random.default_rng(0)
    refusals = []
    for position in rng.integers(0, 3000, 300):
        broken = bytearray(data)
        broken[position] ^= 0xFF
        (tmp_path / "broken.gguf").write_bytes(broken)
        try:
            open_checkpoint(tmp_path / "broken.gguf")
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert all("broken.gguf" in refusal for refusal in refusals)


@pytest.mark.parametrize(
    ("where", "becomes", "message"),
    [
        (b"llama.block_count", 99, "corrupt: a metadata value of unknown kind 99"),
        (b"token_embd.weight", 9, "corrupt: tensor 'token_embd.weight' has 9 dimensions; it must have 1 to"),
    ],
)
def test_a_corrupt_header_is_refused_with_what_is_wrong(tmp_path, where, becomes, message):
    write_gguf(tmp_path / "m.gguf")
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    at = data.index(where) + len(where)
    data[at : at + 4] = becomes.to_bytes(4, "little")
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


def test_an_empty_tensor_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
    data[at : at + 8] = bytes(8)
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=r"corrupt: tensor 'token_embd.weight' is empty"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(ValueError, match="not a GGUF file"):
        open_checkpoint(tmp_path / "m.gguf")


def test_the_error_for_an_unknown_tensor_names_the_nearest_one(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"no tensor 'model.norm.wait'; the nearest name is 'model.norm.weight'"):
        open_checkpoint(tmp_path / "m.gguf").read("model.norm.wait")


BLOCKS = dict(np.load(REFERENCE / "ggml_blocks.npz"))


@pytest.mark.parametrize("kind", sorted({name.split(".")[0] for name in BLOCKS} - {"Q1_0"}))
def test_every_block_type_is_read_as_ggml_reads_it(kind):
    rows, values = BLOCKS[f"{kind}.rows"], BLOCKS[f"{kind}.values"]
    np.testing.assert_array_equal(dequantize(rows, gguf.GGMLQuantizationType[kind].value, values.shape), values)


def test_every_type_that_the_gguf_library_reads_is_among_them():
    assert {kind.name for kind in gguf.quants._type_traits} - {"BF16"} <= {name.split(".")[0] for name in BLOCKS}


def test_a_block_type_that_the_library_does_not_read_is_refused():
    with pytest.raises(ValueError, match="storage type Q8_K cannot be dequantized; requantize the file to one of F32, F16"):
        dequantize(np.zeros((1, 292), np.uint8), gguf.GGMLQuantizationType.Q8_K.value, (1, 256))


def test_a_file_in_several_parts_is_read_from_any_of_them(tmp_path):
    made = write_gguf(tmp_path / "m.gguf", kind="Q8_0", tensors_per_part=10)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts[:2]] == [f"m-0000{n}-of-0000{len(parts)}.gguf" for n in (1, 2)]
    write_gguf(tmp_path / "whole" / "m.gguf", kind="Q8_0")
    whole = open_checkpoint(tmp_path / "whole" / "m.gguf")
    for path in (parts[0], parts[-1], resolve_model(tmp_path)):
        checkpoint = open_checkpoint(path)
        assert checkpoint.path == parts[0]
        assert checkpoint.config == whole.config
        assert checkpoint.tensor_names == made.keys()
        for name in made:
            np.testing.assert_array_equal(checkpoint.read(name), whole.read(name))


def test_an_absent_or_foreign_part_is_named(tmp_path):
    write_gguf(tmp_path / "m.gguf", tensors_per_part=10)
    first, second, *_ = parts = sorted(tmp_path.glob("*.gguf"))
    kept = second.read_bytes()
    second.unlink()
    for read in (open_checkpoint, resolve_model):
        with pytest.raises(ValueError, match=f"is one of {len(parts)} parts, of which {second.name} is absent"):
            read(first if read is open_checkpoint else tmp_path)
    second.write_bytes(parts[-1].read_bytes())
    with pytest.raises(ValueError, match=f"{second.name} is not part 2 of {len(parts)}, as its name says"):
        open_checkpoint(first)
    second.write_bytes(kept)
    renamed = first.rename(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=f"is one of {len(parts)} parts, but its name does not say which"):
        open_checkpoint(renamed)
