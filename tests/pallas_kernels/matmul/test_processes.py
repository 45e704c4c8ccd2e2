"""What depends on a fresh process: native kernels turned off, programs from JAX's persistent cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels import native

_REPOSITORY = Path(__file__).parents[3]


def _python(code: str, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(_REPOSITORY), "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_without_native_kernels_plain_xla_serves():
    code = """
import jax, numpy as np, jax.numpy as jnp
from pallas_kernels.matmul import Int8Weight, linear, prepare, quantize_int8
w = np.random.default_rng(0).standard_normal((33, 20), np.float32)
x = np.ones((3, 33), np.float32)
plain, int8 = prepare(w, platform="cpu"), prepare(w, platform="cpu", quantize="int8")
assert isinstance(plain, jax.Array) and isinstance(int8, Int8Weight)
values, scales = quantize_int8(w)
np.testing.assert_allclose(linear(jnp.asarray(x), plain), x @ w, rtol=1e-4, atol=1e-4)
np.testing.assert_allclose(linear(jnp.asarray(x), int8), x @ (values * scales), rtol=1e-4, atol=1e-4)
print("ok")
"""
    assert _python(code, PALLAS_KERNELS_NATIVE="0") == "ok"


@pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))
def test_a_program_from_the_persistent_compilation_cache_finds_the_kernel(tmp_path: Path):
    code = """
import jax, jax.monitoring, numpy as np, jax.numpy as jnp
hits = []
def count(name, **_):
    if name.endswith("cache_hits"):
        hits.append(name)
jax.monitoring.register_event_listener(count)
from pallas_kernels.matmul import linear, prepare
w = np.random.default_rng(0).standard_normal((33, 20), np.float32)
x = np.ones((3, 33), np.float32)
y = jax.jit(linear)(jnp.asarray(x), prepare(w, platform="cpu"))
np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-4)
print(len(hits) > 0)
"""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    assert _python(code, **settings) == "False"
    assert _python(code, **settings) == "True"
