"""Regenerates `torch.bin`: a state dict pickled by PyTorch, with every number format, a shared storage and a parameter.

    python tests/reference/make_torch_bin.py       # needs torch; the tests do not

Every tensor counts up from 0, except `view`, which counts from 4.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch


def main() -> None:
    """Writes the file."""
    whole = torch.arange(12, dtype=torch.float32)
    state = OrderedDict(
        float32=torch.arange(6, dtype=torch.float32).reshape(2, 3),
        float16=torch.arange(4, dtype=torch.float16),
        bfloat16=torch.arange(6, dtype=torch.bfloat16).reshape(3, 2),
        parameter=torch.nn.Parameter(torch.arange(2, dtype=torch.float32)),
        view=whole[4:10].reshape(2, 3),
        scalar=torch.tensor(0.0),
    )
    torch.save(state, Path(__file__).with_name("torch.bin"))


if __name__ == "__main__":
    main()
