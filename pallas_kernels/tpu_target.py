"""The TPU that a program is lowered for, which may be one that is not present."""

from __future__ import annotations

import dataclasses

import jax

MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What kernels need to know about a kind of TPU."""

    vmem_limit: int  # bytes
    cores: int  # TensorCores per JAX device
    computes_bfloat16: bool  # in the vector unit; the others convert to float32 and back
    multiplies: tuple[str, ...] = ()  # what the matrix units multiply at up to twice the rate of bfloat16, and is used


# VMEM per core: 16 MiB on v4, 64 on TPU7x, 128 and about 96 on the others. XLA needs part of it.
DEVICES = {
    "v4": Device(vmem_limit=15 * MIB, cores=2, computes_bfloat16=False),
    "v5e": Device(vmem_limit=48 * MIB, cores=1, computes_bfloat16=False, multiplies=("int8",)),
    "v5p": Device(vmem_limit=48 * MIB, cores=2, computes_bfloat16=False),
    "v6e": Device(vmem_limit=48 * MIB, cores=1, computes_bfloat16=True, multiplies=("int8",)),
    "tpu7x": Device(vmem_limit=40 * MIB, cores=1, computes_bfloat16=True, multiplies=("fp8",)),
}
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def device_kind() -> str | None:
    """The key in `DEVICES` of the TPU that the program is lowered for; None if it is unknown."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return kind_of(getattr(device, "device_kind", None) or jax.devices()[0].device_kind)


def kind_of(name: str) -> str | None:
    """The key in `DEVICES` of the TPU that JAX calls `name`; None for anything else."""
    return _KINDS.get(name)


def multiplies(form: str) -> bool:
    """Whether the program is lowered for a TPU that multiplies two matrices of this form, "int8" or "fp8"."""
    kind = device_kind()
    return kind is not None and form in DEVICES[kind].multiplies


def device() -> Device:
    """That TPU; the smallest if it is unknown."""
    return DEVICES[device_kind() or "v4"]
