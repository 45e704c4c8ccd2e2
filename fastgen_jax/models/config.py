"""The architecture of a model, as its checkpoint describes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from fastgen_jax.models.moe_config import Activation, MLAConfig, MoEConfig
from fastgen_jax.models.state_config import StateConfig
from fastgen_jax.models.stream_config import AltUp, LayerInputs

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "stepped_ntk"]
LENGTH_DEPENDENT = ("dynamic", "longrope", "stepped_ntk")  # rotary scalings whose angles depend on the whole sequence

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How positions become rotation angles.

    `original_max_position` is the context length that the model was trained on; `factor` is by how much it is extended.
    Each of the remaining fields belongs to one kind and is None or neutral for the others.
    """

    kind: RopeKind = "default"
    theta: float = 10_000.0
    dim: int | None = None  # leading dimensions of a head that are rotated; None: all
    sections: tuple[int, ...] = ()  # pairs rotated by time, row and column in images (M-RoPE, arXiv:2409.12191); (): by time
    sections_interleaved: bool = False  # these pairs alternate, instead of following one another
    unrotated: int = 0  # the last pairs of these dimensions, which have a frequency of 0
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0  # llama3: wavelengths longer than original_max_position / this are stretched in full
    high_freq_factor: float = 4.0  # llama3: wavelengths shorter than original_max_position / this are kept
    beta_fast: float = 32.0  # yarn: dimensions with more rotations than this over the original context are kept
    beta_slow: float = 1.0  # yarn: dimensions with fewer rotations than this are stretched by the full factor
    attention_factor: float | None = None  # yarn, longrope: scale of cos and sin; None derives it from `factor`
    mscale: float | None = None  # yarn: with mscale_all_dim, DeepSeek's rule for attention_factor
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: round the ends of the ramp to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: divisor of each frequency up to original_max_position
    long_factor: tuple[float, ...] = ()  # longrope: the same for longer sequences

    def __post_init__(self) -> None:
        if self.factor < 1.0:
            raise ValueError(f"rope factor is {self.factor}; it must be at least 1.0 (1.0 leaves positions unscaled)")
        if self.kind not in ("default", "linear") and not self.original_max_position:
            raise ValueError(
                f"rope kind {self.kind!r} needs original_max_position > 0 (the context length of training); "
                f"got {self.original_max_position}"
            )
        if self.dim is not None and (self.dim < 2 or self.dim % 2):
            raise ValueError(f"rope dim is {self.dim}; rotary embeddings rotate pairs, so it must be even and at least 2")


@dataclass(frozen=True, kw_only=True)
class QueryGrowth:
    """Queries at position p are scaled by 1 + weight * log(1 + (p + first) // length)."""

    weight: float
    length: int  # tokens
    first: int = 0  # number of the first position: 0 or 1
    unrotated_only: bool = False  # only in layers without rotary embedding


@dataclass(frozen=True, kw_only=True)
class FullHeads:
    """Key and value heads of layers that attend to all tokens."""

    num_kv_heads: int
    head_dim: int
    keys_are_values: bool = False  # as in `ModelConfig`
    num_devices: int = 1  # that the heads of all layers are divided over


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of a decoder-only model: what the checkpoint fixes, and nothing that an operator chooses.

    The defaults are those of Llama. A model family sets these fields and names its weights; see docs/adding-a-model.md.
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
    embed_columns: int | None = None  # of the embedding, if there are more than E: zeros that are not used

    # normalization
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_scale: bool = True  # norms have a scale
    norm_bias: bool = False  # norms have a bias as well
    norm_offset: float = 0.0  # added to the stored scale: Gemma and Nemotron store scale - 1
    norm_placement: Literal["input", "output", "both", "residual"] = "input"  # of attention and MLP; see decoder.py
    final_norm: bool = True
    embed_norm: bool = False  # on the embeddings, before the first layer
    parallel_residual: bool = False  # attention and MLP read the same x, and both are added to it
    shared_norm: bool = False  # with parallel_residual: the MLP reads the same normalized x as attention

    # embedding and head
    embed_proj_dim: int | None = None  # width of the embedding if it is not E; it is then projected in and out
    embed_multiplier: float = 1.0
    learned_positions: int = 0  # rows of the table of position embeddings; 0: no table
    position_offset: int = 0  # row of position 0 in that table
    tie_embeddings: bool = False
    not_predicted: int = 0  # rows of the embedding after those of the vocabulary, for tokens without logits
    head_bias: bool = False
    logits_multiplier: float = 1.0
    logits_soft_cap: float | None = None  # logits become cap * tanh(logits / cap)
    residual_multiplier: float = 1.0  # scales what attention and MLP add to x
    laurel_rank: int = 0  # of a low-rank residual beside attention; 0: none (see streams.py)
    layer_scale: bool = False  # what a layer returns is multiplied by a learned number
    altup: AltUp | None = None  # several residual streams
    layer_inputs: LayerInputs | None = None  # an embedding of each token for each layer
    exceeds_float16: bool = False  # activations grow beyond 65,504: the residual stream needs a wider dtype

    # attention
    qkv_bias: bool = False
    o_bias: bool = False
    # scale [D] shared by heads; [H, D]; over all heads [H*D]; no scale, after the rotation and only in layers that rotate
    qk_norm: Literal["head", "per_head", "row", "unit"] | None = None
    qk_norm_bias: bool = False
    qk_norm_rotated: bool = False  # these norms follow the rotary embedding
    keys_are_values: bool = False  # one projection for both; what follows it is not the same
    v_norm: bool = False  # values are normalized too, per head and without a scale
    clip_qkv: float | None = None  # queries, keys and values are clipped to [-this, this], after their norms
    attention_scale: float | None = None  # of the dot products; None: 1 / sqrt(D)
    attention_scale_by_layer: bool = False  # the scale of layer i, counted from 0, is also divided by i + 1
    attention_soft_cap: float | None = None
    alibi_slopes: tuple[float, ...] = ()  # one per head; (): no ALiBi (arXiv:2108.12409)
    rope: RopeConfig | None = field(default_factory=RopeConfig)  # None: no rotary embedding
    layer_ropes: tuple[RopeConfig | None, ...] = ()  # one per layer if layers differ; (): `rope` for all
    layer_windows: tuple[int | None, ...] = ()  # sliding window per layer, in tokens; (): no windows
    window_chunks: bool = False  # windows of w tokens do not slide: position p sees [p // w * w, p]
    mla: MLAConfig | None = None  # multi-head latent attention instead of q, k and v
    attention_sinks: bool = False  # one learned logit per head that receives probability but has no value
    query_growth: QueryGrowth | None = None  # queries are scaled by position
    logn_length: int | None = None  # queries at position p are scaled by log(p + 1) / log(this), at least 1
    attention_multiplier: float = 1.0  # of the input of the output projection
    full_heads: FullHeads | None = None  # heads of layers without a window, where they differ from the others
    attention_gate: bool = False  # the output of attention is scaled by a sigmoid of the input, before its projection
    attention_layers: tuple[int, ...] | None = None  # the layers that have attention; None: all
    kv_sources: tuple[int, ...] = ()  # the layer whose keys and values each layer reads; (): its own

    # state
    state: StateConfig | None = None  # a state of fixed size in some layers, instead of attention or beside it

    # MLP
    activation: Activation = "silu"
    mlp_gated: bool = True  # act(x @ gate) * (x @ up), else act(x @ up)
    mlp_bias: bool = False
    reader_mlp_dim: int | None = None  # F of layers that read the keys and values of others; None: mlp_dim
    mlp_multipliers: tuple[float, float] | None = None  # of the gate before its activation, and of the hidden units
    # standard deviations above their mean from which gates count, what is below is 0; None: all (see mlp.py)
    gate_cutoffs: tuple[float | None, ...] = ()  # one per layer; (): none
    moe: MoEConfig | None = None  # mixture of experts instead of the MLP, in some or all layers
    mlp_layers: tuple[int, ...] | None = None  # the layers that have an MLP or experts; None: all

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
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                f"every KV head must serve the same number of query heads"
            )
        if self.clip_qkv is not None and self.clip_qkv <= 0:
            raise ValueError(f"clip_qkv is {self.clip_qkv}; it must be positive, or None for no clipping")
        for name in ("layer_ropes", "layer_windows", "kv_sources", "gate_cutoffs"):
            if len(getattr(self, name)) not in (0, self.num_layers):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries; it needs one for each of the "
                    f"{self.num_layers} layers, or none"
                )
        for layer, source in enumerate(self.kv_sources):
            windows = self.layer_windows or (None,) * self.num_layers
            if source > layer or self.kv_sources[source] != source or windows[source] != windows[layer]:
                raise ValueError(
                    f"kv_sources[{layer}] is {source}; a layer reads its own keys and values or those of an earlier layer "
                    "that has its own, with the same window"
                )
        if self.v_norm and self.qk_norm != "head":
            raise ValueError(f"v_norm is set, but qk_norm is {self.qk_norm!r}; values are normalized beside keys: 'head'")
        if self.altup is not None and self.layer_inputs is None:
            raise ValueError("altup is set, but layer_inputs is None; several streams without inputs are not supported")
        if self.attention_layers is not None and self.layer_windows:
            raise ValueError(
                "layer_windows is set, but some layers have no attention; windows beside states are not supported"
            )
        if not self.kv_layers:
            raise ValueError(
                "no layer has attention; models that keep nothing but states are not supported, because the engine counts "
                "the length of a sequence in blocks of keys and values"
            )
        if len(self.alibi_slopes) not in (0, self.num_heads):
            raise ValueError(
                f"alibi_slopes has {len(self.alibi_slopes)} entries; it needs one for each of the "
                f"{self.num_heads} heads, or none"
            )
        if self.full_heads is not None and any(self.cache_kv_heads % heads for heads in self._heads_of_rows()):
            raise ValueError(
                f"layers have {self.num_kv_heads} KV heads of {self.head_dim} numbers, and those that attend to all tokens "
                f"{self.full_heads.num_kv_heads} of {self.full_heads.head_dim}; in a cache for heads of "
                f"{self.cache_head_dim}, layers of one kind must take a multiple of what the others take"
            )
        if len({rope.dim for rope in self.ropes}) > 1 and self.full_heads is None:
            dims = sorted(rope.dim or self.head_dim for rope in self.ropes)
            raise ValueError(f"the layers have rope dims {dims}; all layers must rotate the same number of dimensions")
        for rope in self.ropes:
            if (rope.dim or self.head_dim) % 2:
                raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings rotate pairs, so it must be even")
            if rope.dim is not None and rope.dim > self.cache_head_dim:
                raise ValueError(f"rope dim is {rope.dim}; it must be at most head_dim={self.cache_head_dim}")

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """The layers with keys and values of their own, in the order of these in the cache."""
        if self.kv_sources:
            return tuple(layer for layer, source in enumerate(self.kv_sources) if layer == source)
        return self.attending_layers

    @property
    def attending_layers(self) -> tuple[int, ...]:
        """The layers with attention."""
        return tuple(range(self.num_layers)) if self.attention_layers is None else self.attention_layers

    @property
    def cache_kv_heads(self) -> int:
        """KV heads for which a row of the cache has room; see `cache_rows`."""
        return self.num_kv_heads if self.full_heads is None else max(self._heads_of_rows())

    @property
    def cache_head_dim(self) -> int:
        """The largest size of a head."""
        return self.head_dim if self.full_heads is None else max(self.head_dim, self.full_heads.head_dim)

    @property
    def values_in_keys(self) -> bool:
        """Whether values are the first numbers of their keys, so that the cache has no others; see `mla`."""
        return self.mla is not None and self.mla.indexer is None

    def heads_side_by_side(self, layer: int) -> int:
        """How many heads of a layer lie in one head of the cache; see `cache_rows`."""
        if self.full_heads is None:
            return 1
        own = self.of_layer(layer)
        return self._side_by_side(own.num_kv_heads, own.head_dim)

    def layers_sharing_row(self, layer: int) -> int:
        """How many layers of the kind of a layer share a row of the cache; see `cache_rows`."""
        if self.full_heads is None:
            return 1
        return self.cache_kv_heads // self._heads_of_rows()[self.is_full(layer)]

    def _heads_of_rows(self) -> tuple[int, int]:
        """How many heads of the cache a layer with a window takes, and one without."""
        full = self.full_heads
        assert full is not None, "the layers have heads of two sizes"
        kinds = ((self.num_kv_heads, self.head_dim), (full.num_kv_heads, full.head_dim))
        windowed, everywhere = (heads // self._side_by_side(heads, dim) for heads, dim in kinds)
        return windowed, everywhere

    def _side_by_side(self, num_kv_heads: int, head_dim: int) -> int:
        count, devices = self.cache_head_dim // head_dim, self.full_heads.num_devices if self.full_heads else 1
        return count if num_kv_heads % (count * devices) == 0 else 1

    def is_full(self, layer: int) -> bool:
        """Whether a layer has the heads of layers without a window."""
        return self.full_heads is not None and self.layer_windows[layer] is None

    def is_wide(self, layer: int) -> bool:
        """Whether the MLP of a layer has the width of those that read the keys of other layers."""
        return self.reader_mlp_dim is not None and bool(self.kv_sources) and self.kv_sources[layer] != layer

    def of_layer(self, layer: int) -> ModelConfig:
        """The config with the sizes of one layer, as those of all."""
        own = self
        if self.full_heads is not None:
            heads = (
                self.full_heads if self.is_full(layer) else FullHeads(num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
            )
            rope = self.layer_ropes[layer] if self.layer_ropes else self.rope
            sizes = {"num_kv_heads": heads.num_kv_heads, "head_dim": heads.head_dim, "rope": rope, "layer_ropes": ()}
            own = replace(self, full_heads=None, keys_are_values=heads.keys_are_values, **sizes)
        return replace(own, mlp_dim=self.reader_mlp_dim) if self.reader_mlp_dim and self.is_wide(layer) else own

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The distinct rotary embeddings of the layers."""
        return tuple(dict.fromkeys(rope for rope in self.layer_ropes or (self.rope,) if rope is not None))

    @property
    def rope_kinds(self) -> tuple[RopeConfig | None, ...]:
        """The distinct rotary embeddings of the layers, with None for those without."""
        return tuple(dict.fromkeys(self.layer_ropes or (self.rope,)))

    @property
    def rope_depends_on_length(self) -> bool:
        """Whether the keys of a prefix depend on the length of the sequence, so that they cannot be shared."""
        return any(rope.kind in LENGTH_DEPENDENT for rope in self.ropes)

    @property
    def fused_swiglu(self) -> bool:
        """Whether the MLP is the SwiGLU that `pallas_kernels.matmul.swiglu` computes."""
        return (
            self.mlp_gated and self.activation == "silu" and not (self.mlp_bias or self.mlp_multipliers or self.gate_cutoffs)
        )

    def kv_row_bytes(self, itemsize: int, *, stored_head_dim: int | None = None, scale_bytes: int = 0) -> int:
        """Bytes of K and V per token in a row of the cache, with `itemsize` bytes per number and `scale_bytes` per head."""
        of_keys = self.cache_kv_heads * ((stored_head_dim or self.cache_head_dim) * itemsize + scale_bytes)
        return of_keys if self.values_in_keys else 2 * of_keys

    def kv_bytes_per_token(self, itemsize: int, *, stored_head_dim: int | None = None, scale_bytes: int = 0) -> int:
        """The same over all layers."""
        a_row = self.kv_row_bytes(itemsize, stored_head_dim=stored_head_dim, scale_bytes=scale_bytes)
        return sum(a_row // self.layers_sharing_row(layer) for layer in self.kv_layers)


def same_for_all(values: Sequence[T]) -> bool:
    """Whether all layers have the same setting, so that it need not be looked up by layer."""
    return all(value == values[0] for value in values)
