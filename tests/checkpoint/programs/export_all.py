"""Exports every tiny checkpoint of tests/reference whose weights are not quantized.

python -m tests.checkpoint.programs.export_all FOLDER
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from fastgen_jax.checkpoint import export_checkpoint, open_checkpoint
from tests.models.parity import folder, variants


def main(out: Path) -> None:
    """Writes FOLDER/family-variant, with the original in it, for `load_exported`."""
    for family, variant in variants():
        checkpoint = open_checkpoint(folder(family, variant))
        if checkpoint.quantization:
            continue
        export_checkpoint(out / f"{family}-{variant}", checkpoint)
        shutil.copytree(folder(family, variant), out / f"{family}-{variant}" / "original")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
