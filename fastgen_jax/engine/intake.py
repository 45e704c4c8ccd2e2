"""Turns prompts and parameters into checked requests, in any thread: it does not touch the state of an engine."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastgen_jax.engine import generation
from fastgen_jax.engine.prompts import Prompt, TokenIds, in_vocabulary, plain_prompt
from fastgen_jax.engine.resolve import ResolvedConfig
from fastgen_jax.engine.sampling.tables import validate
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.scheduling import Request, SamplingParams, max_total_tokens
from fastgen_jax.text import Tokenizer
from fastgen_jax.text.filters import Matcher, TokenFilter, spellings
from fastgen_jax.text.grammar import Grammar, GrammarCompiler, GrammarMatcher
from fastgen_jax.text.reasoning import ReasoningMatcher


class Intake:
    """Builds checked requests for an engine with this model and config."""

    def __init__(self, tokenizer: Tokenizer | None, model: ModelConfig, config: ResolvedConfig) -> None:
        self.tokenizer = tokenizer and tokenizer.with_template(config.choices.chat_template)
        self.model = model
        self.config = config
        self._numbers = itertools.count()
        self._grammars = None
        if tokenizer is not None:
            self._grammars = GrammarCompiler(tokenizer, vocab_size=model.vocab_size, eos_token_ids=self.eos_token_ids)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence: those of the checkpoint and those of its tokenizer."""
        ids = self.model.eos_token_ids
        return ids or (self.tokenizer.eos_token_ids if self.tokenizer else ())

    def encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> TokenIds:
        """Token ids of a prompt in any supported form; ValueError if it is empty or in another form.

        `add_special_tokens` is for text, as in `Tokenizer.encode`.
        """
        plain = plain_prompt(prompt)
        if isinstance(plain, str):
            ids = self.need_tokenizer("a prompt of text").encode(plain, add_special_tokens=add_special_tokens)
        elif isinstance(plain, list):
            ids = self.need_tokenizer("a prompt of chat messages").encode_chat(plain)
        else:
            ids = plain
        return in_vocabulary(ids, "the prompt", vocab_size=self.model.vocab_size)

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Defaults for options that a request omits; see `EngineConfig.generation_config`."""
        return dict(self.config.generation_config)

    @property
    def default_new_tokens(self) -> int | None:
        """The model's default limit on the length of an answer, in tokens; None if it has none."""
        return self.defaults.get("max_new_tokens")

    def sampling_params(self, options: Mapping[str, Any]) -> SamplingParams:
        """`SamplingParams` from the given options and, for the others, from the model's defaults."""
        return generation.sampling_params(options, self.defaults)

    def limited(self, params: SamplingParams, num_prompt_tokens: int, new_tokens: int | None) -> SamplingParams:
        """`params` for a prompt of that length; if they have no limit, it becomes `new_tokens`, or as many as fit."""
        return generation.limited(params, new_tokens, room=self.room(num_prompt_tokens))

    def room(self, num_prompt_tokens: int) -> int:
        """Tokens that fit after a prompt, within the context limit and the KV cache."""
        return self.config.longest_sequence - num_prompt_tokens

    def request(
        self,
        token_ids: TokenIds,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        awaits_each_token: bool = False,
        shown_token_ids: tuple[int, ...] = (),
        cache_salt: str = "",
    ) -> Request:
        """A request for a prompt from `encode`; ValueError if it could never run, with the numbers that show why.

        Without `params`, the model's defaults apply; `params` are used as they are. `shown_token_ids` are special tokens
        that the text shows.
        """
        if params is None:
            params = self.limited(self.sampling_params({}), len(token_ids), self.default_new_tokens)
        if params.n != 1:
            raise ValueError(
                f"n is {params.n}; the engine runs one sequence per request: add it {params.n} times with "
                "different seeds, or use a pipeline, which does that"
            )
        validate(params, self.model.vocab_size, eos_token_ids=self.eos_token_ids)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop strings {params.stop} require a tokenizer, and this engine has none; use stop_token_ids")
        for stop in params.stop:
            if any("\ud800" <= character <= "\udfff" for character in stop):
                raise ValueError(f"stop has {stop!r}, with half of a surrogate pair, which matches no text; remove it")
        if awaits_each_token and params.min_new_tokens:
            raise ValueError(
                f"min_new_tokens is {params.min_new_tokens}, but a grammar decides when the text ends; omit min_new_tokens"
            )
        tokens = self.token_filter(params)
        request = Request(
            request_id=f"request-{next(self._numbers)}" if request_id is None else request_id,
            prompt_token_ids=token_ids,
            params=params,
            eos_token_ids=self.eos_token_ids,
            priority=priority,
            arrival_time=time.monotonic(),
            seed=params.seed if params.seed is not None else int.from_bytes(os.urandom(4), "little"),
            awaits_each_token=awaits_each_token or (tokens is not None and not tokens.is_static),
            cache_salt=cache_salt,
            shown_token_ids=shown_token_ids,
        )
        config = self.config
        max_total_tokens(request, max_context_len=config.max_context_len, num_blocks=config.num_blocks, groups=config.groups)
        return request

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the start of `grammar`; ValueError if it is not supported. A complex grammar takes up to a second."""
        self.need_tokenizer("a grammar")
        assert self._grammars is not None  # there is a tokenizer
        if grammar.reasoning is None:
            return self._grammars.matcher(grammar)
        after = None if grammar.kind == "free" else self._grammars.matcher(replace(grammar, reasoning=None))
        return ReasoningMatcher(grammar.reasoning, after, eos_token_ids=self.eos_token_ids)

    def token_filter(self, params: SamplingParams, matcher: Matcher | None = None) -> TokenFilter | None:
        """The tokens that `params` and `matcher` allow; None if `params` exclude none."""
        if not params.bad_words and params.allowed_token_ids is None:
            return None
        words = tuple(params.bad_words)
        banned = spellings(words, self.need_tokenizer("bad_words")) if words else []
        allowed = params.allowed_token_ids
        return TokenFilter(
            vocab_size=self.model.vocab_size,
            allowed=None if allowed is None else tuple(allowed),
            banned=banned,
            inner=matcher,
        )

    def need_tokenizer(self, what: str) -> Tokenizer:
        """The tokenizer; if there is none, ValueError saying that `what` requires it."""
        if self.tokenizer is None:
            raise ValueError(f"{what} requires a tokenizer, and this engine has none; pass token ids")
        return self.tokenizer


def samples(params: SamplingParams) -> list[SamplingParams]:
    """The parameters of each of `params.n` samples, with consecutive seeds: the first sample of n=2 is that of n=1."""
    seeds = [None if params.seed is None else (params.seed + i) % 2**32 for i in range(params.n)]
    return [replace(params, n=1, seed=seed) for seed in seeds]
