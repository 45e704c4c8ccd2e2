"""Prints the bits of `mixed_batch_result`, computed on a single core."""

from __future__ import annotations

import os


def main() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX creates its threads
    from tests.pallas_kernels.ragged_attention.test_invariance import mixed_batch_result

    print(mixed_batch_result().tobytes().hex())


if __name__ == "__main__":
    main()
