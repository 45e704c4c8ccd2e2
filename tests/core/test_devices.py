"""What the engine chooses by the kind of device."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from fastgen_jax.core.devices import supports_bfloat16


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("gpu", "7.5", False),  # T4
        ("gpu", "8.9", True),  # L4
        ("gpu", "10.0", True),  # B200
        ("gpu", "gfx942", True),  # AMD
        ("tpu", None, True),
    ],
)
def test_nvidia_gpus_before_ampere_have_no_bfloat16(platform: str, capability: str | None, expected: bool) -> None:
    device = SimpleNamespace(platform=platform, **({} if capability is None else {"compute_capability": capability}))
    assert supports_bfloat16(device) is expected


def test_a_cpu_supports_bfloat16() -> None:
    assert supports_bfloat16(jax.devices("cpu")[0])
