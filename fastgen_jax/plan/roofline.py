"""The roofline of a step: seconds from its tokens, the peak figures of the devices, and the share of them reached.

`fastgen plan` evaluates it at the peak, the simulator at what good kernels reach.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from fastgen_jax.devices import Device
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.counts import flops_per_token


class StepShape(NamedTuple):
    """What the cost of a step depends on.

    `decode_attended` adds up the positions that the sequences with a single token attend to. `prompt_attended` adds them up
    over the tokens of longer chunks, and `prompt_context` those that a chunk attends to at all. Where layers have sliding
    windows, all three are averages over the layers.
    """

    num_tokens: int
    num_sample_rows: int
    decode_attended: float
    prompt_attended: float
    prompt_context: float


Windows = Sequence[int | None]
"""The sliding window of each cache group, of which all have the same number of layers; None: its layers have none."""


def step_shape(chunks: Iterable[tuple[int, int]], num_sample_rows: int, windows: Windows = (None,)) -> StepShape:
    """The shape of a step of these chunks, each (first position, number of tokens)."""
    tokens = decode = prompt = context = 0
    for start, length in chunks:
        tokens += length
        for window in windows:
            whole = length if window is None else min(length, max(0, window - start))  # tokens before the window is full
            attended = whole * start + whole * (whole + 1) // 2
            if whole < length:
                assert window is not None
                attended += (length - whole) * window
            if length == 1:
                decode += attended
            else:
                prompt += attended
                context += start + length if window is None else min(start + length, window + length - 1)
    if len(windows) > 1:
        decode, prompt, context = (x / len(windows) for x in (decode, prompt, context))
    return StepShape(tokens, num_sample_rows, decode, prompt, context)


def decode_attended(contexts: Collection[int], windows: Windows) -> float:
    """`StepShape.decode_attended` of sequences with these contexts, the computed token included."""
    total = 0
    for window in windows:
        total += sum(contexts) if window is None else sum(min(context, window) for context in contexts)
    return total / len(windows) if len(windows) > 1 else total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """The share of each peak figure that is reached, above 0 and at most 1; ValueError for any other."""

    matmul: float = 1.0
    attention: float = 1.0
    memory: float = 1.0
    links: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            share = getattr(self, field.name)
            if not 0 < share <= 1:
                raise ValueError(f"efficiency {field.name} is {share}; it is a share of the peak, above 0 and at most 1")


PEAK = Efficiency()


class StepTime(NamedTuple):
    """Seconds of a step, and what they would be if only one thing took time."""

    seconds: float
    compute: float
    """Matrix products and attention."""
    memory: float
    """Reading weights and KV once."""
    links: float
    """All-reduces over the devices."""


class Roofline(NamedTuple):
    """Seconds for one of each thing that a step consists of.

    Matrix products, attention and all-reduces follow one another. Each of the first two takes as long as its
    arithmetic or its memory traffic, whichever is longer; all-reduces overlap with nothing.
    """

    token: float
    """Matrix products of a token, without its row of logits."""
    row: float
    """Matrix product of a row of logits."""
    weights: float
    """Reading the weights."""
    read_kv: float
    """Reading the keys and values of a position."""
    attend: float
    """Arithmetic of a token that attends to a position."""
    decode: float
    """A position that a generated token attends to: the longer of `read_kv` and `attend`."""
    reduce_token: float
    """Sending a token's share of the all-reduces."""
    reduce: float
    """Latency of the all-reduces of a step."""

    def __call__(self, shape: StepShape) -> float:
        """Seconds of a step."""
        # Unpacked and without max(): the simulator calls this for every step.
        tokens, rows, decode_attended, prompt_attended, prompt_context = shape
        token, row, weights, read_kv, attend, decode, reduce_token, reduce = self
        matmuls = tokens * token + rows * row
        if matmuls < weights:
            matmuls = weights
        prompt = max(prompt_context * read_kv, prompt_attended * attend) if prompt_context else 0.0
        return matmuls + decode_attended * decode + prompt + reduce + tokens * reduce_token

    def parts(self, shape: StepShape) -> StepTime:
        """Seconds of a step, and of its arithmetic, its memory traffic and its all-reduces alone."""
        tokens, rows, decode_attended, prompt_attended, prompt_context = shape
        return StepTime(
            seconds=self(shape),
            compute=tokens * self.token + rows * self.row + (decode_attended + prompt_attended) * self.attend,
            memory=self.weights + (decode_attended + prompt_context) * self.read_kv,
            links=self.reduce + tokens * self.reduce_token,
        )


def roofline(
    model: ModelConfig,
    device: Device,
    num_devices: int,
    *,
    weight_bytes: float,
    kv_bytes_per_token: float,
    activation_bytes: float,
    efficiency: Efficiency = PEAK,
    latency: bool = False,
) -> Roofline:
    """The roofline of tensor parallelism over `num_devices` equal devices, which divide all arithmetic evenly.

    A step reads `weight_bytes` on each device, and each device stores `kv_bytes_per_token` for a token. Activations,
    which the all-reduces sum, take `activation_bytes` per element. With `latency` the all-reduces take at least the
    device's `all_reduce_latency_s`.
    """
    flops_per_s = num_devices * device.flops_per_s
    memory_bytes_per_s = device.memory_bytes_per_s * efficiency.memory
    body, whole = flops_per_token(model, sampled=False), flops_per_token(model, sampled=True)
    attention = flops_per_token(model, sampled=False, context_len=1) - body
    num_reduces = 2 * model.num_layers if num_devices > 1 else 0
    # In a ring every device sends each number of an all-reduce 2 (n - 1) / n times.
    sent = num_reduces * model.embed_dim * activation_bytes * 2 * (num_devices - 1) / num_devices
    read_kv = kv_bytes_per_token / memory_bytes_per_s
    attend = attention / (flops_per_s * efficiency.attention)
    return Roofline(
        token=body / (flops_per_s * efficiency.matmul),
        row=(whole - body) / (flops_per_s * efficiency.matmul),
        weights=weight_bytes / memory_bytes_per_s,
        read_kv=read_kv,
        attend=attend,
        decode=max(read_kv, attend),
        reduce_token=sent / (device.link_bytes_per_s * efficiency.links),
        reduce=num_reduces * device.all_reduce_latency_s if latency else 0.0,
    )
