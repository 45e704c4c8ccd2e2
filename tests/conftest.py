"""Settings for all tests: no network, one persistent compile cache, checked shapes, strict promotion, warnings as errors."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a shell; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("FASTGEN_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "fastgen_jax"))

import jax

from tests import shape_checks

shape_checks.install()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def fast_compilation() -> Iterator[None]:
    """Compiles in a third less time, for tests to which it does not matter how a program computes its results."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection() -> None:
    """Programs are kept from the beginning, and not from the first engine on. (The controller of xdist collects nothing.)"""
    from fastgen_jax.engine import compile_cache

    compile_cache.use(None, "tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--run-slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --run-slow"))


@pytest.fixture
def without_jax_cache():
    """JAX without its persistent cache: programs that come from there cannot be saved by `engine.executables`."""
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
