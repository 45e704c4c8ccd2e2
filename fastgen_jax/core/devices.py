"""What JAX's devices can do."""

from __future__ import annotations

from typing import Any

from pallas_kernels import tpu_target
from pallas_kernels.jax_versions import HOPPER_PRODUCT, too_old


def multiplies_float8(device: Any) -> bool:
    """Whether `pallas_kernels.matmul` multiplies 8-bit floats on `device`: on NVIDIA GPUs of compute capability 9.0, given a
    jax that is new enough for the kernel, and on TPU7x."""
    if device.platform == "tpu":
        return _tpu_multiplies(device, "fp8")
    return (
        too_old(HOPPER_PRODUCT) is None
        and device.platform == "gpu"
        and str(getattr(device, "compute_capability", "")) == "9.0"
    )


def multiplies_int8(device: Any) -> bool:
    """Whether `pallas_kernels.matmul` multiplies int8 by int8 on `device`: on TPU v5e and v6e."""
    return device.platform == "tpu" and _tpu_multiplies(device, "int8")


def _tpu_multiplies(device: Any, form: str) -> bool:
    kind = tpu_target.kind_of(device.device_kind)
    return kind is not None and form in tpu_target.DEVICES[kind].multiplies


def supports_bfloat16(device: Any) -> bool:  # a jax.Device, which type checkers do not accept as a type
    """Whether bfloat16 is a good choice on `device`: not on NVIDIA GPUs before compute capability 8.0, such as a T4 (7.5).

    Those compute bfloat16 as float32, at an eighth of the rate of float16.
    """
    capability = str(getattr(device, "compute_capability", ""))
    major = capability.partition(".")[0]
    return not (device.platform == "gpu" and major.isdecimal() and int(major) < 8)
