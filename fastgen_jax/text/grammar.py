"""Constrained output: masks of the tokens that a grammar allows next, from llguidance, with one matcher per request."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Literal
from weakref import WeakValueDictionary

import numpy as np

from fastgen_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


JSON_LAYOUT = {"whitespace_pattern": " ?"}
"""Limits the white space in JSON: a model that may write any amount of it may never stop."""
CACHED_GRAMMARS = 64  # compiled ones of a model, a few hundred kilobytes each
MAX_SOURCE = 1_000_000  # characters of a grammar; a larger one takes seconds only to be read


class GrammarError(ValueError):
    """A grammar that cannot be used: it is malformed, or needs something that is not supported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasoningLimits:
    """The tokens that delimit the reasoning at the start of an answer."""

    opening: tuple[int, ...]
    """They begin it, if the model reasons at all; empty if the prompt has begun it."""
    closing: tuple[int, ...]
    """They end it."""
    blanks: tuple[int, ...] = ()
    """White space, of which one token may precede it."""
    forced: tuple[int, ...]
    """They are written after `budget` tokens, to end it."""
    then: tuple[int, ...] = ()
    """They are written after it ended by itself."""
    budget: int | None = None
    """Its maximum number of tokens; None: no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grammar:
    """A constraint on a text: a JSON schema, a regular expression, or a context-free grammar."""

    kind: Literal["json_schema", "regex", "lark", "grammar", "free"]
    """"lark" is llguidance's variant of Lark; "grammar" is that, or GBNF as in llama.cpp. "free" is no constraint, for
    texts of which only the reasoning is limited."""
    source: str
    reasoning: ReasoningLimits | None = None
    """The reasoning that may precede the text."""

    @staticmethod
    def json_schema(schema: Mapping[str, object], *, space: str | None = None) -> Grammar:
        """Returns the grammar of JSON values that follow `schema`.

        `space` is a regular expression of the white space allowed at each place, "" for none; None allows one blank.
        """
        if space is not None:
            layout = {"whitespace_flexible": False} if space == "" else {"whitespace_pattern": space}
            schema = {**schema, "x-guidance": layout}
        return Grammar(kind="json_schema", source=json.dumps(schema, ensure_ascii=False))

    @staticmethod
    def choice(texts: Iterable[str]) -> Grammar:
        """Returns the grammar of exactly these texts."""
        return Grammar(kind="lark", source="start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))


class GrammarMatcher:
    """The position of a text in its grammar. `make` returns a new matcher of llguidance at the start."""

    def __init__(self, matcher: LLMatcher, make: Callable[[], LLMatcher]) -> None:
        self._matcher = matcher
        self._make = make
        self.is_static = False
        self.error: str | None = None
        """Why the grammar cannot be followed any further, for example because it became too complex."""

    @property
    def is_complete(self) -> bool:
        """Whether the text follows the grammar and nothing more is allowed."""
        return self.error is None and self._matcher.is_stopped()

    def restarted(self) -> GrammarMatcher:
        """Returns a matcher at the start of the same grammar."""
        return GrammarMatcher(self._make(), self._make)

    def fill_mask(self, words: np.ndarray) -> None:
        """Sets in `words` i32[ceil(V / 32)], contiguous, the bit of each token that may come next."""
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():  # computing the mask may fail
            words[:] = -1  # allows every token: the request ends when the next one is read

    def advance(self, token_id: int) -> bool:
        """Consumes a token; returns whether the text is complete, or there is an `error`."""
        matcher = self._matcher
        if self.error is None and not matcher.is_stopped():
            taken = matcher.consume_token(token_id)
            if not taken or matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
                self.error = _dead_end(matcher)
        elif self.error is None and not matcher.is_accepting():  # the mask is empty
            self.error = _dead_end(matcher)
        return self.error is not None or matcher.is_stopped()


class GrammarCompiler:
    """Makes matchers for the vocabulary of one model. Thread-safe.

    Source: llguidance, which combines an Earley parser with a lexer based on derivatives.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._lock = threading.Lock()
        self._backend: LLTokenizer | None = None
        # Compiled ones, at the start, or the reasons why they cannot be used; the last used one is last.
        self._compiled: OrderedDict[Grammar, LLMatcher | str] = OrderedDict()
        self._turns: WeakValueDictionary[Grammar, threading.RLock] = WeakValueDictionary()

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """Returns a matcher at the start of `grammar`; GrammarError if it is malformed, too complex or not supported."""
        first = self._first(grammar)
        if isinstance(first, str):
            raise GrammarError(first)
        return GrammarMatcher(first.deep_copy(), first.deep_copy)

    def _first(self, grammar: Grammar) -> LLMatcher | str:
        """The compiled grammar at its start, or why it cannot be used. A thread that compiles it does so for all."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
                return found
            turn = self._turns.setdefault(grammar, threading.RLock())
        with turn:
            with self._lock:
                found = self._compiled.get(grammar)
            if found is None:
                try:
                    found = self._compile(grammar)  # without the lock: it takes up to seconds
                except GrammarError as error:
                    found = str(error)
                with self._lock:
                    self._compiled[grammar] = found
                    while len(self._compiled) > CACHED_GRAMMARS:
                        self._compiled.popitem(last=False)
        return found

    def _compile(self, grammar: Grammar) -> LLMatcher:
        imported = library()
        matchers = imported.LLMatcher
        kind = grammar.kind.replace("_", " ")
        check_size(kind, grammar.source)
        try:
            match grammar.kind:
                case "json_schema":
                    source = matchers.grammar_from_json_schema(grammar.source, defaults=JSON_LAYOUT)
                case "regex":
                    source = matchers.grammar_from_regex(grammar.source)
                case "lark":
                    source = matchers.grammar_from_lark(grammar.source)
                case "grammar":
                    source = imported.grammar_from("grammar", grammar.source)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"the {kind} cannot be used: {error}; simplify it") from None
        matcher = matchers(self._vocabulary(imported), source, log_level=0)
        if not matcher.is_error():
            matcher.compute_logit_bias()  # fails if no token can come first
        if matcher.is_error():
            raise GrammarError(f"the {kind} cannot be used: {_reason(matcher)}")
        return matcher

    def _vocabulary(self, imported: ModuleType) -> LLTokenizer:
        with self._lock:
            backend = self._backend
            if backend is None:
                wrapper = imported.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids))
                backend = self._backend = imported.LLTokenizer(wrapper, eos_token=list(self._eos_token_ids) or None)
            return backend


class _Vocabulary:
    """A tokenizer with the interface that llguidance expects."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        # 0xff marks tokens that are not text, such as those of padding rows of the embedding.
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
        # Text must become neither the special token that it spells nor the unknown token.
        return self._longest_pieces(data) if self._tokenizer.special_ids.intersection(ids) else ids

    def _longest_pieces(self, data: bytes) -> list[int]:
        """Returns tokens whose bytes join to `data`, or to its longest prefix that tokens can spell greedily."""
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


@cache
def compile_threads() -> ThreadPoolExecutor:
    """The threads in which a server compiles grammars: so few that heavy ones leave time to the engine."""
    workers = max(2, min(4, len(os.sched_getaffinity(0)) // 4))
    return ThreadPoolExecutor(workers, thread_name_prefix="fastgen-grammars")


def check_size(kind: str, source: str) -> None:
    """GrammarError if a grammar is too long to be compiled beside an engine."""
    if len(source) > MAX_SOURCE:
        raise GrammarError(
            f"the {kind} cannot be used: it has {len(source):,} characters, more than {MAX_SOURCE:,}; simplify it"
        )


def _dead_end(matcher: LLMatcher) -> str:
    return (
        f"the grammar came to a dead end: no token of this model can continue the text, or the grammar became too "
        f"complex ({_reason(matcher)}); simplify it"
    )


def _reason(matcher: LLMatcher) -> str:
    """Why a matcher cannot continue, without the pages of state in its message."""
    message = " ".join(matcher.get_error().partition("<state>")[0].split()) or matcher.stop_reason()
    return "no token can follow" if message == "NoExtensionBias" else message


def library() -> ModuleType:
    """llguidance; GrammarError if it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise GrammarError("constrained output requires llguidance; pip install 'fastgen_jax[serve]'") from None
    return llguidance
