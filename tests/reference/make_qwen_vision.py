"""Regenerates `vision/qwen*/`: tiny random Qwen2-VL, 2.5-VL and 3-VL, and what transformers computes for real pixels.

    python tests/reference/make_qwen_vision.py       # needs torch, transformers 5.15 and Pillow; the tests need neither

Each folder has a checkpoint under the names of the releases (bfloat16), with a tokenizer, a chat template and
preprocessor_config.json, and expected.npz, in float32:

    patches      u8[n, 3 * p * p]    what the PIL-based processor makes of photo.png, before it is scaled, of one frame
    rows         f32[parts, n, E]    the rows of both images, those of DeepStack after those that become embeddings
    token_ids    i64[P + N]          a conversation with two images, photo.png and a small part of it, and the greedy answer
    logits       f32[P + N, V]

The photo is made smaller and its part larger. In Qwen2.5-VL, windows are cut off at the edges of the first image.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_families import LLAMA_LIKE, randomise
from make_vision import HOME, tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
START, END, IMAGE = 3, 4, 5
PATCH, MERGE, FRAMES = 4, 2, 2
NUM_GREEDY = 8
PART = (10, 5, 34, 19)  # of the photo
# The part of the templates that concerns users and models, in our words.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif 'text' in item %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SIZES = {"patch_size": PATCH, "temporal_patch_size": FRAMES, "merge_size": MERGE}
LEAST, MOST = 8 * 64, 35 * 64  # pixels; a token has 64
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    **SIZES,
    "image_mean": [0.5, 0.45, 0.4],
    "image_std": [0.5, 0.55, 0.45],
}
IDS = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 200}
EYES = {"num_heads": 3, "depth": 3, "spatial_merge_size": MERGE, "temporal_patch_size": FRAMES, "patch_size": PATCH}
TEXT = {
    **LLAMA_LIKE,
    "vocab_size": len(SPECIAL) + 256,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SECTIONS = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 1, 1]}
INTERLEAVED = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
QWEN3 = {**TEXT, "head_dim": 16, "rope_parameters": INTERLEAVED}
QWEN3_EYES = {
    **EYES,
    "hidden_size": 24,
    "intermediate_size": 36,
    "out_hidden_size": 32,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2],
}
# folder -> model_type, fields of the text model, those of the tower, and what is in config.json only
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (
        "qwen2_vl",
        {**TEXT, "rope_parameters": SECTIONS},
        {**EYES, "embed_dim": 24, "mlp_ratio": 2, "hidden_size": 32},
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {**TEXT, "rope_parameters": SECTIONS},
        {
            **EYES,
            "hidden_size": 24,
            "intermediate_size": 36,
            "out_hidden_size": 32,
            "window_size": 2 * MERGE * PATCH,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": ("qwen3_vl", QWEN3, QWEN3_EYES),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        {**QWEN3, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        {**QWEN3_EYES, "depth": 2, "deepstack_visual_indexes": [0]},
    ),
}


def main() -> None:
    for name, (kind, text, eyes) in MODELS.items():
        if not (HOME / name).exists():
            make(HOME / name, kind, text, eyes)


def make(folder: Path, kind: str, text: dict[str, Any], eyes: dict[str, Any]) -> None:
    """The checkpoint and what transformers computes with it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, text_config=copy.deepcopy(text), vision_config=dict(eyes), **IDS)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval()
    randomise(model)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    on_the_hub(folder, kind, type(model).__name__, text, eyes)
    made = tokenizer(SPECIAL)
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    with Image.open(HOME / "photo.png") as file:
        photo = file.convert("RGB")
    mean_std = {name: PREPROCESSOR[name] for name in ("image_mean", "image_std")}
    processor = Qwen2VLImageProcessorPil(**SIZES, **mean_std, size={"shortest_edge": LEAST, "longest_edge": MOST})
    found = processor([photo, photo.crop(PART)], return_tensors="pt")
    pixels, grids = found["pixel_values"], found["image_grid_thw"]
    counts = [int(grid.prod()) // MERGE**2 for grid in grids]
    images = [f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in counts]
    prompt = f"<|im_start|>user\nThis{images[0]}and{images[1]}differ.<|im_end|>\n<|im_start|>assistant\n"
    ids = made.encode(prompt, add_special_tokens=False).ids
    shown = {"pixel_values": pixels, "image_grid_thw": grids}
    with torch.no_grad():
        features = model.model.get_image_features(**shown)
        parts = [torch.cat(features.pooler_output), *(getattr(features, "deepstack_features", None) or [])]
        tokens = torch.tensor([ids])
        for _ in range(NUM_GREEDY):
            tokens = torch.cat([tokens, compute(model, tokens, shown)[:, -1:].argmax(-1)], dim=1)
        logits = compute(model, tokens, shown)
    values = pixels[: int(grids[0].prod())].reshape(-1, 3, FRAMES, PATCH * PATCH)
    mean, std = (torch.tensor(mean_std[name])[None, :, None, None] for name in ("image_mean", "image_std"))
    unscaled = ((values * std + mean) * 255).round()
    assert (unscaled / 255 - mean - values * std).abs().max() < 1e-6
    np.savez_compressed(
        folder / "expected.npz",
        patches=unscaled[:, :, 0].reshape(len(unscaled), -1).numpy().astype(np.uint8),
        rows=torch.stack(parts).numpy(),
        token_ids=tokens[0].numpy(),
        logits=logits[0].float().numpy(),
    )
    print(folder.name, len(ids), counts, made.decode(tokens[0, len(ids) :].tolist()))


def compute(model: Any, tokens: torch.Tensor, shown: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of all tokens in one pass."""
    return model(tokens, **shown, mm_token_type_ids=(tokens == IMAGE).int(), use_cache=False).logits


def on_the_hub(folder: Path, kind: str, architecture: str, text: dict[str, Any], eyes: dict[str, Any]) -> None:
    """Names of tensors and fields of the config as in the releases."""
    is_old = kind.startswith("qwen2")

    def name(new: str) -> str:
        if is_old:
            return new.removeprefix("model.") if new.startswith("model.visual.") else new.replace(".language_model.", ".")
        return new

    file = folder / "model.safetensors"
    # The experts are published with their inputs first.
    tensors = {
        key: value.transpose(1, 2).contiguous() if ".experts." in key else value for key, value in load_file(file).items()
    }
    save_file({name(key): value for key, value in tensors.items()}, file)
    fields = {name: value for name, value in text.items() if name != "rope_parameters"}
    scaling = {key: value for key, value in text["rope_parameters"].items() if key != "rope_theta"}
    if is_old:
        scaling = {"type": "mrope", "mrope_section": scaling["mrope_section"]}
    fields |= {"rope_theta": text["rope_parameters"]["rope_theta"], "rope_scaling": scaling}
    config = {
        "architectures": [architecture],
        "model_type": kind,
        **IDS,
        **(fields if is_old else {"text_config": fields, "tie_word_embeddings": False}),
        "vision_config": {
            "hidden_act": {"qwen2_vl": "quick_gelu", "qwen2_5_vl": "silu"}.get(kind, "gelu_pytorch_tanh"),
            **eyes,
        },
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    limits = (
        {"min_pixels": LEAST, "max_pixels": MOST} if is_old else {"size": {"shortest_edge": LEAST, "longest_edge": MOST}}
    )
    (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **limits}, indent=2) + "\n")
    for other in ("generation_config.json", "processor_config.json"):
        (folder / other).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
