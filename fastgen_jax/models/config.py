"""What a checkpoint says about its model, in our own words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from fastgen_jax.models.moe_config import MLAConfig, MoEConfig

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "stepped_ntk"]
LENGTH_DEPENDENT = ("dynamic", "longrope", "stepped_ntk")  # rotary scalings whose angles depend on the whole sequence

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How positions become rotation angles.

    `original_max_position` is the context length that the model was trained on; `factor` says how many times longer
    it is asked to read. The remaining fields belong to one kind each and are None or neutral for the others.
    """

    kind: RopeKind = "default"
    theta: float = 10_000.0
    dim: int | None = None  # leading numbers of a head that turn; None: all of them
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0  # llama3: wavelengths longer than original_max_position / this are stretched fully
    high_freq_factor: float = 4.0  # llama3: wavelengths shorter than original_max_position / this stay as they are
    beta_fast: float = 32.0  # yarn: dimensions that turn more often than this over the original context stay
    beta_slow: float = 1.0  # yarn: dimensions that turn less often than this are stretched fully
    attention_factor: float | None = None  # yarn, longrope: scale of cos and sin; None derives it from `factor`
    mscale: float | None = None  # yarn: with mscale_all_dim, DeepSeek's way to derive attention_factor
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: round the borders of the ramp to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: divisor of each frequency up to original_max_position
    long_factor: tuple[float, ...] = ()  # longrope: and in sequences that are longer

    def __post_init__(self) -> None:
        if self.factor < 1.0:
            raise ValueError(f"rope factor is {self.factor}; it must be at least 1.0 (1.0 leaves positions unscaled)")
        if self.kind not in ("default", "linear") and not self.original_max_position:
            raise ValueError(
                f"rope kind {self.kind!r} needs original_max_position > 0 (the context length of training); "
                f"got {self.original_max_position}"
            )
        if self.dim is not None and (self.dim < 2 or self.dim % 2):
            raise ValueError(f"rope dim is {self.dim}; rotary embeddings turn pairs, so it must be even and at least 2")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The facts of a decoder-only checkpoint: sizes and switches, nothing that an operator chooses.

    The defaults are those of Llama. A family is a setting of these fields and a table of names; see
    docs/adding-a-model.md.
    """

    family: str
    vocab_size: int  # V, rows of the embedding
    num_layers: int  # L
    embed_dim: int  # E
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    mlp_dim: int  # F
    max_context_len: int  # tokens, prompt and generated together

    # normalisation
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = False  # a bias beside the weight
    norm_offset: float = 0.0  # added to the stored weight: Gemma stores weight - 1
    norm_placement: Literal["input", "output", "both", "residual"] = "input"  # of attention and MLP; see decoder.py
    final_norm: bool = True
    embed_norm: bool = False  # on the embeddings, before the first layer
    parallel_residual: bool = False  # attention and MLP read the same x and are added to it together
    shared_norm: bool = False  # with parallel_residual: the MLP reads what the attention reads

    # embedding and head
    embed_proj_dim: int | None = None  # width of the embedding where it is not E: projected in and out
    embed_multiplier: float = 1.0
    learned_positions: int = 0  # rows of the table of position embeddings; 0: there is none
    position_offset: int = 0  # row of position 0 in that table
    tie_embeddings: bool = False
    head_bias: bool = False
    logits_multiplier: float = 1.0
    logits_soft_cap: float | None = None  # logits become cap * tanh(logits / cap)
    residual_multiplier: float = 1.0  # of what attention and MLP add to x

    # attention
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "per_head", "row"] | None = None  # one weight [D]; one a head [H, D]; over all heads [H*D]
    qk_norm_bias: bool = False
    attention_scale: float | None = None  # of the dot products; None: 1 / sqrt(D)
    attention_soft_cap: float | None = None
    alibi_slopes: tuple[float, ...] = ()  # one a head; (): no ALiBi (arXiv:2108.12409)
    rope: RopeConfig | None = field(default_factory=RopeConfig)  # None: no rotary embedding at all
    layer_ropes: tuple[RopeConfig | None, ...] = ()  # one a layer where they differ; (): `rope` everywhere
    layer_windows: tuple[int | None, ...] = ()  # tokens that each layer looks back on, itself included; (): all
    mla: MLAConfig | None = None  # latent attention in place of q, k and v
    attention_sinks: bool = False  # one more logit a head, learned, that takes probability and carries no value
    logn_length: int | None = None  # queries at position p are scaled by log(p + 1) / log(this), at least 1

    # MLP
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    mlp_gated: bool = True  # act(x @ gate) * (x @ up), else act(x @ up)
    mlp_bias: bool = False
    moe: MoEConfig | None = None  # experts in place of the MLP, in some layers or all

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "num_layers",
            "embed_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
            "max_context_len",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a model needs at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                f"every KV head serves the same number of query heads"
            )
        for name in ("layer_ropes", "layer_windows"):
            if len(getattr(self, name)) not in (0, self.num_layers):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries; it needs one for each of the "
                    f"{self.num_layers} layers, or none"
                )
        if len(self.alibi_slopes) not in (0, self.num_heads):
            raise ValueError(f"alibi_slopes has {len(self.alibi_slopes)} entries for {self.num_heads} heads")
        if len({rope.dim for rope in self.ropes}) > 1:
            raise ValueError("the layers rotate different numbers of dimensions; one rope dim serves all layers")
        for rope in self.ropes:
            if (rope.dim or self.head_dim) % 2:
                raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings turn pairs, so it must be even")
            if rope.dim is not None and rope.dim > self.head_dim:
                raise ValueError(f"rope dim {rope.dim} exceeds head_dim {self.head_dim}")

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotary embeddings that some layer uses, each once."""
        return tuple(dict.fromkeys(rope for rope in self.layer_ropes or (self.rope,) if rope is not None))

    @property
    def rope_depends_on_length(self) -> bool:
        """Whether the keys of a prefix depend on how long the sequence is, so that they cannot be shared."""
        return any(rope.kind in LENGTH_DEPENDENT for rope in self.ropes)

    @property
    def fused_swiglu(self) -> bool:
        """Whether the gated MLP is exactly the one that `pallas_kernels.matmul.swiglu` computes."""
        return self.mlp_gated and self.activation == "silu" and not self.mlp_bias

    def kv_bytes_per_token(self, itemsize: int, *, stored_head_dim: int | None = None, scale_bytes: int = 0) -> int:
        """Bytes of K and V that a token keeps in all layers, at `itemsize` bytes a number and `scale_bytes` a head."""
        a_head = (stored_head_dim or self.head_dim) * itemsize + scale_bytes
        return 2 * self.num_layers * self.num_kv_heads * a_head


def same_for_all(values: Sequence[T]) -> bool:
    """Whether every layer has the same setting, so that it need not be looked up by layer."""
    return all(value == values[0] for value in values)
