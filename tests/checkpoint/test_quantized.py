"""Quantized safetensors compared with other implementations; whole models are in tests/models (mxfp4, fp8)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.checkpoint.convert import convert
from fastgen_jax.checkpoint.quantized import awq_values, fp8_values, gptq_values, mxfp4_values
from fastgen_jax.engine.weights import host_leaf
from tests.checkpoint.tiny_files import write_hf
from tests.text.vocabularies import write_json

INT4 = np.load(Path(__file__).parents[1] / "reference" / "int4.npz")  # see make_int4.py
GROUPS = np.repeat(np.arange(2, dtype=np.int32), 32)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
NAME = "model.layers.1.mlp.gate_proj"


def test_awq_gives_the_values_of_autoawq():
    np.testing.assert_array_equal(awq_values(INT4["awq_weight"], INT4["awq_zeros"], INT4["scales"]), INT4["values"].T)


def test_gptq_gives_the_values_of_autoawq_in_its_layout():
    got = gptq_values(INT4["gptq_weight"], INT4["gptq_zeros"], INT4["scales"], GROUPS, offset=1)
    np.testing.assert_array_equal(got, INT4["values"].T)


def test_gptq_with_g_idx_uses_the_group_of_each_input():
    groups = np.random.default_rng(0).integers(0, 2, 64).astype(np.int32)
    weight, zeros, scales = (INT4[name] for name in ("gptq_weight", "gptq_zeros", "scales"))
    whole = [gptq_values(weight, np.tile(zeros[g], (2, 1)), np.tile(scales[g], (2, 1)), groups, offset=1) for g in (0, 1)]
    np.testing.assert_array_equal(gptq_values(weight, zeros, scales, groups, offset=1), np.where(groups, whole[1], whole[0]))


def test_mxfp4_is_exact_for_every_byte_and_every_exponent_that_bfloat16_has():
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 1, 16), (1, 16, 250, 16))
    scales = np.broadcast_to(np.arange(2, 252, dtype=np.uint8), (1, 16, 250))
    got = mxfp4_values(blocks, scales)
    assert got.shape == (1, 250 * 32, 16)
    number = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    number += [-value for value in number]
    for row, group, pair in ((0, 0, 1), (7, 100, 9), (15, 249, 15), (8, 125, 0)):
        byte = 16 * row + pair
        want = [np.ldexp(number[byte & 15], group + 2 - 127), np.ldexp(number[byte >> 4], group + 2 - 127)]
        np.testing.assert_array_equal(np.float64(got[0, 32 * group + 2 * pair :][:2, row]), want)


def test_fp8_scales_every_block_and_those_at_the_edges():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((20, 37)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.random((3, 3)).astype(np.float32)
    want = [[np.float32(weight[i, j]) * scales[i // 8, j // 16] for j in range(37)] for i in range(20)]
    np.testing.assert_array_equal(fp8_values(weight, scales, block=(8, 16)), want)


def _quantized(path: Path, settings: dict, parts: dict[str, np.ndarray], **overrides) -> Path:
    """A directory whose matrix NAME is stored as `parts`."""

    def change(tensors):
        del tensors[f"{NAME}.weight"]
        tensors |= {f"{NAME}.{ending}": array for ending, array in parts.items()}

    write_hf(path, vocab_size=512, hidden_size=64, intermediate_size=24, change=change, **overrides)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return path


AWQ_PARTS = {"qweight": INT4["awq_weight"], "qzeros": INT4["awq_zeros"], "scales": INT4["scales"]}
GPTQ_PARTS = {"qweight": INT4["gptq_weight"], "qzeros": INT4["gptq_zeros"], "scales": INT4["scales"], "g_idx": GROUPS}
FP8_PARTS = {"weight": np.ones((24, 64), ml_dtypes.float8_e4m3fn), "weight_scale_inv": np.ones((2, 4), np.float32)}


@pytest.mark.parametrize(("settings", "parts", "stored"), [(AWQ, AWQ_PARTS, "AWQ4"), (GPTQ, GPTQ_PARTS, "GPTQ4")])
def test_a_quantized_directory_loads_beside_plain_tensors(tmp_path, settings, parts, stored):
    checkpoint = open_checkpoint(_quantized(tmp_path, settings, parts))
    assert checkpoint.dtype(f"{NAME}.weight") == stored
    gate = load_params(checkpoint, dtype="float32", stack_layers=False)["layers"][1]["gate_up"][:, :24]
    np.testing.assert_array_equal(gate, INT4["values"])


def test_a_snapshot_of_a_quantized_directory_is_not_quantized(tmp_path):
    source = write_json(_quantized(tmp_path / "source", AWQ, AWQ_PARTS))
    convert(open_checkpoint(source), tmp_path / "out", prepare=partial(host_leaf, dtype="float32", quantize=None))
    snapshot = open_checkpoint(tmp_path / "out")
    assert "quantization_config" not in snapshot.config_json
    np.testing.assert_array_equal(snapshot.read("layers.gate_up.1")[:, :24], INT4["values"])


@pytest.mark.parametrize(
    ("settings", "parts", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            AWQ_PARTS,
            r"quant_method is 'bitsandbytes'; supported: mxfp4, fp8, awq, gptq; .*GGUF",
        ),
        ({}, AWQ_PARTS, r"'model.layers.1.mlp.gate_proj.qweight' has dtype int32; supported: float32.*quantization_config"),
        (AWQ | {"bits": 8}, AWQ_PARTS, r"bits=8; supported: 4"),
        (AWQ | {"version": "gemv"}, AWQ_PARTS, r"version='gemv'; supported: 'gemm'"),
        (GPTQ | {"checkpoint_format": "marlin"}, GPTQ_PARTS, r"checkpoint_format='marlin'"),
        (GPTQ, GPTQ_PARTS | {"qzeros": None}, r"a tensor 'model.layers.1.mlp.gate_proj.g_idx', but '.*qzeros' is absent"),
        (FP8 | {"activation_scheme": "static"}, FP8_PARTS, r"activation_scheme='static'; FP8 is supported with"),
        (FP8 | {"weight_block_size": None}, FP8_PARTS, r"weight_block_size=None"),
        (FP8, FP8_PARTS | {"weight_scale_inv": np.ones((2, 3), np.float32)}, r"scales of .* have shape \(2, 3\).*\(2, 4\)"),
        (FP8, FP8_PARTS | {"weight_scale_inv": np.ones((2, 4), np.uint8)}, r"stored as float8_e4m3fn with scales of uint8"),
        (FP8, FP8_PARTS | {"weight_scale_inv": None}, r"'model.layers.1.mlp.gate_proj.weight' has dtype float8_e4m3fn"),
    ],
)
def test_unsupported_quantization_is_refused(tmp_path, settings, parts, message):
    with pytest.raises(ValueError, match=message):
        open_checkpoint(_quantized(tmp_path, settings, {name: part for name, part in parts.items() if part is not None}))
