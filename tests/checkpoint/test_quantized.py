"""Quantized safetensors compared with the libraries of their formats; whole models are in tests/models."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.checkpoint.convert import convert
from fastgen_jax.checkpoint.quantized import split_settings, unpack
from fastgen_jax.checkpoint.quantized.compressed_tensors import integer_values
from fastgen_jax.checkpoint.quantized.floats import fp8_values, mxfp4_values
from fastgen_jax.checkpoint.quantized.integers import awq_values, gptq_values
from fastgen_jax.checkpoint.quantized.numbers import unpack_bits
from fastgen_jax.checkpoint.tensor_files import read_safetensors
from fastgen_jax.engine.config import EngineConfig, resolve
from fastgen_jax.engine.weights import host_leaf, prepare_leaf
from pallas_kernels.matmul import PackedWeight
from tests.checkpoint.test_tensor_files import write_torch
from tests.checkpoint.tiny_files import write_hf
from tests.models import parity
from tests.text.vocabularies import write_json

REFERENCE = Path(__file__).parents[1] / "reference"
INT4 = np.load(REFERENCE / "int4.npz")  # see make_int4.py
MATRICES = REFERENCE / "quantized.safetensors"  # see make_quantized.py
with safe_open(MATRICES, "np") as file:
    SETTINGS = json.loads(file.metadata()["settings"])
GROUPS = np.repeat(np.arange(2, dtype=np.int32), 32)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
STATIC = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}},
}
NAME = "model.layers.1.mlp.gate_proj"


def settings_of(case: str) -> dict:
    """The settings of a case of make_quantized.py as `unpack` gets them."""
    mlx = {"quantization": SETTINGS[case], "quantization_config": SETTINGS[case]}
    settings, rest = split_settings(mlx if case.startswith("mlx") else {"quantization_config": SETTINGS[case]})
    assert settings is not None
    assert not rest
    return settings


def tensors_of(case: str, module: str) -> dict:
    """The stored tensors of a case under the names of a module."""
    tensors = read_safetensors(MATRICES).items()
    return {
        module + name.removeprefix(f"{case}/"): t for name, t in tensors if name.startswith(f"{case}/") and "=" not in name
    }


# What the libraries round themselves: scales to bfloat16, scales times zero points to float16, and the last bit of 1/127.
ROUNDED = {"nvfp4": 2.0**-8, "gemv_fast": 2.0**-11, "bnb_int8": 2.0**-23}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_matrix_has_the_values_that_the_library_of_its_format_gives_it(case):
    want = read_safetensors(MATRICES)[f"{case}/="].map()
    found = unpack(tensors_of(case, "m"), settings_of(case))
    assert found.keys() == {"m.weight"}
    assert found["m.weight"].shape == want.shape
    got = np.float32(found["m.weight"].map().astype(want.dtype))
    np.testing.assert_allclose(got, np.float32(want), rtol=0, atol=ROUNDED.get(case, 0) * float(abs(want).max()))


# In the bits of the file, if the products with its scales are those of its values.
KEPT = {
    **dict.fromkeys(["int8_packed", "int8_channels", "int8_tensor", "bnb_int8"], "8 bits in groups of 64, float32 scales"),
    "int8_groups": "8 bits in groups of 32, float32 scales",
    **dict.fromkeys([f"gptq4{form}" for form in ("", "_v2")], "4 bits and float32 offsets in groups of 32"),
    **dict.fromkeys(
        [f"gptq{bits}" for bits in ("2", "3", "5", "8", "2_v2", "3_v2", "8_v2")],
        "8 bits and float32 offsets in groups of 32",
    ),
    "gptq4_symmetric": "4 bits in groups of 32",
    "gptq8_symmetric": "8 bits in groups of 32",
    "int4_bfloat16": "4 bits and float32 offsets in groups of 32",
    "int4_float16": "4 bits in groups of 32",
    "mlx4_float16": "4 bits and offsets in groups of 32",
    "gemv": "4 bits and float32 offsets in groups of 64",
    "gemv_fast": "4 bits and offsets in groups of 64",
    "marlin": "4 bits in groups of 128",
    "marlin_one_group": "4 bits in groups of 256",
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_matrix_is_kept_in_4_or_8_bits_if_that_rounds_nothing(case):
    stored = unpack(tensors_of(case, "m"), settings_of(case))["m.weight"]
    kind = stored.block_kind()
    assert (kind and kind.name) == KEPT.get(case)
    if kind is not None:
        np.testing.assert_array_equal(stored.blocks().dequantize(), stored.map().T)


def test_a_model_in_the_bits_of_the_file_has_the_logits_of_transformers():
    # attention in int8, gate and up in int4 with zero points; FP8 is dequantized
    checkpoint = open_checkpoint(parity.folder("qwen3", "compressed"))
    config = resolve(EngineConfig(dtype="float32", num_blocks=8), checkpoint.config)
    if not config.keeps_blocks:
        pytest.skip("needs the native kernels of a CPU")
    params = load_params(
        checkpoint,
        dtype="float32",
        stack_layers=config.stack_layers,
        prepare=lambda spec, array: prepare_leaf(spec, array, checkpoint.config, config),
        keep_blocks=True,
    )
    layer = params["layers"] if config.stack_layers else params["layers"][0]
    assert {name: leaf.panels.dtype for name, leaf in layer.items() if isinstance(leaf, PackedWeight)} == {
        "qkv": "uint8",
        "o": "uint8",
        "gate_up": "uint8",
        "down": "float32",
    }
    tokens, want, prompt = parity.expected("qwen3", "compressed")
    runs = parity.Runs(params, checkpoint.config, len(tokens))
    got = runs.logits(tokens, parity.random_cut(len(tokens), seed=0), prompt_length=prompt)
    assert parity.error(got, want) < 1e-4


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_of_any_size_are_unpacked_across_words(bits):
    numbers = np.random.default_rng(bits).integers(0, 2**bits, (3, 71))
    whole = [sum(int(number) << (bits * i) for i, number in enumerate(row)) for row in numbers]
    words = -(-71 * bits // 32)
    stored = np.array([[value >> (32 * word) & 0xFFFFFFFF for word in range(words)] for value in whole], np.uint32)
    np.testing.assert_array_equal(unpack_bits(stored.view(np.int32), bits, 71), numbers)


def test_awq_gives_the_values_of_autoawq():
    got = awq_values(INT4["awq_weight"], INT4["awq_zeros"], INT4["scales"])
    np.testing.assert_array_equal(got.values(), INT4["values"].T)
    np.testing.assert_array_equal(got.blocks().dequantize(), INT4["values"])


def test_gptq_gives_the_values_of_autoawq_in_its_layout():
    got = gptq_values(INT4["gptq_weight"], INT4["gptq_zeros"], INT4["scales"], GROUPS, bits=4, offset=1, inputs=64)
    np.testing.assert_array_equal(got.values(), INT4["values"].T)


def test_gptq_without_g_idx_has_consecutive_groups():
    parts = [INT4[name] for name in ("gptq_weight", "gptq_zeros", "scales")]
    got = gptq_values(*parts, None, bits=4, offset=1, inputs=64)
    np.testing.assert_array_equal(got.values(), INT4["values"].T)


@pytest.mark.parametrize("packed_zeros", [True, False])
def test_older_compressed_tensors_pack_whole_numbers_into_words_and_order_inputs(packed_zeros):
    # Ten 3-bit numbers in each word; `weight_g_idx` is the group of each input.
    rng = np.random.default_rng(0)
    numbers, zeros = rng.integers(0, 8, (20, 64)), rng.integers(0, 8, (20, 2))
    scales, group = rng.random((20, 2)).astype(np.float32), rng.permutation(GROUPS)

    def words(rows):
        padded = np.zeros((len(rows), -(-rows.shape[1] // 10) * 10), np.int64)
        padded[:, : rows.shape[1]] = rows
        return (padded.reshape(len(rows), -1, 10) << (3 * np.arange(10))).sum(-1).astype(np.int32)

    stored = np.ascontiguousarray(words(zeros.T).T) if packed_zeros else (zeros - 4).astype(np.int8)
    got = integer_values(words(numbers), scales, stored, group, bits=3, shape=(20, 64)).values()
    want = [[np.float32(numbers[i, j] - zeros[i, group[j]]) * scales[i, group[j]] for j in range(64)] for i in range(20)]
    np.testing.assert_array_equal(got, want)


def test_bitsandbytes_blocks_may_be_longer_than_a_row(tmp_path):
    rng = np.random.default_rng(0)
    codes, largest = rng.integers(0, 16, 3 * 50), rng.random(2).astype(np.float32)  # the second block is incomplete
    table = rng.standard_normal(16).astype(np.float32)
    state = json.dumps({"quant_type": "nf4", "blocksize": 128, "shape": [3, 50], "dtype": "float32"})
    parts = {
        "m.weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
        "m.weight.absmax": largest,
        "m.weight.quant_map": table,
        "m.weight.quant_state.bitsandbytes__nf4": np.frombuffer(state.encode(), np.uint8),
    }
    save_file(parts, tmp_path / "a.safetensors")
    got = unpack(read_safetensors(tmp_path / "a.safetensors"), {"quant_method": "bitsandbytes"})["m.weight"].map()
    np.testing.assert_array_equal(got, (table[codes] * np.repeat(largest, 128)[:150]).reshape(3, 50))


def test_each_module_has_the_bits_that_its_rule_says():
    both = tensors_of("gptq4", "model.layers.0.mlp.up_proj") | tensors_of("gptq8", "model.layers.1.mlp.up_proj")
    rules = {"-:.*lm_head": {}, r"+:.*\.1\.mlp": {"bits": 8}, r".*\.0\.": {"bits": 4}}
    settings = {"quant_method": "gptq", "bits": 2, "group_size": 32, "dynamic": rules}
    got = unpack(both, settings)
    want = read_safetensors(MATRICES)
    np.testing.assert_array_equal(got["model.layers.0.mlp.up_proj.weight"].map(), want["gptq4/="].map())
    np.testing.assert_array_equal(got["model.layers.1.mlp.up_proj.weight"].map(), want["gptq8/="].map())
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj.scales' has shape \(2, 32\).*require \(4, 32\)"):
        unpack(both, settings | {"dynamic": {}})
    extra = {
        "quant_method": "auto-round",
        "bits": 2,
        "group_size": 32,
        "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 4}, ".*1": {"bits": 8}},
    }
    got = unpack(both, extra)
    assert [got[f"model.layers.{layer}.mlp.up_proj.weight"].dtype for layer in (0, 1)] == ["GPTQ4", "GPTQ8"]


def test_each_module_has_the_settings_of_its_group():
    modules = {
        "model.layers.0.mlp.up_proj": "int4_groups",
        "model.layers.0.mlp.down_proj": "int8_channels",
        "lm_head": "nvfp4",
    }
    tensors = {name: tensor for module, case in modules.items() for name, tensor in tensors_of(case, module).items()}
    groups = {case: dict(SETTINGS[case]["config_groups"]["group_0"]) for case in modules.values()}
    groups["int4_groups"] |= {"targets": [r"re:.*up_proj$"]}
    groups["int8_channels"] |= {"targets": ["Linear"]}
    groups["nvfp4"] |= {"targets": ["lm_head"]}
    settings = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    got = unpack(tensors, settings)
    for module, case in modules.items():
        np.testing.assert_array_equal(
            got[f"{module}.weight"].map(), unpack(tensors_of(case, "m"), settings_of(case))["m.weight"].map()
        )
    groups["int8_channels"]["targets"] = ["lm_head"]
    with pytest.raises(
        ValueError, match=r"'model.layers.0.mlp.down_proj' .* in no group .*config_groups, whose targets are"
    ):
        unpack(tensors, settings)


def test_mlx_has_settings_of_single_modules():
    tensors = tensors_of("mlx4", "model.a") | tensors_of("mlx6", "model.b")
    got = unpack(tensors, {"quant_method": "mlx", "group_size": 32, "bits": 4, "model.b": {"bits": 6, "group_size": 32}})
    assert [got[f"model.{name}.weight"].dtype for name in "ab"] == ["MLX4", "MLX6"]


@pytest.mark.parametrize(("layer", "name"), [("mlp", "up_proj"), ("block_sparse_moe", "w3")])
def test_mlx_stacks_experts(tmp_path, layer, name):
    first = {end: np.array(tensor.map()) for end, tensor in tensors_of("mlx4", "").items()}
    experts = [first, {end: array[::-1] for end, array in first.items()}]
    stacked = {f"a.{layer}.switch_mlp.up_proj{end}": np.stack([each[end] for each in experts]) for end in first}
    save_file(stacked, tmp_path / "a.safetensors")
    settings = {
        "quant_method": "mlx",
        "group_size": 64,
        "bits": 8,
        f"a.{layer}.switch_mlp.up_proj": {"bits": 4, "group_size": 32},
    }
    got = unpack(read_safetensors(tmp_path / "a.safetensors"), settings)
    want = read_safetensors(MATRICES)["mlx4/="].map()
    assert got.keys() == {f"a.{layer}.experts.{expert}.{name}.weight" for expert in range(2)}
    np.testing.assert_array_equal(got[f"a.{layer}.experts.0.{name}.weight"].map(), want)
    np.testing.assert_array_equal(got[f"a.{layer}.experts.1.{name}.weight"].map(), want[::-1])


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("nf4", {"load_in_4bit": True}),
        ("bnb_int8", {"load_in_8bit": True}),
        ("int8_channels", {"config_groups": INT8["config_groups"]}),
        ("gptq4_v2", {"quant_method": "gptq", "method": "gptq", "format": "gptq_v2", "bits": 4, "group_size": 32}),
        ("gemv", {"quant_method": "awq", "checkpoint_format": "gemv", "bits": 4, "group_size": 64, "sym": False}),
        ("modelopt_nvfp4", {"quant_method": "modelopt_fp4", "quant_algo": "nvfp4_awq"}),
        ("int4_groups", SETTINGS["int4_groups"] | {"quant_method": "compressed_tensors"}),
    ],
)
def test_other_names_for_the_same_settings_are_known(case, settings):
    want = unpack(tensors_of(case, "m"), settings_of(case))["m.weight"].map()
    np.testing.assert_array_equal(unpack(tensors_of(case, "m"), settings)["m.weight"].map(), want)


def test_scales_of_activations_and_caches_are_not_used():
    extra = {f"m.{name}": tensor for name, tensor in read_safetensors(MATRICES).items() if name == "nvfp4/="}
    stored = tensors_of("fp8_tensor", "m")
    for name in ("m.input_scale", "attn.k_scale", "attn.v_scale", "m.output_scale", "m.input_global_scale"):
        stored[name] = next(iter(extra.values()))
    assert unpack(stored, settings_of("fp8_tensor")).keys() == {"m.weight"}


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
    """A directory whose matrix NAME is stored as `parts`, whose names begin with what comes after the module's."""

    def change(tensors):
        del tensors[f"{NAME}.weight"]
        tensors |= {f"{NAME}{ending}": array for ending, array in parts.items()}

    sizes = {"hidden_size": 64, "intermediate_size": 24} | overrides
    write_hf(path, vocab_size=512, change=change, **sizes)
    config = json.loads((path / "config.json").read_text())
    field = "quantization" if "quant_method" not in settings else "quantization_config"
    (path / "config.json").write_text(json.dumps(config | {field: settings}))
    return path


def _gate(path: Path) -> np.ndarray:
    """The matrix NAME as loaded, [in, out]."""
    params = load_params(open_checkpoint(path), dtype="float32", stack_layers=False)
    gate, _ = np.split(np.asarray(params["layers"][1]["gate_up"]), 2, axis=1)
    return gate


AWQ_PARTS = {".qweight": INT4["awq_weight"], ".qzeros": INT4["awq_zeros"], ".scales": INT4["scales"]}
GPTQ_PARTS = {".qweight": INT4["gptq_weight"], ".qzeros": INT4["gptq_zeros"], ".scales": INT4["scales"], ".g_idx": GROUPS}
FP8_PARTS = {".weight": np.ones((24, 64), ml_dtypes.float8_e4m3fn), ".weight_scale_inv": np.ones((2, 4), np.float32)}
INT8_PARTS = {".weight": np.ones((24, 64), np.int8), ".weight_scale": np.ones((24, 1), np.float32)}
INT4_PARTS = {
    ".weight_packed": np.ones((24, 8), np.int32),
    ".weight_scale": np.ones((24, 2), np.float32),
    ".weight_shape": np.array([24, 64]),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_directory_with_a_quantized_matrix_loads(tmp_path, case):
    want = np.float32(unpack(tensors_of(case, "m"), settings_of(case))["m.weight"].map())
    parts = {name: np.array(tensor.map()) for name, tensor in tensors_of(case, "").items()}
    sizes = {"intermediate_size": want.shape[0], "hidden_size": want.shape[1]}
    np.testing.assert_array_equal(_gate(_quantized(tmp_path, SETTINGS[case], parts, **sizes)), want.T)


@pytest.mark.parametrize(("settings", "parts", "stored"), [(AWQ, AWQ_PARTS, "AWQ4"), (GPTQ, GPTQ_PARTS, "GPTQ4")])
def test_a_quantized_directory_loads_beside_plain_tensors(tmp_path, settings, parts, stored):
    path = _quantized(tmp_path, settings, parts)
    assert open_checkpoint(path).dtype(f"{NAME}.weight") == stored
    np.testing.assert_array_equal(_gate(path), INT4["values"])


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
    got = _gate(_quantized(tmp_path, STATIC | {"weight_block_size": None}, parts))
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
    path = _quantized(tmp_path, {}, parts)
    (path / name).write_text(json.dumps(settings))
    np.testing.assert_array_equal(_gate(path), np.full((64, 24), 0.5) if "hf" in name else INT4["values"])
    (path / name).write_text("{")
    with pytest.raises(ValueError, match=rf"{name} is not valid JSON"):
        open_checkpoint(path)


def test_modelopt_has_fp8_in_blocks_and_mixed_algorithms(tmp_path):
    weight = np.random.default_rng(0).standard_normal((24, 64)).astype(ml_dtypes.float8_e4m3fn)
    scales = np.arange(1, 9, dtype=np.float32).reshape(2, 1, 4, 1)
    layers = {NAME: {"quant_algo": "FP8_PB_WO"}, "lm_head": {"quant_algo": "NVFP4", "group_size": 16}}
    settings = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "group_size": 16, "quantized_layers": layers}
    path = _quantized(tmp_path, settings, {".weight": weight, ".weight_scale": scales})
    np.testing.assert_array_equal(_gate(path), fp8_values(weight, scales[:, 0, :, 0], block=(16, 16)).T)


def test_biases_of_zeros_that_gptq_tools_add_are_dropped_and_others_refused(tmp_path):
    zeros = {".bias": np.zeros(24, np.float16)}
    np.testing.assert_array_equal(_gate(_quantized(tmp_path / "a", GPTQ, GPTQ_PARTS | zeros)), INT4["values"])
    zeros[".bias"][3] = 1
    with pytest.raises(ValueError, match=rf"1 tensors .*'{NAME}.bias'"):
        _gate(_quantized(tmp_path / "b", GPTQ, GPTQ_PARTS | zeros))


def test_a_quantized_matrix_may_be_in_a_bin_file(tmp_path):
    path = _quantized(tmp_path, GPTQ, GPTQ_PARTS)
    write_torch(path / "pytorch_model.bin", load_file(path / "model.safetensors"))
    (path / "model.safetensors").unlink()
    np.testing.assert_array_equal(_gate(path), INT4["values"])


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
        open_checkpoint(_quantized(tmp_path, settings, {name: part for name, part in parts.items() if part is not None}))
