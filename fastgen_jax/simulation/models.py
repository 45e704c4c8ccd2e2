"""The shapes of the models that experiments refer to by name."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig


def _llama(
    *,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    vocab: int = 32_000,
    context: int = 4096,
    head_dim: int = 128,
    tied: bool = False,
) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=vocab,
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp,
        max_context_len=context,
        tie_embeddings=tied,
    )


MODELS = {
    "llama-2-7b": _llama(layers=32, width=4096, heads=32, kv_heads=32, mlp=11008),
    "llama-2-13b": _llama(layers=40, width=5120, heads=40, kv_heads=40, mlp=13824),
    "llama-2-70b": _llama(layers=80, width=8192, heads=64, kv_heads=8, mlp=28672),
    "llama-3.1-8b": _llama(layers=32, width=4096, heads=32, kv_heads=8, mlp=14336, vocab=128_256, context=131_072),
    "llama-3.1-70b": _llama(layers=80, width=8192, heads=64, kv_heads=8, mlp=28672, vocab=128_256, context=131_072),
    "smollm2-135m": _llama(
        layers=30, width=576, heads=9, kv_heads=3, mlp=1536, vocab=49_152, context=8192, head_dim=64, tied=True
    ),
}
