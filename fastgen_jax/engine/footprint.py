"""Bytes that a model needs on a device, from the declarations of its weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fastgen_jax.core import scale_bytes, stored_head_dim
from fastgen_jax.engine.sampling.state import init_state
from fastgen_jax.models.cache_groups import cache_groups
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.counts import count_params
from fastgen_jax.models.division import DIVIDED_AXES, divided
from fastgen_jax.models.params import all_specs, head_spec, layers_with, param_specs
from fastgen_jax.models.sparse import indexer_of
from fastgen_jax.models.states import state_shapes
from fastgen_jax.models.targets import adaptable
from fastgen_jax.models.weight_spec import DType, Kind, WeightSpec
from pallas_kernels.matmul import FLOAT8_BLOCK, INT4_BLOCK, INT4_ROWS

SAMPLER_COPIES = 4  # f32[R, V] arrays that the sampler holds at the same time: logits, their order, probabilities, noise


def quantization_of(
    spec: WeightSpec, quantize: str | None, *, packed: bool, num_devices: int = 1, platform: str = "cpu"
) -> str | None:
    """The format of a weight of a model that is divided over devices, in an engine with this `quantize`.

    With "int4", the head, which is sensitive, and matrices that whole blocks (on accelerators pairs of them) do not fill on
    each device have 8 bits. With "w8a8" only matrices and experts of layers round activations.
    """
    if not spec.quantizable:
        return None
    if quantize == "w8a8":
        return "w8a8" if spec.kind in (Kind.MATRIX, Kind.EXPERTS) and spec.per_layer else "int8"
    if quantize != "int4":
        return quantize
    share = num_devices if spec.axes[-2] in DIVIDED_AXES else 1
    unit = INT4_BLOCK if packed else 2 * INT4_ROWS
    return "int4" if spec.per_layer and spec.shape[-2] % (share * unit) == 0 else "int8"


def int4_bits(platform: str) -> float:
    """Bits of an int4 value with its share of the scale, which has 32 bits on a TPU and 16 elsewhere."""
    return 4 + (32 if platform == "tpu" else 16) / INT4_BLOCK


def typical_bytes(
    model: ModelConfig,
    dtype: DType,
    quantize: str | None,
    platform: str,
    *,
    kept: tuple[tuple[str, float], ...] = (),
) -> float:
    """Bytes of a typical value of a matrix in an engine with these formats; `kept` as for `weight_bytes`."""
    if kept:
        if platform == "cpu":
            return 1
        weights = weight_bytes(model, 1, jnp.dtype(dtype).itemsize, quantize=quantize, kept=kept, platform=platform)
        return weights / count_params(model)
    return jnp.dtype(dtype).itemsize if quantize is None else int4_bits(platform) / 8 if quantize == "int4" else 1


@functools.lru_cache(maxsize=64)
def weight_bytes(
    model: ModelConfig,
    num_devices: int,
    itemsize: float,
    *,
    quantize: str | None = None,
    packed: bool = False,
    kept: tuple[tuple[str, float], ...] = (),
    platform: str = "cpu",
    in_blocks: bool = False,
) -> int:
    """Bytes of the weights on one device: weights with a divided axis are divided, the others are on every device.

    `kept`: weights, by path, that have another number of bits per value, scales included. `packed`: matrices are stored for
    the native CPU kernels, so that a tied head cannot share the embedding's memory. `in_blocks`: weights of "fp8" have a
    scale for every 128 inputs.
    """
    model = divided(model, num_devices, platform)
    specs, having = param_specs(model), layers_with(model)

    def held(spec: WeightSpec, copies: int = 1) -> float:
        shares = num_devices if DIVIDED_AXES & set(spec.axes) else 1
        form = quantization_of(spec, quantize, packed=packed, num_devices=num_devices, platform=platform)
        bits = bits_per_value(spec, itemsize, form=form, kept=dict(kept), platform=platform)
        # With 8 bits, each output has a scale, which is divided like the outputs; or one for each block of its inputs.
        has_scales = spec.path not in dict(kept) and form in ("int8", "fp8", "w8a8")
        scales = 4 * math.prod(spec.shape) / spec.shape[-2] if has_scales else 0
        scales /= num_devices if spec.axes[-1] in DIVIDED_AXES else 1
        if form == "fp8" and in_blocks and spec.shape[-2] % FLOAT8_BLOCK == 0:
            scales = 4 * math.prod(spec.shape) / FLOAT8_BLOCK / shares
        return copies * (math.prod(spec.shape) * bits / 8 / shares + scales)

    layer = sum(held(spec, len(having[name])) for name, spec in specs["layers"].items())
    rest = sum(held(spec) for name, spec in specs.items() if name != "layers")
    if "lm_head" not in specs and num_devices == 1 and (quantize is not None or packed):
        rest += held(head_spec(model))  # a tied head is stored separately
    return math.ceil(layer + rest)


def adapter_bytes(model: ModelConfig, count: int, rank: int, dtype: DType) -> int:
    """Bytes of the places for `count` adapters; twice that much while one is loaded, since steps keep the old ones."""
    if not count:
        return 0
    having = layers_with(model)
    each = sum(
        len(having[name]) * rank * (spec.shape[0] * max(len(spec.parts), 1) + spec.shape[1])
        for name, spec in adaptable(model).items()
    )
    return 2 * count * each * jnp.dtype(dtype).itemsize


def bits_per_value(
    spec: WeightSpec, itemsize: float, *, form: str | None, kept: Mapping[str, float], platform: str
) -> float:
    """Bits of memory per value of a weight of this `quantization_of`, without the scales of outputs."""
    if spec.path in kept:
        return kept[spec.path]
    return 8 * itemsize if form is None else int4_bits(platform) if form == "int4" else 8


@functools.lru_cache(maxsize=64)
def largest_weight(model: ModelConfig, itemsize: float, *, kept: tuple[tuple[str, float], ...] = ()) -> int:
    """Bytes on the host of the largest weight that is loaded at once; `kept` as for `weight_bytes`.

    Those matrices have a byte for each value until they are packed. Experts are packed one by one.
    """

    def loaded(spec: WeightSpec) -> float:
        bits = dict(kept).get(spec.path)
        values = math.prod(spec.shape)
        return values * itemsize if bits is None else values * (bits / 8 if spec.kind is Kind.EXPERTS else max(bits / 8, 1))

    return math.ceil(max(map(loaded, all_specs(model).values())))


def token_bytes(model: ModelConfig, platform: str, *, kv_dtype: DType, num_devices: int = 1) -> int:
    """Bytes of the keys and values of a token in all layers, on all devices together."""
    return divided(model, num_devices).kv_bytes_per_token(**_stored(model, platform, kv_dtype))


def block_bytes(
    model: ModelConfig, platform: str, *, kv_dtype: DType, block_size: int, num_groups: int, num_devices: int = 1
) -> int:
    """Bytes of a KV block on all devices together: keys and values of all heads in the layers of a cache group."""
    own = divided(model, num_devices)
    return block_size * own.kv_row_bytes(**_stored(model, platform, kv_dtype)) * cache_groups(own, num_groups).num_rows


def _stored(model: ModelConfig, platform: str, kv_dtype: DType) -> dict[str, int]:
    """The arguments of `kv_row_bytes`."""
    return {
        "itemsize": jnp.dtype(kv_dtype).itemsize,
        "stored_head_dim": stored_head_dim(model.cache_head_dim, platform, values_in_keys=model.values_in_keys),
        "scale_bytes": scale_bytes(kv_dtype),
    }


def temporary_bytes(model: ModelConfig, num_devices: int, *, token_budget: int, max_num_seqs: int, itemsize: int) -> int:
    """An estimate of the bytes that a step needs besides its arguments; the compile check knows the real number."""
    model = divided(model, num_devices)
    h, k, d = model.num_heads, model.cache_kv_heads, model.cache_head_dim
    bytes_per_token = (
        itemsize * (4 * model.embed_dim + (2 * h + 4 * k) * d / num_devices) + 4 * 3 * model.mlp_dim / num_devices
    )
    indexer = indexer_of(model)
    if indexer is not None:
        bytes_per_token += 4 * indexer.num_chosen
    rows = min(token_budget, max_num_seqs)
    return math.ceil(token_budget * bytes_per_token + SAMPLER_COPIES * 4 * rows * model.vocab_size)


def state_bytes(model: ModelConfig, platform: str, max_num_seqs: int) -> int:
    """Bytes of what running sequences hold beside their KV blocks; 0 for most models."""
    return max_num_seqs * state_shapes(divided(model, 1, platform), platform).num_bytes


@functools.lru_cache(maxsize=64)
def sampler_bytes(model: ModelConfig, max_num_seqs: int) -> int:
    """Bytes of the tables that the sampler keeps for each sequence, on every device."""
    state = jax.eval_shape(lambda: init_state(max_num_seqs, model.vocab_size))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def size(num_bytes: float) -> str:
    """A number of bytes for people."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if num_bytes >= 1 << power:
            return f"{num_bytes / (1 << power):.1f} {unit}"
    return f"{num_bytes / 1024:.1f} KiB"
