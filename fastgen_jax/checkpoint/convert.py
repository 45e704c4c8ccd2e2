"""Converts any checkpoint to an inference snapshot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

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
    checkpoint: Checkpoint, out: str | Path, *, prepare: Callable[[WeightSpec, Leaf], Leaf], progress: bool = False
) -> None:
    """Writes a snapshot of `checkpoint` into the new directory `out`, local or gs://.

    `prepare(spec, array)` returns the form in which a weight is stored: a host array or an `Int8Weight` of host arrays. Host
    memory must hold the whole model in that form. Raises ValueError as `check_target`, `load_params` and `save_snapshot` do,
    and if there is no tokenizer.
    """
    check_target(out, source=checkpoint.path)
    files = tokenizer_files(checkpoint.tokenizer_source)
    if not files.keys() - {"config.json", "generation_config.json"}:
        raise ValueError(
            f"{checkpoint.path} has no tokenizer files; put tokenizer.json or tokenizer.model next to the weights"
        )
    params = load_params(checkpoint, dtype=None, stack_layers=False, prepare=prepare, progress=progress)
    save_snapshot(out, params, checkpoint.config_json, tokenizer_files=files, generation_config=checkpoint.generation_config)


def tokenizer_files(source: Path | GGUFFile) -> Mapping[str, bytes]:
    """The files that `load_tokenizer` reads, by name; for a GGUF file, its metadata without the weights."""
    if isinstance(source, GGUFFile):
        return {"tokenizer.gguf": vocabulary_file(source)}
    found = sorted({file for pattern in TOKENIZER_FILES for file in source.glob(pattern)})
    return {file.relative_to(source).as_posix(): file.read_bytes() for file in found}
