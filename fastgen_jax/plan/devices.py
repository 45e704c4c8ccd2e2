"""What a device can do, by the vendors' public figures; a device is what JAX calls one."""

from __future__ import annotations

import dataclasses

GIB = 2**30


class NoCompiler(ValueError):  # noqa: N818 (what is missing)
    """The compiler for a kind of device is not installed here; the message says how to get it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """Limits of one device."""

    kind: str
    platform: str  # "tpu" or "cuda"
    memory: int  # bytes
    bandwidth: float  # bytes a second, from that memory
    flops: float  # bfloat16 operations a second
    link: float  # bytes a second that a device sends to its neighbours, all links together


ALIASES = {"a100-80gb": "a100"}

# TPU: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x, per JAX device: a v4 or v5p chip is one, half a TPU7x chip.
# NVIDIA's data sheets of the H200 SXM, H100 SXM, A100 SXM (80 and 40 GB), L4 and T4, without sparsity; NVLink or, for L4
# and T4, PCIe in one direction. ECC takes a sixteenth of the GDDR6 of L4 and T4. A T4 computes bfloat16 as float32 at an
# eighth of the rate of its tensor cores, which know float16 alone; its figure is that of these.
DEVICES = {
    device.kind: device
    for device in (
        Device(kind="v4", platform="tpu", memory=32 * GIB, bandwidth=1.228e12, flops=275e12, link=150e9),
        Device(kind="v5e", platform="tpu", memory=16 * GIB, bandwidth=0.819e12, flops=197e12, link=100e9),
        Device(kind="v5p", platform="tpu", memory=95 * GIB, bandwidth=2.765e12, flops=459e12, link=300e9),
        Device(kind="v6e", platform="tpu", memory=32 * GIB, bandwidth=1.64e12, flops=918e12, link=224e9),
        Device(kind="tpu7x", platform="tpu", memory=96 * GIB, bandwidth=3.69e12, flops=1154e12, link=300e9),
        Device(kind="h200", platform="cuda", memory=141 * GIB, bandwidth=4.8e12, flops=989e12, link=450e9),
        Device(kind="h100", platform="cuda", memory=80 * GIB, bandwidth=3.35e12, flops=989e12, link=450e9),
        Device(kind="a100", platform="cuda", memory=80 * GIB, bandwidth=2.039e12, flops=312e12, link=300e9),
        Device(kind="a100-40gb", platform="cuda", memory=40 * GIB, bandwidth=1.555e12, flops=312e12, link=300e9),
        Device(kind="l4", platform="cuda", memory=24 * GIB * 15 // 16, bandwidth=0.3e12, flops=121e12, link=32e9),
        Device(kind="t4", platform="cuda", memory=16 * GIB * 15 // 16, bandwidth=0.32e12, flops=65e12, link=16e9),
    )
}


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
    """The topology called "v5e:2x4", "h100:8" and so on; ValueError says what is known."""
    kind, _, shape = name.lower().partition(":")
    kind = ALIASES.get(kind, kind)
    sizes = shape.split("x") if shape else ["1"] * (2 if kind in ("v5e", "v6e") else 1)
    if kind not in DEVICES or not all(size.isdigit() and int(size) > 0 for size in sizes):
        examples = "v4:2x2x1, v5e:2x4, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1, h100:8, a100:4, l4"
        raise ValueError(f"topology is {name!r}; it must be a kind among {', '.join(DEVICES)} and a shape, as in {examples}")
    if kind in ("v4", "v5p", "tpu7x"):
        sizes += ["1"] * (3 - len(sizes))  # these are cubes
    return Topology(name=name, device=DEVICES[kind], shape=tuple(map(int, sizes)))
