"""Text and tokens: tokenizers of every format, incremental detokenization, stop strings, chat templates, grammars."""

from fastgen_jax.text.detokenizer import IncrementalDetokenizer
from fastgen_jax.text.load import load_tokenizer
from fastgen_jax.text.stop import StopStrings, stops_with_tokens
from fastgen_jax.text.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "StopStrings", "Tokenizer", "load_tokenizer", "stops_with_tokens"]
