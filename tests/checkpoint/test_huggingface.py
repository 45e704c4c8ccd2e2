from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastgen_jax.checkpoint import open_checkpoint, resolve_model
from fastgen_jax.checkpoint.load import check_tensors
from tests.checkpoint.tiny_files import write_hf


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [0, 3])
def test_tensors_are_read_as_they_were_written(tmp_path, dtype, shards):
    made = write_hf(tmp_path, dtype=dtype, shards=shards)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensor_names == made.keys()
    for name, array in made.items():
        assert checkpoint.shape(name) == array.shape
        assert checkpoint.read(name).dtype == dtype
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_end_of_sequence_ids_of_the_generation_config_are_added(tmp_path):
    write_hf(tmp_path, eos_token_id=2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5, 9]}')
    assert open_checkpoint(tmp_path).config.eos_token_ids == (2, 5, 9)


def test_head_dim_and_biases_come_from_the_config(tmp_path):
    write_hf(tmp_path, head_dim=8, attention_bias=True)
    config = open_checkpoint(tmp_path).config
    assert (config.head_dim, config.qkv_bias) == (8, True)


def _drop_shard(path):
    (path / "model-00002-of-00003.safetensors").unlink()


def _cut_shard(path):
    file = path / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _garbage_shard(path):
    (path / "model-00002-of-00003.safetensors").write_bytes(b"\xff" * 50)


def _misplaced_tensor(path):
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00003.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _bad_index(path):
    (path / "model.safetensors.index.json").write_text('{"weight_map": ')


def _empty_index(path):
    (path / "model.safetensors.index.json").write_text("{}")


def _no_index(path):
    (path / "model.safetensors.index.json").unlink()


def _bad_config(path):
    (path / "config.json").write_text("{'vocab_size': 3}")


def _no_config(path):
    (path / "config.json").unlink()


def _config_without(field):
    def change(path):
        config = json.loads((path / "config.json").read_text())
        del config[field]
        (path / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_shard, r"index.json names model-00002-of-00003.safetensors, which is absent"),
        (_cut_shard, r"model-00002-of-00003.safetensors is truncated or corrupt"),
        (_garbage_shard, r"model-00002-of-00003.safetensors is truncated or corrupt"),
        (_misplaced_tensor, r"says that model-00002-of-00003.safetensors holds 'lm_head.weight', but it does not"),
        (_bad_index, r"index.json is not valid JSON"),
        (_empty_index, r"index.json has no 'weight_map'"),
        (_no_index, r"3 model\*.safetensors files but no model.safetensors.index.json"),
        (_bad_config, r"config.json is not valid JSON"),
        (_no_config, r"config.json does not exist"),
        (_config_without("architectures"), r"config.json: 'architectures' must name one architecture"),
        (_config_without("hidden_size"), r"config.json lacks the field 'hidden_size'"),
    ],
)
def test_a_damaged_directory_is_refused_with_the_file_and_the_cause(tmp_path, damage, message):
    write_hf(tmp_path, shards=3)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"architectures": ["LlamaForCausalLm"]}, "nearest supported: LlamaForCausalLM"),
        ({"hidden_act": "sinc"}, r"config.json: config.json has hidden_act='sinc'|hidden_act='sinc'"),
        ({"quantization_config": {"quant_method": "hqq"}}, r"quant_method is 'hqq'; supported: mxfp4, fp8, .* GGUF file"),
        ({"num_attention_heads": 3}, "num_heads=3 is not a multiple of num_kv_heads=2"),
    ],
)
def test_an_unsupported_config_is_refused(tmp_path, overrides, message):
    write_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | overrides
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_integer_weights_are_refused(tmp_path):
    write_hf(tmp_path)
    save_file({"model.norm.weight": np.zeros(32, np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'model.norm.weight' has dtype int8; supported: float32, float16, bfloat16"):
        open_checkpoint(tmp_path)


def test_another_copy_of_the_weights_and_an_adapter_are_ignored(tmp_path):
    made = write_hf(tmp_path)
    save_file({"tok_embeddings.weight": np.zeros((4, 4), np.float32)}, tmp_path / "consolidated.safetensors")
    save_file({"base_model.model.lora_A.weight": np.zeros((4, 4), np.float32)}, tmp_path / "adapter_model.safetensors")
    assert open_checkpoint(tmp_path).tensor_names == made.keys()


def test_a_folder_with_an_adapter_alone_says_so(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match="is a LoRA adapter, not a model; pass its base model, and the adapter beside it: --adapters NAME="
    ):
        resolve_model(tmp_path)


def test_buffers_of_old_checkpoints_are_ignored_in_any_number_format(tmp_path):
    def add_buffers(made):
        made["model.layers.0.attention.bias"] = np.tri(8, dtype=bool)
        made["model.layers.1.attn.masked_bias"] = np.zeros(1, np.uint8)
        made["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float64)

    write_hf(tmp_path, change=add_buffers)
    check_tensors(open_checkpoint(tmp_path))
