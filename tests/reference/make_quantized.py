"""Regenerates `quantized.safetensors`: one random matrix in each quantized format, and its values by the format's library.

    pip install torch==2.13.0 compressed-tensors==0.20.1 bitsandbytes==0.50.2 auto-round==0.16.1 nvidia-modelopt==0.47.0 \
        "mlx[cpu]==0.32.4"
    python tests/reference/make_quantized.py .../autoawq-0.2.9    # the source distribution; its kernels are not needed

Tensors are named `case/ending`; the values of a case are `case/=`, [out, in]. The settings of all cases, as they are in
config.json, are in the metadata.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import mlx.core as mx
import numpy as np
import torch
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import save_file

OUTPUTS, INPUTS, GROUP = 32, 64, 32
Case = tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]  # settings, stored tensors, values


def compressed_tensors(form: str, *, scale_dtype: torch.dtype = torch.float32, **fields: Any) -> Case:
    """Quantized with scales (and zero points) of its own for each group, channel, block or the matrix."""
    args = QuantizationArgs(**fields)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    shapes = {"tensor": (1,), "channel": (OUTPUTS, 1), "block": (OUTPUTS // 16, INPUTS // 32)}
    size = args.group_size if args.group_size and args.group_size > 0 else INPUTS
    shape = shapes.get(args.strategy, (OUTPUTS, INPUTS // size))
    weight = torch.randn(OUTPUTS, INPUTS)
    largest = 2.0 ** (args.num_bits - 1) if args.type == "int" else 6.0 if args.num_bits == 4 else 448.0
    state = {"weight": weight, "weight_scale": ((0.5 + torch.rand(shape)) * 3 / largest).to(scale_dtype)}
    if form.startswith("mx"):
        state["weight_scale"] = torch.exp2(torch.randint(-6, -2, shape).float())
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = torch.tensor([37.5])
        state["weight_scale"] = (state["weight_scale"] * 37.5).to(torch.float8_e4m3fn).float()
    if not args.symmetric:
        half = 2 ** (args.num_bits - 1)
        state["weight_zero_point"] = torch.randint(-half, half, shape).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    values = compressor.decompress(stored, scheme)["weight"]
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head"],
    }
    return settings, {f".{name}": tensor for name, tensor in stored.items()}, values


def auto_round(packing: str, bits: int, *, in_order: bool = True, symmetric: bool = False) -> Case:
    """As GPTQ stores matrices, with zero points as they are or minus one."""
    module = qlinear_torch_zp if packing == "auto_round:auto_gptq" else qlinear_torch
    layer = module.QuantLinear(bits, GROUP, INPUTS, OUTPUTS, bias=False, g_idx=not in_order)
    scales = (torch.rand(OUTPUTS, INPUTS // GROUP) * 0.1 + 0.01).half().float()
    zeros = torch.randint(1, 2**bits, scales.shape).float()
    if symmetric:
        zeros = torch.full_like(zeros, 2.0 ** (bits - 1))
    spread = [values.repeat_interleave(GROUP, 1) for values in (scales, zeros)]
    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data = (torch.randint(0, 2**bits, (OUTPUTS, INPUTS)).float() - spread[1]) * spread[0]
    layer.device = "cpu"  # which one of the two modules reads
    layer.pack(linear, scales, zeros, device="cpu")
    if not in_order:
        layer.g_idx = layer.g_idx[torch.randperm(INPUTS)]
    stored = {f".{name}": tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.scales = layer.scales.float()  # so that it multiplies in float32
    values = layer(torch.eye(INPUTS)).T
    settings = {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": bits,
        "group_size": GROUP,
        "sym": symmetric,
        "data_type": "int",
    }
    if not in_order:
        settings |= {"quant_method": "gptq", "desc_act": True, "checkpoint_format": "gptq"}
    return settings, stored, values


def auto_awq(layout: str, group: int) -> Case:
    """AutoAWQ's layouts for its other kernels, packed by its own modules."""
    name, file = {
        "gemv": ("WQLinear_GEMV", "gemv"),
        "gemv_fast": ("WQLinear_GEMVFast", "gemv_fast"),
        "marlin": ("WQLinear_Marlin", "marlin"),
    }[layout]
    packer = getattr(_source(f"awq/modules/linear/{file}.py"), name)
    outputs, inputs = (64, 256)
    scales = (torch.rand(outputs, inputs // group) * 0.1 + 0.01).half().float()
    zeros = torch.randint(0, 16, scales.shape).float() if layout != "marlin" else torch.full_like(scales, 8.0)
    spread = [values.repeat_interleave(group, 1) for values in (scales, zeros)]
    values = (torch.randint(0, 16, (outputs, inputs)).float() - spread[1]) * spread[0]
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = values
    layer = packer.from_linear(linear, 4, group, scales=scales, zeros=None if layout == "marlin" else zeros)
    stored = {f".{key}": tensor for key, tensor in layer.state_dict().items()}
    settings = {"quant_method": "awq", "version": layout, "bits": 4, "group_size": group, "zero_point": layout != "marlin"}
    return settings, stored, values


def _source(path: str) -> Any:
    folder = Path(sys.argv[1])
    package = types.ModuleType("awq")  # without what AutoAWQ imports by itself
    package.__path__ = [str(folder / "awq")]
    sys.modules["awq"] = package
    utils = types.ModuleType("awq.utils")
    utils.__path__ = [str(folder / "awq" / "utils")]
    sys.modules["awq.utils"] = utils
    spec = importlib.util.spec_from_file_location(Path(path).stem, folder / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bits_and_bytes(kind: str, *, nested: bool = False) -> Case:
    """The tensors that transformers saves, under the names of bitsandbytes' quantization state.

    On a CPU, version 0.50 of the library dequantizes blocks that are longer than a row wrongly; these are not.
    """
    weight = torch.randn(OUTPUTS, INPUTS)
    if kind == "int8":
        values, largest, _ = bnb.int8_vectorwise_quant(weight.half())
        stored = {".weight": values, ".SCB": largest, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
        dequantized = bnb.int8_vectorwise_dequant(values, largest)
    else:
        values, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        stored = {".weight": values} | {f".weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        dequantized = bnb.dequantize_4bit(values, state)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": kind != "int8", "load_in_8bit": kind == "int8"}
    return settings, stored, dequantized


def model_opt() -> Case:
    """NVFP4 with factors of the inputs, as in NVFP4_AWQ."""
    weight = torch.randn(OUTPUTS, INPUTS)
    packed, scales, whole = NVFP4QTensor.quantize(weight, 16)
    values = packed.dequantize(torch.float32, scale=scales, double_scale=whole, block_sizes={-1: 16})
    factors = torch.rand(INPUTS) + 0.5
    stored = {
        ".weight": packed._quantized_data,
        ".weight_scale": scales,
        ".weight_scale_2": whole,
        ".pre_quant_scale": factors,
        ".input_scale": torch.tensor(0.5),
    }
    return {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ", "group_size": 16}, stored, values * factors


def mlx(mode: str, bits: int, size: int, *, dtype: mx.Dtype = mx.float32) -> Case:
    """Computed by MLX on its CPU backend."""
    weight = mx.array(np.random.default_rng(bits).standard_normal((OUTPUTS, INPUTS)).astype(np.float32)).astype(dtype)
    parts = mx.quantize(weight, group_size=size, bits=bits, mode=mode)
    if mode == "affine":  # so that the values are not rounded to the dtype of the scales
        values = mx.dequantize(parts[0], *(part.astype(mx.float32) for part in parts[1:]), group_size=size, bits=bits)
    else:
        values = mx.dequantize(*parts, group_size=size, bits=bits, mode=mode, dtype=mx.float32)
    stored = {
        ending: torch.from_numpy(np.array(part))
        for ending, part in zip((".weight", ".scales", ".biases"), parts, strict=False)
    }
    return {"group_size": size, "bits": bits, "mode": mode}, stored, torch.from_numpy(np.array(values))


CASES: dict[str, Callable[[], Case]] = {
    "int4_groups": lambda: compressed_tensors("pack-quantized", num_bits=4, group_size=GROUP, strategy="group"),
    "int4_float16": lambda: compressed_tensors(
        "pack-quantized", scale_dtype=torch.float16, num_bits=4, group_size=GROUP, strategy="group"
    ),
    "int4_bfloat16": lambda: compressed_tensors(
        "pack-quantized", scale_dtype=torch.bfloat16, num_bits=4, group_size=GROUP, strategy="group"
    ),
    "int4_zeros": lambda: compressed_tensors(
        "pack-quantized", num_bits=4, group_size=GROUP, strategy="group", symmetric=False
    ),
    "int4_channels": lambda: compressed_tensors("pack-quantized", num_bits=4, strategy="channel"),
    "int3_zeros": lambda: compressed_tensors(
        "pack-quantized", num_bits=3, group_size=GROUP, strategy="group", symmetric=False
    ),
    "int5_groups": lambda: compressed_tensors("pack-quantized", num_bits=5, group_size=GROUP, strategy="group"),
    "int8_packed": lambda: compressed_tensors("pack-quantized", num_bits=8, strategy="channel"),
    "int8_channels": lambda: compressed_tensors("int-quantized", num_bits=8, strategy="channel"),
    "int8_zeros": lambda: compressed_tensors("int-quantized", num_bits=8, strategy="channel", symmetric=False),
    "int8_tensor": lambda: compressed_tensors("naive-quantized", num_bits=8, strategy="tensor"),
    "int8_groups": lambda: compressed_tensors("naive-quantized", num_bits=8, group_size=GROUP, strategy="group"),
    "fp8_channels": lambda: compressed_tensors("float-quantized", num_bits=8, type="float", strategy="channel"),
    "fp8_tensor": lambda: compressed_tensors("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "fp8_blocks": lambda: compressed_tensors(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 32]
    ),
    "nvfp4": lambda: compressed_tensors(
        "nvfp4-pack-quantized", num_bits=4, type="float", group_size=16, strategy="tensor_group"
    ),
    "mxfp4": lambda: compressed_tensors("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32, strategy="group"),
    "mxfp8": lambda: compressed_tensors(
        "mxfp8-quantized", num_bits=8, type="float", group_size=32, strategy="group", scale_dtype=torch.uint8
    ),
    **{f"gptq{bits}": lambda bits=bits: auto_round("auto_round:auto_gptq", bits) for bits in (2, 3, 4, 5, 8)},
    **{f"gptq{bits}_v2": lambda bits=bits: auto_round("auto_round", bits) for bits in (2, 3, 4, 8)},
    "gptq4_order": lambda: auto_round("auto_round:auto_gptq", 4, in_order=False),
    "gptq3_order": lambda: auto_round("auto_round:auto_gptq", 3, in_order=False),
    **{
        f"gptq{bits}_symmetric": lambda bits=bits: auto_round("auto_round:auto_gptq", bits, symmetric=True)
        for bits in (4, 8)
    },
    "gemv": lambda: auto_awq("gemv", 64),
    "gemv_fast": lambda: auto_awq("gemv_fast", 64),
    "marlin": lambda: auto_awq("marlin", 128),
    "marlin_one_group": lambda: auto_awq("marlin", 256),
    "nf4": lambda: bits_and_bytes("nf4"),
    "nf4_nested": lambda: bits_and_bytes("nf4", nested=True),
    "fp4": lambda: bits_and_bytes("fp4"),
    "bnb_int8": lambda: bits_and_bytes("int8"),
    "modelopt_nvfp4": model_opt,
    **{f"mlx{bits}": lambda bits=bits: mlx("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)},
    "mlx4_float16": lambda: mlx("affine", 4, 32, dtype=mx.float16),
    "mlx_mxfp4": lambda: mlx("mxfp4", 4, 32),
    "mlx_mxfp8": lambda: mlx("mxfp8", 8, 32),
    "mlx_nvfp4": lambda: mlx("nvfp4", 4, 16),
}


def main() -> None:
    """Writes the file beside this script."""
    tensors, settings = {}, {}
    for name, make in CASES.items():
        torch.manual_seed(0)
        settings[name], stored, values = make()
        tensors |= {f"{name}/{ending}": tensor.detach().contiguous() for ending, tensor in stored.items()}
        tensors[f"{name}/="] = values.detach().contiguous()
    file = Path(__file__).with_name("quantized.safetensors")
    save_file(tensors, file, metadata={"settings": json.dumps(settings)})
    print(f"{len(CASES)} cases, {file.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
