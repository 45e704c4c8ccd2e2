"""Loads the native library of the tests and prints whether that worked."""

from __future__ import annotations

from pallas_kernels import native
from tests.pallas_kernels.native.test_loader import PROBE, SYMBOLS

print(native.load("probe", SYMBOLS, source=PROBE))
