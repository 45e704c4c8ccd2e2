"""Every supported GGUF architecture, as written by llama.cpp's converter, compared with the original checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest

from fastgen_jax.checkpoint import check_tensors, load_params, open_checkpoint
from fastgen_jax.checkpoint.gguf_architectures import ARCHITECTURES
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import family_of
from fastgen_jax.models.state_config import Mamba2
from tests.models.parity import Runs, error
from tests.reference.gguf_values import values

HOME = Path(__file__).parents[1] / "reference" / "gguf"
# Vectors are kept as float32 and matrices as float16, which hold the values exactly; Gemma's norms had 1 added.
TOLERANCE = 1e-6
OTHERS_OF_THEM = (
    "mixtral",
    "olmo3",
    "deepseek2-lite",
    "stablelm-12b",
    "granitehybrid-moe",
    "gemma4-moe",
)  # with the name of another in their files
WITHOUT_GROUPS = {"expert_group_count": None, "expert_group_used_count": None}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS_OF_THEM])
def test_config_and_tensors_are_those_of_the_original_checkpoint(name):
    checkpoint = open_checkpoint(HOME / f"{name}.gguf")
    hf = json.loads((HOME / f"{name}.json").read_text())
    original = family_of(hf["architectures"][0]).config_from_hf(hf)
    ours = replace(checkpoint.config, eos_token_ids=original.eos_token_ids, bos_token_id=original.bos_token_id)
    if name.startswith(("granitehybrid", "nemotron_h")):  # the converter writes the same length for every model
        assert ours.max_context_len == 131_072
        ours = replace(ours, max_context_len=original.max_context_len)
    if name == "falcon-h1":
        original = _without_multipliers(original)
    assert ours == original
    check_tensors(checkpoint)
    for tensor in checkpoint.tensor_names:
        expected = values(tensor, checkpoint.shape(tensor))
        if name == "falcon-h1":
            expected = _multiplied(tensor, expected, hf)
        assert checkpoint.read(tensor).shape == checkpoint.shape(tensor)
        np.testing.assert_allclose(np.float32(checkpoint.read(tensor)), expected, atol=TOLERANCE, err_msg=tensor)


def test_keys_of_layers_that_read_those_of_others_may_be_in_the_file(tmp_path):
    unused = {f"blk.5.attn_{part}.weight": np.zeros((4, 4), np.float16) for part in ("k", "v", "k_norm")}
    _with(HOME / "gemma4.gguf", tmp_path / "published.gguf", tensors=unused)
    ours, original = (open_checkpoint(path) for path in (tmp_path / "published.gguf", HOME / "gemma4.gguf"))
    check_tensors(ours)
    assert ours.tensor_names == original.tensor_names
    _with(HOME / "gemma4.gguf", tmp_path / "other.gguf", tensors={"blk.2.attn_k_norm_2.weight": np.zeros(4, np.float16)})
    with pytest.raises(ValueError, match=r"attn_k_norm_2"):
        check_tensors(open_checkpoint(tmp_path / "other.gguf"))


def _without_multipliers(config: ModelConfig) -> ModelConfig:
    """Falcon-H1 as a file describes it, whose weights are multiplied."""
    assert isinstance(config.state, Mamba2)
    return replace(
        config,
        embed_multiplier=1.0,
        logits_multiplier=1.0,
        attention_scale=config.head_dim**-0.5,
        attention_multiplier=1.0,
        mlp_multipliers=(1.0, 1.0),
        state=replace(config.state, in_multipliers=(1.0,) * 5, out_multiplier=1.0),
    )


def _multiplied(name: str, values: np.ndarray, hf: dict[str, Any]) -> np.ndarray:
    """What the converter makes of a tensor of Falcon-H1: all factors are powers of two."""
    attention, gate_and_down = hf["attention_in_multiplier"], hf["mlp_multipliers"]
    factors = {
        "embed_tokens": hf["embedding_multiplier"],
        "lm_head": hf["lm_head_multiplier"],
        "q_proj": attention,
        "k_proj": attention * hf["key_multiplier"],
        "v_proj": attention,
        "o_proj": hf["attention_out_multiplier"],
        "gate_proj": gate_and_down[0],
        "down_proj": gate_and_down[1],
        "mamba.out_proj": hf["ssm_out_multiplier"],
    }
    if ".in_proj" in name:
        inner, groups = hf["mamba_d_ssm"], hf["mamba_n_groups"] * hf["mamba_d_state"]
        parts = np.repeat(hf["ssm_multipliers"], (inner, inner, groups, groups, hf["mamba_n_heads"]))
        return values * np.float32(hf["ssm_in_multiplier"] * parts)[:, None]
    return values * np.float32(next((factor for part, factor in factors.items() if f"{part}." in name), 1.0))


def _with(source: Path, target: Path, *, tensors=MappingProxyType({}), without=(), **changes) -> None:
    """A copy of a GGUF file, some metadata and tensors changed, added or left out."""
    reader = gguf.GGUFReader(source)
    kind = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, kind)
    for name, field in reader.fields.items():
        short = name.removeprefix(f"{kind}.")
        if name.startswith(f"{kind}.") and short not in changes:
            add = {float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string}
            add.get(type(field.contents()), writer.add_array)(name, field.contents())
    for name, value in changes.items():
        if value is not None:
            {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)](f"{kind}.{name}", value)
    for tensor in reader.tensors:
        if not any(part in tensor.name for part in without):
            writer.add_tensor(tensor.name, tensor.data)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"attention.clamp_kqv": 8.0}, r"qwen2.attention.clamp_kqv is 8.0, which is not supported"),
        ("gemma2", {"attn_logit_softcapping": None}, r"the metadata lacks gemma2.attn_logit_softcapping"),
        ("olmo2", {"attention.sliding_window": 64}, r"the metadata lacks olmo2.attention.sliding_window_pattern"),
        ("qwen3", {"rope.dimension_count": 8}, r"qwen3.rope.dimension_count is 8; only 16 is supported"),
        ("qwen3", {"block_count": 10**9}, r"qwen3.block_count is 1,000,000,000, but the file holds only"),
        ("granite", {"rope.scaling.type": "longrope"}, r"granite.rope.scaling.type 'longrope' is not supported"),
        ("mixtral", {"expert_gating_func": 2}, r"llama.expert_gating_func is 2, which is not supported"),
        ("mixtral", {"expert_count": 3}, r"'blk.0.ffn_gate_exps.weight' holds 4 entries, but the metadata says 3"),
        ("mixtral", {"expert_count": 5}, r"'blk.0.ffn_gate_exps.weight' holds 4 entries, but the metadata says 5"),
        ("olmoe", {"attention.clamp_kqv": 8.0}, r"olmoe.attention.clamp_kqv is 8.0"),
        (
            "deepseek2",
            {"expert_gating_func": 3},
            r"deepseek2.expert_gating_func is 3; supported: 1 \(softmax\), 2 \(sigmoid\)",
        ),
        ("deepseek2", {"rope.scaling.yarn_log_multiplier": None}, r"lacks deepseek2.rope.scaling.yarn_log_multiplier"),
        ("deepseek2", {"attention.temperature_scale": 0.1}, r"deepseek2.attention.temperature_scale is 0.1, which is not"),
        ("deepseek2", {"attention.key_length": 24}, r"deepseek2.attention.key_length is 24; only 20 is supported"),
        ("gemma4", {"rope.dimension_count": 8}, r"gemma4.rope.dimension_count is 8; only 32 is supported"),
        ("gemma4", {"attention.key_length_swa": 8}, r"gemma4.attention.value_length_swa is 16; only 8 is supported"),
        ("gemma3n", {"altup.num_inputs": None}, r"the metadata lacks gemma3n.altup.num_inputs"),
        ("qwen", {"attention.head_count_kv": 2}, r"qwen.attention.head_count_kv is 2; only 4 is supported"),
    ],
)
def test_metadata_that_would_be_ignored_is_refused(tmp_path, name, changes, message):
    _with(HOME / f"{name}.gguf", tmp_path / "changed.gguf", **changes)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "changed.gguf")


@pytest.mark.parametrize("split", [True, False])
def test_the_groups_of_deepseeks_experts_and_its_latent_projection_are_read_from_old_files_too(tmp_path, split):
    """Files from before April 2025 have the projection as one tensor, and those from before autumn 2025 have no groups."""
    new = open_checkpoint(HOME / "deepseek2-lite.gguf")
    sizes = (
        {}
        if split
        else {
            "attention.key_length_mla": None,
            "attention.value_length_mla": None,
            "attention.key_length": 12,
            "attention.value_length": 12,
            "attention.head_count_kv": 4,
        }
    )
    whole = (
        {}
        if split
        else {f"blk.{i}.attn_kv_b.weight": new.read(f"model.layers.{i}.self_attn.kv_b_proj.weight") for i in range(2)}
    )
    _with(
        HOME / "deepseek2-lite.gguf",
        tmp_path / "old.gguf",
        **sizes,
        **WITHOUT_GROUPS,
        tensors=whole,
        without=() if split else ("attn_k_b", "attn_v_b"),
    )
    old = open_checkpoint(tmp_path / "old.gguf")
    assert old.config == new.config
    assert old.tensor_names == new.tensor_names
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert old.shape(name) == new.shape(name) == (80, 16)
    np.testing.assert_array_equal(old.read(name), new.read(name))


def test_the_experts_of_deepseek_v3_are_in_groups_whether_the_file_says_so_or_not(tmp_path):
    _with(HOME / "deepseek2.gguf", tmp_path / "old.gguf", **WITHOUT_GROUPS)
    with pytest.raises(ValueError, match=r"the number of groups of its 8 experts is not recorded; convert it again"):
        open_checkpoint(tmp_path / "old.gguf")
    _with(HOME / "deepseek2.gguf", tmp_path / "big.gguf", **WITHOUT_GROUPS, expert_count=256)
    with pytest.raises(ValueError, match=r"'blk.1.ffn_gate_exps.weight' holds 8 entries, but the metadata says 256"):
        open_checkpoint(tmp_path / "big.gguf")


def test_multi_token_prediction_layers_are_left_out(tmp_path):
    third, fourth = ({f"blk.{layer}.nextn.enorm.weight": np.ones(32, np.float32)} for layer in (2, 3))
    _with(HOME / "glm4moe.gguf", tmp_path / "one.gguf", tensors=third)
    checkpoint = open_checkpoint(tmp_path / "one.gguf")
    assert checkpoint.config.num_layers == 2
    check_tensors(checkpoint)
    _with(HOME / "glm4moe.gguf", tmp_path / "two.gguf", tensors=third | fourth)
    with pytest.raises(ValueError, match=r"does not know \('blk.3.nextn.enorm.weight'\)"):
        check_tensors(open_checkpoint(tmp_path / "two.gguf"))


def test_values_missing_in_the_metadata_are_those_of_the_releases(tmp_path):
    _with(HOME / "qwen.gguf", tmp_path / "qwen.gguf", context_length=8192)
    assert open_checkpoint(tmp_path / "qwen.gguf").config.max_context_len == 2048  # up to there no release scales anything
    _with(HOME / "starcoder2.gguf", tmp_path / "starcoder2.gguf", context_length=16384)
    config = open_checkpoint(tmp_path / "starcoder2.gguf").config
    assert (config.max_context_len, config.layer_windows) == (16384, (4096, 4096))
    assert open_checkpoint(HOME / "gptneox.gguf").config.activation == "gelu"


def test_a_falcon_variant_that_gguf_cannot_describe_is_refused(tmp_path):
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


def test_a_vocabulary_without_weights_is_not_a_checkpoint(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="holds a vocabulary, not a model"):
        open_checkpoint(tmp_path / "v.gguf")


LOGITS = dict(np.load(HOME / "logits.npz"))
# Float32 in another order, amplified by weights of standard deviation 1; ggml computes GELU with a float16 table.
LOGITS_TOLERANCE, WITH_GELU = 1e-4, 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({key.split(".")[0] for key in LOGITS}))
def test_logits_are_those_of_llama_cpp(name):
    checkpoint = open_checkpoint(HOME / f"{name}.gguf")
    params, config = load_params(checkpoint, dtype="float32", stack_layers=False), checkpoint.config
    tokens, want = LOGITS[f"{name}.tokens"], LOGITS[f"{name}.logits"]
    if name == "gpt-oss":  # its config says not to round the ends of YaRN's ramp; llama.cpp always does
        config = replace(config, rope=replace(config.rope, truncate=True))
    if name == "exaone4":  # llama.cpp only gives windows to the model of 64 layers
        config = replace(config, layer_windows=(), layer_ropes=())
    got = Runs(params, config, len(tokens)).logits(tokens, [len(tokens)], prompt_length=len(tokens))[-len(want) :]
    assert error(got, want) < (WITH_GELU if "gelu" in config.activation else LOGITS_TOLERANCE)
