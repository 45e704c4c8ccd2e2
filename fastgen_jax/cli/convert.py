"""`fastgen convert`: converts a checkpoint to an inference snapshot, or to safetensors for other programs."""

from __future__ import annotations

import argparse
import functools
from typing import TYPE_CHECKING

from fastgen_jax.cli.parser import Options
from fastgen_jax.flags import MODEL_HELP

if TYPE_CHECKING:
    from fastgen_jax.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    trained = (
        "; or maxtext:PATH or gm:PATH, an Orbax checkpoint of MaxText or of the gemma library, with --config; or "
        "easydel:PATH, the directory that EasyDeL has saved"
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP + trained)
    parser.add_argument("out", metavar="OUT", help="new directory; for a snapshot also gs://")
    parser.add_argument(
        "--format",
        choices=("snapshot", "safetensors"),
        default="snapshot",
        help="an inference snapshot, or a directory in Hugging Face's layout (default: %(default)s)",
    )
    parser.add_argument(
        "--config",
        metavar="MODEL",
        help="for maxtext: and gm:, the directory or repo id whose config.json and tokenizer the model has; for easydel:, "
        "one to use in place of those in its directory",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="number format of weights that are not quantized (default: bfloat16 for a snapshot, as stored for safetensors)",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4", "fp8", "none"),
        help="quantize the matrices of a snapshot: int8 and fp8 with one scale per output channel, int4 with one per 32 "
        "inputs; none: dequantize those of a quantized checkpoint (default: as in the checkpoint)",
    )


def run(options: Options) -> int:
    """Runs the command and returns the exit code."""
    from fastgen_jax.checkpoint import export_checkpoint
    from fastgen_jax.checkpoint.convert import convert
    from fastgen_jax.checkpoint.snapshot import check_target
    from fastgen_jax.engine.weights import kept_by_snapshot, snapshot_leaf

    out, dtype = options["out"], options["dtype"]
    if options["format"] == "safetensors" and options["quantize"] not in (None, "none"):
        raise ValueError("--quantize is for snapshots; safetensors are written in floating point: leave one of the two out")
    check_target(out)  # before a model is downloaded
    checkpoint = _open(options["model"], options["config"])
    if options["format"] == "safetensors":
        export_checkpoint(out, checkpoint, dtype=dtype, progress=True)
    else:
        quantize = None if options["quantize"] == "none" else options["quantize"]
        prepare = functools.partial(snapshot_leaf, dtype=dtype or "bfloat16", quantize=quantize)
        kept = kept_by_snapshot(checkpoint, options["quantize"])
        convert(checkpoint, out, prepare=prepare, keep_blocks=kept, quantize=quantize, progress=True)
    print(f'wrote {out}; use it with: fastgen generate --model {out} "..."')
    return 0


def _open(model: str, config: str | None) -> Checkpoint:
    from fastgen_jax.checkpoint import open_checkpoint, open_easydel, open_gemma, open_maxtext, resolve_model
    from fastgen_jax.checkpoint.hub_files import BESIDE_WEIGHTS

    trainer, separator, path = model.partition(":")
    if not separator or trainer not in ("maxtext", "gm", "easydel"):
        if config is not None:
            raise ValueError(
                "--config belongs to maxtext:PATH, gm:PATH and easydel:PATH; other checkpoints have a config of their own"
            )
        return open_checkpoint(resolve_model(model))
    if config is None and trainer == "easydel":
        return open_easydel(path)
    if config is None:
        raise ValueError(
            f"{model} requires the model's config.json and tokenizer, which {trainer} does not save: pass --config with the "
            "directory or the repo id of the model that training began with"
        )
    base = resolve_model(config, files=BESIDE_WEIGHTS)
    opened = {"maxtext": open_maxtext, "gm": open_gemma, "easydel": open_easydel}
    return opened[trainer](path, base)
