"""Which numbers of 4 bits of a checkpoint stay as they are on an accelerator, and in which form.

Everything follows from the kinds of blocks that the headers of the checkpoint declare, so that a program can be compiled
before a weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from fastgen_jax.checkpoint.block_kind import BlockKind
from fastgen_jax.engine.footprint import quantization_of
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.division import DIVIDED_AXES, divided_shape, keeps_blocks
from fastgen_jax.models.params import all_specs, head_spec, layers_with
from fastgen_jax.models.weight_spec import WeightSpec
from pallas_kernels.matmul import INT4_ROWS, BlockWeight, Int4Kernel, Int4Weight, int4_fits, pack_int4

Stored = Sequence[tuple[str, BlockKind | str]]
"""The quantized weights of a checkpoint by path: see `checkpoint.quantized_weights`."""

_SIZES = (256, 128, 64, 32)  # into which larger groups are divided, if a kernel does not take them


class Int4Form(NamedTuple):
    """How an `Int4Weight` holds the numbers of a checkpoint."""

    size: int
    """Inputs that share a scale; a divisor of those of a block of the checkpoint."""
    has_offsets: bool
    scale_dtype: str

    @property
    def bits(self) -> float:
        """Bits of memory per weight, with its share of the scale and of the offset."""
        return 4 + (16 if self.scale_dtype == "float16" else 32) * (1 + self.has_offsets) / self.size


Forms = tuple[tuple[str, Int4Form], ...]
"""The forms of weights by their paths."""


class Choice(NamedTuple):
    """What becomes of the quantized weights of a checkpoint."""

    kept: Forms
    """Those that stay in 4 bits."""
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
    requested: bool = False,
) -> Choice:
    """What stays in 4 bits: what `kernel` multiplies with `activations`, or, if int4 is `requested`, all that can.

    `platform` and `num_devices` say where and how the model is divided. Of a tied head, the embedding is the memory.
    """
    specs = {head_spec(model).path: head_spec(model)} | all_specs(model)
    kept: dict[str, Int4Form] = {}
    left: dict[str, str] = {}
    for path, kind in stored:
        if path == "lm_head" and model.tie_embeddings:
            continue
        found = _form(
            kind,
            specs[path],
            model,
            kernel=kernel,
            platform=platform,
            activations=activations,
            num_devices=num_devices,
            requested=requested,
        )
        if isinstance(found, Int4Form):
            kept[path] = found
        else:
            left[path] = found
    return Choice(tuple(kept.items()), tuple(left.items()))


def _form(
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
    share = [size // (num_devices if axis in DIVIDED_AXES else 1) for size, axis in zip(shape, spec.axes, strict=True)]
    half = kind.scale_dtype == "float16" and not kind.has_offsets and platform != "tpu"  # TPUs have no float16
    sizes = [
        size
        for size in dict.fromkeys((kind.size, *(size for size in _SIZES if kind.size % size == 0)))
        if keeps_blocks(spec, math.lcm(size, 2 * INT4_ROWS), model, num_devices, platform)
    ]
    fitting = [size for size in sizes if kernel and int4_fits(kernel, tuple(share), size=size, dtype=activations)]
    if fitting or (requested and sizes):
        return Int4Form((fitting or sizes)[0], kind.has_offsets, "float16" if half else "float32")
    if requested:
        return "a device has no whole groups of inputs"
    if kernel in ("hopper", "ampere") and activations not in ("bfloat16", "float16"):
        return f"the kernel multiplies bfloat16 or float16, not {activations}"
    return f"not in whole tiles of the kernel{' on each device' if num_devices > 1 else ''}"


def in_form(array: BlockWeight, form: Int4Form) -> Int4Weight:
    """A matrix of the checkpoint on the host, in the form that was declared; ValueError if it has other numbers."""
    repeats = array.size // max(form.size, 1)
    if array.size % form.size or array.format.numbers != "uint4" or (array.offsets is not None) != form.has_offsets:
        raise ValueError(
            f"a matrix {list(array.shape)} of the checkpoint has {array.format}, but its headers declare {form}; download "
            "the checkpoint again, or load it with quantize='none'"
        )
    if repeats > 1:
        offsets = None if array.offsets is None else array.offsets.repeat(repeats, axis=1)
        array = replace(array, scales=array.scales.repeat(repeats, axis=1), offsets=offsets)
    return pack_int4(array, scale_dtype=np.dtype(form.scale_dtype))


def described(choice: Choice, model: ModelConfig, dtype: str, quantize: str | None) -> str:
    """How many weights stay in 4 bits, how many do not and why, in one line; empty if the checkpoint is not quantized."""
    kept, left = counted(choice.kept, model), counted(choice.dequantized, model)
    if not kept + left:
        return ""
    line = f"{people(kept)} of {people(kept + left)} quantized weights stay in the 4 bits of the checkpoint"
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
