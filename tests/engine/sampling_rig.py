"""A small sampler to test: its sizes, rows that each use one parameter, and the compiled program."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.engine.sampling import sampler as sampling
from fastgen_jax.engine.sampling.sampler import SampleOutput
from fastgen_jax.engine.sampling.state import SamplerState, init_state
from fastgen_jax.engine.sampling.tables import SamplingBatch, SamplingTables, sampling_fields

V = 200  # two pieces of a search, the second one partly filled
S = 8
R = 8
TOP = 20


def views_of(num_rows: int, vocab_size: int = V) -> dict[str, np.ndarray]:
    views = {name: np.zeros(shape, dtype) for name, shape, dtype in sampling_fields(num_rows)}
    SamplingTables.clear(views, max_num_seqs=S, vocab_size=vocab_size)
    return views


def batch_of(views: dict[str, np.ndarray]) -> SamplingBatch:
    return SamplingBatch(**{name: jnp.array(view) for name, view in views.items()})


def sampling_rows(num_rows: int, vocab_size: int = V, **columns: Any) -> SamplingBatch:
    """Rows that sample at temperature 1 unless `columns` says otherwise."""
    views = views_of(num_rows, vocab_size)
    for name, value in {"temperature": 1, "any_sampling": 1, **columns}.items():
        views[name][...] = value
    return batch_of(views)


@functools.cache
def program(num_rows: int) -> Any:
    """The compiled sampler for `num_rows` rows."""
    sample = jax.jit(sampling.sample, static_argnames="max_logprobs", donate_argnames="state")
    return sample.lower(jnp.zeros((num_rows, V)), init_state(S, V), sampling_rows(num_rows), max_logprobs=TOP).compile()


def run(logits: np.ndarray, batch: SamplingBatch, state: SamplerState | None = None) -> tuple[SampleOutput, SamplerState]:
    return program(len(logits))(jnp.asarray(logits, jnp.float32), state or init_state(S, V), batch)
