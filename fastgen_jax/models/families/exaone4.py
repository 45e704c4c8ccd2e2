"""EXAONE 4: norms after attention and MLP and on each head; if some layers have windows, the others have no positions."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common, olmo2
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("Exaone4ForCausalLM",)
FEATURES = "1.2B and 32B; windows in some layers, no positions in the others"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    period = _period(hf.get("sliding_window_pattern", 4))
    windows = common.windows(hf, hf.get("sliding_window", 4096) or None, lambda layer: (layer + 1) % period != 0)
    positions = rotary(hf, max_context_len=2048)
    return ModelConfig(
        family="exaone4",
        **common.sizes(hf),
        **positions,
        layer_windows=windows,
        layer_ropes=tuple(None if window is None else positions["rope"] for window in windows),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        norm_placement="output",
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qk_norm="head",
        activation=common.activation(hf, default="silu"),
    )


def _period(pattern: int | str | None) -> int:
    """The period of layers with full attention, which may be given as a pattern such as "LLLG"."""
    if isinstance(pattern, str):
        if pattern != "L" * (len(pattern) - 1) + "G":
            raise ValueError(f"sliding_window_pattern={pattern!r} is not supported; supported: L several times, then G")
        return len(pattern)
    return pattern or 1


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return olmo2.sources(config)
