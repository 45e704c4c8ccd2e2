"""Loading a checkpoint's tokenizer, whatever its format."""

from __future__ import annotations

from pathlib import Path

from fastgen_jax.checkpoint.gguf_file import GGUFFile, read_header
from fastgen_jax.text.gguf import load_gguf
from fastgen_jax.text.huggingface import load_directory
from fastgen_jax.text.tokenizer import Tokenizer


def load_tokenizer(source: str | Path | GGUFFile) -> Tokenizer:
    """Returns the tokenizer of a checkpoint; ValueError says what is missing or not supported.

    `source` is a GGUF file, its header, or a directory in one of the formats of `load_directory`.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if (path / "tokenizer.gguf").exists():  # in a snapshot converted from a GGUF file
            path = path / "tokenizer.gguf"
        if path.is_dir():
            return load_directory(path)
        if not path.exists():
            raise ValueError(f"{path} does not exist; pass a checkpoint directory or a .gguf file")
        source = read_header(path)
    try:
        return load_gguf(source.metadata)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error
