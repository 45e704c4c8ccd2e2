"""The cost of a step: seconds from its tokens and the contexts that they attend to.

Either measured on a device with `fastgen bench steps`, or computed from a roofline.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from fastgen_jax.devices import DEVICES, GIB, Device
from fastgen_jax.json_types import JsonObject
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.counts import count_params
from fastgen_jax.models.division import divided
from fastgen_jax.plan.roofline import Efficiency, Roofline, StepShape, Windows, roofline, step_shape
from fastgen_jax.scheduling import Chunk, Step
from fastgen_jax.simulation.models import MODELS

_START = itemgetter(1)


def shape_of(step: Step, windows: Windows = (None,)) -> StepShape:
    """The shape of a step, for layers with these windows."""
    chunks = step.chunks
    if windows != (None,):
        return step_shape([chunk[1:3] for chunk in chunks], step.num_sample_rows, windows)
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
    """A cost model: the seconds that a device needs for a step."""

    def __call__(self, shape: StepShape) -> float:
        """Seconds for a step of this shape."""
        ...


def of_whole_steps(cost: StepCost, num_tokens: int) -> StepCost:
    """`cost` of steps that all are padded to `num_tokens`."""
    return lambda shape: cost(shape._replace(num_tokens=num_tokens))


@dataclass(frozen=True, kw_only=True)
class MeasuredCost:
    """A straight line for each compiled step size, fitted by `fastgen bench steps`.

    `sizes` are the token budgets of the compiled programs, ascending; `base` is the seconds of each one without
    tokens, and `per_token` the seconds per token in it, which is 0 where padding is computed too.
    """

    sizes: tuple[int, ...]
    base: tuple[float, ...]
    per_token: tuple[float, ...]
    per_row: float
    """Seconds per row of logits."""
    per_decode_attended: float
    """Seconds per position that a generated token attends to."""
    per_prompt_attended: float
    """Seconds per position that a token of a prompt attends to."""
    host_seconds: float
    """Seconds of host work per step, during which the device may run another one."""
    facts: JsonObject
    """Machine, versions, model and engine settings of the measurement."""

    def __call__(self, shape: StepShape) -> float:
        """Seconds for a step of this shape; ValueError if it exceeds the largest compiled step."""
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


def cost_from(model: JsonObject) -> MeasuredCost:
    """The cost model in a JSON object of `fastgen bench steps`; KeyError or TypeError if it contains none."""
    return MeasuredCost(**{**model, **{name: tuple(model[name]) for name in ("sizes", "base", "per_token")}})


def load_cost(path: Path) -> MeasuredCost:
    """The cost model in a file of `fastgen bench steps`; ValueError if it contains none."""
    try:
        return cost_from(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} contains no step costs: {error!r}; create it with: fastgen bench steps -o {path}"
        ) from error


GOOD_KERNELS = Efficiency(matmul=0.6, attention=0.4, memory=0.8, links=0.7)
"""The shares of the peak figures that good kernels reach."""


@dataclass(frozen=True, kw_only=True)
class RooflineCost:
    """A dense model on the roofline, tensor-parallel over `num_devices` equal devices.

    `sizes` are the compiled step sizes to which a step is padded; if empty, steps are not padded.
    """

    model: ModelConfig
    device: Device
    num_devices: int = 1
    bytes_per_weight: float = 2.0
    bytes_per_kv: float = 2.0
    efficiency: Efficiency = GOOD_KERNELS
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise ValueError(f"num_devices is {self.num_devices}; a model needs at least 1")

    @cached_property
    def _roofline(self) -> Roofline:
        return roofline(
            self.model,
            self.device,
            self.num_devices,
            weight_bytes=self._weight_bytes / self.num_devices,
            kv_bytes_per_token=self._kv_bytes_per_token / self.num_devices,
            activation_bytes=2.0,
            efficiency=self.efficiency,
            latency=True,
        )

    @property
    def _weight_bytes(self) -> float:
        return count_params(self.model) * self.bytes_per_weight

    @property
    def _kv_bytes_per_token(self) -> float:
        return divided(self.model, self.num_devices).kv_bytes_per_token(1) * self.bytes_per_kv

    def __call__(self, shape: StepShape) -> float:
        """Seconds for a step of this shape; ValueError if it exceeds the largest compiled step."""
        if self.sizes:
            index = bisect_left(self.sizes, shape.num_tokens)
            if index == len(self.sizes):
                raise ValueError(f"a step of {shape.num_tokens} tokens exceeds the largest compiled one, {self.sizes[-1]}")
            shape = shape._replace(num_tokens=self.sizes[index])
        return self._roofline(shape)

    def num_kv_tokens(self, *, memory_share: float = 0.9) -> int:
        """Positions that fit into the KV cache, which gets what the weights leave of `memory_share` of all memory.

        Raises ValueError if the weights leave nothing.
        """
        usable_bytes = memory_share * self.num_devices * self.device.memory_bytes
        free_bytes = usable_bytes - self._weight_bytes
        if free_bytes <= 0:
            needed = self._weight_bytes / (memory_share * self.device.memory_bytes)
            raise ValueError(
                f"the weights take {self._weight_bytes / GIB:.0f} GiB, but {self.num_devices} devices have "
                f"{usable_bytes / GIB:.0f} GiB for them; use at least {int(needed) + 1} devices"
            )
        return int(free_bytes / self._kv_bytes_per_token)


def roofline_cost(model: str, hardware: str, num_devices: int, *, efficiency: Efficiency = GOOD_KERNELS) -> RooflineCost:
    """The cost of a known model on known hardware; ValueError, which lists the known names, for others."""
    if model not in MODELS:
        raise ValueError(f"model is {model!r}; choose one of {', '.join(MODELS)}")
    if hardware not in DEVICES:
        raise ValueError(f"hardware is {hardware!r}; choose one of {', '.join(DEVICES)}")
    return RooflineCost(model=MODELS[model], device=DEVICES[hardware], num_devices=num_devices, efficiency=efficiency)
