"""The products of `gpu_check`: weights in every form, of one matrix and of experts.

Weights are made on the device. What a product is compared with is computed from the matrices that the weights stand for, in
float32; how long it takes is compared with the memory bandwidth and the product rate that were measured before, and with the
library's product of the same shape in bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.gpu import grouped_matmul_gpu
from pallas_kernels.matmul import FLOAT8_BLOCK, Float8Weight, Int4Weight, Int8Weight, ampere, hopper, linear
from pallas_kernels.matmul.narrow import float8_rows
from pallas_kernels.matmul.weights import unscaled

LAYERS, LAYER = 2, 1
TOLERANCE = 2e-2  # of the largest number of a result: activations, weights and results have 8 bits
FORMS = ("bfloat16", "int8", "int4", "int4, 128 inputs", "int4 with offsets", "fp8", "fp8 in blocks")
NOT_ON_AMPERE = ("fp8", "fp8 in blocks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """x [rows, inputs] by a matrix [inputs, columns] of a stack of layers, or by those of experts."""

    form: str
    rows: int
    inputs: int
    columns: int
    groups: tuple[int, ...] = ()
    """Rows of each expert; none: one matrix."""

    @property
    def name(self) -> str:
        experts = f", {len(self.groups)} experts" if self.groups else ""
        return f"{self.form}, {self.rows} x {self.inputs} x {self.columns}{experts}"

    @property
    def flops(self) -> int:
        return 2 * (sum(self.groups) if self.groups else self.rows) * self.inputs * self.columns


def variants(generation: str, tiny: bool) -> list[Product]:
    """Rows that fill no tile, inputs and columns that fill none, experts without rows."""
    forms = [form for form in FORMS if generation != "ampere" or form not in NOT_ON_AMPERE]
    if tiny:
        return [
            Product(form=form, rows=5, inputs=256, columns=128)
            for form in forms
            if form in ("int8", "int4", "fp8 in blocks")
        ]
    plain = [Product(form=form, rows=rows, inputs=1920, columns=1152) for form in forms[1:] for rows in (1, 64, 200)]
    groups = (5, 0, 70, 9, 0, 130, 1)
    return plain + [Product(form=form, rows=300, inputs=768, columns=384, groups=groups) for form in forms]


def timed(generation: str, tiny: bool) -> list[Product]:
    """Gate and up of Llama-3-8B, and those of Mixtral-8x7B's experts."""
    forms = [form for form in ("int8", "int4", "fp8") if generation != "ampere" or form not in NOT_ON_AMPERE]
    if tiny:
        return [Product(form="int8", rows=4, inputs=128, columns=128)]
    plain = [Product(form=form, rows=rows, inputs=4096, columns=28672) for form in forms for rows in (64, 2048)]
    return plain + [
        Product(form=form, rows=2 * rows, inputs=4096, columns=28672, groups=(2 * rows // 8,) * 8)
        for form in ("bfloat16", "int8", "int4")
        for rows in (64, 2048)
    ]


def arguments_of(product: Product) -> tuple[jax.Array, Any]:
    """Random rows, and the weights of all layers (and experts)."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (product.rows, product.inputs), jnp.bfloat16)
    count = LAYERS * max(1, len(product.groups))
    return x, _weights(product.form, count, product.inputs, product.columns, keys)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _weights(form: str, count: int, inputs: int, columns: int, keys: jax.Array) -> Any:
    if form == "bfloat16":
        return jax.random.normal(keys[1], (count, inputs, columns), jnp.bfloat16) / 8
    if form.startswith("int4"):
        values = jax.random.bits(keys[1], (count, inputs // 2, columns), jnp.uint8)
        size = 128 if "128" in form else 32
        scales, offsets = (
            jax.random.uniform(key, (count, inputs // size, columns), jnp.float32, 0.01, 0.05).astype(dtype)
            for key, dtype in zip(keys[2:], [jnp.float32 if "offsets" in form else jnp.float16, jnp.float32], strict=True)
        )
        return Int4Weight(values=values, scales=scales, offsets=offsets if "offsets" in form else None)
    scales = jax.random.uniform(keys[2], (count, columns), jnp.float32, 0.001, 0.005)
    if form == "int8":
        return Int8Weight(values=jax.random.randint(keys[1], (count, inputs, columns), -127, 128, jnp.int8), scales=scales)
    values = jax.random.normal(keys[1], (count, columns, inputs), jnp.bfloat16).astype(jnp.float8_e4m3fn)
    if form == "fp8 in blocks":
        shape = (count, inputs // FLOAT8_BLOCK, columns)
        scales = jax.random.uniform(keys[2], shape, jnp.float32, 0.05, 0.2)
    return Float8Weight(values=values, scales=scales)


def call_of(product: Product, generation: str, interpret: Any) -> Callable[..., jax.Array]:
    """The product as used in production, or interpreted."""
    sizes, first = jnp.asarray(product.groups, jnp.int32), LAYER * len(product.groups)
    if product.groups and interpret:
        return jax.jit(lambda x, w: grouped_matmul_gpu(x, w, sizes, jnp.int32(first), interpret=interpret))
    if product.groups:
        return jax.jit(lambda x, w: grouped_matmul(x, w, sizes, first_group=first))
    if interpret:
        multiply = {"hopper": hopper.multiply, "ampere": ampere.multiply}[generation]
        return jax.jit(lambda x, w: multiply(x, w.at_layer(LAYER), interpret=interpret))
    return jax.jit(lambda x, w: linear(x, w.at_layer(LAYER), out_dtype=jnp.float32))


def difference(product: Product, generation: str, interpret: Any) -> float:
    """The largest difference from the product with the dequantized matrices, over its tolerance."""
    x, w = arguments_of(product)
    found = np.asarray(call_of(product, generation, interpret)(x, w), np.float32)
    rows = x.astype(jnp.float32)
    if isinstance(w, Float8Weight):
        rounded, factors = float8_rows(x)
        rows = rounded.astype(jnp.float32) * factors
    count = max(1, len(product.groups))
    own = jax.tree.map(lambda part: part[LAYER * count : (LAYER + 1) * count], w)
    matrices = np.asarray(_matrices(own))
    if product.groups:
        ends = np.cumsum(product.groups)
        of_row = np.searchsorted(ends, np.arange(product.rows), side="right")
        expected = np.stack(
            [
                row @ matrices[group] if group < count else np.zeros(product.columns)
                for row, group in zip(np.asarray(rows), of_row, strict=True)
            ]
        )
    else:
        expected = np.asarray(rows) @ matrices[0]
    return float(np.abs(found - expected).max() / np.abs(expected).max()) / TOLERANCE


def _matrices(w: Any) -> jax.Array:
    """float32[G, K, N]"""
    if isinstance(w, Int4Weight):
        return w.dequantize()
    if isinstance(w, Int8Weight):
        return w.values.astype(jnp.float32) * w.scales[:, None, :]
    if isinstance(w, Float8Weight):
        values = unscaled(w, w.values, w.scales)
        return values if w.in_blocks else values * w.scales[:, None, :]
    return w.astype(jnp.float32)


def weight_bytes(product: Product, w: Any) -> int:
    """Of the matrices that a product reads."""
    return sum(part.nbytes for part in jax.tree.leaves(w)) // LAYERS


def library(product: Product) -> Callable[[], jax.Array]:
    """The library's product of the same shape in bfloat16, with one matrix."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (product.rows, product.inputs), jnp.bfloat16)
    w = jax.random.normal(keys[1], (product.inputs, product.columns), jnp.bfloat16)
    multiply = jax.jit(lambda x, w: x @ w)
    return lambda: multiply(x, w)
