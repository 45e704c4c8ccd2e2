"""Regenerates `vision/`: a tiny random Gemma 3 with a vision tower, and what transformers computes for real pixels.

    python tests/reference/make_vision.py PHOTO      # needs torch, transformers 5.15 and Pillow; the tests need neither

PHOTO is any picture; the one in use is Matplotlib's sample data grace_hopper.jpg, a photograph of the US Navy in the public
domain, of which a small part is kept as photo.png. `gemma3/` has a checkpoint under the names of the releases (bfloat16),
with a tokenizer, a chat template and preprocessor_config.json, and expected.npz, in float32:

    pixels       u8[side, side, 3]   what the PIL-based processor makes of photo.png, before it is scaled
    rows         f32[n, E]           the embeddings of that image
    token_ids    i64[P + N]          a conversation with two images, the second one mirrored, and the greedy answer
    logits       f32[P + N, V]

An image has more tokens than the sliding window, and the windows more than a block of the tests.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
from make_families import GEMMA, randomise
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, Gemma3ForConditionalGeneration
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

HOME = Path(__file__).parent / "vision"
SIDE, PATCH, TOKENS, WINDOW = 112, 14, 16, 12
SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
START, END, IMAGE = 5, 6, 7
NUM_GREEDY = 8
# The part of Gemma 3's template that concerns users and models, in our words.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PREPROCESSOR = {
    "image_processor_type": "Gemma3ImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_pan_and_scan": None,
    "image_mean": [0.5, 0.45, 0.4],
    "image_std": [0.5, 0.55, 0.45],
    "rescale_factor": 0.00392156862745098,
    "resample": 2,
    "size": {"height": SIDE, "width": SIDE},
}


def tokenizer(special: tuple[str, ...] = SPECIAL) -> Tokenizer:
    """One token for each byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate((*special, *alphabet))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return made


def photo(path: Path) -> Image.Image:
    """A small part of a picture, neither square nor of the size of the tower."""
    whole = Image.open(path).convert("RGB")
    width, height = whole.size
    return whole.crop((width // 4, height // 10, 3 * width // 4, height // 2)).resize((90, 70))


def main() -> None:
    torch.manual_seed(0)
    HOME.mkdir(exist_ok=True)
    shown = photo(Path(sys.argv[1]))
    shown.save(HOME / "photo.png", optimize=True)
    text = {
        **GEMMA,
        "model_type": "gemma3_text",
        "vocab_size": len(SPECIAL) + 256,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 20,
        "max_position_embeddings": 256,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    eyes = {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": SIDE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config=eyes,
        mm_tokens_per_image=TOKENS,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").float().eval()
    randomise(model)

    folder = HOME / "gemma3"
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)  # a copy: this also rounds the scale of embeddings
    on_the_hub(folder, {"text_config": text, "vision_config": eyes})
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    made = tokenizer()
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    images = [shown, ImageOps.mirror(shown)]
    processor = Gemma3ImageProcessorPil(
        **{key: value for key, value in PREPROCESSOR.items() if key != "image_processor_type"}
    )
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(PREPROCESSOR[name])[:, None, None] for name in ("image_mean", "image_std"))
    unscaled = ((pixels[0] * std + mean) / PREPROCESSOR["rescale_factor"]).round()
    assert (unscaled * PREPROCESSOR["rescale_factor"] - mean - pixels[0] * std).abs().max() < 1e-6
    image = f"\n\n<start_of_image>{'<image_soft_token>' * TOKENS}<end_of_image>\n\n"
    prompt = f"<bos><start_of_turn>user\nThis{image}and{image}differ.<end_of_turn>\n<start_of_turn>model\n"
    ids = made.encode(prompt, add_special_tokens=False).ids
    with torch.no_grad():
        rows = model.get_image_features(pixels[:1]).pooler_output
        tokens = torch.tensor([ids])
        for _ in range(NUM_GREEDY):
            logits = compute(model, tokens, pixels)
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        logits = compute(model, tokens, pixels)
    np.savez_compressed(
        folder / "expected.npz",
        pixels=unscaled.permute(1, 2, 0).numpy().astype(np.uint8),
        rows=rows.reshape(-1, rows.shape[-1]).numpy(),
        token_ids=tokens[0].numpy(),
        logits=logits[0].float().numpy(),
    )


def compute(model: Gemma3ForConditionalGeneration, tokens: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """The logits of all tokens in one pass; those of an image attend to each other."""
    return model(tokens, pixel_values=pixels, token_type_ids=(tokens == IMAGE).long()).logits


def on_the_hub(folder: Path, parts: dict[str, dict[str, object]]) -> None:
    """Names of tensors and fields of the config as in the releases."""

    def name(new: str) -> str:
        new = new.removeprefix("model.")
        if new.startswith("vision_tower.") and not new.startswith("vision_tower.vision_model."):
            new = new.replace("vision_tower.", "vision_tower.vision_model.", 1)
        if new.startswith("lm_head"):
            return f"language_model.{new}"
        if new.startswith("language_model.") and not new.startswith(("language_model.model.", "language_model.lm_head")):
            return new.replace("language_model.", "language_model.model.", 1)
        return new

    file = folder / "model.safetensors"
    save_file({name(key): value for key, value in load_file(file).items()}, file)
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": START,
        "eoi_token_index": END,
        "image_token_index": IMAGE,
        "mm_tokens_per_image": TOKENS,
        "eos_token_id": [1, 4],
        "initializer_range": 0.02,
        **parts,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
