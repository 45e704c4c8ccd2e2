"""What a checkpoint says about its experts, and about latent attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """How tokens choose among the experts of a layer, and what an expert is. Source: arXiv:1701.06538."""

    num_experts: int  # X
    experts_per_token: int  # chosen for each token
    expert_dim: int  # F of an expert
    layers: tuple[int, ...]  # the layers that have experts; the others have an MLP of the model's `mlp_dim`
    scores: Literal["softmax", "sigmoid", "softmax_of_chosen"] = "softmax"  # of all experts, or among the chosen
    normalize: bool = False  # the weights of the chosen are divided by their sum
    scale: float = 1.0  # and then multiplied by this
    router_bias: bool = False  # of the scores, before softmax or sigmoid
    choice_bias: bool = False  # added to the scores for the choice alone; the weights do without (arXiv:2412.19437)
    num_groups: int = 1  # experts are chosen from the best few of so many groups of neighbours (arXiv:2405.04434)
    groups_per_token: int = 1
    group_score: Literal["max", "two_best"] = "max"  # a group is as good as its best expert, or its two best together
    expert_bias: bool = False
    swiglu_limit: float | None = None  # the gpt-oss activation: clamped to this, see `moe.clamped_swiglu`; None: SwiGLU
    shared_dim: int = 0  # F of an expert that every token has; 0: there is none
    shared_gate: bool = False  # what the shared expert adds is scaled by a sigmoid

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}; with num_experts={self.num_experts} it must be in "
                f"[1, {self.num_experts}]"
            )
        if self.num_experts % self.num_groups or not 1 <= self.groups_per_token <= self.num_groups:
            raise ValueError(
                f"{self.num_experts} experts cannot be chosen from {self.groups_per_token} of {self.num_groups} groups; "
                "groups are of equal size, and at least one of them is chosen"
            )
        in_groups = self.num_experts // self.num_groups * self.groups_per_token
        if self.experts_per_token > in_groups:
            raise ValueError(f"experts_per_token is {self.experts_per_token}, but the chosen groups hold {in_groups}")
        if self.shared_gate and not self.shared_dim:
            raise ValueError("shared_gate is set, but shared_dim is 0: there is no shared expert to scale")


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Sizes of latent attention. The model's `head_dim` is `kv_rank + rope_dim`, and it has one KV head."""

    kv_rank: int  # numbers of a token's latent
    rope_dim: int  # numbers of a head that carry the position
    nope_dim: int  # and that do not
    v_dim: int  # numbers of a head's value
    q_rank: int | None = None  # queries are projected through so many numbers; None: directly
    rope_interleaved: bool = True  # whether the file has the pairs that turn together side by side
    kv_bias: bool = False  # biases of the projections to latents
