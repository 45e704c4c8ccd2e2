"""Large memory pages under arrays: the kernel reports them, values stay, and arrays elsewhere are left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.engine.huge_pages import use_huge_pages

PAGE = 2 << 20


def bytes_in_huge_pages(array: jax.Array) -> int:
    """What Linux reports for the mapping at the array's first whole page; the ends may be in other mappings."""
    address, found = -(-array.unsafe_buffer_pointer() // PAGE) * PAGE, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            start, end = (int(part, 16) for part in name.split("-"))
            found = start <= address < end
        elif found and name == "AnonHugePages:":
            return int(rest[0]) << 10
    return 0


def test_a_large_array_is_in_huge_pages_and_keeps_its_values() -> None:
    large = jnp.arange(8 * PAGE // 4, dtype=jnp.float32)
    granted = use_huge_pages({"large": large, "small": jnp.ones(8)})
    np.testing.assert_array_equal(large, np.arange(8 * PAGE // 4, dtype=np.float32))
    if granted == 0:
        pytest.skip("this kernel grants no huge pages on request (Linux 6.1 and later do)")
    assert granted % PAGE == 0
    assert large.nbytes - PAGE <= granted <= large.nbytes, "all but the ends of the array, and nothing of the small one"
    assert bytes_in_huge_pages(large) >= granted


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is requested here anyway")
def test_nothing_is_requested_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[int, int]] = []
    monkeypatch.setattr("fastgen_jax.engine.huge_pages._advise", lambda *region: requests.append(region) or region[1])
    large = jnp.ones(4 * PAGE)
    assert use_huge_pages(large) > 0
    assert requests
    requests.clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert use_huge_pages(large) == 0
    assert not requests
