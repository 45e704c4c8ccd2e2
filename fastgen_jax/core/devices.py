"""What JAX's devices can do."""

from __future__ import annotations

from typing import Any


def multiplies_float8(device: Any) -> bool:
    """Whether `pallas_kernels.matmul` multiplies 8-bit floats on `device`: on NVIDIA GPUs of compute capability 9.0."""
    return device.platform == "gpu" and str(getattr(device, "compute_capability", "")) == "9.0"


def supports_bfloat16(device: Any) -> bool:  # a jax.Device, which type checkers do not accept as a type
    """Whether bfloat16 is a good choice on `device`: not on NVIDIA GPUs before compute capability 8.0, such as a T4 (7.5).

    Those compute bfloat16 as float32, at an eighth of the rate of float16.
    """
    capability = str(getattr(device, "compute_capability", ""))
    major = capability.partition(".")[0]
    return not (device.platform == "gpu" and major.isdecimal() and int(major) < 8)
