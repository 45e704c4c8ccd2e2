"""Prints whether native kernels are available, or why not. The argument "no-compiler" simulates a missing compiler."""

from __future__ import annotations

import sys

from pallas_kernels import native
from pallas_kernels.native import compiler

if sys.argv[1:] == ["no-compiler"]:
    compiler._candidates = list
print(native.available(), native.unavailable_reason())
