"""8-bit and 4-bit floats: gpt-oss' MXFP4, the FP8 of DeepSeek, Qwen, Mistral and Llama, and NVIDIA's modelopt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from fastgen_jax.checkpoint.quantized.numbers import E2M1, E8M0_BIAS, Groups, e8m0, fp4
from fastgen_jax.checkpoint.quantized.packed import REMEDY, Format, PackedTensor, Parts, assemble, expect_shape, only
from fastgen_jax.checkpoint.tensor_files import StoredTensor
from fastgen_jax.json_types import JsonFields

FP8 = "float8_e4m3fn"
SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")
ACTIVATIONS = (
    *(".input_scale", ".input_scale_ub", ".input_zero_point", ".input_global_scale", ".activation_scale", ".output_scale"),
    *(".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_scale", ".k_zero_point", ".v_zero_point"),
)
"""Endings of tensors that quantize activations and caches, which stay as the engine has them."""


def read_mxfp4(tensors: Mapping[str, StoredTensor], settings: JsonFields) -> dict[str, StoredTensor | PackedTensor]:
    """Experts of gpt-oss."""

    def weight(module: str, parts: Parts) -> PackedTensor:
        blocks, scales = parts["_blocks"], parts["_scales"]
        *lead, rows, groups, size = blocks.shape
        expect_shape(module, "_scales", scales, blocks.shape[:-1])
        return PackedTensor(
            dtype="MXFP4",
            shape=(*lead, 2 * groups * size, rows),
            parts=(blocks, scales),
            values=mxfp4_values,
            of_entry=_mxfp4_expert,
        )

    form = Format(needs=("_blocks", "_scales"), dtypes=("uint8",), weight=weight, becomes="")
    return assemble(tensors, [form])


def mxfp4_values(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bfloat16[X, in, out] of u8[X, out, in/32, 16], two numbers per byte, and their exponents u8[X, out, in/32]; exact.

    Source: OCP Microscaling Formats 1.0, and the layout of the gpt-oss release.
    """
    pairs = _mxfp4_pairs()
    experts, rows, groups, size = blocks.shape
    out = np.empty((experts, 2 * groups * size, rows), ml_dtypes.bfloat16)
    for expert in range(experts):  # temporaries have the size of one expert
        index = (scales[expert].astype(np.uint16) << 8)[..., None] | blocks[expert]
        out[expert] = pairs[index].view(ml_dtypes.bfloat16).reshape(rows, -1).T
    return out


def _mxfp4_expert(blocks: np.ndarray, scales: np.ndarray) -> Groups:
    """[out, in] of u8[out, in/32, 16] and their exponents u8[out, in/32]."""
    return mxfp4_rows(blocks.reshape(len(blocks), -1), scales)


@functools.cache
def _mxfp4_pairs() -> np.ndarray:
    """Both numbers of every byte at every exponent, as two bfloat16 in a u32: [exponent * 256 + byte]."""
    byte = np.arange(256)
    both = np.stack([E2M1[byte & 15], E2M1[byte >> 4]], axis=-1)
    with np.errstate(over="ignore"):  # for exponents that do not occur
        scaled = np.ldexp(both, np.arange(256)[:, None, None] - E8M0_BIAS)
        return scaled.astype(ml_dtypes.bfloat16).reshape(-1, 2).view(np.uint32)[:, 0]


def read_fp8(tensors: Mapping[str, StoredTensor], settings: JsonFields) -> dict[str, StoredTensor | PackedTensor]:
    """FP8 with a scale for each block, output channel or tensor; the scales of static activations are not used."""
    only(settings, {"activation_scheme": ("dynamic", "static", None), "fmt": ("e4m3", None)})
    block = settings.get("weight_block_size")
    if block is not None and not (isinstance(block, list) and len(block) == 2):
        raise ValueError(
            f"quantization_config has weight_block_size={block!r}; supported: [rows, columns] or null; {REMEDY}"
        )
    forms = [
        Format(needs=(".weight", ending), dtypes=(FP8,), weight=functools.partial(fp8_weight, block=block))
        for ending in _scale_endings(tensors)
    ]
    return assemble(tensors, forms, unused=ACTIVATIONS)


def _scale_endings(tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """The one ending that a checkpoint uses: vLLM and FBGEMM write `weight_scale`, transformers `weight_scale_inv`."""
    return (".weight_scale",) if any(name.endswith(".weight_scale") for name in tensors) else (".weight_scale_inv",)


def fp8_weight(module: str, parts: Parts, *, block: list[int] | None) -> PackedTensor:
    """A matrix of FP8 numbers with a scale for each `block` of [rows, columns], or, by its shape, row or matrix."""
    (end, scales) = next((ending, tensor) for ending, tensor in parts.items() if ending.startswith(".weight_scale"))
    weight = parts[".weight"]
    if scales.dtype not in SCALES:
        raise ValueError(
            f"{module + '.weight'!r} is stored as {weight.dtype} with scales of {scales.dtype}; FP8 is supported as "
            f"{FP8} with scales of {', '.join(SCALES)}; {REMEDY}"
        )
    if block and len(scales.shape) == 2 and len(weight.shape) == 2:
        expect_shape(module, end, scales, tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True)))
        values = functools.partial(fp8_values, block=(block[0], block[1]))
    else:
        outputs = weight.shape[0]
        expect_shape(module, end, scales, (), (1,), (1, 1), (outputs,), (outputs, 1))
        values = channel_values
    return PackedTensor(dtype=weight.dtype, shape=weight.shape, parts=(weight, scales), values=values)


def fp8_values(weight: np.ndarray, scales: np.ndarray, *, block: tuple[int, int]) -> Groups:
    """[out, in] of an 8-bit matrix with one scale per block; blocks at the edges may be partial."""
    outputs, inputs = weight.shape
    return Groups(
        shape=(outputs, inputs),
        rows=lambda some: weight[some],
        scales=scales.repeat(block[0], axis=0)[:outputs],
        group=None if inputs % block[1] == 0 else np.arange(inputs, dtype=np.int32) // block[1],
    )


def channel_values(weight: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None) -> Groups:
    """[out, in] of 8-bit numbers with one scale (and zero point) for each output, or one for all."""
    outputs = len(weight)

    def of_outputs(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values.reshape(-1, 1), (outputs, 1))

    return Groups(
        shape=(outputs, weight.shape[1]),
        rows=lambda some: weight[some],
        scales=of_outputs(scales),
        zeros=None if zeros is None else of_outputs(zeros),
        bits=8 if weight.dtype == np.int8 else None,
    )


_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4")


def read_modelopt(tensors: Mapping[str, StoredTensor], settings: JsonFields) -> dict[str, StoredTensor | PackedTensor]:
    """FP8, MXFP8 and NVFP4 of NVIDIA's modelopt."""
    settings = settings.get("quantization") or settings  # as in hf_quant_config.json
    algorithms = {str(settings.get("quant_algo")).upper()}
    if algorithms == {"MIXED_PRECISION"}:
        algorithms = {str(layer.get("quant_algo")).upper() for layer in (settings.get("quantized_layers") or {}).values()}
    if unknown := sorted(algorithms - {*_MODELOPT}):
        raise ValueError(
            f"quantization_config has quant_algo={unknown[0]!r}; supported: {', '.join(map(repr, _MODELOPT))}, and "
            f"'MIXED_PRECISION' of these; {REMEDY}"
        )

    def eight_bits(module: str, parts: Parts) -> PackedTensor:
        weight, scales = parts[".weight"], parts[".weight_scale"]
        if scales.dtype == "uint8":
            expect_shape(module, ".weight_scale", scales, (weight.shape[0], weight.shape[1] // 32))
            return PackedTensor(dtype="MXFP8", shape=weight.shape, parts=(weight, scales), values=mxfp8_values)
        if len(scales.shape) == 4:  # of blocks: [rows, 1, columns, 1]
            size = settings.get("group_size") or 128
            parts = {**parts, ".weight_scale": dataclasses.replace(scales, shape=(scales.shape[0], scales.shape[2]))}
            return fp8_weight(module, parts, block=[size, size])
        return fp8_weight(module, parts, block=None)

    return assemble(
        tensors,
        [
            Format(
                needs=(".weight", ".weight_scale", ".weight_scale_2"),
                may_have=(".pre_quant_scale",),
                dtypes=("uint8",),
                weight=_nvfp4_modelopt,
            ),
            Format(needs=(".weight", ".weight_scale"), dtypes=(FP8,), weight=eight_bits),
        ],
        unused=ACTIVATIONS,
    )


def _nvfp4_modelopt(module: str, parts: Parts) -> PackedTensor:
    return nvfp4_weight(
        module, parts[".weight"], parts[".weight_scale"], parts[".weight_scale_2"], parts.get(".pre_quant_scale")
    )


def nvfp4_weight(
    module: str,
    packed: StoredTensor,
    scales: StoredTensor,
    whole: StoredTensor,
    inputs: StoredTensor | None = None,
    *,
    divides: bool = False,
) -> PackedTensor:
    """A matrix of 4-bit floats with an FP8 scale for each 16 inputs, and one for the matrix, which `divides` or multiplies.

    `inputs` are factors of the matrix's inputs.
    """
    outputs, half = packed.shape
    expect_shape(module, ".weight_scale", scales, (outputs, half // 8))
    return PackedTensor(
        dtype="NVFP4",
        shape=(outputs, 2 * half),
        parts=(packed, scales, whole, inputs),
        values=functools.partial(nvfp4_values, divides=divides),
    )


def nvfp4_values(
    packed: np.ndarray, scales: np.ndarray, whole: np.ndarray, inputs: np.ndarray | None, *, divides: bool
) -> np.ndarray | Groups:
    """[out, in] of u8[out, in/2], fp8[out, in/16], f32[] or f32[1], and, if any, factors of the inputs [in]."""
    factor = whole.astype(np.float32).reshape(())
    of_groups = scales.astype(np.float32) / factor if divides else scales.astype(np.float32) * factor
    shape = (len(packed), 2 * packed.shape[1])
    out = Groups(shape=shape, rows=lambda some: fp4(packed[some]), scales=of_groups)
    return out if inputs is None else out.values() * inputs.astype(np.float32).reshape(1, -1)


def mxfp8_values(weight: np.ndarray, scales: np.ndarray) -> Groups:
    """[out, in] of fp8[out, in] and exponents u8[out, in/32]."""
    return Groups(shape=(len(weight), weight.shape[1]), rows=lambda some: weight[some], scales=e8m0(scales))


def mxfp4_rows(packed: np.ndarray, scales: np.ndarray) -> Groups:
    """[out, in] of u8[out, in/2] and exponents u8[out, in/32]."""
    shape = (len(packed), 2 * packed.shape[1])
    return Groups(shape=shape, rows=lambda some: fp4(packed[some]), scales=e8m0(scales))
