"""A scheduled step as one array, which the host sends to the device once per step."""

from __future__ import annotations

import functools
import math
from collections import abc
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.core import RaggedBatch
from fastgen_jax.engine.grids import rope_positions
from fastgen_jax.engine.resolve import ResolvedConfig
from fastgen_jax.engine.sampling.sampler import Work
from fastgen_jax.engine.sampling.tables import SamplingBatch, SamplingTables, sampling_fields
from fastgen_jax.scheduling import BlockGroups, Chunk, Sequence, Step
from pallas_kernels.ragged_attention import RaggedIndex

T = TypeVar("T")


class Field(NamedTuple):
    """One array inside the packed one."""

    name: str
    shape: tuple[int, ...]
    dtype: type[np.generic] = np.int32


class Layout:
    """The place of each field in a flat int32 array; fields of other 4-byte types keep their bit pattern."""

    def __init__(self, fields: abc.Sequence[Field]) -> None:
        self._places: dict[str, tuple[int, Field]] = {}
        self.size = 0
        for field in fields:
            if np.dtype(field.dtype).itemsize != 4:
                raise ValueError(
                    f"field {field.name!r} has dtype {field.dtype}; a packed field must have 4 bytes per element"
                )
            self._places[field.name] = (self.size, field)
            self.size += math.prod(field.shape)

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Writable views of `buffer` i32[size], one per field."""
        return {
            name: buffer[start : start + math.prod(field.shape)].view(field.dtype).reshape(field.shape)
            for name, (start, field) in self._places.items()
        }

    def unpack(self, packed: jax.Array) -> dict[str, jax.Array]:
        """The fields of `packed` i32[size], on the device."""
        arrays = {}
        for name, (start, field) in self._places.items():
            flat = packed[start : start + math.prod(field.shape)]
            if np.dtype(field.dtype) != np.int32:
                flat = jax.lax.bitcast_convert_type(flat, field.dtype)
            arrays[name] = flat.reshape(field.shape)
        return arrays


@functools.cache
def sampling_layout(num_rows: int) -> Layout:
    """The fields of `SamplingBatch` for so many rows, by their own names."""
    return Layout([Field(name, shape, dtype) for name, shape, dtype in sampling_fields(num_rows)])


class Bucket:
    """A compiled shape: `num_tokens` T, with rows for `num_seqs` S sequences and as many sampled tokens.

    `groups` are the cache groups. The second and later ones have tables of the blocks that T tokens see, from the first of
    these on. With `has_states` a batch has the slots of its sequences, with `has_grids` three streams of positions.
    `num_slots` counts the slots of tokens in the cache.
    """

    def __init__(
        self,
        num_tokens: int,
        *,
        max_num_seqs: int,
        max_blocks: int,
        num_slots: int,
        vocab_size: int,
        num_adapters: int = 0,
        groups: BlockGroups | None = None,
        has_states: bool = False,
        has_grids: bool = False,
    ) -> None:
        self.num_tokens = num_tokens
        self.num_seqs = min(num_tokens, max_num_seqs)
        self.max_blocks = max_blocks
        windowed: list[Field] = []
        if groups is not None and groups.num_groups > 1:
            count, *_ = shape = (groups.num_groups - 1, self.num_seqs)
            width = min(max_blocks, max(groups.blocks_spanned(w, num_tokens) for w in groups.windows[1:]))
            windowed = [
                Field("windowed.kv_slots", (count, num_tokens)),
                Field("windowed.context_lens", shape),
                Field("windowed.block_tables", (*shape, width)),
            ]
        self.layout = Layout(
            [
                Field("token_ids", (num_tokens,)),
                Field("token_slots", (num_tokens,)),
                Field("positions", (num_tokens,)),
                Field("rope_lengths", (num_tokens,)),
                Field("kv_slots", (num_tokens,)),
                Field("query_starts", (self.num_seqs + 1,)),
                Field("context_lens", (self.num_seqs,)),
                Field("block_tables", (self.num_seqs, max_blocks)),
                Field("sample_rows", (self.num_seqs,)),
                Field("num_sample_rows", ()),
                *([Field("adapters", (num_tokens,))] if num_adapters else []),
                *([Field("rope_positions", (3, num_tokens))] if has_grids else ()),
                *([Field("slots", (self.num_seqs,))] if has_states else ()),
                *windowed,
                *(Field(f"sampling.{name}", shape, dtype) for name, shape, dtype in sampling_fields(self.num_seqs)),
            ]
        )
        # An empty step, copied and filled for each real one.
        self._empty = np.zeros(self.layout.size, np.int32)
        views = self.layout.views(self._empty)
        views["token_slots"][:] = max_num_seqs
        for name in ("kv_slots", "windowed.kv_slots"):
            if name in views:
                views[name][:] = num_slots
        if num_adapters:
            views["adapters"][:] = num_adapters
        if has_states:
            views["slots"][:] = max_num_seqs
        SamplingTables.clear(_sampling_part(views), max_num_seqs=max_num_seqs, vocab_size=vocab_size)

    def new_buffer(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A new packed array of an empty step, and its views.

        New each time: on a CPU the device may read the host's memory in place while the next step is packed.
        """
        buffer = self._empty.copy()
        return buffer, self.layout.views(buffer)

    def take_sampling(self, packed: np.ndarray) -> np.ndarray:
        """Takes the sampling parameters out of a packed step, which then samples nothing, in the order of `sampling_layout`.

        It still computes the logits of its rows.
        """
        start = self.layout.size - sampling_layout(self.num_seqs).size  # they come last
        sampling = packed[start:].copy()
        packed[start:] = self._empty[start:]
        return sampling

    def work_of(self, packed: np.ndarray) -> Work:
        """The least that a program must be able to do for a packed step."""
        flags = {name: bool(view) for name, view in self.layout.views(packed).items() if name.startswith("sampling.any_")}
        draws = flags.pop("sampling.any_sampling")
        return "any" if any(flags.values()) else "sampled" if draws else "greedy"

    def unpack(self, packed: jax.Array) -> tuple[RaggedBatch, SamplingBatch]:
        """The typed batches inside `packed`, on the device."""
        arrays = self.layout.unpack(packed)
        sampling = SamplingBatch(**_sampling_part(arrays))
        kinds = ("kv_slots", "query_starts", "context_lens", "block_tables")
        index = RaggedIndex(**{name: arrays.pop(name) for name in kinds}, plans=None)
        others: tuple[RaggedIndex, ...] = ()
        windowed = _part(arrays, "windowed.")
        if windowed:  # all tables are equally wide, so that a layer can take any; the rest is never read
            tables = windowed["block_tables"]
            windowed["block_tables"] = jnp.pad(tables, ((0, 0), (0, 0), (0, self.max_blocks - tables.shape[2])))
            others = tuple(
                replace(index, **{name: array[group] for name, array in windowed.items()}) for group in range(len(tables))
            )
        rest = {name: array for name, array in arrays.items() if "." not in name}
        return RaggedBatch(index=index, windowed=others, **rest), sampling


class Packer:
    """Fills packed arrays from scheduled steps; keeps a copy of the block tables, updated by each step."""

    def __init__(self, config: ResolvedConfig, tables: SamplingTables) -> None:
        num_groups, max_num_seqs = len(config.windows), config.max_num_seqs
        self._block_tables = np.zeros((num_groups * max_num_seqs, config.max_blocks), np.int32)
        self._block_size = config.block_size
        self._windows = np.array(config.windows[1:], np.int32)[:, None]  # [G - 1, 1]
        self._first_rows = np.arange(1, num_groups, dtype=np.int32)[:, None] * max_num_seqs
        self._num_adapters = config.num_adapters
        self._tables = tables

    def pack(self, step: Step, bucket: Bucket) -> np.ndarray:
        """The packed array i32 of `step`, padded to `bucket`; its chunks are in the order of `by_adapter`."""
        for row, first, block_ids in step.block_updates:
            self._block_tables[row, first : first + len(block_ids)] = block_ids
        buffer, v = bucket.new_buffer()
        chunks = step.chunks
        n = len(chunks)
        slots = np.array([chunk.sequence.slot for chunk in chunks], np.int32)
        starts = np.array([chunk.start for chunk in chunks], np.int32)
        lengths = np.array([chunk.length for chunk in chunks], np.int32)
        ends = np.cumsum(lengths, dtype=np.int32)
        total = int(ends[-1])

        contexts = starts + lengths
        blocks_used = -(-int(contexts.max()) // self._block_size)
        tables = self._block_tables[slots, :blocks_used]
        v["query_starts"][1 : n + 1] = ends
        v["query_starts"][n + 1 :] = total
        v["context_lens"][:n] = contexts
        v["block_tables"][:n, :blocks_used] = tables
        if "slots" in v:
            v["slots"][:n] = slots

        if total == n:  # every chunk is one token
            rows, positions = np.arange(n), starts
        else:
            rows = np.repeat(np.arange(n), lengths)
            positions = np.arange(total, dtype=np.int32) + np.repeat(starts - (ends - lengths), lengths)
        block, offset = np.divmod(positions, self._block_size)
        v["positions"][:total] = positions
        if "rope_positions" in v:
            v["rope_positions"][:, :total] = positions
            for chunk, end in zip(chunks, ends.tolist(), strict=True):
                if images := chunk.sequence.request.images:
                    found = rope_positions(images, chunk.start, chunk.start + chunk.length)
                    v["rope_positions"][:, end - chunk.length : end] = found
        v["kv_slots"][:total] = tables[rows, block] * self._block_size + offset
        if "adapters" in v:
            places = (chunk.sequence.request.adapter_place for chunk in chunks)
            adapters = np.array([self._num_adapters if place is None else place for place in places], np.int32)
            v["adapters"][:total] = adapters[rows]
        if len(self._windows):
            self._fill_windowed(v, slots, starts, contexts)
            at = self._block_tables[(self._first_rows + slots)[:, rows], block] * self._block_size + offset
            v["windowed.kv_slots"][:, :total] = at
        self._fill_tokens(step, ends, v["token_ids"], v["token_slots"])
        prompt_lengths = np.array([chunk.sequence.num_prompt_tokens for chunk in chunks], np.int32)
        v["rope_lengths"][:total] = np.maximum(positions + 1, prompt_lengths[rows])
        self._fill_sample_rows(step, slots, contexts, ends, v)
        return buffer

    def _fill_windowed(self, v: dict[str, np.ndarray], slots: np.ndarray, starts: np.ndarray, contexts: np.ndarray) -> None:
        """Tables and contexts of the windowed groups, from the block with the first key that a chunk sees."""
        n, size = len(slots), self._block_size
        first = np.maximum(starts - self._windows + 1, 0) // size  # [G - 1, n]
        width = int((-(-contexts // size) - first).max())
        columns = np.minimum(first[:, :, None] + np.arange(width), self._block_tables.shape[1] - 1)
        v["windowed.context_lens"][:, :n] = contexts - first * size
        v["windowed.block_tables"][:, :n, :width] = self._block_tables[(self._first_rows + slots)[:, :, None], columns]

    def _fill_tokens(self, step: Step, ends: np.ndarray, token_ids: np.ndarray, token_slots: np.ndarray) -> None:
        host_rows, host_tokens, device_rows, device_slots = [], [], [], []
        for chunk, end in zip(step.chunks, ends.tolist(), strict=True):
            sequence, start, length = chunk.sequence, chunk.start, chunk.length
            generated = start - sequence.num_prompt_tokens
            if length == 1 and generated >= 0:
                output = sequence.output_token_ids
                if generated < len(output):
                    host_rows.append(end - 1)
                    host_tokens.append(output[generated])
                else:  # sampled by a step whose tokens the host has not read yet
                    device_rows.append(end - 1)
                    device_slots.append(sequence.slot)
            else:
                token_ids[end - length : end] = sequence.token_ids(start, start + length)
        token_ids[host_rows] = host_tokens
        token_slots[device_rows] = device_slots

    def _fill_sample_rows(
        self, step: Step, slots: np.ndarray, contexts: np.ndarray, ends: np.ndarray, v: dict[str, np.ndarray]
    ) -> None:
        if all(chunk.num_sample_rows <= 1 for chunk in step.chunks):
            sampled = [i for i, chunk in enumerate(step.chunks) if chunk.num_sample_rows]
            rows, row_slots, positions = ends[sampled] - 1, slots[sampled], contexts[sampled]
            writes = np.array([step.chunks[i].samples for i in sampled], np.int32)
            wanted: dict[int, int] = {}
            if not writes.all():
                chunks = [step.chunks[i] for i in sampled]
                wanted = {row: t for row, chunk in enumerate(chunks) if (t := _token_after(chunk)) is not None}
        else:
            rows, row_slots, positions, writes, wanted = [], [], [], [], {}
            for i, chunk in enumerate(step.chunks):
                prompt = chunk.sequence.request.prompt_token_ids
                for back in range(chunk.num_sample_rows, 0, -1):
                    position = int(contexts[i]) - back + 1  # of the token that this row predicts
                    samples = chunk.samples and back == 1
                    if not samples and position < len(prompt):
                        wanted[len(rows)] = prompt[position]
                    rows.append(int(ends[i]) - back)
                    row_slots.append(int(slots[i]))
                    positions.append(position)
                    writes.append(int(samples))
            rows, row_slots, positions, writes = (np.array(x, np.int32) for x in (rows, row_slots, positions, writes))
        given = self._tables.next_tokens
        if given:
            wanted |= {row: given[slot] for row, slot in enumerate(row_slots.tolist()) if slot in given and writes[row]}
        n = len(rows)
        v["sample_rows"][:n] = rows
        v["num_sample_rows"][...] = n
        self._tables.fill(_sampling_part(v), slots=row_slots, positions=positions, writes_token=writes, targets=wanted)


def by_adapter(step: Step) -> None:
    """Orders the chunks of a step by their adapters; those without one come last."""

    def key(sequence: Sequence) -> float:
        place = sequence.request.adapter_place
        return math.inf if place is None else place

    step.chunks.sort(key=lambda chunk: key(chunk.sequence))
    step.sampled.sort(key=key)  # sorting is stable, so it stays in the order of the chunks


def _token_after(chunk: Chunk) -> int | None:
    """The prompt token that the last row of a chunk predicts; None if it samples one."""
    prompt, position = chunk.sequence.request.prompt_token_ids, chunk.start + chunk.length
    return prompt[position] if not chunk.samples and position < len(prompt) else None


def _sampling_part(arrays: Mapping[str, T]) -> dict[str, T]:
    return _part(arrays, "sampling.")


def _part(arrays: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
