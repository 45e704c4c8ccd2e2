"""The declaration of a weight, which initialization, loading, sharding, quantization, packing and counts all read."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

DType = str | type | np.dtype
"""A dtype: "bfloat16", jnp.bfloat16 or a NumPy dtype. Like `jax.typing.DTypeLike`, but without importing JAX."""

Leaf: TypeAlias = Any
"""A weight: an array on the host or a device, its shape, or the pytree that it was prepared as (see `LayerWeights`)."""

Params = dict[str, Leaf]
"""`{"embed": [V, E], "layers": ..., "final_norm": [E], "lm_head": [E, V], ...}`, as `param_specs` declares them.

`layers` is either one dict of arrays, each stacked over the layers that have it (the form that `lax.scan` walks), or a
tuple of L dicts (the form whose layers are separate buffers; see `models.decoder.run_layers`).
"""

LayerWeights = Mapping[str, Leaf]
"""The weights of one layer by name: arrays, or what `matmul`, `grouped_matmul` and `mla` prepare from them."""


class Kind(enum.Enum):
    """How the forward pass reads a weight."""

    MATRIX = "matrix"  # [in, out]; multiplied by `linear` or `swiglu`
    EXPERTS = "experts"  # [X, in, out]; one matrix per expert, multiplied with the tokens routed to that expert only
    HEADS = "heads"  # [in, H * out]; one matrix per head, side by side, multiplied head by head
    TABLE = "table"  # [rows, width]; rows are looked up
    CONV = "conv"  # [tokens, channels]; a convolution over the last tokens, of each channel by itself
    NORM = "norm"  # scale of a normalization
    BIAS = "bias"  # added to the result of another weight
    VECTOR = "vector"  # anything else: attention sinks, the bias of the expert choice


# Of the names of weights with another shape than in most layers: with those of layers without a window, and with those of
# layers that read the keys of others.
FULL, WIDE = "full_", "wide_"

_PRODUCTS = frozenset({Kind.MATRIX, Kind.EXPERTS, Kind.HEADS})
_STACK_AXES = frozenset({"H", "K", "X"})


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """The declaration of one weight (of one layer): its shape, its axes, and how it is stored and read."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    """Logical axes: the axis letters of the project, "HD" for all query heads (or queries, keys and values) together, "KD"
    for all KV heads, and names for the rest."""
    parts: tuple[int, ...] = ()
    """Widths of the projections that are fused along the last axis; () for a single one."""
    initial: float | None = None
    """The value of all its elements after initialization; None: random, scaled by fan-in."""
    gated: bool = False
    """Whether it is [gate | up] and read by the fused SwiGLU kernels, which use a different packing."""
    never_quantized: str | None = None
    """For a matrix: why it stays floating point when matrices are quantized; None: it is quantized."""
    dtype: Literal["weights", "activations", "float32"] = "weights"
    """Its dtype on the device: the engine's `dtype`, that of the activations, or always float32.

    Snapshots store the first two alike.
    """
    bias_of: str | None = None
    """For a bias: the name of the weight that it belongs to."""
    per_layer: bool = False
    """Whether it is a weight of a layer, in `params["layers"]`."""

    @property
    def path(self) -> str:
        """Its path in the parameter tree, such as "embed" or "layers.qkv"."""
        return self._path_of(self.name)

    @property
    def owner_path(self) -> str:
        """The path of the weight that shares its checkpoint module: for a bias the weight it belongs to, else its own."""
        return self._path_of(self.bias_of or self.name)

    def _path_of(self, name: str) -> str:
        return f"layers.{name}" if self.per_layer else name

    @property
    def is_product(self) -> bool:
        """Whether activations are multiplied with it. Most checkpoints store such weights transposed, [out, in]."""
        return self.kind in _PRODUCTS

    @property
    def is_stack(self) -> bool:
        """Whether its first axis is heads or experts, which a checkpoint may store as separate tensors."""
        return self.axes[0] in _STACK_AXES

    @property
    def quantizable(self) -> bool:
        """Whether it becomes int8 when the engine quantizes weights."""
        return self.is_product and self.never_quantized is None


def matrix(
    name: str,
    shape: tuple[int, int],
    axes: tuple[str, str],
    *,
    parts: tuple[int, ...] = (),
    gated: bool = False,
    never_quantized: str | None = None,
    dtype: Literal["weights", "activations"] = "weights",
) -> WeightSpec:
    """A matrix [in, out]."""
    return WeightSpec(
        name=name,
        kind=Kind.MATRIX,
        shape=shape,
        axes=axes,
        parts=parts,
        gated=gated,
        never_quantized=never_quantized,
        dtype=dtype,
    )


def experts(
    name: str, shape: tuple[int, int, int], axes: tuple[str, str, str], *, parts: tuple[int, ...] = (), gated: bool = False
) -> WeightSpec:
    """A stack [X, in, out] of one matrix per expert."""
    return WeightSpec(name=name, kind=Kind.EXPERTS, shape=shape, axes=axes, parts=parts, gated=gated)


def table(name: str, shape: tuple[int, int], axes: tuple[str, str]) -> WeightSpec:
    """A table [rows, width]."""
    return WeightSpec(name=name, kind=Kind.TABLE, shape=shape, axes=axes)


def norm(name: str, shape: tuple[int, ...], axes: tuple[str, ...], *, initial: float = 1.0) -> WeightSpec:
    """The scale of a normalization; `initial` is the value with no effect."""
    return WeightSpec(name=name, kind=Kind.NORM, shape=shape, axes=axes, initial=initial, dtype="activations")


def conv(name: str, shape: tuple[int, int]) -> WeightSpec:
    """A convolution over the last `shape[0]` tokens, of each of `shape[1]` channels by itself."""
    return WeightSpec(name=name, kind=Kind.CONV, shape=shape, axes=("tokens", "channels"), dtype="activations")


def bias(of: WeightSpec) -> WeightSpec:
    """The bias of a weight, one number per output; its name is `<name>_bias`."""
    outputs = (slice(-2), slice(-1, None)) if of.is_product or of.kind is Kind.CONV else (slice(None),)  # without the inputs
    return WeightSpec(
        name=f"{of.name}_bias",
        kind=Kind.BIAS,
        shape=sum((of.shape[axes] for axes in outputs), ()),
        axes=sum((of.axes[axes] for axes in outputs), ()),
        parts=of.parts,
        initial=0.0,
        dtype="activations",
        bias_of=of.name,
    )


def vector(name: str, size: int, axis: str, *, dtype: Literal["activations", "float32"] = "activations") -> WeightSpec:
    """A learned vector that is not the bias of a weight."""
    return WeightSpec(name=name, kind=Kind.VECTOR, shape=(size,), axes=(axis,), initial=0.0, dtype=dtype)
