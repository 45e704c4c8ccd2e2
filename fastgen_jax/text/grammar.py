"""Which tokens may come next under a grammar: masks from llguidance, one matcher a request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from fastgen_jax.text.tokenizer import Tokenizer

# Between the parts of a JSON text: a model that may write any white space can write it for ever.
_JSON_LAYOUT = {"whitespace_pattern": " ?"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Grammar:
    """What a text must look like: a JSON schema, a regular expression, or llguidance's variant of a Lark grammar."""

    kind: Literal["json_schema", "regex", "lark"]
    source: str

    @staticmethod
    def json_schema(schema: Mapping[str, Any]) -> Grammar:
        """The texts that are JSON values of `schema`."""
        return Grammar(kind="json_schema", source=json.dumps(schema))


class GrammarMatcher:
    """How far a text has come in its grammar. `make` gives another of llguidance's matchers at the start of it."""

    def __init__(self, matcher: Any, make: Callable[[], Any]) -> None:
        self._matcher = matcher
        self._make = make
        self.error: str | None = None
        """Why the grammar could not be followed any further, for example because it became too complex."""

    @property
    def is_complete(self) -> bool:
        """Whether the text is one of the grammar and nothing can follow."""
        return self.error is None and self._matcher.is_stopped()

    def restarted(self) -> GrammarMatcher:
        """A matcher at the start of the same grammar."""
        return GrammarMatcher(self._make(), self._make)

    def fill_mask(self, words: np.ndarray) -> None:
        """Writes into `words` i32[ceil(V / 32)], contiguous, a 1 for each token that may come next."""
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():  # it may have become one
            words[:] = -1  # the request ends when its token is read; until then any token will do

    def advance(self, token_id: int) -> bool:
        """Takes in a token; true if the text is complete and nothing can follow, or if there is an `error`."""
        matcher = self._matcher
        if self.error is None and not matcher.is_stopped():
            taken = matcher.consume_token(token_id)
            if not taken or matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
                self.error = _dead_end(matcher)
        elif self.error is None and not matcher.is_accepting():  # the mask found that nothing can follow
            self.error = _dead_end(matcher)
        return self.error is not None or matcher.is_stopped()


class GrammarCompiler:
    """Makes matchers for the vocabulary of one model; usable from several threads.

    Source: Earley parsing over a lexer's derivatives, as in llguidance, whose masks these are.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._lock = threading.Lock()
        self._backend: Any = None

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the start of `grammar`; ValueError if it is malformed or has a feature that is not supported."""
        library = _library()
        matchers = library.LLMatcher
        read = {
            "json_schema": lambda source: matchers.grammar_from_json_schema(source, defaults=_JSON_LAYOUT),
            "regex": matchers.grammar_from_regex,
            "lark": matchers.grammar_from_lark,
        }[grammar.kind]
        kind = grammar.kind.replace("_", " ")
        try:
            source = read(grammar.source)
        except ValueError as error:
            raise ValueError(f"the {kind} cannot be used: {error}; simplify it") from None
        make = partial(matchers, self._vocabulary(library), source, log_level=0)
        matcher = make()
        if not matcher.is_error():
            matcher.compute_logit_bias()  # finds out whether there is a first token at all
        if matcher.is_error():
            raise ValueError(f"the {kind} cannot be used: {_reason(matcher)}")
        return GrammarMatcher(matcher, make)

    def _vocabulary(self, library: Any) -> Any:
        with self._lock:
            if self._backend is None:
                wrapper = library.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids))
                self._backend = library.LLTokenizer(wrapper, eos_token=list(self._eos_token_ids) or None)
            return self._backend


class _Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        # 0xff marks a token that is no text; padding rows of the embedding are such tokens too.
        texts = [
            b"\xff" + (tokenizer.texts[i] or f"<{i}>").encode() if i in tokenizer.special_ids or not piece else piece
            for i, piece in enumerate(tokenizer.pieces)
        ]
        texts += [b"\xff<%d>" % i for i in range(len(texts), vocab_size)]
        self.tokens = texts[:vocab_size]
        self.special_token_ids = [i for i, text in enumerate(self.tokens) if text.startswith(b"\xff")]
        self.eos_token_id = eos_token_ids[0] if eos_token_ids else self.special_token_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
        try:
            ids = self._tokenizer.encode(data.decode(), add_special_tokens=False)
        except UnicodeDecodeError:
            return self._longest_pieces(data)
        # Text that spells a special token, or that the vocabulary lacks, must not become that or the unknown token.
        return self._longest_pieces(data) if self._tokenizer.special_ids.intersection(ids) else ids

    def _longest_pieces(self, data: bytes) -> list[int]:
        """Tokens whose bytes join to `data`, or to as much of its beginning as there are tokens for."""
        longest, ids, start = max(map(len, self._id_of)), [], 0
        while start < len(data):
            lengths = range(min(longest, len(data) - start), 0, -1)
            length = next((n for n in lengths if data[start : start + n] in self._id_of), None)
            if length is None:
                break
            ids.append(self._id_of[data[start : start + length]])
            start += length
        return ids

    @cached_property
    def _id_of(self) -> dict[bytes, int]:
        return {token: i for i, token in enumerate(self.tokens) if not token.startswith(b"\xff")}


def _dead_end(matcher: Any) -> str:
    return (
        f"the grammar came to a dead end: what it wants next cannot be written with the tokens of this model, or it "
        f"became too complex ({_reason(matcher)}); simplify it"
    )


def _reason(matcher: Any) -> str:
    """Why a matcher cannot go on; its own message goes on with pages of its state."""
    said = " ".join(matcher.get_error().partition("<state>")[0].split()) or matcher.stop_reason()
    return "no token can follow" if said == "NoExtensionBias" else said


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ValueError("output that follows a grammar needs llguidance; pip install 'fastgen_jax[serve]'") from None
    return llguidance
