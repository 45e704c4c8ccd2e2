"""Time and host memory to load checkpoints: seconds per GB, and peak memory over model bytes.

    fastgen bench loading smollm2-135m-instruct SNAPSHOT DIRECTORY ... [--dtype float32] [--cold]

Each checkpoint is loaded `--rounds` times in its own process, interleaved with the others, as plain arrays that are neither
packed nor quantized. A GB is 10^9 bytes of the loaded model. --cold drops the files from the page cache before each round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from fastgen_jax.flags import MODEL_HELP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's flags."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="number format of the loaded weights (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="loads per checkpoint (default: %(default)s)")
    parser.add_argument("--cold", action="store_true", help="load from the disk instead of the page cache")


def run(args: argparse.Namespace) -> int:
    """Prints the table and returns the exit code."""
    from fastgen_jax.checkpoint import resolve_model

    paths = [resolve_model(model) for model in args.models]
    results: dict[Path, list[dict[str, float]]] = {path: [] for path in paths}
    for _ in range(args.rounds):
        for path in paths:
            if args.cold:
                _drop_from_page_cache(path)
            done = subprocess.run([sys.executable, "-m", __name__, str(path), args.dtype], capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"loading {path} failed: {done.stderr.strip().splitlines()[-1]}")
            results[path].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'GB':>8} {'seconds':>8} {'s/GB':>6} {'peak/model':>10}  model, loaded as {args.dtype}, median of {args.rounds}")
    for path, rounds in results.items():
        seconds = statistics.median(entry["seconds"] for entry in rounds)
        size, peak = rounds[0]["bytes"], max(entry["peak"] for entry in rounds)
        print(f"{size / 1e9:8.3f} {seconds:8.2f} {seconds / size * 1e9:6.2f} {peak / size:10.2f}  {path}")
    return 0


def load_once(path: str, dtype: str) -> dict[str, float]:
    """Bytes of the model, seconds to load it, and the peak growth of this process in bytes."""
    import time

    import jax

    from fastgen_jax.checkpoint import load_params, open_checkpoint

    jax.devices()  # starts the backend, which is not part of loading
    before = _resident("VmRSS")
    start = time.perf_counter()
    params = jax.block_until_ready(load_params(open_checkpoint(path), dtype=dtype, stack_layers=False))
    seconds = time.perf_counter() - start
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"bytes": size, "seconds": seconds, "peak": _resident("VmHWM") - before}


def _resident(field: str) -> int:
    """Resident bytes now (VmRSS) or at the peak (VmHWM), from Linux's /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def _drop_from_page_cache(path: Path) -> None:
    for file in [path] if path.is_file() else (file for file in path.rglob("*") if file.is_file()):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    print(json.dumps(load_once(*sys.argv[1:])))
