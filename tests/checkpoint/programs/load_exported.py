"""Loads the directories of `export_all` in transformers and compares logits with those of the originals.

Requires transformers and PyTorch only.

python tests/checkpoint/programs/load_exported.py FOLDER
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText


def check(folder: Path) -> str:
    """What came of a directory."""
    try:
        AutoConfig.from_pretrained(folder)
    except ValueError as error:  # an architecture whose code is in a repository
        return f"skipped: {str(error).splitlines()[0][:80]}"
    got, problems = logits_of(folder)
    want, _ = logits_of(folder / "original")
    if problems:
        return f"FAILED: {problems}"
    return "ok" if np.array_equal(got, want) else f"FAILED: logits differ by {np.abs(got - want).max()}"


def logits_of(folder: Path) -> tuple[np.ndarray, dict[str, object]]:
    """The logits of some tokens, and what transformers found wrong with the tensors."""
    has_images = "text_config" in AutoConfig.from_pretrained(folder).to_dict()
    kind = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = kind.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    with torch.no_grad():
        logits = model.eval()(torch.arange(3, 40)[None]).logits[0].float().numpy()
    return logits, {name: keys for name, keys in info.items() if keys}


def main(folder: Path) -> int:
    """Prints a line for each directory; 1 if one failed."""
    results = {path.name: check(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    for name, result in results.items():
        print(f"{name:40} {result}")
    return int(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
