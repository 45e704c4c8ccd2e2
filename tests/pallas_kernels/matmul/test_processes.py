"""What depends on a fresh process: native kernels turned off, programs from JAX's persistent cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from pallas_kernels import native
from tests.pallas_kernels.programs.run import run


def test_without_native_kernels_plain_xla_multiplies():
    assert run("multiply", PALLAS_KERNELS_NATIVE="0") == "ArrayImpl Int8Weight"


@pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))
def test_a_program_from_the_persistent_compilation_cache_finds_the_kernel(tmp_path: Path):
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    assert run("cached_program", **settings) == "False"
    assert run("cached_program", **settings) == "True"
