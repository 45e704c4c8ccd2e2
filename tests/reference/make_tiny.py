"""Regenerates the tiny random Llama checkpoints under `tiny/` and the logits that transformers computes for them.

    python tests/reference/make_tiny.py        # needs torch and transformers; the tests need neither

Each variant has a config.json and model.safetensors as written by `save_pretrained`, and expected.npz with
`token_ids` i64[P], `logits` f32[P, V] of the whole prompt in one pass, `greedy` i64[N], the tokens that follow, and
`greedy_logits` f32[N - 1, V], the logits after each of these except the last, computed with transformers' cache.
The prompt is longer than the `original_max_position_embeddings` of the scaled variants, so that scaling has an effect.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
VARIANTS = {
    "default": {},
    "multi_head_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "three_groups_wide_head": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "rope_linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "rope_dynamic": {
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
    "rope_llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "rope_yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "rope_longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 1.5, 2.0, 4.0],
            "original_max_position_embeddings": 32,
        },
    },
}
PROMPT_LENGTH = 75
NUM_GREEDY = 16


def main() -> None:
    """Writes every variant."""
    home = Path(__file__).parent / "tiny"
    for name, changes in VARIANTS.items():
        torch.manual_seed(0)
        config = LlamaConfig(**{**BASE, **changes})
        config._attn_implementation = "eager"
        model = LlamaForCausalLM(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # with the default 0.02, logits would be too flat to reveal errors
                parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 2 else 0.1))
                if parameter.ndim == 1:
                    parameter += 1.0
        model.save_pretrained(home / name)
        (home / name / "generation_config.json").unlink(missing_ok=True)
        token_ids = torch.randint(3, config.vocab_size, (PROMPT_LENGTH,))
        with torch.no_grad():
            logits = model(token_ids[None]).logits[0]
            tokens, cache = token_ids[None], None
            greedy, rows = [], []
            for _ in range(NUM_GREEDY):
                out = model(tokens, past_key_values=cache, use_cache=True)
                cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
                greedy.append(int(tokens))
                rows.append(out.logits[0, -1])
        np.savez_compressed(
            home / name / "expected.npz",
            token_ids=token_ids.numpy(),
            logits=logits.numpy(),
            greedy=np.array(greedy),
            greedy_logits=torch.stack(rows[1:]).numpy(),
        )
        print(
            f"{name}: {sum(f.stat().st_size for f in (home / name).iterdir()) / 1024:.0f} KiB, "
            f"logits in [{logits.min():.1f}, {logits.max():.1f}]"
        )


if __name__ == "__main__":
    main()
