"""Remakes `gguf/`: a tiny model of every GGUF architecture that we read, as llama.cpp's own converter writes it.

    python tests/reference/make_gguf.py .../llama.cpp        # needs torch, transformers and llama.cpp's scripts

Each architecture has ARCH.gguf (float16, no tokenizer worth the name) and ARCH.json, the config.json that it came from. The
weights are those of `gguf_values.py`.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import sentencepiece
import torch
import transformers as hf

sys.path.insert(0, str(Path(__file__).parent))
from gguf_values import values

SIZES = {
    "vocab_size": 280, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
CONFIGS = {
    "llama": hf.LlamaConfig(**SIZES, attention_bias=False),
    "qwen2": hf.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": hf.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "gemma": hf.GemmaConfig(**SIZES, head_dim=16),
    "gemma2": hf.Gemma2Config(**SIZES, head_dim=16, sliding_window=32, query_pre_attn_scalar=16),
    "gemma3": hf.Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 7}, head_dim=16, sliding_window=32,
                                  query_pre_attn_scalar=16),
    "gpt2": hf.GPT2Config(vocab_size=280, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2),
    "granite": hf.GraniteConfig(**SIZES, attention_multiplier=0.25, embedding_multiplier=3.0, residual_multiplier=0.5,
                                logits_scaling=2.0),
    "smollm3": hf.SmolLM3Config(**{**SIZES, "num_hidden_layers": 4}),
    "olmo2": hf.Olmo2Config(**SIZES),
    "phi3": hf.Phi3Config(**SIZES),
}


def main() -> None:
    """Writes every architecture."""
    converter = Path(sys.argv[1]) / "convert_hf_to_gguf.py"
    home = Path(__file__).with_name("gguf")
    home.mkdir(exist_ok=True)
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            model = hf.AutoModelForCausalLM.from_config(config).float()
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    parameter.copy_(torch.from_numpy(values(key, tuple(parameter.shape))))
            model.save_pretrained(folder)
            fields = json.loads(Path(folder, "config.json").read_text())
            if name == "gpt2":
                fields["n_ctx"] = fields["n_positions"]
            Path(folder, "config.json").write_text(json.dumps(fields))
            write_tokenizer(Path(folder))
            subprocess.run([sys.executable, converter, folder, "--outtype", "f16", "--outfile", home / f"{name}.gguf"],
                           check=True, env={**os.environ, "PYTHONPATH": str(converter.parent / "gguf-py")})
            shutil.copy(Path(folder, "config.json"), home / f"{name}.json")


def write_tokenizer(folder: Path) -> None:
    """Something that the converter accepts: the files of both kinds of tokenizer."""
    out = io.BytesIO()
    lines = ["one two three four five six seven", "eight nine ten eleven twelve"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 50), model_writer=out, vocab_size=280, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2)
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))


if __name__ == "__main__":
    main()
