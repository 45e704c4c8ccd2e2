"""The compiled programs and their device memory."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from fastgen_jax.core import KVCache, StepImages, copy_block
from fastgen_jax.engine.adapter_stacks import adapter_arrays, empty_stacks, write
from fastgen_jax.engine.huge_pages import use_huge_pages
from fastgen_jax.engine.packing import Bucket
from fastgen_jax.engine.programs import Program, Programs, StepOutput, abstract, further_arguments, memory_shardings
from fastgen_jax.engine.resolve import ResolvedConfig
from fastgen_jax.engine.samplers import Sampler, SamplerPrograms, work_of
from fastgen_jax.engine.sampling.sampler import SampleOutput, Work
from fastgen_jax.engine.sampling.state import SamplerState, reset_slot, set_masks
from fastgen_jax.engine.tower import Tower
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.sharding import tensor_mesh
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.scheduling import Step
from pallas_kernels.folders import Folder
from pallas_kernels.unfilled import unfilled


class Runner:
    """Runs steps: one program per bucket, compiled ahead of time; owns the KV cache and the sampler's state."""

    def __init__(self, params: Params, model: ModelConfig, config: ResolvedConfig, *, folder: Folder | None = None) -> None:
        """Allocates the memory; `folder` is that of `Programs`."""
        self.params = params
        self.weight_version = 0
        """The version of the weights, which outputs carry."""
        self.model = model
        self.config = config
        self.mesh = tensor_mesh(jax.local_devices()[: config.tensor_parallel]) if config.tensor_parallel else None
        self.adapters = empty_stacks(model, config)
        """The stacks of adapters; None without places for them. Replaced, never changed."""
        self.adapter_versions: Mapping[int, int] = {}
        """The version of the adapter in each place, which outputs of its requests carry."""
        self.programs = Programs(
            model=model,
            config=config,
            mesh=self.mesh,
            params=abstract(params),
            adapters=None if self.adapters is None else abstract(self.adapters),
            folder=folder,
        )
        self._compiled: dict[int, Program] = {}  # replaced, never changed: another thread may add a program during a step
        self._narrow: dict[tuple[int, Work], Program] = {}  # as `_compiled`: programs that suffice for some steps
        self.samplers = SamplerPrograms(programs=self.programs)
        self._samplers: dict[tuple[int, Work], Sampler] = {}  # as `_compiled`
        self.tower: Tower | None = None
        """Computes the embeddings of images; None if they are refused."""
        self._with_images: Program | None = None  # for steps with tokens of images
        self._no_images: StepImages | None = None  # for steps without them, if it runs these as well
        self._copy_block: jax.stages.Wrapped | None = None  # compiled by the first fork
        self._made: list[weakref.ref[jax.Array]] = []
        self.is_asleep = False
        """Whether cache, state and weights have been released."""
        use_huge_pages(read_whole(params))
        self._allocate()

    def reset(self, *, keep: bool = False) -> None:
        """Empties the cache and the sampler's state, for an engine that starts over.

        With `keep` they stay as they are, unless they are lost because an exception came between passing them to a
        program and storing the results.
        """
        if self.is_asleep or (keep and not self.memory_is_lost):
            return
        _delete(jax.tree.leaves((self.kv_cache, self.state)))  # before allocating: there may be no room for two
        self._allocate()

    def own_params(self) -> None:
        """Makes this runner the owner of its current weights: `destroy` deletes them."""
        self._made = [weakref.ref(leaf) for leaf in jax.tree.leaves(self.params) if isinstance(leaf, jax.Array)]

    @property
    def owned_params(self) -> bool:
        """Whether this runner owns its weights; see `own_params`."""
        return bool(self._made)

    def release(self, *, delete_params: bool) -> None:
        """Frees the cache and the sampler's state and forgets the weights; with `delete_params` deletes those it owns."""
        self.is_asleep = True  # first: after an interrupt, `restore` completes what is missing
        _delete(jax.tree.leaves((self.kv_cache, self.state)))
        if delete_params:
            _delete([array for ref in self._made if (array := ref()) is not None])
            if self.tower is not None:
                self.tower.release()
        self.params = {}

    def restore(self, params: Params, *, version: int, own: bool) -> None:
        """Undoes `release`, with an empty cache; with `own` it becomes the owner of the weights."""
        _delete(jax.tree.leaves((self.kv_cache, self.state)))
        self._allocate()
        use_huge_pages(read_whole(params))
        self.replace_params(params, version=version)
        if own:
            self.own_params()
        self.is_asleep = False

    def destroy(self) -> None:
        """Frees the device memory immediately, even if something still refers to it, such as a traceback in a notebook."""
        if self.tower is not None:
            self.tower.release()
        self._compiled, self._narrow, self._samplers = {}, {}, {}
        self._with_images = self._no_images = None
        made = [array for ref in self._made if (array := ref()) is not None]
        _delete([*jax.tree.leaves((self.kv_cache, self.state, self.adapters)), *made])
        self.params = {}

    def _allocate(self) -> None:
        self.kv_cache: KVCache
        self.state: SamplerState
        zeros = self.programs.zeros
        if self.mesh is None:
            leaves, structure = jax.tree.flatten(jax.eval_shape(zeros)[0])
            self.kv_cache = jax.tree.unflatten(structure, unfilled(leaves))  # no step reads what none has written
            self.state = self.programs.idle_state(on_host=True)
        else:  # each device allocates its own shard: the whole may not fit on any device
            self.kv_cache, self.state = jax.jit(zeros, out_shardings=memory_shardings(self.mesh, *jax.eval_shape(zeros)))()

    @property
    def budgets(self) -> tuple[int, ...]:
        """Token budgets of the compiled programs, smallest first."""
        return tuple(sorted(self._compiled))

    @property
    def compiled(self) -> Mapping[int, Program]:
        """The programs by their token budgets."""
        return self._compiled

    def bucket(self, num_tokens: int) -> Bucket:
        """The smallest compiled shape for `num_tokens`."""
        compiled = self._compiled
        fitting = [budget for budget in compiled if budget >= num_tokens]
        if not fitting:
            raise ValueError(f"a step of {num_tokens} tokens exceeds the largest compiled budget {max(compiled)}")
        return compiled[min(fitting)].bucket

    def missing(self, budgets: Sequence[int]) -> list[tuple[int, Work]]:
        """Which programs of these budgets have not been compiled: first those that can do everything."""
        wanted: list[tuple[int, Work]] = [(budget, work) for work in self.programs.works for budget in budgets]
        return [key for key in wanted if key not in self._narrow and (key[1] != "any" or key[0] not in self._compiled)]

    def compile(self, programs: Sequence[tuple[int, Work]], *, on_done: Callable[[], object] = lambda: None) -> None:
        """Compiles and warms programs that are `missing`; calls `on_done` after each."""
        for budget, work in programs:
            self.add(self.programs.compile(budget, work))
            on_done()

    def add(self, program: Program | Sampler, *, warm: bool = True) -> None:
        """Makes a program available to the next step; with `warm` after one empty run, so that its first step is fast."""
        if isinstance(program, Sampler):
            if warm:
                *arguments, packed = self.samplers.empty(program.num_rows)
                _, self.state = program.run(*arguments, self.state, packed)
                jax.block_until_ready(self.state)
            self._samplers = {**self._samplers, (program.num_rows, program.work): program}
            return
        if warm:
            self._run(program, program.bucket.new_buffer()[0])
            jax.block_until_ready(self.kv_cache)
        budget = program.bucket.num_tokens
        if program.work == "any":
            self._compiled = {**self._compiled, budget: program}
        else:
            self._narrow = {**self._narrow, (budget, program.work): program}

    def keep_only(self, budgets: Sequence[int]) -> None:
        """Drops the programs of all other budgets."""
        self._compiled = {budget: self._compiled[budget] for budget in budgets}
        self._narrow = {key: program for key, program in self._narrow.items() if key[0] in budgets}

    def add_tower(self, tower: Tower, budget: int) -> None:
        """Compiles what steps with tokens of images need: one program, which such steps of any size run.

        With fixed chunks all steps of requests run it: another would round the text differently.
        """
        self.tower = tower
        if self.config.fixed_chunks:
            self._no_images = tower.no_images(budget, mesh=self.mesh)
        self._with_images = self.programs.compile(budget, images=tower.shapes(budget, mesh=self.mesh))
        tower.warm_up(budget, mesh=self.mesh)

    def images_of(self, step: Step) -> tuple[tuple[StepImages], Bucket] | None:
        """The images among the tokens of a step, and the compiled shape for it; None if it needs no program for images."""
        if self.tower is None or self._with_images is None:
            return None
        bucket = self._with_images.bucket
        images = self.tower.images_of(step, bucket.num_tokens, mesh=self.mesh) or self._no_images
        return None if images is None else ((images,), bucket)

    def run(self, packed: np.ndarray, bucket: Bucket, *images: StepImages) -> StepOutput:
        """Dispatches a step and returns immediately; reading the output waits for it. `images` as from `images_of`."""
        if images:
            assert self._with_images is not None, "there is a tower"
            return self._run(self._with_images, packed, *images)
        budget, program = bucket.num_tokens, None
        if self._narrow:
            program = self._narrow.get((budget, bucket.work_of(packed)))
        return self._run(program or self._compiled[budget], packed)

    @property
    def samples_later(self) -> bool:
        """Whether every step can sample in a program of its own: `run` without sampling, then `sample`."""
        samplers = self._samplers
        return bool(samplers) and all((p.bucket.num_seqs, "any") in samplers for p in self._compiled.values())

    def sample(self, output: StepOutput, sampling: np.ndarray, bucket: Bucket) -> SampleOutput:
        """Dispatches the sampling of a step whose parameters were taken out of its packed array; see `samples_later`."""
        num_rows, program = bucket.num_seqs, None
        if (num_rows, "masked") in self._samplers:
            program = self._samplers.get((num_rows, work_of(sampling, num_rows)))
        program = program or self._samplers[num_rows, "any"]
        sampled, self.state = program.run(output.logits, output.last_tokens, self.state, sampling)
        return sampled

    def _run(self, program: Program, packed: np.ndarray, *images: StepImages) -> StepOutput:
        further = further_arguments(self.adapters, *images)
        output, self.kv_cache, self.state = program.run(self.params, self.kv_cache, self.state, packed, *further)
        return output

    @property
    def weights_are_lost(self) -> bool:
        """Whether someone deleted the weights, for example a trainer whose step has donated them."""
        return not self._made and any(leaf.is_deleted() for leaf in jax.tree.leaves(self.params))

    @property
    def memory_is_lost(self) -> bool:
        """Whether a step took the KV cache or the sampler's state and its results were lost, so that a `reset` is needed."""
        return not self.is_asleep and any(leaf.is_deleted() for leaf in jax.tree.leaves((self.kv_cache, self.state)))

    def replace_params(self, params: Params, *, version: int) -> None:
        """Computes with `params` from the next step on; they must have the shapes and dtypes that the programs expect.

        It does not own them: they may share arrays with weights of the caller.
        """
        self._made = []
        self.params, self.weight_version = params, version

    def copy_block(self, source: int, target: int) -> None:
        """Copies KV block `source` to block `target` in all layers. One small program serves all blocks."""
        if self._copy_block is None:
            placed = None if self.mesh is None else jax.tree.map(lambda leaf: leaf.sharding, self.kv_cache)
            copy = partial(copy_block, num_blocks=self.config.num_blocks)
            self._copy_block = jax.jit(copy, donate_argnums=0, out_shardings=placed)
        self.kv_cache = self._copy_block(self.kv_cache, np.int32(source), np.int32(target))

    def reset_slot(self, slot: int, **tables: Any) -> None:
        """Sets the token history for penalties and the logit bias of a slot; see `sampling.state.reset_slot`."""
        self.state = reset_slot(self.state, slot, **tables)

    def set_masks(self, slots: Sequence[int], masks: np.ndarray) -> None:
        """Limits the next tokens of some slots to those in their masks i32[n, ceil(V / 32)]."""
        self.state = set_masks(self.state, slots, masks)

    def warm_up(self) -> None:
        """Compiles and runs the small programs that change a slot, so that no first call delays a request."""
        self.reset_slot(0, prompt_ids=(), output_ids=(), logit_bias=())
        self.set_masks([0], np.zeros((1, -(-self.model.vocab_size // 32)), np.int32))
        if self.adapters is not None:
            nothing = adapter_arrays({"layers": {}}, self.model, self.config, scale=1.0)
            self.adapters = write(self.adapters, nothing, 0)

    def time_step(self, program: Program, num_tokens: int) -> float:
        """Seconds of a step of `num_tokens` in a program: one prompt chunk at the start of its sequence.

        Neither the KV cache nor the state of a slot changes.
        """
        buffer, views = program.bucket.new_buffer()  # whose slots in the cache are out of range, so that nothing is written
        views["query_starts"][1:] = num_tokens
        views["context_lens"][0] = num_tokens
        blocks = -(-num_tokens // self.config.block_size)
        views["block_tables"][0, :blocks] = np.arange(blocks)
        if "windowed.context_lens" in views:
            views["windowed.context_lens"][:, 0] = num_tokens
            views["windowed.block_tables"][:, 0, :blocks] = np.arange(blocks)
        views["positions"][:num_tokens] = np.arange(num_tokens)
        views["sample_rows"][0] = num_tokens - 1
        views["num_sample_rows"][...] = 1
        start = time.perf_counter()
        jax.block_until_ready(self._run(program, buffer))
        return time.perf_counter() - start

    def measure(self, budget: int, *, num_tokens: int | None = None, **limits: float) -> float:
        """Seconds of a step of `num_tokens` (default: all) in the program of `budget`: the `shortest` of several runs.

        `limits` are those of `is_measured`.
        """
        times: list[float] = []
        while not is_measured(times, **limits):
            times.append(self.time_step(self._compiled[budget], budget if num_tokens is None else num_tokens))
        return shortest(times)


def is_measured(times: Sequence[float], *, repeats: float = 5, at_least: float = 0.4) -> bool:
    """Whether a step ran often enough: `repeats` times and for `at_least` seconds, after a run that pays for page faults."""
    return len(times) > repeats and sum(times[1:]) >= at_least


def shortest(times: Sequence[float]) -> float:
    """The time of a step, from its runs: other load on the machine can only add to it."""
    return min(times[1:] or times)


def read_whole(params: Params) -> Params:
    """The weights that every step reads completely."""
    return {name: leaf for name, leaf in params.items() if name != "embed" or "lm_head" not in params}


def _delete(arrays: Sequence[jax.Array]) -> None:
    for array in arrays:
        array.delete()  # no effect if it was deleted before
