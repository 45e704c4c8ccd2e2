"""Model directories with quantized matrices: which load, and which are refused."""

from __future__ import annotations

import json
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from fastgen_jax.checkpoint import open_checkpoint
from fastgen_jax.checkpoint.convert import convert
from fastgen_jax.checkpoint.quantized import unpack
from fastgen_jax.checkpoint.quantized.floats import fp8_values
from fastgen_jax.engine.weights import host_leaf
from tests.checkpoint.quantized_files import (
    AWQ,
    AWQ_PARTS,
    FP8,
    FP8_PARTS,
    GPTQ,
    GPTQ_PARTS,
    INT4,
    INT4_PARTS,
    INT8,
    INT8_PARTS,
    NAME,
    SETTINGS,
    STATIC,
    loaded_gate,
    quantized_folder,
    settings_of,
    tensors_of,
)
from tests.checkpoint.test_tensor_files import write_torch
from tests.text.vocabularies import write_json


@pytest.mark.parametrize("case", SETTINGS)
def test_a_directory_with_a_quantized_matrix_loads(tmp_path, case):
    want = np.float32(unpack(tensors_of(case, "m"), settings_of(case))["m.weight"].map())
    parts = {name: np.array(tensor.map()) for name, tensor in tensors_of(case, "").items()}
    sizes = {"intermediate_size": want.shape[0], "hidden_size": want.shape[1]}
    np.testing.assert_array_equal(loaded_gate(quantized_folder(tmp_path, SETTINGS[case], parts, **sizes)), want.T)


@pytest.mark.parametrize(("settings", "parts", "stored"), [(AWQ, AWQ_PARTS, "AWQ4"), (GPTQ, GPTQ_PARTS, "GPTQ4")])
def test_a_quantized_directory_loads_beside_plain_tensors(tmp_path, settings, parts, stored):
    path = quantized_folder(tmp_path, settings, parts)
    assert open_checkpoint(path).dtype(f"{NAME}.weight") == stored
    np.testing.assert_array_equal(loaded_gate(path), INT4["values"])


SCALARS = {
    "scalar": np.array(0.25, np.float32),
    "vector": np.full(1, 0.25, np.float32),
    "rows": np.linspace(0.1, 1, 24, dtype=np.float32),
}


@pytest.mark.parametrize(
    ("ending", "activations"), [(".weight_scale", ".input_scale"), (".weight_scale_inv", ".activation_scale")]
)
@pytest.mark.parametrize("form", SCALARS)
def test_fp8_may_have_one_scale_for_a_matrix_or_a_row_and_static_ones_for_activations(tmp_path, ending, activations, form):
    # weight_scale as AutoFP8, vLLM and FBGEMM write it; weight_scale_inv without blocks as in Mistral's releases
    weight = np.random.default_rng(0).standard_normal((24, 64)).astype(ml_dtypes.float8_e4m3fn)
    parts = {".weight": weight, ending: SCALARS[form], activations: np.array(3, np.float32)}
    got = loaded_gate(quantized_folder(tmp_path, STATIC | {"weight_block_size": None}, parts))
    np.testing.assert_array_equal(got, (np.float32(weight) * SCALARS[form].reshape(-1, 1)).T)


MODELOPT_PARTS = {
    ".weight": np.ones((24, 64), ml_dtypes.float8_e4m3fn),
    ".weight_scale": np.array(0.5, np.float32),
    ".input_scale": np.array(3, np.float32),
}
BESIDE = [
    ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, MODELOPT_PARTS),
    ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}, GPTQ_PARTS),
    ("quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}, AWQ_PARTS),
]


@pytest.mark.parametrize(("name", "settings", "parts"), BESIDE)
def test_the_settings_of_older_tools_are_in_a_file_of_their_own(tmp_path, name, settings, parts):
    path = quantized_folder(tmp_path, {}, parts)
    (path / name).write_text(json.dumps(settings))
    np.testing.assert_array_equal(loaded_gate(path), np.full((64, 24), 0.5) if "hf" in name else INT4["values"])
    (path / name).write_text("{")
    with pytest.raises(ValueError, match=rf"{name} is not valid JSON"):
        open_checkpoint(path)


def test_modelopt_has_fp8_in_blocks_and_mixed_algorithms(tmp_path):
    weight = np.random.default_rng(0).standard_normal((24, 64)).astype(ml_dtypes.float8_e4m3fn)
    scales = np.arange(1, 9, dtype=np.float32).reshape(2, 1, 4, 1)
    layers = {NAME: {"quant_algo": "FP8_PB_WO"}, "lm_head": {"quant_algo": "NVFP4", "group_size": 16}}
    settings = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "group_size": 16, "quantized_layers": layers}
    path = quantized_folder(tmp_path, settings, {".weight": weight, ".weight_scale": scales})
    np.testing.assert_array_equal(loaded_gate(path), fp8_values(weight, scales[:, 0, :, 0], block=(16, 16)).values().T)


def test_biases_of_zeros_that_gptq_tools_add_are_dropped_and_others_refused(tmp_path):
    zeros = {".bias": np.zeros(24, np.float16)}
    np.testing.assert_array_equal(loaded_gate(quantized_folder(tmp_path / "a", GPTQ, GPTQ_PARTS | zeros)), INT4["values"])
    zeros[".bias"][3] = 1
    with pytest.raises(ValueError, match=rf"1 tensors .*'{NAME}.bias'"):
        loaded_gate(quantized_folder(tmp_path / "b", GPTQ, GPTQ_PARTS | zeros))


def test_a_quantized_matrix_may_be_in_a_bin_file(tmp_path):
    path = quantized_folder(tmp_path, GPTQ, GPTQ_PARTS)
    write_torch(path / "pytorch_model.bin", load_file(path / "model.safetensors"))
    (path / "model.safetensors").unlink()
    np.testing.assert_array_equal(loaded_gate(path), INT4["values"])


def test_a_snapshot_of_a_quantized_directory_is_not_quantized(tmp_path):
    source = write_json(quantized_folder(tmp_path / "source", AWQ, AWQ_PARTS))
    convert(open_checkpoint(source), tmp_path / "out", prepare=partial(host_leaf, dtype="float32", quantize=None))
    snapshot = open_checkpoint(tmp_path / "out")
    assert "quantization_config" not in snapshot.config_json
    np.testing.assert_array_equal(snapshot.read("layers.gate_up.1")[:, :24], INT4["values"])


@pytest.mark.parametrize(
    ("settings", "parts", "message"),
    [
        (
            {"quant_method": "hqq"},
            AWQ_PARTS,
            r"quant_method is 'hqq'; supported: mxfp4, fp8, fbgemm_fp8, compressed-tensors, awq, gptq, .*GGUF",
        ),
        ({}, AWQ_PARTS, r"'model.layers.1.mlp.gate_proj.qweight' has dtype int32; supported: float32.*quantization_config"),
        (AWQ | {"bits": 8}, AWQ_PARTS, r"bits=8; supported: 4; otherwise pass the original"),
        (AWQ | {"version": "llm-awq"}, AWQ_PARTS, r"version='llm-awq'; supported: gemm, exllama, gemv, gemv_fast, marlin"),
        (AWQ | {"version": "marlin"}, AWQ_PARTS, r"zero_point=True; supported: False"),
        (AWQ, AWQ_PARTS | {".qzeros": INT4["awq_zeros"][:1]}, r"gate_proj.qzeros' has shape \(1, 3\).*require \(2, 3\)"),
        (GPTQ | {"checkpoint_format": "bitblas"}, GPTQ_PARTS, r"checkpoint_format='bitblas'; supported: 'gptq', 'gptq_v2'"),
        (GPTQ | {"bits": 1}, GPTQ_PARTS, r"bits=1; supported: 2, 3"),
        (GPTQ | {"bits": 8}, GPTQ_PARTS, r"gate_proj.qweight' has shape \(8, 24\).*require \(16, 24\)"),
        (GPTQ, GPTQ_PARTS | {".qzeros": None}, r"a tensor 'model.layers.1.mlp.gate_proj.qweight' .*'.*qzeros' is absent"),
        (GPTQ | {"is_marlin_format": True, "bits": 8}, GPTQ_PARTS, r"bits=8; supported: 4"),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:fp8_static"},
            GPTQ_PARTS,
            r"packing_format='auto_round:fp8_static'; supported: auto_round:auto_gptq",
        ),
        ({"quant_method": "auto-round", "data_type": "mx_fp"}, GPTQ_PARTS, r"data_type='mx_fp'; supported: 'int'"),
        (FP8 | {"fmt": "e5m2"}, FP8_PARTS, r"fmt='e5m2'; supported: 'e4m3'"),
        (FP8 | {"activation_scheme": "block"}, FP8_PARTS, r"activation_scheme='block'; supported: 'dynamic', 'static'"),
        (FP8 | {"weight_block_size": 16}, FP8_PARTS, r"weight_block_size=16; supported: \[rows, columns\] or null"),
        (FP8 | {"weight_block_size": None}, FP8_PARTS, r"gate_proj.weight_scale_inv' has shape \(2, 4\).*\(24, 1\)"),
        (FP8, FP8_PARTS | {".weight_scale_inv": np.ones((2, 3), np.float32)}, r"has shape \(2, 3\).*\(2, 4\)"),
        (FP8, FP8_PARTS | {".weight_scale_inv": np.ones((2, 4), np.uint8)}, r"stored as float8_e4m3fn with scales of uint8"),
        (
            FP8,
            FP8_PARTS | {".weight_scale_inv": None},
            r"'model.layers.1.mlp.gate_proj.weight' of float8_e4m3fn, but .*absent",
        ),
        (INT8 | {"format": "marlin-24"}, INT8_PARTS, r"format='marlin-24'; supported: pack-quantized, int-quantized"),
        (
            INT8 | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            INT8_PARTS,
            r"sparsity_config.format='sparse-24-bitmask'",
        ),
        (INT8 | {"transform_config": {"config_groups": {"u": {}}}}, INT8_PARTS, r"transform_config .*rotates activations"),
        (INT8 | {"config_groups": {}}, INT8_PARTS, r"gate_proj' is stored as quantized, but it is in no group .*are empty"),
        (INT8, INT8_PARTS | {".weight_scale": np.ones((24, 2), np.float32)}, r"has shape \(24, 2\).*\(24, 1\)"),
        (INT8, INT4_PARTS, r"gate_proj.weight_packed' has shape \(24, 8\).*require \(24, 16\)"),
        (
            {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
            FP8_PARTS,
            r"quant_algo='W4A16_AWQ'; supported: 'FP8', .* 'MIXED_PRECISION' of these; otherwise pass",
        ),
        (
            {"group_size": 32, "bits": 7},
            {".weight": np.ones((24, 8), np.uint32), ".scales": np.ones(1)},
            r"bits=7; supported: 2",
        ),
        (
            {"quant_method": "bitsandbytes"},
            {
                ".weight": np.ones((24, 64), np.int8),
                ".SCB": np.ones(24, np.float32),
                ".weight_format": np.array(1, np.uint8),
            },
            r"gate_proj.weight_format' is 1; supported: 0, rows",
        ),
    ],
)
def test_unsupported_quantization_is_refused(tmp_path, settings, parts, message):
    with pytest.raises(ValueError, match=message):
        open_checkpoint(
            quantized_folder(tmp_path, settings, {name: part for name, part in parts.items() if part is not None})
        )
