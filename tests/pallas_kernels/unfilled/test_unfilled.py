"""Arrays that are allocated and not written."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from pallas_kernels import native
from pallas_kernels.unfilled import unfilled

SHAPES = [jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((3, 5), jnp.float32)]


@pytest.fixture(params=[True, False], ids=["native", "zeros"])
def load(request, monkeypatch) -> None:
    if not request.param:
        monkeypatch.setattr(native, "load", lambda *arguments: False)


@pytest.mark.usefixtures("load")
def test_equal_shapes_are_separate_arrays_that_a_program_may_change_in_place() -> None:
    first, second = unfilled(SHAPES)
    assert first.unsafe_buffer_pointer() != second.unsafe_buffer_pointer()
    where = first.unsafe_buffer_pointer()
    filled = jax.jit(lambda x: x.at[:].set(2.0), donate_argnums=0)(first)
    assert filled.unsafe_buffer_pointer() == where
    np.testing.assert_array_equal(filled, np.full((3, 5), 2.0))
    assert first.is_deleted()
    assert not second.is_deleted()


@pytest.mark.usefixtures("load")
def test_every_dtype_of_a_cache_has_its_shape() -> None:
    shapes = [jax.ShapeDtypeStruct((4,), dtype) for dtype in (jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn, jnp.float16)]
    assert [(x.shape, x.dtype) for x in unfilled(shapes)] == [(shape.shape, shape.dtype) for shape in shapes]


@pytest.mark.skipif(not native.available(), reason="needs a native kernel")
def test_memory_is_used_only_when_it_is_written() -> None:
    size = 256 * 2**20
    before = psutil.Process().memory_info().rss
    (array,) = unfilled([jax.ShapeDtypeStruct((size,), jnp.int8)])
    array.block_until_ready()
    assert psutil.Process().memory_info().rss - before < size / 4
