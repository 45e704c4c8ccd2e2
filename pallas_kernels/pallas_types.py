"""Names for values of Pallas kernels that JAX has no public type for. To a type checker each of them is `Any`."""

from __future__ import annotations

from typing import Any, TypeAlias

Ref: TypeAlias = Any
"""An operand, result or buffer inside a kernel, a view of one (`ref.at[...]`), or a semaphore or barrier.

`jax.Ref` does not fit: it declares no `at`, and views and barriers are instances of private classes.
"""

Scratch: TypeAlias = Any
"""What a kernel asks for before it runs: the shape of a buffer, a semaphore or a barrier."""

Layout: TypeAlias = Any
"""How an array is spread over the registers of a GPU's threads."""
