"""Which numbers of 4 bits, and which 8-bit floats, of a checkpoint stay as they are on an accelerator, and in which form.

Everything follows from the kinds of blocks that the headers of the checkpoint declare, so that a program can be compiled
before a weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.checkpoint.block_kind import BlockKind
from fastgen_jax.engine.footprint import quantization_of
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.division import DIVIDED_AXES, divided_shape, keeps_blocks
from fastgen_jax.models.params import all_specs, head_spec, layers_with
from fastgen_jax.models.weight_spec import WeightSpec
from pallas_kernels.matmul import (
    FLOAT8_BLOCK,
    INT4_ROWS,
    BlockWeight,
    Float8Weight,
    Int4Kernel,
    Int4Weight,
    hopper_support,
    int4_fits,
    pack_int4,
)

Stored = Sequence[tuple[str, BlockKind | str]]
"""The quantized weights of a checkpoint by path: see `checkpoint.quantized_weights`."""

_SIZES = (256, 128, 64, 32)  # into which larger groups are divided, if a kernel does not take them


class Int4Form(NamedTuple):
    """How an `Int4Weight` holds the numbers of a checkpoint."""

    numbers, short = "4 bits", "4-bit"  # for people
    size: int
    """Inputs that share a scale; a divisor of those of a block of the checkpoint."""
    has_offsets: bool
    scale_dtype: str

    @property
    def bits(self) -> float:
        """Bits of memory per weight, with its share of the scale and of the offset."""
        return 4 + (16 if self.scale_dtype == "float16" else 32) * (1 + self.has_offsets) / self.size


class Float8Form(NamedTuple):
    """How a `Float8Weight` holds the numbers of a checkpoint."""

    numbers, short = "8-bit floats", "fp8"  # for people
    size: int
    """Inputs that share a scale on a device: all of them, unless `in_blocks`."""
    in_blocks: bool

    @property
    def bits(self) -> float:
        """Bits of memory per weight, with its share of the scale."""
        return 8 + 32 / self.size


Form = Int4Form | Float8Form
Forms = tuple[tuple[str, Form], ...]
"""The forms of weights by their paths."""


class Choice(NamedTuple):
    """What becomes of the quantized weights of a checkpoint."""

    kept: Forms
    """Those that stay as they are."""
    dequantized: tuple[tuple[str, str], ...]
    """The others by path, and why."""


NOTHING = Choice((), ())
"""Of a checkpoint without quantized weights."""


def choose_forms(
    stored: Stored,
    model: ModelConfig,
    *,
    kernel: Int4Kernel | None,
    platform: str,
    activations: str,
    num_devices: int = 1,
    float8: bool = False,
    requested: bool = False,
) -> Choice:
    """What stays: numbers of 4 bits that `kernel` multiplies with `activations`, or, if int4 is `requested`, all that can;
    and where the device multiplies `float8`, 8-bit floats with a scale for each output or block that it takes.

    `platform` and `num_devices` say where and how the model is divided. Of a tied head, the embedding is the memory.
    """
    specs = {head_spec(model).path: head_spec(model)} | all_specs(model)
    kept: dict[str, Form] = {}
    left: dict[str, str] = {}
    for path, kind in stored:
        if path == "lm_head" and model.tie_embeddings:
            continue
        division = {"platform": platform, "num_devices": num_devices}
        if isinstance(kind, BlockKind) and kind.is_float8 and not requested:
            found = _float8_form(kind, specs[path], model, **division, activations=activations, multiplies=float8)
        else:
            found = _int4_form(
                kind, specs[path], model, **division, kernel=kernel, activations=activations, requested=requested
            )
        if isinstance(found, str):
            left[path] = found
        else:
            kept[path] = found
    return Choice(tuple(kept.items()), tuple(left.items()))


def _float8_form(
    kind: BlockKind,
    spec: WeightSpec,
    model: ModelConfig,
    *,
    multiplies: bool,
    platform: str,
    activations: str,
    num_devices: int,
) -> Float8Form | str:
    """The form of a weight of 8-bit floats, or why it is dequantized."""
    if not multiplies:
        return f"{kind.name}, which this device does not multiply with jax {jax.__version__}"
    if not spec.quantizable:
        return spec.never_quantized or "it is not multiplied"
    if kind.only_weights:
        return f"{kind.name} without those of activations, which a kernel would round"
    in_blocks = not kind.of_outputs
    if in_blocks and platform == "tpu":
        return f"{kind.name}, not one scale for each output"
    if in_blocks and kind.size != FLOAT8_BLOCK:
        return f"{kind.name}, not one scale for each output or for {FLOAT8_BLOCK} inputs"
    if in_blocks and not keeps_blocks(spec, FLOAT8_BLOCK, model, num_devices, platform):
        return f"a block belongs to two of {num_devices} devices"
    share = _share(divided_shape(spec, model, num_devices, platform), spec, num_devices)
    if platform in ("gpu", "cuda") and not hopper_support.fits(share, hopper_support.FLOAT8, jnp.dtype(activations)):
        return f"not in whole tiles of the kernel{' on each device' if num_devices > 1 else ''}"
    return Float8Form(FLOAT8_BLOCK if in_blocks else share[-2], in_blocks)


def _share(shape: tuple[int, ...], spec: WeightSpec, num_devices: int) -> tuple[int, ...]:
    """What each device has of a weight of the divided model."""
    return tuple(size // (num_devices if axis in DIVIDED_AXES else 1) for size, axis in zip(shape, spec.axes, strict=True))


def _int4_form(
    kind: BlockKind | str,
    spec: WeightSpec,
    model: ModelConfig,
    *,
    kernel: Int4Kernel | None,
    platform: str,
    activations: str,
    num_devices: int,
    requested: bool,
) -> Int4Form | str:
    """The form of one weight, or why it is dequantized."""
    if isinstance(kind, str):
        if "," in kind:
            return f"{kind}, without a common form"
        return f"{kind}, not integers of 4 bits in groups and an order that a kernel reads"
    if kind.is_float or kind.value_bits != 4:
        return f"{kind.name}, not integers of 4 bits"
    if not spec.quantizable:
        return spec.never_quantized or "it is not multiplied"
    if kind.size % INT4_ROWS:
        return f"groups of {kind.size} inputs, not of a multiple of {INT4_ROWS}"
    shape = divided_shape(spec, model, num_devices, platform)
    if requested:
        wanted = quantization_of(
            replace(spec, shape=shape), "int4", packed=False, num_devices=num_devices, platform=platform
        )
        if wanted != "int4":
            return "quantized to 8 bits"
    elif kernel is None:
        return f"no kernel for 4 bits on this device with jax {jax.__version__}"
    share = _share(shape, spec, num_devices)
    half = kind.scale_dtype == "float16" and not kind.has_offsets and platform != "tpu"  # TPUs have no float16
    sizes = [
        size
        for size in dict.fromkeys((kind.size, *(size for size in _SIZES if kind.size % size == 0)))
        if keeps_blocks(spec, math.lcm(size, 2 * INT4_ROWS), model, num_devices, platform)
    ]
    fitting = [size for size in sizes if kernel and int4_fits(kernel, share, size=size, dtype=activations)]
    if fitting or (requested and sizes):
        return Int4Form((fitting or sizes)[0], kind.has_offsets, "float16" if half else "float32")
    if requested:
        return "a device has no whole groups of inputs"
    if kernel in ("hopper", "ampere") and activations not in ("bfloat16", "float16"):
        return f"the kernel multiplies bfloat16 or float16, not {activations}"
    return f"not in whole tiles of the kernel{' on each device' if num_devices > 1 else ''}"


def in_form(array: BlockWeight, form: Form) -> Int4Weight | Float8Weight:
    """A matrix of the checkpoint on the host, in the form that was declared; ValueError if it has other numbers."""
    if isinstance(form, Float8Form):
        return _in_float8(array, form)
    repeats = array.size // max(form.size, 1)
    if array.size % form.size or array.format.numbers != "uint4" or (array.offsets is not None) != form.has_offsets:
        raise _other_form(array, form)
    if repeats > 1:
        offsets = None if array.offsets is None else array.offsets.repeat(repeats, axis=1)
        array = replace(array, scales=array.scales.repeat(repeats, axis=1), offsets=offsets)
    return pack_int4(array, scale_dtype=np.dtype(form.scale_dtype))


def _in_float8(array: BlockWeight, form: Float8Form) -> Float8Weight:
    same = form.in_blocks or (array.scales == array.scales[:, :1]).all()
    if array.format.numbers != "float8_e4m3fn" or not same or (form.in_blocks and array.size != form.size):
        raise _other_form(array, form)
    scales = np.ascontiguousarray(array.scales.T) if form.in_blocks else array.scales[:, 0]
    return Float8Weight(values=array.values, scales=scales)  # pyright: ignore[reportArgumentType] (host arrays)


def _other_form(array: BlockWeight, form: Form) -> ValueError:
    return ValueError(
        f"a matrix {list(array.shape)} of the checkpoint has {array.format}, but its headers declare {form}; download "
        "the checkpoint again, or load it with quantize='none'"
    )


def numbers_of(kept: Forms) -> str:
    """What kinds of numbers stay as they are, for people."""
    return " and ".join(sorted({form.numbers for _, form in kept}))


def described(choice: Choice, model: ModelConfig, dtype: str, quantize: str | None) -> str:
    """How many weights stay as they are, how many do not and why, in one line; empty if the checkpoint is not quantized."""
    kept, left = counted(choice.kept, model), counted(choice.dequantized, model)
    if not kept + left:
        return ""
    line = f"{people(kept)} of {people(kept + left)} quantized weights stay in the"
    line = f"{line} {numbers_of(choice.kept)} of the checkpoint"
    if any(isinstance(form, Float8Form) for _, form in choice.kept):
        line += ", to which rows of activations are rounded"
    if not left:
        return line
    line = f"{line}, {people(left)}" if kept else f"{people(left)} quantized weights"
    reasons: dict[str, list[str]] = {}
    for path, why in choice.dequantized:
        reasons.setdefault(why, []).append(path)
    causes = "; ".join(f"{', '.join(paths)}: {why}" for why, paths in reasons.items())
    others = f"dequantized to {dtype}" if quantize is None else f"quantized again, to {quantize}"
    return f"{line} are {others} ({causes})"


def counted(paths: Sequence[tuple[str, object]], model: ModelConfig) -> int:
    """The number of weights in all layers."""
    specs, having = {head_spec(model).path: head_spec(model)} | all_specs(model), layers_with(model)

    def count(spec: WeightSpec) -> int:
        return math.prod(spec.shape) * (len(having[spec.name]) if spec.per_layer else 1)

    return sum(count(specs[path]) for path, _ in paths)


def people(number: int) -> str:
    """A number with three digits, as in 1.24B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
