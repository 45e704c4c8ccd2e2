"""Regenerates `released/logits.npz`: what transformers computes for the released configurations, scaled down.

    python tests/reference/make_released_logits.py [MODEL ...]   # needs torch and transformers 5.15; the tests need neither

A model is saved under the tensor names of transformers and loaded again with the weights of `shrunk.py`, float32, eager
attention. Kept are the logits of a few rows of a prompt.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from shrunk import ROWS, prompt, random_tensor, shrunk
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

RELEASED = Path(__file__).with_name("released")
_PUBLISHED = {"backbone.embedding.weight": "backbone.embeddings.weight"}  # by the names that transformers 5 gives them
_OF_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def of_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """A shrunk config in the terms of transformers, for releases that are older than its implementation of the family."""
    model_type = config["model_type"]
    if model_type == "RefinedWeb":
        renamed = {"num_kv_heads": config["n_head_kv"], "new_decoder_architecture": True}
        sizes = {"num_attention_heads": config["n_head"], "num_hidden_layers": config["n_layer"]}
        return {**config, "model_type": "falcon", **renamed, **sizes}
    if model_type == "stablelm_epoch":
        renamed = {"layer_norm_eps": config["norm_eps"], "partial_rotary_factor": config["rope_pct"]}
        return {**config, "model_type": "stablelm", **renamed}
    if model_type == "minimax_m2":
        return {**config, "partial_rotary_factor": config["rotary_dim"] / config["head_dim"]}
    if model_type == "phimoe":  # it never uses the long factors, which its published code does beyond the trained length
        scaling = {**config["rope_scaling"], "short_factor": config["rope_scaling"]["long_factor"]}
        return {**config, "rope_scaling": {**scaling, "factor": 4.0}}
    if model_type == "kimi_k25":  # its text model
        return {**config["text_config"], "model_type": "deepseek_v3"}
    if model_type == "gemma4":
        return dict(config["text_config"])
    return {**config, "model_type": {"mimo": "qwen2", "kimi_k2": "deepseek_v3"}.get(model_type, model_type)}


def of_one_expert(name: re.Match[str], shape: tuple[int, ...], names: Iterable[str]) -> np.ndarray:
    """The matrix of one expert in the tensor that is published for all experts of a layer."""
    block, expert, part = name.groups()
    count = sum(other.startswith(f"{block}.") and other.endswith(".down_proj.weight") for other in names)
    if part == "down":
        return random_tensor(f"{block}.down_proj", (count, *shape))[int(expert)]
    both = random_tensor(f"{block}.gate_up_proj", (count, 2 * shape[0], shape[1]))[int(expert)]
    return np.split(both, 2)[part == "up"]


def logits(config: dict[str, Any]) -> np.ndarray:
    """f32[ROWS, V] of transformers."""
    fields = of_transformers(shrunk(config))
    hf = AutoConfig.for_model(fields.pop("model_type"), **fields)
    kind = AutoModelForImageTextToText if "vision_config" in fields else AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        kind.from_config(hf, dtype=torch.float32).save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        with safe_open(file, "pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        weights = {}
        for name, shape in shapes.items():
            if hf.model_type == "qwen3_5_moe" and (each := _OF_EXPERT.fullmatch(name)):
                weights[name] = torch.from_numpy(of_one_expert(each, tuple(shape), shapes))
            elif hf.model_type == "qwen3_vl_moe" and "mlp.experts." in name:  # published with the inputs first
                experts, outputs, inputs = shape
                published = torch.from_numpy(random_tensor(name, (experts, inputs, outputs)))
                weights[name] = published.transpose(1, 2).contiguous()
            else:
                weights[name] = torch.from_numpy(random_tensor(_PUBLISHED.get(name, name), tuple(shape)))
        save_file(weights, file, metadata={"format": "pt"})
        attention = "sdpa" if fields.get("alibi") else "eager"
        model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        found = model(torch.from_numpy(prompt())[None]).logits[0]
    return found[list(ROWS)].numpy()


def main() -> None:
    """Computes the models named on the command line, or all that transformers implements."""
    disable_progress_bar()
    file = RELEASED / "logits.npz"
    found = dict(np.load(file)) if file.exists() and sys.argv[1:] else {}
    for line in (RELEASED / "checkpoints.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if sys.argv[1:] and row["model"] not in sys.argv[1:]:
            continue
        try:
            found[row["model"]] = logits(row["config"])
        except (ValueError, KeyError) as error:
            print(f"{row['model']}: none ({str(error).splitlines()[0]})", flush=True)
            continue
        print(f"{row['model']}: logits of up to {np.abs(found[row['model']]).max():.1f}", flush=True)
    np.savez_compressed(file, **dict(sorted(found.items())))


if __name__ == "__main__":
    main()
