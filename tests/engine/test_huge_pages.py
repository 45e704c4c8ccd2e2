"""Asking for large pages changes no value, and what does not lie in this machine's memory is left alone."""

from __future__ import annotations

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.engine.huge_pages import use_huge_pages


def test_values_stay_and_small_arrays_are_passed_over() -> None:
    large = jnp.arange(3 << 20, dtype=jnp.float32)  # 12 MiB
    granted = use_huge_pages({"large": large, "small": jnp.ones(8)})
    assert granted % (2 << 20) == 0
    assert granted <= large.nbytes
    np.testing.assert_array_equal(large, np.arange(3 << 20, dtype=np.float32))


def test_elsewhere_than_on_linux_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert use_huge_pages(jnp.ones(4 << 20)) == 0
