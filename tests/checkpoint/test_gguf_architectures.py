"""Every GGUF architecture that we read, as llama.cpp's own converter writes it, beside the checkpoint that it came from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from fastgen_jax.checkpoint import check_tensors, open_checkpoint
from fastgen_jax.checkpoint.gguf_architectures import ARCHITECTURES, REFUSED
from fastgen_jax.models.families import family_of
from tests.reference.gguf_values import values

HOME = Path(__file__).parents[1] / "reference" / "gguf"
# Vectors are kept as float32 and matrices as float16, which hold the values exactly; Gemma's norms went through + 1.
TOLERANCE = 1e-6


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mixtral"])  # the last has Llama's name in its file
def test_config_and_tensors_are_those_of_the_original_checkpoint(name):
    checkpoint = open_checkpoint(HOME / f"{name}.gguf")
    hf = json.loads((HOME / f"{name}.json").read_text())
    original = family_of(hf["architectures"][0]).config_from_hf(hf)
    ours = replace(checkpoint.config, eos_token_ids=original.eos_token_ids, bos_token_id=original.bos_token_id)
    assert ours == original
    check_tensors(checkpoint)
    for tensor in checkpoint.tensor_names:
        expected = values(tensor, checkpoint.shape(tensor))
        assert checkpoint.read(tensor).shape == checkpoint.shape(tensor)
        np.testing.assert_allclose(np.float32(checkpoint.read(tensor)), expected, atol=TOLERANCE, err_msg=tensor)


def _with(source: Path, target: Path, **changes) -> None:
    """A copy of a GGUF file without tensors' data, some metadata changed or added."""
    reader = gguf.GGUFReader(source)
    kind = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, kind)
    for name, field in reader.fields.items():
        short = name.removeprefix(f"{kind}.")
        if name.startswith(f"{kind}.") and short not in changes:
            {float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string}[
                type(field.contents())](name, field.contents())
    for name, value in changes.items():
        if value is not None:
            {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)](
                f"{kind}.{name}", value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("qwen2", {"attention.clamp_kqv": 8.0}, r"qwen2.attention.clamp_kqv is 8.0, which is not supported"),
    ("gemma2", {"attn_logit_softcapping": None}, r"the metadata lack gemma2.attn_logit_softcapping"),
    ("olmo2", {"attention.sliding_window": 64}, r"olmo2.attention.sliding_window is 64; only 0 is supported"),
    ("qwen3", {"rope.dimension_count": 8}, r"qwen3.rope.dimension_count is 8; only 16 is supported"),
    ("qwen3", {"block_count": 10**9}, r"qwen3.block_count is 1,000,000,000, but the file holds only"),
    ("granite", {"rope.scaling.type": "longrope"}, r"granite.rope.scaling.type 'longrope' is not supported"),
    ("mixtral", {"expert_gating_func": 2}, r"llama.expert_gating_func is 2, which is not supported"),
    ("mixtral", {"expert_count": 3}, r"'blk.0.ffn_gate_exps.weight' holds 4 experts, but the metadata announce 3"),
    ("mixtral", {"expert_count": 5}, r"'blk.0.ffn_gate_exps.weight' holds 4 experts, but the metadata announce 5"),
    ("olmoe", {"attention.clamp_kqv": 8.0}, r"olmoe.attention.clamp_kqv is 8.0"),
])
def test_metadata_that_would_be_ignored_are_refused(tmp_path, name, changes, message):
    _with(HOME / f"{name}.gguf", tmp_path / "changed.gguf", **changes)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "changed.gguf")


@pytest.mark.parametrize("kind", REFUSED)
def test_an_architecture_whose_metadata_do_not_say_enough_is_refused_with_the_reason(tmp_path, kind):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", kind)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=rf"'{kind}' is not supported \({REFUSED[kind][:20]}.*the Hugging Face"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_falcon_that_the_metadata_cannot_describe_is_refused(tmp_path):
    """Falcon 11B has groups and one norm, and a rotary base that the converter does not write."""
    reader = gguf.GGUFReader(HOME / "falcon.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "falcon")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for tensor in reader.tensors:
        if "attn_norm_2" not in tensor.name:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"this is not Falcon 7B, 40B or 180B; .* rotary base of Falcon 11B"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_vocabulary_without_weights_is_no_checkpoint(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="holds a vocabulary, not a model"):
        open_checkpoint(tmp_path / "v.gguf")
