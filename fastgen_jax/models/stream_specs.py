"""The declarations of the weights of residual streams and of inputs of layers."""

from __future__ import annotations

from collections.abc import Iterator

from fastgen_jax.models.stream_config import AltUp, LayerInputs
from fastgen_jax.models.weight_spec import Kind, WeightSpec, matrix, norm, table, vector

_STEERS = "it decides how streams are mixed; int8 would save little memory and affect every number"


def input_model_specs(embed_dim: int, num_layers: int, inputs: LayerInputs, *, neutral: float) -> Iterator[WeightSpec]:
    """The specs of the weights that make the inputs of all layers; `neutral` is the scale of a norm without effect."""
    width = num_layers * inputs.dim
    yield table("layer_embed", (inputs.num_rows, width), ("V", "inputs"))
    yield matrix("layer_inputs_proj", (embed_dim, width), ("E", "inputs"))
    yield norm("layer_inputs_norm", (inputs.dim,), ("input",), initial=neutral)


def input_layer_specs(embed_dim: int, inputs: LayerInputs, *, neutral: float) -> Iterator[WeightSpec]:
    """The specs of the weights with which a layer adds its inputs."""
    yield matrix("input_gate", (embed_dim, inputs.dim), ("E", "input"))
    yield matrix("input_proj", (inputs.dim, embed_dim), ("input", "E"))
    yield norm("input_norm", (embed_dim,), ("E",), initial=neutral)


def stream_model_specs(embed_dim: int, altup: AltUp) -> Iterator[WeightSpec]:
    """The specs of the weights that make streams of an embedding, and one stream of several."""
    others = altup.num_streams - 1
    yield matrix("streams_in", (embed_dim, others * embed_dim), ("E", "streams"), parts=(embed_dim,) * others)
    for stream in range(1, altup.num_streams):
        yield matrix(f"stream_out_{stream}", (embed_dim, embed_dim), ("E", "streams"))


def stream_layer_specs(embed_dim: int, altup: AltUp, *, neutral: float) -> Iterator[WeightSpec]:
    """The specs of the weights with which a layer predicts and corrects the streams."""
    n = altup.num_streams
    router = matrix("stream_router", (embed_dim, n), ("E", "streams"), never_quantized=_STEERS, dtype="activations")
    yield router
    yield norm("stream_router_norm", (embed_dim,), ("E",), initial=neutral)
    for name, width in (("stream_predict", n * n), ("stream_correct", n)):
        yield WeightSpec(
            name=name, kind=Kind.VECTOR, shape=(n, width), axes=("streams", "weights"), initial=0.0, dtype="activations"
        )
    yield vector("stream_scale", embed_dim, "E")


def low_rank_specs(embed_dim: int, rank: int, *, neutral: float) -> Iterator[WeightSpec]:
    """The specs of the weights of a low-rank residual (LAuReL, arXiv:2411.07501)."""
    yield matrix("laurel_in", (embed_dim, rank), ("E", "rank"))
    yield matrix("laurel_out", (rank, embed_dim), ("rank", "E"))
    yield norm("laurel_norm", (embed_dim,), ("E",), initial=neutral)
