"""Prints what JAX finds on this machine, one JSON object per line. A process of its own, because JAX may hang or crash."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def devices() -> dict[str, Any]:
    """The devices that JAX uses by default, with their memory, after a computation on each; packages that do not fit."""
    # Only in this process: JAX would reserve most of a GPU's memory, which another program may be using.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp

    from fastgen_jax.core.environment import environment_problems
    from fastgen_jax.engine.memory import available
    from pallas_kernels.matmul import int4_kernel

    found, problems = [], environment_problems()
    for device in jax.local_devices():
        stats = (device.memory_stats() or {}) if device.platform != "cpu" else {}
        ones = jax.device_put(jnp.ones((128, 128), jnp.float32), device)
        works = float((ones @ ones)[0, 0]) == 128
        found.append(
            {
                "kind": device.device_kind,
                "platform": device.platform,
                "memory_bytes": stats.get("bytes_limit"),
                "used_bytes": stats.get("bytes_in_use"),
                "works": works,
                "int4": int4_kernel(device) is not None,
            }
        )
    return {"backend": jax.default_backend(), "devices": found, "free_host_bytes": available(), "package_problems": problems}


def kernels() -> dict[str, Any]:
    """Whether the C++ kernels for the CPU can be used, the compiler for them, and those that are built."""
    from pallas_kernels import native
    from pallas_kernels.native.loader import library_folder

    built = sorted({path.name.rpartition("-")[0] for path in library_folder().glob("*.so")})
    return {"unavailable": native.unavailable_reason(), "built": built, "origin": native.origin()}


def main(name: str) -> None:
    """Prints the result of one look, or the error that it ended with."""
    look = {"devices": devices, "kernels": kernels}[name]
    try:
        result = look()
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
