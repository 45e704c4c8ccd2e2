"""The one table of what a device can do, with the source of each row, and topologies of such devices."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pallas_kernels.matmul import Int4Kernel

GIB = 2**30
_TPU_DOCS = "https://docs.cloud.google.com/tpu/docs"


class NoCompiler(ValueError):  # noqa: N818 (says what is missing)
    """The compiler for a kind of device is not installed here; the message says how to install it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """Peak figures of one JAX device: one chip or one GPU, but half a chip of TPU7x."""

    kind: str
    platform: str
    """ "tpu" or "cuda"."""
    reported_as: tuple[str, ...]
    """What JAX calls it: its `device_kind`, or the first words of it."""
    memory_bytes: int
    memory_bytes_per_s: float
    flops_per_s: float
    """Dense bfloat16 operations per second, without sparsity."""
    link_bytes_per_s: float
    """Bytes per second that the device can send, in one direction, over all its links to devices of its kind together.

    Data sheets usually state both directions, twice as much. A slice of TPUs without wraparound uses fewer links: in a
    mesh of 2 x 2 each chip has two of its four.
    """
    all_reduce_latency_s: float
    """Seconds of an all-reduce of a message without size. An estimate, not from a data sheet."""
    source: str
    """Where the peak figures come from."""


# Memory is in GiB although most data sheets say GB: the compiler for v5e has 15.75 GiB to use, an A100 and an H100 report
# 79.1 GiB, an H200 140.4 GiB. ECC takes a sixteenth of the GDDR6 of L4 and T4.
DEVICES = {
    device.kind: device
    for device in (
        Device(
            kind="v4",
            platform="tpu",
            reported_as=("TPU v4",),
            memory_bytes=32 * GIB,
            memory_bytes_per_s=1.2e12,
            flops_per_s=275e12,
            link_bytes_per_s=300e9,  # 6 links of 50e9 in each direction
            all_reduce_latency_s=5e-6,
            source=f"{_TPU_DOCS}/v4; links: arXiv:2304.01433",
        ),
        Device(
            kind="v5e",
            platform="tpu",
            reported_as=("TPU v5 lite", "TPU v5e"),
            memory_bytes=16 * GIB,
            memory_bytes_per_s=819e9,
            flops_per_s=197e12,
            link_bytes_per_s=200e9,  # 400e9 in both directions, 4 links
            all_reduce_latency_s=5e-6,
            source=f"{_TPU_DOCS}/v5e",
        ),
        Device(
            kind="v5p",
            platform="tpu",
            reported_as=("TPU v5",),
            memory_bytes=95 * GIB,
            memory_bytes_per_s=2765e9,
            flops_per_s=459e12,
            link_bytes_per_s=600e9,  # 1200e9 in both directions, 6 links
            all_reduce_latency_s=5e-6,
            source=f"{_TPU_DOCS}/v5p",
        ),
        Device(
            kind="v6e",
            platform="tpu",
            reported_as=("TPU v6 lite", "TPU v6e"),
            memory_bytes=32 * GIB,
            memory_bytes_per_s=1638e9,
            flops_per_s=918e12,
            link_bytes_per_s=400e9,  # 800e9 in both directions, 4 links; older revisions of the page say 3584 Gbit/s
            all_reduce_latency_s=5e-6,
            source=f"{_TPU_DOCS}/v6e",
        ),
        Device(
            kind="tpu7x",
            platform="tpu",
            reported_as=("TPU7x",),
            memory_bytes=96 * GIB,
            memory_bytes_per_s=7380e9 / 2,
            flops_per_s=2307e12 / 2,
            link_bytes_per_s=300e9,  # half of a chip's 600e9; 1200e9 in both directions
            all_reduce_latency_s=5e-6,
            source=f"{_TPU_DOCS}/tpu7x, half of each figure of a chip",
        ),
        Device(
            kind="h200",
            platform="cuda",
            reported_as=("NVIDIA H200",),
            memory_bytes=141 * GIB,
            memory_bytes_per_s=4.8e12,
            flops_per_s=989e12,
            link_bytes_per_s=450e9,  # NVLink, 900e9 in both directions
            all_reduce_latency_s=10e-6,
            source="NVIDIA H200 Tensor Core GPU data sheet, H200 SXM",
        ),
        Device(
            kind="h100",
            platform="cuda",
            reported_as=("NVIDIA H100",),
            memory_bytes=80 * GIB,
            memory_bytes_per_s=3.35e12,
            flops_per_s=989e12,
            link_bytes_per_s=450e9,  # NVLink, 900e9 in both directions
            all_reduce_latency_s=10e-6,
            source="NVIDIA H100 Tensor Core GPU data sheet, H100 SXM",
        ),
        Device(
            kind="a100",
            platform="cuda",
            reported_as=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"),
            memory_bytes=80 * GIB,
            memory_bytes_per_s=2039e9,
            flops_per_s=312e12,
            link_bytes_per_s=300e9,  # NVLink, 600e9 in both directions
            all_reduce_latency_s=12e-6,
            source="NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM",
        ),
        Device(
            kind="a100-40gb",
            platform="cuda",
            reported_as=("NVIDIA A100",),
            memory_bytes=40 * GIB,
            memory_bytes_per_s=1555e9,
            flops_per_s=312e12,
            link_bytes_per_s=300e9,  # NVLink, 600e9 in both directions
            all_reduce_latency_s=12e-6,
            source="NVIDIA A100 Tensor Core GPU data sheet, A100 40GB SXM",
        ),
        Device(
            kind="l4",
            platform="cuda",
            reported_as=("NVIDIA L4",),
            memory_bytes=24 * GIB * 15 // 16,
            memory_bytes_per_s=300e9,
            flops_per_s=121e12,  # half of the figure with sparsity
            link_bytes_per_s=32e9,  # PCIe Gen4 x16, 64e9 in both directions
            all_reduce_latency_s=25e-6,
            source="NVIDIA L4 Tensor Core GPU data sheet",
        ),
        Device(
            kind="t4",
            platform="cuda",
            reported_as=("Tesla T4", "NVIDIA T4"),
            memory_bytes=16 * GIB * 15 // 16,
            memory_bytes_per_s=320e9,
            # Of float16. A T4 computes bfloat16 as float32, at an eighth of this rate.
            flops_per_s=65e12,
            link_bytes_per_s=16e9,  # PCIe Gen3 x16, 32e9 in both directions
            all_reduce_latency_s=25e-6,
            source="NVIDIA T4 Tensor Core GPU data sheet",
        ),
    )
}
FLOAT8_KINDS = ("h100", "h200", "tpu7x")
"""Kinds on which 8-bit floats are multiplied."""
INT8_KINDS = ("v5e", "v6e")
"""Kinds on which int8 is multiplied by int8."""
INT4_KERNELS: dict[str, Int4Kernel] = {
    **dict.fromkeys(("v4", "v5e", "v5p", "v6e", "tpu7x"), "tpu"),
    **dict.fromkeys(("h100", "h200"), "hopper"),
    **dict.fromkeys(("a100", "a100-40gb", "l4"), "ampere"),
}
"""Kinds with a kernel for weights of 4 bits."""
ALIASES = {"a100-80gb": "a100"}


def reported(device_kind: str) -> Device | None:
    """The row of the device that JAX calls `device_kind`, by the longest name that fits; None if the table lacks it."""
    fitting = [
        (len(name), row.kind)
        for row in DEVICES.values()
        for name in row.reported_as
        if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-"))  # an L40S is not an L4
    ]
    return DEVICES[max(fitting)[1]] if fitting else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices of one kind, connected as "2x4" or "2x2x1"."""

    name: str
    device: Device
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """JAX devices: two for each chip of TPU7x."""
        total = 2 if self.device.kind == "tpu7x" else 1
        for size in self.shape:
            total *= size
        return total


def parse_topology(name: str) -> Topology:
    """The topology called "v5e:2x4", "h100:8" and so on; ValueError lists the known kinds."""
    kind, _, shape = name.lower().partition(":")
    kind = ALIASES.get(kind, kind)
    sizes = shape.split("x") if shape else ["1"] * (2 if kind in ("v5e", "v6e") else 1)
    if kind not in DEVICES or not all(size.isdigit() and int(size) > 0 for size in sizes):
        examples = "v4:2x2x1, v5e:2x4, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1, h100:8, a100:4, l4"
        raise ValueError(f"topology is {name!r}; it must be a kind among {', '.join(DEVICES)} and a shape, as in {examples}")
    if kind in ("v4", "v5p", "tpu7x"):
        sizes += ["1"] * (3 - len(sizes))  # these are 3D tori
    return Topology(name=name, device=DEVICES[kind], shape=tuple(map(int, sizes)))
