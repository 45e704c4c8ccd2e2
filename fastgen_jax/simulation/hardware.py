"""Accelerators by their data sheets, and the shapes of the models that the experiments name."""

from __future__ import annotations

from dataclasses import dataclass

from fastgen_jax.models.config import ModelConfig

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """Peak figures of one device, dense bfloat16; what of them is reached is an argument of `Roofline`."""

    name: str
    flops: float
    """Floating-point operations a second."""
    memory_bandwidth: float
    """Bytes a second."""
    memory: float
    """Bytes."""
    link_bandwidth: float
    """Bytes a second that one device can send to the others of its group."""
    link_latency: float
    """Seconds of one collective operation on a message of no size."""


# NVIDIA's data sheets (A100 80 GB SXM, H100 SXM; NVLink counted one way) and Google's TPU documentation (links of a chip,
# one way). The latencies are what collectives on small messages take in practice.
ACCELERATORS = {
    a.name: a
    for a in (
        Accelerator(
            name="a100", flops=312e12, memory_bandwidth=2039e9, memory=80 * GB, link_bandwidth=300e9, link_latency=12e-6
        ),
        Accelerator(
            name="h100", flops=989e12, memory_bandwidth=3350e9, memory=80 * GB, link_bandwidth=450e9, link_latency=10e-6
        ),
        Accelerator(
            name="v5e", flops=197e12, memory_bandwidth=819e9, memory=16 * GB, link_bandwidth=200e9, link_latency=5e-6
        ),
        Accelerator(
            name="v6e", flops=918e12, memory_bandwidth=1640e9, memory=32 * GB, link_bandwidth=448e9, link_latency=5e-6
        ),
    )
}


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
