"""Weights that stay in the blocks of the checkpoint have the values that reading them dequantized gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastgen_jax.checkpoint import kept_in_blocks, load_params, open_checkpoint
from fastgen_jax.checkpoint.quantized import unpack
from fastgen_jax.checkpoint.quantized.declared import declared_kind
from fastgen_jax.checkpoint.quantized.numbers import Groups
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.resolve import resolve
from fastgen_jax.engine.weights import prepare_leaf
from pallas_kernels.grouped_matmul import BlockGroups, PackedGroups
from pallas_kernels.matmul import BlockWeight, PackedWeight
from tests.checkpoint.quantized_files import REFERENCE, SETTINGS, settings_of, tensors_of
from tests.checkpoint.tiny_files import requantize, write_hf
from tests.models import parity

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
    **dict.fromkeys(["nf4", "nf4_nested"], "NF4 in groups of 64, float32 scales"),
    **dict.fromkeys(["fp8_channels", "fp8_tensor"], "8-bit floats in groups of 64, float32 scales"),
    "fp8_blocks": "8-bit floats in groups of 32, float32 scales",
    **dict.fromkeys(["mxfp8", "mlx_mxfp8"], "8-bit floats in groups of 32, float32 scales"),
    **dict.fromkeys(["mxfp4", "mlx_mxfp4"], "4-bit floats in groups of 32"),
    **dict.fromkeys(["nvfp4", "mlx_nvfp4"], "4-bit floats in groups of 16, float32 scales"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_matrix_is_kept_in_4_or_8_bits_if_that_rounds_nothing(case):
    stored = unpack(tensors_of(case, "m"), settings_of(case))["m.weight"]
    kind = stored.block_kind
    assert (kind and kind.name) == KEPT.get(case)
    if kind is not None:
        blocks = stored.blocks()
        np.testing.assert_array_equal(blocks.dequantize(), stored.map().T)
        declared = (kind.bits, kind.size, kind.has_offsets, kind.scale_dtype)
        assert declared == (blocks.format.bits_with_scales, *blocks.format[3:], *blocks.format[1:3])


DTYPES = {"int4_bfloat16": "bfloat16"}


@pytest.mark.parametrize("case", [case for case in SETTINGS if KEPT.get(case, "").startswith("4 bits") or "fp8_" in case])
def test_the_settings_alone_declare_the_kind_that_the_files_have(case):
    settings = settings_of(case)
    stored = unpack(tensors_of(case, "m"), settings)["m.weight"]
    found = declared_kind(settings, stored.shape[1], DTYPES.get(case, "float16"))
    assert found is not None
    assert found._replace(name="", only_weights=False) == stored.block_kind._replace(name="")


@pytest.mark.parametrize("case", ["gptq4_order", "nf4", "int8_groups", "mxfp4", "mxfp8", "gptq8"])
def test_the_settings_declare_nothing_that_they_cannot_know(case):
    assert declared_kind(settings_of(case), 64, "float16") is None


@pytest.mark.parametrize("biases", [False, True])
def test_a_group_of_all_inputs_is_divided_into_blocks(biases):
    generator = np.random.default_rng(0)
    numbers = generator.integers(0, 16, (6, 4096), np.uint8)
    scales, offsets = (generator.uniform(0.1, 1, (6, 1)).astype(np.float16) for _ in range(2))
    zeros = None if biases else generator.integers(0, 16, (6, 1), np.uint8)
    groups = Groups(
        shape=(6, 4096), rows=numbers.__getitem__, scales=scales, zeros=zeros, biases=offsets if biases else None, bits=4
    )
    kind = groups.block_kind()
    assert kind is not None
    assert (kind.size, kind.value_bits) == (2048, 4)
    np.testing.assert_array_equal(groups.blocks().dequantize(), groups.values().T)


# compressed: attention in int8, gate and up in int4 with zero points, down in FP8 but without whole blocks.
@pytest.mark.parametrize(
    ("family", "variant", "kept"),
    [("qwen3", "compressed", {"qkv", "o", "gate_up"}), ("gpt_oss", "mxfp4", {"expert_gate_up", "expert_down"})],
)
def test_a_model_in_the_bits_of_the_file_has_the_logits_of_transformers(family, variant, kept):
    checkpoint = open_checkpoint(parity.folder(family, variant))
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
    packed = {name: leaf.panels.dtype for name, leaf in layer.items() if isinstance(leaf, PackedWeight | PackedGroups)}
    assert {name for name, dtype in packed.items() if dtype == "uint8"} == kept
    tokens, want, prompt = parity.expected(family, variant)
    runs = parity.Runs(params, checkpoint.config, len(tokens))
    got = runs.logits(tokens, parity.random_cut(len(tokens), seed=0), prompt_length=prompt)
    assert parity.error(got, want) < 1e-4


def _dequantized(weight: BlockWeight | BlockGroups) -> np.ndarray:
    if isinstance(weight, BlockWeight):
        return weight.dequantize()
    return np.stack([weight.read(group).dequantize() for group in range(weight.shape[0])])


def _kept(path: Path) -> set[str]:
    """The weights that stay in blocks, whose values are those of the dequantized ones in all layers."""
    found: dict[str, list[np.ndarray]] = {}

    def prepare(spec, array):
        if isinstance(array, BlockWeight | BlockGroups):
            found.setdefault(spec.path, []).append(_dequantized(array))
            assert array.shape == spec.shape
        return np.zeros(1, np.float32)

    checkpoint = open_checkpoint(path)
    load_params(checkpoint, dtype=None, prepare=prepare, keep_blocks=True, stack_layers=False)
    plain = load_params(checkpoint, dtype="float32", stack_layers=False)
    for name, arrays in found.items():
        if name.startswith("layers."):
            rows = [layer[short] for layer in plain["layers"] if (short := name.removeprefix("layers.")) in layer]
        else:
            rows = [plain[name] if name in plain else plain["embed"].T]  # a tied head
        for got, want in zip(arrays, rows, strict=True):
            np.testing.assert_array_equal(got, want)
    return {name.removeprefix("layers.") for name in found}


def _q4_0(name: str) -> str:
    return "F32" if "gate_inp" in name else "Q4_0"  # converters leave the router as it is


# 32 inputs are a whole block; the other matrices of these tiny models are not quantized.
OF_32 = {
    "mixtral": {"qkv", "o", "expert_gate_up", "lm_head"},
    "qwen3moe": {"qkv", "o", "expert_gate_up", "lm_head"},
    "qwen2moe": {"qkv", "o", "expert_gate_up", "shared_gate_up", "lm_head"},
    "olmoe": {"qkv", "o", "expert_gate_up", "lm_head"},
    "granitemoe": {"qkv", "o", "expert_gate_up", "lm_head"},
    "gpt-oss": {"qkv", "o", "expert_gate_up", "lm_head"},
    "deepseek2-lite": {"q", "kv_a", "expert_gate_up", "shared_gate_up", "gate_up", "lm_head"},
    "gpt2": {"qkv", "o", "up", "down", "lm_head"},
    "gptneox": {"qkv", "o", "up", "lm_head"},
    "falcon": {"qkv", "o", "up", "down", "lm_head"},
    "glm4": {"qkv", "o", "gate_up", "lm_head"},
    "qwen3next": {"qkv", "o", "mix_in", "mix_out", "mix_gates", "expert_gate_up", "shared_gate_up", "lm_head"},
    "qwen35": {"qkv", "o", "mix_in", "mix_gates", "gate_up", "lm_head"},
    "nemotron_h_moe": {"qkv", "o", "mix_in", "mix_out", "expert_up", "shared_up", "lm_head"},
}


@pytest.mark.parametrize("architecture", OF_32)
def test_gguf_files_keep_experts_and_reordered_matrices(tmp_path, architecture):
    requantize(REFERENCE / "gguf" / f"{architecture}.gguf", tmp_path / "a.gguf", kind=_q4_0)
    assert _kept(tmp_path / "a.gguf") == OF_32[architecture]


def test_experts_of_different_types_take_a_common_kind(tmp_path):
    def kind(name):
        return {"blk.0.ffn_up_exps.weight": "Q8_0", "blk.1.ffn_gate_exps.weight": "Q5_1"}.get(name, _q4_0(name))

    requantize(REFERENCE / "gguf" / "mixtral.gguf", tmp_path / "a.gguf", kind=kind)
    assert kept_in_blocks(open_checkpoint(tmp_path / "a.gguf"))["layers.expert_gate_up"].bits == 10
    assert "expert_gate_up" in _kept(tmp_path / "a.gguf")


def _config_of(case: str) -> dict:
    field = "quantization" if case.startswith("mlx") else "quantization_config"
    return {field: SETTINGS[case]}


def _replaced(tensors: dict[str, np.ndarray], case: str, modules: list[str]) -> None:
    """Stores the matrices of these modules as in a case of make_quantized.py."""
    for module in modules:
        tensors.pop(f"{module}.weight", None)
        tensors |= {name: np.array(tensor.map()) for name, tensor in tensors_of(case, module).items()}


@pytest.mark.parametrize("case", ["gptq4", "int4_float16", "mlx4_float16", "fp8_blocks", "mxfp4", "nf4"])
def test_separate_experts_are_kept_in_the_formats_in_which_matrices_are(tmp_path, case):
    block = "model.layers.{}.block_sparse_moe"

    def change(tensors):
        for layer in range(3):
            for name in ("gate", "up", "down"):
                del tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"]
            tensors[f"{block.format(layer)}.gate.weight"] = np.ones((2, 64), np.float32)
            experts = [f"{block.format(layer)}.experts.{expert}" for expert in range(2)]
            _replaced(tensors, case, [f"{expert}.{name}" for expert in experts for name in ("w1", "w3")])
            tensors |= {f"{expert}.w2.weight": np.ones((64, 32), np.float32) for expert in experts}

    write_hf(
        tmp_path,
        change=change,
        architectures=["MixtralForCausalLM"],
        num_local_experts=2,
        num_experts_per_tok=1,
        hidden_size=64,
        intermediate_size=32,
        **_config_of(case),
    )
    assert _kept(tmp_path) == ({"expert_gate_up"} if case in KEPT else set())


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("case", ["gptq4", "bnb_int8", "nf4"])
def test_the_matrices_of_gpt2_are_quantized_as_those_of_other_models(tmp_path, case, prefix):
    tensors = {f"{prefix}wte.weight": np.ones((96, 64)), f"{prefix}wpe.weight": np.ones((16, 64))}
    norms = [f"{prefix}ln_f", *(f"{prefix}h.{layer}.ln_{i}" for layer in range(2) for i in (1, 2))]
    tensors |= {f"{name}.{part}": np.ones(64) for name in norms for part in ("weight", "bias")}
    shapes = {"attn.c_attn": (64, 192), "attn.c_proj": (64, 64), "mlp.c_fc": (64, 32), "mlp.c_proj": (32, 64)}
    for layer in range(2):
        for name, shape in shapes.items():
            tensors |= {
                f"{prefix}h.{layer}.{name}.weight": np.ones(shape),
                f"{prefix}h.{layer}.{name}.bias": np.ones(shape[1]),
            }
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    _replaced(tensors, case, [f"{prefix}h.{layer}.mlp.c_fc" for layer in range(2)])
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = {"vocab_size": 96, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 32, "n_positions": 16}
    config = {"architectures": ["GPT2LMHeadModel"], **sizes, **_config_of(case)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    name = f"{prefix}h.1.mlp.c_fc.weight"
    want = unpack(tensors_of(case, "m"), settings_of(case))["m.weight"].map()
    assert checkpoint.shape(name) == (64, 32)
    np.testing.assert_array_equal(checkpoint.read(name), want.T)
    assert _kept(tmp_path) == ({"up"} if case in KEPT else set())
