"""`fastgen cache`: lists what is kept between runs, where, and its size; or removes it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from fastgen_jax.cli.parser import Options

KINDS = {
    "programs": "compiled programs",
    "measurements": "measured step sizes, times of starts, KV cache sizes and number formats",
    "native": "C++ kernels built for this CPU",
    "models": "downloaded models",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument(
        "--clear",
        nargs="*",
        choices=tuple(KINDS),
        metavar="KIND",
        help=f"remove these kinds ({', '.join(KINDS)}); default: all but models",
    )


def run(options: Options) -> int:
    """Prints folders, sizes and measurements, or removes some, and returns the exit code."""
    places = _places()
    if options["clear"] is not None:
        for kind in options["clear"] or [kind for kind in KINDS if kind != "models"]:
            size = sum(map(_size, places[kind]))
            for path in places[kind]:
                _remove(path)
            print(f"removed {KINDS[kind]}: {_megabytes(size)}")
        return 0
    for kind, paths in places.items():
        folder = paths[0].parent if kind == "measurements" and paths else (paths or [None])[0]
        print(f"{kind:13} {_megabytes(sum(map(_size, paths))):>10}  {folder or 'not kept'}")
    from fastgen_jax.engine import ladder

    known = ladder.known()
    if known:
        print("\nmeasured step sizes (remeasure=True or --remeasure measures them again):")
        for m in sorted(known, key=lambda m: m.when):
            print(f"  {m.model}; {m.machine}; {m.versions}; {m.when}")
            times = ", ".join(
                f"{tokens}{'*' if tokens in m.ladder else ''}: {1e3 * cost:.1f} ms" for tokens, cost in m.seconds.items()
            )
            print(f"    {times}   (tokens per step; * has a compiled program)")
    return 0


def _places() -> dict[str, list[Path]]:
    """The paths of each kind; none where FASTGEN_CACHE_DIR disables the cache."""
    from fastgen_jax import paths
    from fastgen_jax.engine import fit, ladder, programs, startup
    from pallas_kernels.native.loader import library_folder

    engine = [settled.path for folder in paths.engine_dirs() if (settled := paths.settle_engine(folder)) is not None]
    return {
        "programs": [folder / name for folder in engine for name in ("xla", programs.FOLDER)],
        "measurements": [
            folder / name for folder in engine for name in (ladder.FILE, startup.BLOCKS_FILE, startup.STARTS_FILE, fit.FILE)
        ],
        "native": [library_folder()],
        "models": [paths.models_dir()],
    }


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot remove {path}: {error}") from error
