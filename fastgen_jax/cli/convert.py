"""`fastgen convert`: converts a checkpoint to an inference snapshot."""

from __future__ import annotations

import argparse
import functools

from fastgen_jax.cli.parser import Options
from fastgen_jax.flags import MODEL_HELP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="new directory for the snapshot, local or gs://")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="number format of weights that are not quantized (default: %(default)s)",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8",),
        help="quantize matrices to int8 with one scale per output channel (default: do not quantize)",
    )


def run(options: Options) -> int:
    """Runs the command and returns the exit code."""
    from fastgen_jax.checkpoint import open_checkpoint, resolve_model
    from fastgen_jax.checkpoint.convert import convert
    from fastgen_jax.checkpoint.snapshot import check_target
    from fastgen_jax.engine.weights import host_leaf

    check_target(options["out"])  # before a model is downloaded
    checkpoint = open_checkpoint(resolve_model(options["model"]))
    prepare = functools.partial(host_leaf, dtype=options["dtype"], quantize=options["quantize"])
    convert(checkpoint, options["out"], prepare=prepare, progress=True)
    print(f'wrote {options["out"]}; use it with: fastgen generate --model {options["out"]} "..."')
    return 0
