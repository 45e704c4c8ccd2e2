"""Programs that only sample: for steps whose token masks are computed on the host while the device runs the layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fastgen_jax.engine import executables
from fastgen_jax.engine.packing import Layout, sampling_layout
from fastgen_jax.engine.programs import Programs, devices_of, load_or_compile, sample_rows
from fastgen_jax.engine.sampling.processor import LogitsProcessor
from fastgen_jax.engine.sampling.sampler import SampleOutput, Work
from fastgen_jax.engine.sampling.state import SamplerState
from fastgen_jax.engine.sampling.tables import SamplingBatch, SamplingTables
from fastgen_jax.engine.xla_options import compiler_options
from pallas_kernels.folders import Folder


class Sampler(NamedTuple):
    """A compiled program that samples `num_rows` rows: (logits, last tokens, state, packed i32) -> (SampleOutput, state)."""

    num_rows: int
    run: jax.stages.Compiled
    work: Work


@dataclass(frozen=True, kw_only=True)
class SamplerPrograms:
    """Everything that determines the programs of `Sampler`. Holds shapes, not arrays: any thread may compile."""

    programs: Programs
    """The steps whose logits they sample."""

    @property
    def folder(self) -> Folder | None:
        """The cache folder with programs of earlier starts; None: nothing is kept."""
        return self.programs.folder

    def wanted(self) -> list[tuple[int, Work]]:
        """The arguments of `compile` for all steps of the engine, the most rows first."""
        config = self.programs.config
        rows = {self.programs.bucket(budget).num_seqs for budget in config.budget_ladder}
        works: tuple[Work, ...] = ("masked", "any") if jax.default_backend() == "gpu" else ("any",)
        return [(num_rows, work) for num_rows in sorted(rows, reverse=True) for work in works]

    def compile(self, num_rows: int, work: Work) -> Sampler:
        """A program for `num_rows` rows: loaded if an earlier start saved it, else compiled and saved."""
        config, arguments = self.programs.config, self._arguments(num_rows)
        name = None
        if config.choices.logits_processor is None:  # which has no name to look up
            name = executables.key(arguments, "sampler", self.programs.model.vocab_size, work, devices=devices_of(config))
        run = load_or_compile(self.folder, name, config, lambda: self._lower(num_rows, work))
        return Sampler(num_rows, run, work)

    def empty(self, num_rows: int) -> tuple[jax.Array, jax.Array | None, np.ndarray]:
        """Arguments of a program, without the state, for which it samples nothing."""
        layout, programs = sampling_layout(num_rows), self.programs
        packed = np.zeros(layout.size, np.int32)
        SamplingTables.clear(
            layout.views(packed), max_num_seqs=programs.config.max_num_seqs, vocab_size=programs.model.vocab_size
        )
        logits, last_tokens, *_ = self._arguments(num_rows)
        zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding))
        return zeros(logits), zeros(last_tokens), packed

    def _lower(self, num_rows: int, work: Work) -> jax.stages.Lowered:
        programs = self.programs
        sample = partial(
            _sample, layout=sampling_layout(num_rows), logits_processor=programs.config.choices.logits_processor, work=work
        )
        mesh = programs.mesh
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        jit = partial(jax.jit, donate_argnums=2, compiler_options=compiler_options(device))
        if mesh is not None:
            whole = NamedSharding(mesh, PartitionSpec())
            jit = partial(jit, out_shardings=(whole, whole))
        return jit(sample).lower(*self._arguments(num_rows))

    def _arguments(
        self, num_rows: int
    ) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct | None, SamplerState, jax.ShapeDtypeStruct]:
        programs = self.programs
        whole = None if programs.mesh is None else NamedSharding(programs.mesh, PartitionSpec())
        logits = jax.ShapeDtypeStruct((num_rows, programs.model.vocab_size), jnp.float32, sharding=whole)
        last_tokens = None
        if programs.config.choices.logits_processor is not None:
            last_tokens = jax.ShapeDtypeStruct((num_rows,), jnp.int32, sharding=whole)
        packed = jax.ShapeDtypeStruct((sampling_layout(num_rows).size,), jnp.int32)
        return logits, last_tokens, programs.memory()[1], packed


def work_of(sampling: np.ndarray, num_rows: int) -> Work:
    """The least that a program must be able to do for the sampling parameters of `Bucket.take_sampling`."""
    views = sampling_layout(num_rows).views(sampling)
    names = {name for name, view in views.items() if name.startswith("any_") and view}
    return "masked" if names <= {"any_masks", "any_sampling"} else "any"


def _sample(
    logits: jax.Array,
    last_tokens: jax.Array | None,
    state: SamplerState,
    packed: jax.Array,
    *,
    layout: Layout,
    logits_processor: LogitsProcessor | None,
    work: Work,
) -> tuple[SampleOutput, SamplerState]:
    batch = SamplingBatch(**layout.unpack(packed))
    return sample_rows(logits, last_tokens, state, batch, logits_processor=logits_processor, work=work)
