"""Regenerates adapters/: LoRA adapters as PEFT saves them, and the logits that PEFT and transformers compute with them.

    python tests/reference/make_adapters.py        # needs torch, transformers and peft; the tests need none of them

Each folder has adapter_config.json and adapter_model.safetensors as written by `save_pretrained`, and expected.npz with
`model`, the folder of the model beside this file, `token_ids` i64[P], and `logits` f32[P, V].
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
LENGTH = 24
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all_linear": (
        "tiny/default",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3},
            "alpha_pattern": {"v_proj": 5, "^model.layers.0.self_attn.o_proj": 2},
        },
    ),
    "one_layer": (
        "tiny/default",
        {"r": 3, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    ),
    "regex": ("tiny/biases", {"r": 2, "lora_alpha": 4, "target_modules": r".*layers\.[01]\..*(gate_proj|down_proj)"}),
    "gpt2": ("families/gpt2/default", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt_neox": ("families/gpt_neox/default", {"r": 3, "target_modules": ["query_key_value", "dense", "dense_h_to_4h"]}),
    "phi3": ("families/phi3/partial_tied", {"r": 3, "target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
    "glm4": ("families/glm4/default", {"r": 3, "target_modules": [*ATTENTION, "gate_up_proj"]}),
    "gemma4": (
        "families/gemma4/keys_as_values",
        {"r": 3, "target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"], "alpha_pattern": {"k_proj": 5}},
    ),
    "deepseek_v2": ("families/deepseek_v2/lite", {"r": 2, "target_modules": ["q_proj", "kv_a_proj_with_mqa", "o_proj"]}),
}


def make(name: str) -> None:
    """One folder of adapters/."""
    base, options = CASES[name]
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_pretrained(HERE / base, dtype=torch.float32, attn_implementation="eager").eval()
    # With these weights neither matrix is zero, so that the adapter changes something.
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    adapted = get_peft_model(model, config)
    vocab_size = model.config.vocab_size
    token_ids = np.random.default_rng(0).integers(3, vocab_size, LENGTH)
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if ".lora_" in parameter_name:
                parameter.mul_(0.7)
        logits = adapted(input_ids=torch.tensor(token_ids)[None]).logits[0].numpy()
        with adapted.disable_adapter():
            plain = adapted(input_ids=torch.tensor(token_ids)[None]).logits[0].numpy()
    assert np.abs(logits - plain).max() > 0.05, f"{name} changes too little"
    folder = HERE / "adapters" / name
    shutil.rmtree(folder, ignore_errors=True)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    saved = folder / "adapter_config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"base_model_name_or_path": base}, indent=2) + "\n")
    np.savez_compressed(folder / "expected.npz", model=base, token_ids=token_ids, logits=logits)
    print(name, f"{np.abs(logits - plain).max():.3f}")


def main() -> None:
    """All folders."""
    for name in CASES:
        make(name)


if __name__ == "__main__":
    main()
