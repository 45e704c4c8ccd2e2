"""The architecture of layers that keep a state of fixed size for each sequence, not keys and values of every token."""

from __future__ import annotations

from dataclasses import dataclass

from fastgen_jax.models.moe_config import Activation


@dataclass(frozen=True, kw_only=True)
class ShortConv:
    """A convolution over a few tokens, gated before and after it. Source: LFM2.

    b, c, x = input @ mix_in;   out = (c * conv(b * x)) @ mix_out
    """

    layers: tuple[int, ...]  # the layers that have it
    width: int  # tokens that an output depends on
    bias: bool = False  # of the projections and of the convolution


@dataclass(frozen=True, kw_only=True)
class Mamba2:
    """A state space with one decay per head. Source: arXiv:2405.21060.

    gate, x, b, c, dt = input @ mix_in;   x, b, c = act(conv(x, b, c));   dt = softplus(dt + dt_bias)
    state = exp(-exp(a_log) dt) * state + b (dt x)^T
    out = norm((state^T c + d * x) * silu(gate)) @ mix_out
    """

    layers: tuple[int, ...]
    num_heads: int
    head_dim: int  # values of a head
    num_groups: int  # groups of adjacent heads that share b and c
    state_dim: int  # size of b and c
    width: int  # of the convolution, in tokens
    activation: Activation = "silu"  # after the convolution
    conv_bias: bool = True
    bias: bool = False  # of the projections
    norm_groups: int = 1  # parts of the output that are normalized separately; 0: there is no norm
    norm_first: bool = False  # the gate follows the norm: norm(y) * silu(gate)
    in_multipliers: tuple[float, ...] = ()  # of gate, x, b, c and dt, as they are projected; (): none
    out_multiplier: float = 1.0  # of the input of the output projection
    tile: int = 1  # columns of mix_in and of kept inputs are filled up with zeros to a multiple of it; see `divided_state`

    @property
    def inner_dim(self) -> int:
        """Values of all heads."""
        return self.num_heads * self.head_dim

    @property
    def in_dim(self) -> int:
        """Columns of mix_in that mean something."""
        return 2 * (self.inner_dim + self.num_groups * self.state_dim) + self.num_heads


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Gated delta rule. Source: arXiv:2412.06464.

    q, k, v, gate = input @ mix_in;   b, a = input @ mix_gates;   q, k, v = act(conv(q, k, v))
    q, k = q / |q| / sqrt(key_dim), k / |k|
    state = exp(-exp(a_log) softplus(a + dt_bias)) * state;   state += k (sigmoid(b) (v - state^T k))^T
    out = (norm(state^T q) * silu(gate)) @ mix_out
    """

    layers: tuple[int, ...]
    num_heads: int  # of values
    num_key_heads: int  # of queries and keys; each serves adjacent value heads
    key_dim: int  # of a head
    value_dim: int
    width: int  # of the convolution, in tokens
    activation: Activation = "silu"  # after the convolution
    tile: int = 1  # mix_gates and kept inputs are filled up with columns of zeros to a multiple of it; see `divided_state`


StateConfig = ShortConv | Mamba2 | DeltaNet
