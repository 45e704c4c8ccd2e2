"""C++ kernels for the CPU, compiled for this machine the first time they are used.

A kernel is one `.cc` file beside the Python module that calls it. `load` compiles it with the system's C++ compiler,
keeps the library in the user's cache folder, and registers its functions with XLA. Without a compiler everything still
runs, in plain XLA: `available()` is then False, and `unavailable_reason()` returns the reason.

Environment: `PALLAS_KERNELS_NATIVE=0` turns native kernels off, `CXX` names the compiler, `XDG_CACHE_HOME` moves the
cache.
"""

from pallas_kernels.native.loader import available, function, load, requests, unavailable_reason

__all__ = ["available", "function", "load", "requests", "unavailable_reason"]
