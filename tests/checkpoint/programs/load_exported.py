"""Loads the directories of `export_all` in transformers and compares logits; requires transformers and PyTorch only.

python tests/checkpoint/programs/load_exported.py FOLDER
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

TOLERANCE = 1e-4  # of the largest logit, as in tests/models


def check(folder: Path) -> str:
    """What came of a directory."""
    try:
        AutoConfig.from_pretrained(folder)
    except ValueError as error:  # an architecture whose code is in a repository
        return f"skipped: {str(error).splitlines()[0][:80]}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {name: keys for name, keys in info.items() if keys}
    if problems:
        return f"FAILED: {problems}"
    saved = np.load(folder / "expected.npz")
    with torch.no_grad():
        got = model.eval()(torch.tensor(saved["token_ids"][None])).logits[0].float().numpy()
    error = np.abs(got - saved["logits"]).max() / np.abs(saved["logits"]).max()
    return f"{'ok' if error < TOLERANCE else 'FAILED'}: {error:.1e}"


def main(folder: Path) -> int:
    """Prints a line for each directory; 1 if one failed."""
    results = {path.name: check(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    for name, result in results.items():
        print(f"{name:40} {result}")
    return int(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
