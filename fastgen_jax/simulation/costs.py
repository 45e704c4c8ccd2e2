"""What a step costs: seconds from the tokens in it and the contexts that they attend to.

Either measured on a device by `fastgen bench steps`, or read off a roofline.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.counts import count_params, flops_per_token
from fastgen_jax.scheduling import Chunk, Step
from fastgen_jax.simulation.hardware import ACCELERATORS, MODELS, Accelerator

_START = itemgetter(1)


class StepShape(NamedTuple):
    """What the cost of a step depends on.

    `decode_attended` adds up the contexts of the sequences that compute one token. `prompt_attended` adds up, over
    the tokens of longer chunks, the positions that each attends to, and `prompt_context` the contexts at their ends.
    """

    num_tokens: int
    num_sample_rows: int
    decode_attended: int
    prompt_attended: int
    prompt_context: int


def shape_of(step: Step) -> StepShape:
    """The shape of a step."""
    chunks = step.chunks
    decode = sum(map(_START, chunks)) + len(chunks)
    prompt = context = 0
    if step.num_tokens != len(chunks):
        for _, start, length, _, _ in _prompts(chunks):
            decode -= start + 1
            prompt += length * start + length * (length + 1) // 2
            context += start + length
    return StepShape(step.num_tokens, step.num_sample_rows, decode, prompt, context)


def _prompts(chunks: Sequence[Chunk]) -> list[Chunk]:
    return [chunk for chunk in chunks if chunk[2] > 1]


class StepCost(Protocol):
    """Seconds that a device takes for a step."""

    def __call__(self, shape: StepShape) -> float:
        """Seconds for a step of this shape."""
        ...


@dataclass(frozen=True, kw_only=True)
class MeasuredCost:
    """A straight line for each compiled step size, as `fastgen bench steps` fits it.

    `sizes` are the token budgets of the compiled programs, ascending; `base` the seconds of each without a token, and
    `per_token` for each token in it, which is nothing where padding is computed.
    """

    sizes: tuple[int, ...]
    base: tuple[float, ...]
    per_token: tuple[float, ...]
    per_row: float
    """Seconds a row of logits."""
    per_decode_attended: float
    """Seconds for each position that a generated token attends to."""
    per_prompt_attended: float
    host_seconds: float
    """Seconds that the host takes for a step, during which the device may run another."""
    facts: dict[str, Any]
    """Machine, versions, model and engine settings of the measurement."""

    def __call__(self, shape: StepShape) -> float:
        """Seconds for a step of this shape; ValueError if no compiled step holds it."""
        tokens, rows, decode_attended, prompt_attended, _ = shape
        index = bisect_left(self.sizes, tokens)
        if index == len(self.sizes):
            raise ValueError(f"a step of {tokens} tokens exceeds the largest measured one, {self.sizes[-1]}")
        return (
            self.base[index]
            + self.per_token[index] * tokens
            + self.per_row * rows
            + self.per_decode_attended * decode_attended
            + self.per_prompt_attended * prompt_attended
        )


def cost_from(model: dict[str, Any]) -> MeasuredCost:
    """The cost model that `fastgen bench steps` fitted, from its JSON object; KeyError or TypeError if it is none."""
    return MeasuredCost(**{**model, **{name: tuple(model[name]) for name in ("sizes", "base", "per_token")}})


def load_cost(path: Path) -> MeasuredCost:
    """The cost model in a file of `fastgen bench steps`; ValueError if it is none."""
    try:
        return cost_from(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no step costs: {error!r}; write one with: fastgen bench steps -o {path}") from error


class _Seconds(NamedTuple):
    """Seconds for one of each: what a roofline comes down to."""

    token: float
    row: float
    weights: float
    read_kv: float
    attend: float
    decode: float
    """A position that a generated token attends to: read or multiplied, whatever takes longer."""
    reduce_token: float
    reduce: float


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Tensor parallelism over `num_devices` equal devices; each part of a step takes its compute or its memory time.

    The efficiencies say what share of the peak is reached: the values by default are what good kernels reach. Matrix
    products, attention and the two all-reduces a layer follow one another. `sizes` are compiled step sizes to
    which a step is padded; without them a step has exactly the tokens that are in it.
    """

    model: ModelConfig
    accelerator: Accelerator
    num_devices: int = 1
    bytes_a_weight: float = 2.0
    bytes_a_kv: float = 2.0
    matmul_efficiency: float = 0.6
    attention_efficiency: float = 0.4
    memory_efficiency: float = 0.8
    link_efficiency: float = 0.7
    sizes: tuple[int, ...] = ()
    _seconds: _Seconds = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("matmul_efficiency", "attention_efficiency", "memory_efficiency", "link_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share of the peak, above 0 and at most 1")
        if self.num_devices < 1:
            raise ValueError(f"num_devices is {self.num_devices}; a model needs at least 1")
        flops = self.num_devices * self.accelerator.flops
        bandwidth = self.num_devices * self.accelerator.memory_bandwidth * self.memory_efficiency
        model, n = self.model, self.num_devices
        body, row = flops_per_token(model, sampled=False), flops_per_token(model, sampled=True)
        kv_bytes = model.kv_bytes_per_token(1) * self.bytes_a_kv
        # A ring sends each number of the all-reduce 2 (n - 1) / n times.
        reduced = 2 * model.num_layers * 2.0 * model.embed_dim * 2 * (n - 1) / n
        attention_flops = 4.0 * model.num_layers * model.num_heads * model.head_dim  # scores and values, for a position
        read_kv = kv_bytes / bandwidth
        attend = attention_flops / (flops * self.attention_efficiency)
        seconds = _Seconds(
            token=body / (flops * self.matmul_efficiency),
            row=(row - body) / (flops * self.matmul_efficiency),
            weights=count_params(model) * self.bytes_a_weight / bandwidth,
            read_kv=read_kv,
            attend=attend,
            decode=max(read_kv, attend),
            reduce_token=reduced / (self.accelerator.link_bandwidth * self.link_efficiency),
            reduce=2 * model.num_layers * self.accelerator.link_latency if n > 1 else 0.0,
        )
        object.__setattr__(self, "_seconds", seconds)

    def __call__(self, shape: StepShape) -> float:
        """Seconds for a step of this shape; ValueError if no compiled step holds it."""
        # Unpacked, and without max(): this is called for every simulated step.
        tokens, rows, decode_attended, prompt_attended, prompt_context = shape
        if self.sizes:
            index = bisect_left(self.sizes, tokens)
            if index == len(self.sizes):
                raise ValueError(f"a step of {tokens} tokens exceeds the largest compiled one, {self.sizes[-1]}")
            tokens = self.sizes[index]
        token, row, weights, read_kv, attend, decode, reduce_token, reduce = self._seconds
        matmuls = tokens * token + rows * row
        if matmuls < weights:
            matmuls = weights
        prompt = max(prompt_context * read_kv, prompt_attended * attend) if prompt_context else 0.0
        return matmuls + decode_attended * decode + prompt + reduce + tokens * reduce_token

    def num_kv_tokens(self, *, memory_share: float = 0.9) -> int:
        """Positions that the KV cache can hold in what the weights leave of `memory_share` of all memory.

        Raises ValueError if the weights leave nothing.
        """
        memory = memory_share * self.num_devices * self.accelerator.memory
        free = memory - count_params(self.model) * self.bytes_a_weight
        if free <= 0:
            need = count_params(self.model) * self.bytes_a_weight / (memory_share * self.accelerator.memory)
            raise ValueError(
                f"the weights take {count_params(self.model) * self.bytes_a_weight / 1e9:.0f} GB, but {self.num_devices} "
                f"devices have {memory / 1e9:.0f} GB for them; use at least {int(need) + 1} devices"
            )
        return int(free / (self.model.kv_bytes_per_token(1) * self.bytes_a_kv))


def roofline(model: str, accelerator: str, num_devices: int, **options: Any) -> Roofline:
    """The roofline of a known model on known hardware; ValueError that lists the known names."""
    if model not in MODELS:
        raise ValueError(f"model is {model!r}; choose one of {', '.join(MODELS)}")
    if accelerator not in ACCELERATORS:
        raise ValueError(f"hardware is {accelerator!r}; choose one of {', '.join(ACCELERATORS)}")
    return Roofline(model=MODELS[model], accelerator=ACCELERATORS[accelerator], num_devices=num_devices, **options)
