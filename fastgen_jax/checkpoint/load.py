"""Loads the parameters of a model from a checkpoint."""

from __future__ import annotations

import functools
import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from fastgen_jax.checkpoint.base import Checkpoint, HoldsBlocks, is_buffer, missing_tensor
from fastgen_jax.checkpoint.block_kind import BlockKind, common_kind
from fastgen_jax.checkpoint.kept_blocks import read_kept
from fastgen_jax.checkpoint.layer_stack import LayerStack
from fastgen_jax.checkpoint.snapshot import SnapshotCheckpoint
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.params import head_spec, layer_specs, layers_with, model_specs
from fastgen_jax.models.weight_spec import DType, Kind, Leaf, Params, WeightSpec
from pallas_kernels.aligned import aligned_empty

if TYPE_CHECKING:
    from jax.sharding import Sharding

    from fastgen_jax.core.progress import Phases

log = logging.getLogger(__name__)

FLOATS = frozenset({"float32", "float16", "bfloat16"})
"""Types of tensors that are not quantized."""
_THREADS = 3  # NumPy releases the GIL
# Weights in work behind the oldest, which take host memory beyond the model: so many, or more if they are together no larger
# than the oldest, so that an embedding does not keep the layers waiting.
_AHEAD = 3


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One array of a model, that of layer number `layer` if the weight is per layer, and the tensors that make it."""

    spec: WeightSpec
    layer: int | None
    source: Source
    omitted: str = ""
    """Prefix of tensor names that the checkpoint leaves out."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name.format(layer=self.layer).removeprefix(self.omitted) for name in self.source.names)

    @property
    def constants(self) -> tuple[tuple[str, float], ...]:
        """The scalars that are stored beside it, by name."""
        return tuple((name.format(layer=self.layer), value) for name, value in self.source.constants)

    @property
    def num_bytes(self) -> int:
        """Bytes of the array in float32."""
        return 4 * math.prod(self.spec.shape)


def load_params(
    checkpoint: Checkpoint,
    *,
    dtype: DType | None,
    stack_layers: bool = True,
    prepare: Callable[[WeightSpec, Leaf], Leaf] | None = None,
    sharding: Callable[[WeightSpec], Sharding] | None = None,
    keep_blocks: bool | Literal["fp8"] | Collection[str] = False,
    progress: bool | Phases = False,
) -> Params:
    """All weights of a checkpoint as `Params`. A missing or unknown tensor, or one of another shape, is a ValueError.

    `prepare(spec, array)` returns the leaf of one weight (of one layer), given its declaration and the array [in, out] as
    stored: float32, float16 or bfloat16. It may return any pytree of arrays, and `dtype` is then ignored. Without
    `prepare`, the leaf is the array in `dtype`. `sharding(spec)` is the sharding of a weight (of one layer); `prepare` then
    receives an array that is already on its devices. With `keep_blocks`, `prepare` receives a `BlockWeight` or `BlockGroups`
    for each of `kept_in_blocks`, or with "fp8" for those of 8-bit floats, or for those with one of the given paths. An
    int8 snapshot yields `Int8Weight`s instead of matrices. Threads call `prepare` for a few weights at a time, so that the
    host never holds more in addition to what it returned. `progress` shows a bar on stderr, or is the display of a start of
    which this is a phase.
    """
    from fastgen_jax.core.progress import shown  # `core` imports JAX, which inspecting a checkpoint does not need

    weights = list(stored_weights(checkpoint))
    check_tensors(checkpoint)
    make = prepare or functools.partial(_plain, dtype=dtype)
    kept = kept_in_blocks(checkpoint) if keep_blocks else {}
    if keep_blocks == "fp8":
        kept = {path: kind for path, kind in kept.items() if kind.is_float8}
    elif not isinstance(keep_blocks, bool):
        kept = {path: kind for path, kind in kept.items() if path in keep_blocks}
    params: Params = {}
    layers: list[dict[str, Leaf]] = [{} for _ in range(checkpoint.config.num_layers)]
    having = layers_with(checkpoint.config)
    stacks = {name: LayerStack(f"layers.{name}", len(rows)) for name, rows in having.items()}
    count = sum(math.prod(weight.spec.shape) // (weight.spec.shape[0] if weight.source.stacked else 1) for weight in weights)
    log.info("loading %s from %s: %s parameters", checkpoint.config.family, checkpoint.path, f"{count:,}")
    if "lm_head" in kept and checkpoint.config.tie_embeddings:
        weights.insert(0, _tied_head(checkpoint, weights))

    def load(weight: Weight) -> Leaf:
        return make(weight.spec, _read(checkpoint, weight, kept=kept, dtype=dtype, sharding=sharding))

    progressing = shown(log, "loading weights", total=len(weights), unit="weight", bar=progress)
    with ThreadPoolExecutor(_THREADS) as pool, progressing as advance:
        for weight, leaf in _loaded(load, weights, pool):
            name = weight.spec.name
            if weight.layer is None:
                params[name] = leaf
            elif stack_layers:
                stacks[name].set_row(having[name].index(weight.layer), leaf)
            else:
                layers[weight.layer][name] = leaf
            advance()
    params["layers"] = {name: stack.leaf() for name, stack in stacks.items()} if stack_layers else tuple(layers)
    return params


def kept_in_blocks(checkpoint: Checkpoint) -> dict[str, BlockKind]:
    """The weights, by path, that a checkpoint holds in blocks in all layers, and their kind; "lm_head" too if it is tied."""
    return {path: kind for path, kind in quantized_weights(checkpoint).items() if isinstance(kind, BlockKind)}


def quantized_weights(checkpoint: Checkpoint) -> dict[str, BlockKind | str]:
    """The matrices, by path, that a checkpoint holds quantized in some layer; "lm_head" too if it is tied.

    Each with the kind of its blocks, or the types of its tensors if they have no common one. Reads headers, and of GPTQ and
    AWQ which group an input is in, and the zero points.
    """
    if not isinstance(checkpoint, HoldsBlocks):
        return {}
    names: dict[str, dict[str, None]] = {}
    for weight in stored_weights(checkpoint):
        if weight.spec.kind in (Kind.MATRIX, Kind.EXPERTS):
            names.setdefault(weight.spec.path, {}).update(dict.fromkeys(weight.names))
    if checkpoint.config.tie_embeddings:
        names["lm_head"] = {checkpoint.sources["embed"].names[0]: None}
    found: dict[str, BlockKind | str] = {}
    for path, tensors in names.items():
        kind = common_kind({checkpoint.block_kind(name) for name in tensors})
        types = sorted({checkpoint.dtype(name) for name in tensors if name in checkpoint.tensor_names})
        if kind is not None:
            found[path] = kind
        elif not FLOATS.issuperset(types) and not isinstance(checkpoint, SnapshotCheckpoint):  # whose int8 stays
            found[path] = ", ".join(types)
    return found


def _tied_head(checkpoint: Checkpoint, weights: Sequence[Weight]) -> Weight:
    embed = next(weight for weight in weights if weight.spec.name == "embed")
    return replace(embed, spec=head_spec(checkpoint.config))


def _plain(spec: WeightSpec, array: Leaf, *, dtype: DType | None) -> Leaf:
    """A weight as a JAX array; a CPU device uses a host array of the right dtype without copying it."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.matmul import Int8Weight

    if isinstance(array, Int8Weight):
        return jax.tree.map(jax.device_put, array)
    if isinstance(array, jax.Array):
        return jnp.asarray(array, dtype)
    return jax.device_put(np.asarray(array).astype(jnp.dtype(dtype), copy=False))


def check_tensors(checkpoint: Checkpoint) -> None:
    """Raises ValueError unless the checkpoint holds exactly the tensors that its config requires, in the right shapes.

    Reads only headers, except for tensors that are not in the config: the head of a checkpoint with tied embeddings must
    equal the embedding, and biases must be zeros.
    """
    config, names = checkpoint.config, checkpoint.tensor_names
    expected = required_tensors(checkpoint)
    for name, shape in expected.items():
        if name not in names:
            raise missing_tensor(name, checkpoint.path, names)
        if checkpoint.shape(name) != shape:
            raise ValueError(
                f"{checkpoint.path}: tensor {name!r} has shape {checkpoint.shape(name)}, but the config "
                f"requires {shape}; the file and its config do not match"
            )
    extra = {name for name in names - expected.keys() if not is_buffer(name)}
    if config.tie_embeddings and "lm_head.weight" in extra:
        _check_tied(checkpoint)
        extra.remove("lm_head.weight")
    # Tools for quantization add biases to all layers. Reading stops at the first one that is not zero.
    if extra and all(name.endswith(".bias") and not checkpoint.read(name).any() for name in sorted(extra)):
        return
    if extra:
        some = ", ".join(map(repr, sorted(extra)[:3]))
        raise ValueError(
            f"{checkpoint.path} holds {len(extra)} tensors that the {config.family} family does not know "
            f"({some}{', ...' if len(extra) > 3 else ''}); ignoring them would change the model's output"
        )


def required_tensors(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors that the config of a checkpoint requires; reads none of them."""
    required: dict[str, tuple[int, ...]] = {}
    for weight in stored_weights(checkpoint):
        required |= dict(zip(weight.names, stored_shapes(weight), strict=True))
    return required


def _check_tied(checkpoint: Checkpoint) -> None:
    (embedding,) = checkpoint.sources["embed"].names
    head, embed = checkpoint.read("lm_head.weight"), checkpoint.read(embedding)
    if head.shape != embed.shape or not np.array_equal(head, embed):
        raise ValueError(
            f"{checkpoint.path}: the config ties the embeddings, but 'lm_head.weight' differs from "
            f"{embedding!r}; set tie_word_embeddings to false in config.json, or remove the tensor"
        )


def stored_weights(checkpoint: Checkpoint) -> Iterator[Weight]:
    """Every array of the model, layer by layer, the usual order in files."""
    config, sources = checkpoint.config, checkpoint.sources
    # Checkpoints of the bare model, such as those of GPT-2 and BLOOM, leave out the prefix of the model.
    model = sources["embed"].names[0].split(".")[0] + "."
    omitted = "" if any(name.startswith(model) for name in checkpoint.tensor_names) else model
    return weights_of(config, sources, omitted=omitted)


def weights_of(config: ModelConfig, sources: Mapping[str, Source], *, omitted: str = "") -> Iterator[Weight]:
    """Every array of a model, layer by layer."""
    for spec in model_specs(config).values():
        yield Weight(spec=spec, layer=None, source=sources[spec.path], omitted=omitted)
    for layer in range(config.num_layers):
        for spec in layer_specs(config, layer).values():
            yield Weight(spec=spec, layer=layer, source=sources[spec.path], omitted=omitted)


def stored_shapes(weight: Weight) -> list[tuple[int, ...]]:
    """The shape of each tensor of a weight: that of the spec, or of its parts if they are separate tensors."""
    shape, source = weight.spec.shape, weight.source
    if source.stacked:
        shape = shape[1:]
    pieces = len(source.names) // (weight.spec.shape[0] if source.stacked else 1)
    sizes = (shape[-1],) if pieces == 1 else weight.spec.parts
    shapes = [(*shape[:-1], size) for size in sizes]
    shapes = [(*rest, n, m) for *rest, m, n in shapes] if source.transpose else shapes
    shapes = [(1, *rest) for rest in shapes] if source.is_row else shapes
    shapes = [(n, 1, tokens) for tokens, n in shapes] if source.is_conv else shapes
    return shapes * (len(source.names) // pieces)


def _loaded(
    load: Callable[[Weight], Leaf], weights: Sequence[Weight], pool: ThreadPoolExecutor
) -> Iterator[tuple[Weight, Leaf]]:
    """The weights in order, each with its leaf; the pool works ahead."""
    pending: deque[tuple[Weight, Future[Leaf]]] = deque()
    upcoming = deque(weights)
    ahead = 0  # bytes of all pending weights but the oldest
    while pending or upcoming:
        while upcoming and (len(pending) <= _AHEAD or ahead + upcoming[0].num_bytes <= pending[0][0].num_bytes):
            weight = upcoming.popleft()
            ahead += weight.num_bytes if pending else 0
            pending.append((weight, pool.submit(load, weight)))
        weight, future = pending.popleft()
        ahead -= pending[0][0].num_bytes if pending else 0
        yield weight, future.result()


def _read(
    checkpoint: Checkpoint,
    weight: Weight,
    *,
    kept: Mapping[str, BlockKind],
    dtype: DType | None,
    sharding: Callable[[WeightSpec], Sharding] | None,
) -> Leaf:
    """One weight in memory, not mapped: on the host, or on devices as `sharding` says."""
    import jax

    if weight.spec.path in kept and isinstance(checkpoint, HoldsBlocks):
        return read_kept(checkpoint, weight.spec, weight.source, weight.names, kept[weight.spec.path])
    if sharding is None:
        array = assemble(checkpoint, weight)
        return _in_memory(array) if isinstance(array, np.memmap) else array
    place = sharding(weight.spec)
    if isinstance(checkpoint, SnapshotCheckpoint):
        (name,) = weight.names
        return checkpoint.restore(name, dtype=dtype, sharding=place)
    whole = assemble(checkpoint, weight)
    return jax.make_array_from_callback(whole.shape, place, lambda index: np.asarray(whole[index], dtype))


def _in_memory(mapped: np.ndarray) -> np.ndarray:
    array = aligned_empty(mapped.shape, mapped.dtype)
    array[...] = mapped
    return array


def assemble(checkpoint: Checkpoint, weight: Weight) -> np.ndarray:
    """One weight in the shape of its spec: tensors stacked and concatenated, and matrices transposed to [in, out].

    `export.take_apart` is the inverse.
    """
    source, shape = weight.source, weight.spec.shape
    if source.is_conv:
        (name,) = weight.names
        return np.ascontiguousarray(checkpoint.read(name)[:, 0].T)
    if len(weight.names) == 1 and not source.transpose and source.rearrange is None:
        stored = checkpoint.read(weight.names[0])
        return stored[0] if source.is_row else stored
    out: np.ndarray | None = None
    entries = shape[0] if source.stacked else 1
    start = 0
    for i, name in enumerate(weight.names):
        piece = checkpoint.read(name)
        piece = piece.swapaxes(-1, -2) if source.transpose else piece
        if out is None:
            out = aligned_empty(shape, piece.dtype)
        if i % (len(weight.names) // entries) == 0:
            start = 0
        whole = out[i * entries // len(weight.names)] if source.stacked else out
        whole[..., start : start + piece.shape[-1]] = piece
        start += piece.shape[-1]
    assert out is not None, "every weight has a source"
    return out if source.rearrange is None else source.rearrange(out)
