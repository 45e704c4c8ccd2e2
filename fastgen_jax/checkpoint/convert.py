"""Converts any checkpoint to an inference snapshot."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal

from fastgen_jax.checkpoint.base import Checkpoint
from fastgen_jax.checkpoint.gguf_file import GGUFFile, vocabulary_file
from fastgen_jax.checkpoint.load import load_params
from fastgen_jax.checkpoint.snapshot import check_target, save_snapshot
from fastgen_jax.models.weight_spec import Leaf, WeightSpec

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "config.json",  # names the class of a tokenizer in the two files above
    "tokenizer.model",
    "tokenizer.gguf",
    "*.tiktoken",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)


def convert(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    prepare: Callable[[WeightSpec, Leaf], Leaf],
    keep_blocks: bool | Literal["fp8"] | Collection[str] = False,
    quantize: str | None = None,
    progress: bool = False,
) -> None:
    """Writes a snapshot of `checkpoint` into the new directory `out`, local or gs://.

    `prepare(spec, array)` returns the form in which a weight is stored: a host array, an `Int8Weight` of host arrays or
    `StoredBlocks`. With `keep_blocks`, it gets weights in the blocks of the checkpoint as `load_params` says; a tied head in
    blocks is stored as the embedding. `quantize` is what it quantizes others to, as for `save_snapshot`. Host memory must
    hold the whole model in that form. Raises ValueError as `check_target`, `load_params` and `save_snapshot` do,
    and if there is no tokenizer.
    """
    check_target(out, source=checkpoint.path)
    files = tokenizer_files(checkpoint.tokenizer_source)
    if not files.keys() - {"config.json", "generation_config.json"}:
        raise ValueError(
            f"{checkpoint.path} has no tokenizer files; put tokenizer.json or tokenizer.model next to the weights"
        )
    params = load_params(
        checkpoint, dtype=None, stack_layers=False, prepare=prepare, keep_blocks=keep_blocks, progress=progress
    )
    if checkpoint.config.tie_embeddings and "lm_head" in params:
        params["embed"] = params.pop("lm_head")  # its outputs are the rows of the embedding
    save_snapshot(
        out,
        params,
        checkpoint.config_json,
        tokenizer_files=files,
        generation_config=checkpoint.generation_config,
        quantize=quantize if quantize in ("int4", "fp8") else None,
    )


def tokenizer_files(source: Path | GGUFFile) -> Mapping[str, bytes]:
    """The files that `load_tokenizer` reads, by name; for a GGUF file, its metadata without the weights."""
    if isinstance(source, GGUFFile):
        return {"tokenizer.gguf": vocabulary_file(source)}
    found = sorted({file for pattern in TOKENIZER_FILES for file in source.glob(pattern)})
    return {file.relative_to(source).as_posix(): file.read_bytes() for file in found}
