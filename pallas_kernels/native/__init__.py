"""C++ kernels for the CPU: prebuilt in some wheels, otherwise compiled for this machine the first time they are used.

A kernel is one `.cc` file beside the Python module that calls it, listed in `sources`. `load` opens the library that the
wheel has for this CPU's instruction set (`isa`, `prebuilt`), or compiles the kernel with the system's C++ compiler and
keeps it in the user's cache folder, and registers its functions with XLA. Without either everything still runs, in plain
XLA: `available()` is then False, and `unavailable_reason()` returns the reason.

Environment: `PALLAS_KERNELS_NATIVE=0` turns native kernels off, `PALLAS_KERNELS_ISA` selects an instruction set, `CXX`
names the compiler, `XDG_CACHE_HOME` moves the cache.
"""

from pallas_kernels.native.loader import Build, available, function, load, origin, prefetch, requests, unavailable_reason

__all__ = ["Build", "available", "function", "load", "origin", "prefetch", "requests", "unavailable_reason"]
