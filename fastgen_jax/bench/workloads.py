"""Fixed request sets, so that every engine is measured on the same token ids.

Lengths follow DeepSpeed-FastGen's benchmark: `int(N(mean, 0.3 * mean))`, seed 42. Standard library and numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fastgen_jax.json_types import JsonObject

SEED = 42
SPREAD = 0.3  # standard deviation of a length as a share of its mean, as in FastGen's benchmark
MIN_LENGTH = 4  # tokens; shorter draws are raised to this, so that no request is empty


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """One request: its prompt as token ids and the exact number of tokens to generate (end-of-text is ignored)."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A named set of requests that all arrive at the same time."""

    name: str
    description: str
    requests: tuple[BenchRequest, ...]

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of all requests together."""
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens of all requests together."""
        return sum(request.max_new_tokens for request in self.requests)

    @property
    def longest_context(self) -> int:
        """Prompt plus output tokens of the longest request: what `max_context_len` must hold."""
        return max(len(request.prompt_token_ids) + request.max_new_tokens for request in self.requests)

    def to_jsonable(self) -> JsonObject:
        """The workload as plain dicts and lists, for an engine in another process."""
        return asdict(self)


def sample_lengths(mean: int, count: int, *, spread: float, rng: np.random.Generator) -> list[int]:
    """`count` lengths in tokens, `int(N(mean, spread * mean))`, none below min(4, mean)."""
    if mean < 1:
        raise ValueError(f"mean length is {mean} tokens; it must be at least 1")
    if spread < 0:
        raise ValueError(f"spread is {spread}; it is a share of the mean and must be 0 or more")
    if spread == 0:
        return [mean] * count
    draws = rng.normal(mean, spread * mean, count)
    return [max(min(MIN_LENGTH, mean), int(draw)) for draw in draws]


def make_workload(
    name: str,
    *,
    num_requests: int,
    mean_prompt: int,
    mean_output: int,
    vocab_size: int,
    spread: float = SPREAD,
    seed: int = SEED,
    num_reserved_ids: int = 256,
    max_prompt: int | None = None,
) -> Workload:
    """A workload of random token ids; the same arguments give the same ids on every machine.

    Lengths are drawn before ids, so a different vocabulary does not change them. Ids below `num_reserved_ids` are never
    drawn, because most vocabularies keep their special tokens there. Longer prompts are truncated to `max_prompt`.
    """
    if num_requests < 1:
        raise ValueError(f"num_requests is {num_requests}; a workload needs at least 1")
    if not 0 <= num_reserved_ids < vocab_size:
        raise ValueError(
            f"num_reserved_ids is {num_reserved_ids} but vocab_size is {vocab_size}; "
            f"use 0 to {vocab_size - 1}, so that there are ids to draw from"
        )
    rng = np.random.default_rng(seed)
    prompt_lengths = sample_lengths(mean_prompt, num_requests, spread=spread, rng=rng)
    output_lengths = sample_lengths(mean_output, num_requests, spread=spread, rng=rng)
    if max_prompt is not None:
        prompt_lengths = [min(length, max_prompt) for length in prompt_lengths]
    requests = tuple(
        BenchRequest(
            request_id=f"{name}-{index}",
            prompt_token_ids=tuple(rng.integers(num_reserved_ids, vocab_size, prompt_length).tolist()),
            max_new_tokens=output_length,
        )
        for index, (prompt_length, output_length) in enumerate(zip(prompt_lengths, output_lengths, strict=True))
    )
    lengths = f"{mean_prompt}/{mean_output}" + (f" +-{spread:.0%}" if spread else "")
    return Workload(name=name, description=f"{num_requests} simultaneous requests, {lengths}", requests=requests)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a standard workload: requests, mean prompt and output tokens, spread as a fraction of the mean."""

    num_requests: int
    mean_prompt: int
    mean_output: int
    spread: float = SPREAD


STANDARD: dict[str, Shape] = {
    "W1": Shape(num_requests=32, mean_prompt=260, mean_output=60),
    "W2": Shape(num_requests=1, mean_prompt=128, mean_output=128, spread=0.0),
    "W3": Shape(num_requests=8, mean_prompt=1000, mean_output=32, spread=0.0),
    # The published workloads of DeepSpeed-FastGen's blog, as one closed batch.
    "fastgen-1200-60": Shape(num_requests=32, mean_prompt=1200, mean_output=60),
    "fastgen-1200-128": Shape(num_requests=32, mean_prompt=1200, mean_output=128),
    "fastgen-2600-60": Shape(num_requests=32, mean_prompt=2600, mean_output=60),
    "fastgen-2600-128": Shape(num_requests=32, mean_prompt=2600, mean_output=128),
}


def standard_workload(name: str, *, vocab_size: int, seed: int = SEED) -> Workload:
    """The standard workload called `name` (a key of `STANDARD`) for a vocabulary of `vocab_size` ids."""
    if name not in STANDARD:
        raise ValueError(f"workload is {name!r}; choose one of {', '.join(sorted(STANDARD))}")
    shape = STANDARD[name]
    return make_workload(
        name,
        num_requests=shape.num_requests,
        mean_prompt=shape.mean_prompt,
        mean_output=shape.mean_output,
        spread=shape.spread,
        vocab_size=vocab_size,
        seed=seed,
    )


def warmup_workload(like: Workload, *, vocab_size: int, seed: int = SEED + 1) -> Workload:
    """A workload with the lengths of `like` but other token ids, so that everything `like` needs is compiled.

    The ids differ so that an engine with a prefix cache gains nothing from the warm-up.
    """
    rng = np.random.default_rng(seed)
    requests = tuple(
        BenchRequest(
            request_id=f"warmup-{index}",
            prompt_token_ids=tuple(rng.integers(0, vocab_size, len(request.prompt_token_ids)).tolist()),
            max_new_tokens=request.max_new_tokens,
        )
        for index, request in enumerate(like.requests)
    )
    return Workload(name="warmup", description=f"warm-up shaped like {like.name}", requests=requests)


def with_text(workload: Workload, *, prompt_ids: Sequence[int], seed: int = SEED) -> Workload:
    """`workload` with each prompt taken from `prompt_ids` (a real text) at a random offset."""
    rng = np.random.default_rng(seed)
    longest = max(len(request.prompt_token_ids) for request in workload.requests)
    if len(prompt_ids) < longest:
        raise ValueError(f"the text has {len(prompt_ids)} tokens but the longest prompt has {longest}; pass a longer text")
    requests = []
    for request in workload.requests:
        length = len(request.prompt_token_ids)
        start = int(rng.integers(0, len(prompt_ids) - length + 1))
        requests.append(
            BenchRequest(
                request_id=request.request_id,
                prompt_token_ids=tuple(prompt_ids[start : start + length]),
                max_new_tokens=request.max_new_tokens,
            )
        )
    description = workload.description + ", real text"
    return Workload(name=workload.name, description=description, requests=tuple(requests))
