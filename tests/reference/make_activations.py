"""Regenerates activations.npz: every activation function without parameters, and a model with each of them.

    python tests/reference/make_activations.py        # needs torch and transformers; the tests need neither

`x` f32[N] are inputs and `NAME` f32[N] the values there. `logits/NAME` f32[P, V] are those of the checkpoint tiny/default
with `hidden_act` NAME, for the first P tokens of its prompt, of the names that do not repeat an earlier function.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2CLS, ACT2FN

HOME = Path(__file__).parent
NUM_TOKENS = 40
WITH_PARAMETERS = ("prelu", "xielu")


def main() -> None:
    """Writes the file."""
    x = torch.cat([torch.linspace(-12, 12, 481), torch.tensor([-100.0, -1e-6, 1e-6, 100.0])])
    prompt = torch.as_tensor(np.load(HOME / "tiny" / "default" / "expected.npz")["token_ids"][:NUM_TOKENS])
    saved = {"x": x.numpy()}
    for name in ACT2CLS.keys() - set(WITH_PARAMETERS):
        saved[name] = ACT2FN[name](x.clone()).numpy()
    distinct: dict[bytes, str] = {}
    for name in sorted(saved.keys() - {"x"}):
        distinct.setdefault(np.round(saved[name], 4).tobytes(), name)
    for name in distinct.values():
        config = AutoConfig.from_pretrained(HOME / "tiny" / "default")
        config.hidden_act = name
        model = AutoModelForCausalLM.from_pretrained(HOME / "tiny" / "default", config=config, dtype=torch.float32).eval()
        with torch.no_grad():
            saved[f"logits/{name}"] = model(prompt[None]).logits[0].numpy()
    np.savez_compressed(HOME / "activations.npz", **saved)
    print(sorted(distinct.values()), os.path.getsize(HOME / "activations.npz"))


if __name__ == "__main__":
    main()
