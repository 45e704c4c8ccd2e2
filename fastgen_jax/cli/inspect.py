"""`fastgen inspect`: shows what a checkpoint contains, reading only its headers."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from dataclasses import fields
from typing import TYPE_CHECKING

from fastgen_jax.cli.parser import Options
from fastgen_jax.flags import MODEL_HELP

if TYPE_CHECKING:
    from fastgen_jax.checkpoint import Checkpoint
    from fastgen_jax.checkpoint.block_kind import BlockKind
    from fastgen_jax.models.config import ModelConfig
    from pallas_kernels.matmul import Int4Kernel

_PLAIN = ("float32", "bfloat16", "float16")
KV_DTYPES = {"float32": 4, "bfloat16": 2, "int8": 1}  # bytes per number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("model", metavar="PATH", help=MODEL_HELP)
    parser.add_argument("--template", action="store_true", help="print the chat template in full")


def run(options: Options) -> int:
    """Runs the command and returns the exit code."""
    from fastgen_jax.checkpoint import open_checkpoint, resolve_model
    from fastgen_jax.text import load_tokenizer

    checkpoint = open_checkpoint(resolve_model(options["model"]))
    for name, value in describe(checkpoint).items():
        print(f"{name:<16}{value}")
    print("config")
    for field in fields(checkpoint.config):
        value = getattr(checkpoint.config, field.name)
        if value != field.default:  # fields at their default say nothing about this model
            print(f"  {field.name:<22}{value}")
    try:
        tokenizer = load_tokenizer(checkpoint.tokenizer_source)
    except ValueError as error:
        print(f"tokenizer       none: {error}")
        return 0
    names = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_ids}
    print(
        f"tokenizer       {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, "
        + ", ".join(f"{name} {value}" for name, value in names.items())
    )
    print(f"chat templates  {', '.join(tokenizer.templates) or 'none'}")
    if options["template"]:
        for name, text in tokenizer.templates.items():
            print(f"--- {name}\n{text}")
    return 0


def describe(checkpoint: Checkpoint) -> dict[str, str]:
    """The facts of a checkpoint that are known without reading its weights, by name."""
    from fastgen_jax.core import scale_bytes
    from fastgen_jax.models.counts import count_params

    config = checkpoint.config
    parameters = count_params(config)
    stored: Counter[str] = Counter()
    for name in checkpoint.tensor_names:
        stored[checkpoint.dtype(name)] += math.prod(checkpoint.shape(name))
    total = sum(stored.values())
    shares = ", ".join(f"{dtype} {100 * count / total:.1f} %" for dtype, count in stored.most_common())
    weights = ", ".join(f"{parameters * size:,} as {dtype}" for dtype, size in KV_DTYPES.items() if size > 1)
    kv = ", ".join(
        f"{config.kv_bytes_per_token(size, scale_bytes=scale_bytes(dtype)):,} as {dtype}"
        for dtype, size in KV_DTYPES.items()
    )
    facts = {
        "path": str(checkpoint.path),
        "architecture": ", ".join(checkpoint.config_json["architectures"]),
        "parameters": f"{parameters:,}",
        "vision tower": _vision(checkpoint),
        "quantization": checkpoint.quantization,
        "stored as": shares,
        "loaded as": _loaded_as(checkpoint, stored),
        "weight bytes": weights,
        "KV bytes/token": kv,
        "state": _state(config),
        "sampling": _sampling(checkpoint),
    }
    return {name: value for name, value in facts.items() if value}


def _state(config: ModelConfig) -> str:
    """What a sequence holds beside keys and values; empty for most models."""
    from fastgen_jax.models.states import state_shapes

    shapes = state_shapes(config, "cpu")
    return f"{shapes.num_bytes:,} bytes per sequence, in {shapes.num_layers} layers; no prefix cache" if config.state else ""


def _loaded_as(checkpoint: Checkpoint, stored: Counter[str]) -> str:
    """What becomes of quantized weights; empty if there are none, and for a snapshot, whose weights stay as they are."""
    from fastgen_jax.checkpoint import SnapshotCheckpoint, kept_in_blocks, quantized_weights
    from fastgen_jax.checkpoint.base import HoldsBlocks
    from fastgen_jax.engine.kept_forms import choose_forms, counted, numbers_of
    from fastgen_jax.models.params import all_specs, head_spec, layers_with

    if not isinstance(checkpoint, HoldsBlocks) or all(dtype in _PLAIN for dtype in stored):
        return ""
    head, having = head_spec(checkpoint.config), layers_with(checkpoint.config)
    specs = {head.path: head} | all_specs(checkpoint.config)
    kept: Counter[BlockKind] = Counter()
    for path, kind in kept_in_blocks(checkpoint).items():
        # A tied head is the embedding once more.
        copies = len(having[specs[path].name]) if specs[path].per_layer else 1
        kept[kind] += copies * math.prod(specs[path].shape)
    parts = [
        f"{100 * count / stored.total():.1f} % in {kind.name} ({kind.bits:.2f} bits each)"
        for kind, count in kept.most_common()
        if count
    ]
    if not parts:
        return "" if isinstance(checkpoint, SnapshotCheckpoint) else "dequantized"
    places = [f"CPUs with native kernels: {', '.join(parts)}"]
    float8 = any(kind.is_float8 for kind in kept)
    devices: tuple[tuple[str, Int4Kernel, str], ...] = (
        ("TPU7x" if float8 else "TPUs", "tpu", "tpu"),
        ("H100 and H200" if float8 else "GPUs with kernels for 4 bits", "hopper", "gpu"),
    )
    for name, kernel, platform in devices:
        found = choose_forms(
            tuple(quantized_weights(checkpoint).items()),
            checkpoint.config,
            kernel=kernel,
            platform=platform,
            activations="bfloat16",
            float8=float8,
        )
        if found.kept:
            share = 100 * counted(found.kept, checkpoint.config) / stored.total()
            places.append(f"{name}: {share:.1f} % in {numbers_of(found.kept)}")
    return f"{'; '.join(places)}; else dequantized"


def _vision(checkpoint: Checkpoint) -> str:
    """The part of a checkpoint that reads images; empty if there is none."""
    from fastgen_jax.checkpoint import images_of
    from fastgen_jax.checkpoint.huggingface import HuggingFaceCheckpoint
    from fastgen_jax.models.vision.read import tower_bytes

    if not isinstance(checkpoint, HuggingFaceCheckpoint) or not checkpoint.around_text:
        return ""
    try:
        images = images_of(checkpoint)
    except ValueError as error:
        return f"none: {error}"
    if images is None:
        return f"not read: {len(checkpoint.around_text)} tensors"
    sizes = ", ".join(f"{tower_bytes(images, size):,} bytes as {dtype}" for dtype, size in KV_DTYPES.items() if size > 1)
    return f"{images.tower.shown}, {sizes}"


def _sampling(checkpoint: Checkpoint) -> str:
    from fastgen_jax.engine.generation import defaults_of_model

    try:
        defaults = defaults_of_model(checkpoint.generation_config, checkpoint.path)
    except ValueError as error:
        return f"none: {error}"
    return ", ".join(f"{name} {value}" for name, value in defaults) or "no defaults: temperature 1, all tokens kept"
