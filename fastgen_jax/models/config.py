"""What a checkpoint says about its model, in our own words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How positions become rotation angles.

    `original_max_position` is the context length that the model was trained on; `factor` says how many times longer
    it is asked to read. The remaining fields belong to one kind each and are None or neutral for the others.
    """

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0  # llama3: wavelengths longer than original_max_position / this are stretched fully
    high_freq_factor: float = 4.0  # llama3: wavelengths shorter than original_max_position / this stay as they are
    beta_fast: float = 32.0  # yarn: dimensions that turn more often than this over the original context stay
    beta_slow: float = 1.0  # yarn: dimensions that turn less often than this are stretched fully
    attention_factor: float | None = None  # yarn: scale of cos and sin; None derives it from `factor`
    mscale: float | None = None  # yarn: with mscale_all_dim, DeepSeek's way to derive attention_factor
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: round the borders of the ramp to whole dimensions

    def __post_init__(self) -> None:
        if self.factor < 1.0:
            raise ValueError(f"rope factor is {self.factor}; it must be at least 1.0 (1.0 leaves positions unscaled)")
        if self.kind in ("dynamic", "llama3", "yarn") and not self.original_max_position:
            raise ValueError(
                f"rope kind {self.kind!r} needs original_max_position > 0 (the context length of training); "
                f"got {self.original_max_position}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The facts of a decoder-only checkpoint: sizes and switches, nothing that an operator chooses."""

    family: str
    vocab_size: int  # V, rows of the embedding
    num_layers: int  # L
    embed_dim: int  # E
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    mlp_dim: int  # F
    max_context_len: int  # tokens, prompt and generated together
    norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    attention_bias: bool = False  # biases on q, k, v and o
    mlp_bias: bool = False  # biases on gate, up and down
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
                     "max_context_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a model needs at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                f"every KV head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings turn pairs, so it must be even")

    @property
    def num_params(self) -> int:
        """Parameters of the model, counting a tied embedding once."""
        from fastgen_jax.models.params import count_params

        return count_params(self)

    def flops_per_token(self, *, context_len: int = 0, sampled: bool = True) -> float:
        """Floating-point operations of one token: the matrix products, its attention, and its row of logits."""
        e, d = self.embed_dim, self.head_dim
        per_layer = e * (self.num_heads + 2 * self.num_kv_heads) * d + self.num_heads * d * e + 3 * e * self.mlp_dim
        attention = 2 * context_len * self.num_heads * d
        head = e * self.vocab_size if sampled else 0
        return 2.0 * (self.num_layers * (per_layer + attention) + head)

    def kv_bytes_per_token(self, itemsize: int, *, stored_head_dim: int | None = None) -> int:
        """Bytes of K and V that a token keeps in all layers, at `itemsize` bytes a number."""
        return 2 * self.num_layers * self.num_kv_heads * (stored_head_dim or self.head_dim) * itemsize
