"""Quantized matrices of every format, and model directories with one of them."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.checkpoint.quantized import split_settings
from fastgen_jax.checkpoint.tensor_files import read_safetensors
from tests.checkpoint.tiny_files import write_hf

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


AWQ_PARTS = {".qweight": INT4["awq_weight"], ".qzeros": INT4["awq_zeros"], ".scales": INT4["scales"]}
GPTQ_PARTS = {".qweight": INT4["gptq_weight"], ".qzeros": INT4["gptq_zeros"], ".scales": INT4["scales"], ".g_idx": GROUPS}
FP8_PARTS = {".weight": np.ones((24, 64), ml_dtypes.float8_e4m3fn), ".weight_scale_inv": np.ones((2, 4), np.float32)}
INT8_PARTS = {".weight": np.ones((24, 64), np.int8), ".weight_scale": np.ones((24, 1), np.float32)}
INT4_PARTS = {
    ".weight_packed": np.ones((24, 8), np.int32),
    ".weight_scale": np.ones((24, 2), np.float32),
    ".weight_shape": np.array([24, 64]),
}


def quantized_folder(path: Path, settings: dict, parts: dict[str, np.ndarray], **overrides) -> Path:
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


def write_int4(path: Path, method: str, *, symmetric: bool = False, group: int = 32, seed: int = 0, **overrides) -> Path:
    """A directory whose projections of all layers have random numbers of 4 bits, in the layout of GPTQ or AWQ."""

    def change(tensors):
        generator = np.random.default_rng(seed)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            outputs, inputs = tensors.pop(name).shape
            numbers = generator.integers(0, 16, (inputs, outputs), np.uint32)
            zeros = np.full((inputs // group, outputs), 8, np.uint32) if symmetric else numbers[: inputs // group] | 1
            module = name.removesuffix(".weight")
            scales = generator.uniform(0.01, 0.03, (inputs // group, outputs))
            if method == "gptq":
                packed, of_zeros = _words(numbers, 0), _words(zeros - 1, 1)
                tensors[f"{module}.g_idx"] = np.arange(inputs, dtype=np.int32) // group
            else:
                packed, of_zeros = (_words(array, 1, (0, 4, 1, 5, 2, 6, 3, 7)) for array in (numbers, zeros))
            tensors |= {f"{module}.qweight": packed, f"{module}.qzeros": of_zeros}
            tensors[f"{module}.scales"] = scales.astype(np.float16)

    write_hf(path, change=change, **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128} | overrides)
    config = json.loads((path / "config.json").read_text())
    settings = (GPTQ if method == "gptq" else AWQ) | {"group_size": group} | ({"sym": symmetric} if method == "gptq" else {})
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return path


def write_fp8(path: Path, block: int | None, *, exceptions: tuple[str, ...] = (), **overrides) -> Path:
    """A directory whose projections of all layers are 8-bit floats with a scale for each block of 128 outputs and `block`
    inputs, or with None for each matrix. `exceptions` stay as they are."""
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block and [128, block]}

    def change(tensors):
        generator = np.random.default_rng(0)
        for name in [name for name in tensors if name.endswith("_proj.weight") and not any(e in name for e in exceptions)]:
            weight = tensors[name]
            shape = () if block is None else (-(-weight.shape[0] // 128), weight.shape[1] // block)
            tensors[name] = generator.standard_normal(weight.shape).astype(ml_dtypes.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = generator.uniform(0.03, 0.1, shape).astype(np.float32)

    sizes = {"vocab_size": 512, "hidden_size": 256, "head_dim": 64, "intermediate_size": 256}
    write_hf(path, change=change, **sizes | overrides)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return path


def _words(numbers: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """i32 words of eight numbers of 4 bits each along an axis; nibble i, from the lowest, is number order[i]'s place."""
    eight = np.moveaxis(numbers, axis, -1).reshape(*np.moveaxis(numbers, axis, -1).shape[:-1], -1, 8)
    words = np.zeros(eight.shape[:-1], np.uint32)
    for i in range(8):
        words |= eight[..., i] << np.uint32(4 * order[i])
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def loaded_gate(path: Path) -> np.ndarray:
    """The matrix NAME as loaded, [in, out]."""
    params = load_params(open_checkpoint(path), dtype="float32", stack_layers=False)
    gate, _ = np.split(np.asarray(params["layers"][1]["gate_up"]), 2, axis=1)
    return gate
