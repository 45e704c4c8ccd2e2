"""The architecture of mixture-of-experts layers and of latent attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal[
    "silu",
    "gelu",
    "gelu_tanh",
    "gelu_quick",
    "gelu_clipped",
    "relu",
    "relu2",
    "relu6",
    "leaky_relu",
    "hard_swish",
    "mish",
    "sigmoid",
    "sqrt_softplus",
    "tanh",
    "laplace",
    "linear",
    "xielu",
]
"""The functions of `layers.ACTIVATIONS`, and `layers.xielu`, which has parameters, in MLPs without a gate."""


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """How tokens are routed to the experts of a layer, and what an expert is. Source: arXiv:1701.06538."""

    num_experts: int  # X
    experts_per_token: int  # top k
    expert_dim: int  # F of an expert
    layers: tuple[int, ...]  # the layers that have experts; the others have an MLP of width `mlp_dim`
    # over all experts, over the chosen, or of each choice over the experts with a similar logit (see `moe.sparse_mixer`)
    scores: Literal["softmax", "sigmoid", "softmax_of_chosen", "sigmoid_of_chosen", "sparse_mixer"] = "softmax"
    normalize: bool = False  # divide the weights of the chosen experts by their sum
    scale: float = 1.0  # factor of the weights, after that
    weigh_inputs: bool = False  # the weight of an expert multiplies its input instead of its output
    mixer_tolerance: float = 0.0  # sparse_mixer: relative distance of logits that count as similar
    router_bias: bool = False  # added to the logits, before softmax or sigmoid
    choice_bias: bool = False  # added to the scores for choosing, not for the weights (arXiv:2412.19437)
    expert_scale: bool = False  # a learned factor of the weights of each expert
    beside_mlp: bool = False  # these layers have an MLP too, and add both; each has norms of its own (see `mlp.beside_mlp`)
    num_groups: int = 1  # groups of adjacent experts; experts are chosen from the best few groups (arXiv:2405.04434)
    groups_per_token: int = 1
    group_score: Literal["max", "two_best"] = "max"  # score of a group: its best expert, or the sum of its best two
    activation: Activation = "silu"  # of the routed experts and the shared one
    gated: bool = True  # an expert is act(x @ gate) * (x @ up), else act(x @ up)
    expert_bias: bool = False
    swiglu_limit: float | None = None  # clamp of the gpt-oss activation, see `moe.clamped_swiglu`; None: `activation`
    down_dim: int | None = None  # columns of the down matrices, if there are more than E: zeros that are not used
    shared_dim: int = 0  # F of the expert that is applied to every token; 0: none
    shared_gate: bool = False  # scale the output of the shared expert by a sigmoid
    latent_dim: int | None = None  # width that routed experts read and write, projected from and to E; None: E

    @property
    def fused_swiglu(self) -> bool:
        """Whether the routed experts are the SwiGLU that `pallas_kernels.grouped_matmul.grouped_swiglu` computes."""
        return self.gated and self.activation == "silu" and self.swiglu_limit is None and not self.expert_bias

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}; with num_experts={self.num_experts} it must be in "
                f"[1, {self.num_experts}]"
            )
        if self.num_experts % self.num_groups or not 1 <= self.groups_per_token <= self.num_groups:
            raise ValueError(
                f"num_groups is {self.num_groups} and groups_per_token is {self.groups_per_token}; num_groups must divide "
                f"num_experts={self.num_experts}, and groups_per_token must be in [1, num_groups]"
            )
        in_groups = self.num_experts // self.num_groups * self.groups_per_token
        if self.experts_per_token > in_groups:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, but the chosen groups hold only {in_groups} experts"
            )
        if self.shared_gate and not self.shared_dim:
            raise ValueError("shared_gate is set, but shared_dim is 0: there is no shared expert to scale; set shared_dim")


@dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """What chooses the tokens that a query attends to (DeepSeek Sparse Attention)."""

    num_heads: int
    head_dim: int  # the first `rope_dim` dimensions are rotated
    num_chosen: int  # tokens; shorter contexts are attended to in full
    layers: tuple[int, ...]  # the layers that choose; the others use the choice of the last one before them
    rope_interleaved: bool = False  # whether rotated pairs are adjacent in the checkpoint


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Sizes of latent attention. The model has one KV head, whose `head_dim` holds a latent and `beside_latent` more."""

    kv_rank: int  # size of a token's latent
    rope_dim: int  # dimensions of a head that are rotated
    nope_dim: int  # dimensions of a head that are not
    v_dim: int  # size of a head's value
    q_rank: int | None = None  # size of the latent that queries are projected through; None: no latent
    rope_interleaved: bool = True  # whether rotated pairs are adjacent in the checkpoint
    kv_bias: bool = False  # whether the projections to latents have biases
    indexer: IndexerConfig | None = None  # None: queries attend to all tokens

    @property
    def beside_latent(self) -> int:
        """Numbers beside a token's latent in the cache: in keys the rotated part, in values the key of the indexer."""
        return self.rope_dim if self.indexer is None else max(self.rope_dim, self.indexer.head_dim)

    def __post_init__(self) -> None:
        indexer = self.indexer
        if indexer is None:
            return
        if self.q_rank is None:
            raise ValueError("q_rank is None, but an indexer reads the latent of queries; set q_rank")
        if indexer.head_dim < self.rope_dim:
            raise ValueError(
                f"the indexer has heads of {indexer.head_dim} dimensions, but rope_dim={self.rope_dim} of them are rotated; "
                f"its head_dim must be at least that"
            )
        if min(indexer.num_chosen, indexer.num_heads) < 1:
            raise ValueError(
                f"the indexer chooses {indexer.num_chosen} tokens with {indexer.num_heads} heads; both must be at least 1"
            )
        if 0 not in indexer.layers:
            raise ValueError("layer 0 uses the choice of a layer before it, but there is none; it needs an indexer")
