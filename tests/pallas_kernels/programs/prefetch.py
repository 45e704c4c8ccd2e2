"""Prefetches two kernels, loads them, and prints what was compiled. With "exit": ends as soon as the compilers run."""

from __future__ import annotations

import sys
import time

from pallas_kernels import native
from pallas_kernels.native import compiler

done: list[str] = []
builds = native.prefetch(("rotary", "norm"), on_done=done.append)
if sys.argv[1:] == ["exit"]:
    while not compiler._running and not builds[0].path.done():
        time.sleep(0.01)
    sys.exit()
assert native.load("norm", {"norm": "PallasKernelsNorm"})
assert native.load("rotary", {"rotary": "PallasKernelsRotary"})
print(sorted(build.name for build in builds), sorted(done), native.prefetch(("rotary", "norm")))
