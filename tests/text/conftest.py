from __future__ import annotations

import pytest

from fastgen_jax.checkpoint import resolve_model
from fastgen_jax.text import Tokenizer, load_tokenizer
from tests.text.vocabularies import all_tokenizers


class Tokenizers(dict[str, Tokenizer]):
    """A dict with a short repr: hypothesis prints the arguments of a failing test."""

    def __repr__(self) -> str:
        return f"tokenizers of {', '.join(self)}"


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    """A small tokenizer of every format, by name."""
    return Tokenizers(all_tokenizers(tmp_path_factory.mktemp("tokenizers")))


@pytest.fixture(scope="session", params=["json", "spm", "gguf bpe", "gguf spm"])
def tokenizer(request, tokenizers) -> Tokenizer:
    """Each of these tokenizers in turn."""
    return tokenizers[request.param]


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    """The tokenizer of SmolLM2-135M-Instruct, from its GGUF file."""
    try:
        return load_tokenizer(resolve_model("smollm2-135m-instruct"))
    except ValueError as error:
        pytest.skip(f"the model file is not available: {error}")
