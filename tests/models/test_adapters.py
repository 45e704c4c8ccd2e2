"""Products with the change of each row's adapter, in every form of the matrices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.models.adapters import AdaptedWeight, adapted_linear, rows_of, sampled_rows
from fastgen_jax.models.columns import join_columns, split_columns
from pallas_kernels import native
from pallas_kernels.grouped_matmul import prepare as prepare_groups
from pallas_kernels.matmul import prepare

COUNT, RANK, INPUTS, WIDTHS = 3, 2, 24, (16, 8, 8)
IDS = np.array([0, 0, 0, 2, 2, 3, 3, 3, 3, 3], np.int32)  # then without an adapter, of which the last two are padding
NUM_ROWS = 8


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"x": (len(IDS), INPUTS), "w": (INPUTS, sum(WIDTHS)), "residual": (len(IDS), sum(WIDTHS))}
    made = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    made["down"] = rng.standard_normal((INPUTS, len(WIDTHS), COUNT, RANK), np.float32)
    for i, width in enumerate(WIDTHS):
        made[f"up{i}"] = rng.standard_normal((COUNT, RANK, width), np.float32)
    return made


def weight(a: dict[str, np.ndarray], *, packed: bool) -> AdaptedWeight:
    up = [a[f"up{i}"] for i in range(len(WIDTHS))]
    if not packed:
        return AdaptedWeight(
            weight=jnp.asarray(a["w"]),
            down=jnp.asarray(a["down"]),
            up=tuple(map(jnp.asarray, up)),
            rows=rows_of(jnp.asarray(IDS), COUNT),
        )
    down = a["down"].transpose(2, 0, 1, 3).reshape(COUNT, INPUTS, -1)
    return AdaptedWeight(
        weight=prepare(a["w"], platform="cpu"),
        down=prepare_groups(np.ascontiguousarray(down), platform="cpu"),
        up=tuple(prepare_groups(part, platform="cpu") for part in up),
        rows=rows_of(jnp.asarray(IDS), COUNT),
    )


@pytest.mark.parametrize(
    "packed", [False, pytest.param(True, marks=pytest.mark.skipif(not native.available(), reason="no C++ compiler"))]
)
def test_each_row_has_the_change_of_its_adapter(packed: bool):
    a = arrays()
    got = adapted_linear(
        jnp.asarray(a["x"]), weight(a, packed=packed), residual=jnp.asarray(a["residual"]), num_rows=jnp.int32(NUM_ROWS)
    )
    for row, adapter in enumerate(IDS[:NUM_ROWS]):
        want = a["x"][row] @ a["w"] + a["residual"][row]
        if adapter < COUNT:
            want = want + np.concatenate(
                [a["x"][row] @ a["down"][:, i, adapter] @ a[f"up{i}"][adapter] for i in range(len(WIDTHS))]
            )
        np.testing.assert_allclose(got[row], want, atol=2e-4)


def test_columns_that_fill_a_weight_up_are_not_changed():
    a = arrays()
    adapted = weight(a, packed=False)
    wide = dataclasses.replace(adapted, weight=jnp.pad(jnp.asarray(a["w"]), ((0, 0), (0, 5))))
    got, want = (adapted_linear(jnp.asarray(a["x"]), w) for w in (wide, adapted))
    np.testing.assert_allclose(got[:, : sum(WIDTHS)], want, atol=1e-5)  # float32 sums, in an order that the width may change
    assert not got[:, sum(WIDTHS) :].any()


def test_unused_rows_of_the_sampled_ones_have_no_adapter():
    rows = sampled_rows(jnp.asarray(IDS), jnp.asarray([2, 4, 5, 0, 0]), jnp.int32(3), COUNT)
    assert rows.ids.tolist() == [0, 2, 3, 3, 3]
    assert rows.sizes.tolist() == [1, 0, 1]


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_joining_columns_is_the_inverse_of_splitting_them(num_devices: int):
    y = jnp.arange(2.0 * sum(WIDTHS)).reshape(2, -1)
    np.testing.assert_array_equal(join_columns(split_columns(y, WIDTHS, num_devices), num_devices), y)


def test_a_product_with_adapters_has_a_derivative():
    a = arrays()
    w = weight(a, packed=False)
    slope = jax.grad(lambda x: adapted_linear(x, w).sum())(jnp.asarray(a["x"]))
    assert np.abs(slope).min() > 0
