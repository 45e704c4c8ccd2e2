"""Generation options: from keywords to `SamplingParams`, and a warning when a default limit cuts an answer off."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fastgen_jax.engine import generation
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.intake import Intake, samples
from fastgen_jax.engine.option_names import unknown_option
from fastgen_jax.engine.outputs import RequestOutput
from fastgen_jax.scheduling import SamplingParams
from fastgen_jax.text.grammar import Grammar
from fastgen_jax.text.schemas import fitted

log = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 256  # limit of an answer if neither the caller nor the model sets one, as in transformers' pipeline
GRAMMAR_OPTIONS = ("choice", "grammar", "json_schema", "regex")
CALL_OPTIONS = (*GRAMMAR_OPTIONS, "echo", "params", "progress", "return_full_text", "stream")

# Names of the options in other programs.
_OTHER_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_gen_len": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "num_predict": "max_new_tokens",
    "max_len": "max_length",
    "min_tokens": "min_new_tokens",
    "min_length": "min_new_tokens",
    "temp": "temperature",
    "topk": "top_k",
    "topp": "top_p",
    "minp": "min_p",
    "sample": "do_sample",
    "greedy": "do_sample",
    "random_seed": "seed",
    "generator": "seed",
    "repeat_penalty": "repetition_penalty",
    "num_return_sequences": "n",
    "best_of": "n",
    "num_samples": "n",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "stopping_criteria": "stop",
    "stop_words": "stop",
    "eos_token_id": "stop_token_ids",
    "stop_ids": "stop_token_ids",
    "output_scores": "logprobs",
    "output_logits": "logprobs",
    "top_logprobs": "logprobs",
    "return_logprobs": "logprobs",
    "streaming": "stream",
    "streamer": "stream",
    "use_tqdm": "progress",
    "sampling_params": "params",
    "generation_config": "it belongs to the engine: fastgen_jax.pipeline(model, generation_config=...)",
    "num_beams": "beam search is not supported; use n=... samples and their logprobs",
    "no_repeat_ngram_size": "it is not supported; use repetition_penalty or frequency_penalty",
    "return_dict_in_generate": "omit it: results are always `Response` objects",
    "pad_token_id": "omit it: nothing is padded",
    "attention_mask": "omit it: nothing is padded",
    "use_cache": "omit it: there is always a KV cache",
    "batch_size": "omit it: the engine forms batches, see max_num_seqs of fastgen_jax.pipeline",
}


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The sampling parameters of a call, with the limits of its engine."""

    params: SamplingParams
    """For every prompt; `samples` adds a length limit if the caller sets none."""
    intake: Intake
    new_tokens: int | None
    """Maximum length of an answer in tokens if the caller sets none; None: as many as fit."""
    grammar: Grammar | None = None
    """What every answer must follow."""

    def samples(self, num_prompt_tokens: int) -> list[SamplingParams]:
        """The parameters of each of the `n` answers to a prompt of that many tokens."""
        return samples(self.intake.limited(self.params, num_prompt_tokens, self.new_tokens))

    def most_tokens(self, num_prompt_tokens: int) -> int:
        """The maximum length of an answer to a prompt of that length, in tokens."""
        params = self.intake.limited(self.params, num_prompt_tokens, self.new_tokens)
        room = self.intake.room(num_prompt_tokens)
        if params.max_length is not None:
            return min(room, params.max_length - num_prompt_tokens)
        return room if params.max_new_tokens is None else min(room, params.max_new_tokens)


def generation_of(intake: Intake, params: SamplingParams | None, options: Mapping[str, Any]) -> Generation:
    """The sampling parameters of a call with `params` or `options`.

    `params` are used as they are. With options, the model's defaults apply to those that are omitted, and an answer has
    at most `DEFAULT_NEW_TOKENS` tokens. The options that name a grammar are allowed beside `params`. Raises ValueError if
    both are given, for an unknown option, and as `SamplingParams` does.
    """
    grammar = _grammar_of({name: options[name] for name in GRAMMAR_OPTIONS if options.get(name) is not None})
    options = {name: value for name, value in options.items() if name not in GRAMMAR_OPTIONS}
    if params is None:
        _check_names(options)
        new_tokens = intake.default_new_tokens or DEFAULT_NEW_TOKENS
        return Generation(params=intake.sampling_params(options), intake=intake, new_tokens=new_tokens, grammar=grammar)
    if not isinstance(params, SamplingParams):
        raise ValueError(
            f"params is a {type(params).__name__}; pass fastgen_jax.SamplingParams, or options as "
            "keywords: pipe(prompts, max_new_tokens=32)"
        )
    if options:
        raise ValueError(
            f"both params and options ({', '.join(sorted(options))}) were passed; pass only one of them: "
            "dataclasses.replace(params, ...) changes params"
        )
    return Generation(params=params, intake=intake, new_tokens=None, grammar=grammar)


def _grammar_of(options: Mapping[str, Any]) -> Grammar | None:
    """The grammar of the option that names one; ValueError if several do, or its value has another form."""
    if len(options) > 1:
        raise ValueError(f"{' and '.join(options)} are several grammars for one answer; keep one of them")
    for name, value in options.items():
        if name == "json_schema" and isinstance(value, Mapping):
            return Grammar.json_schema(fitted(dict(value), strict=True).schema)
        if name == "choice" and value and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return Grammar.choice(value)
        if name in ("regex", "grammar") and isinstance(value, str):
            return Grammar(kind="regex" if name == "regex" else "grammar", source=value)
        forms = {"json_schema": "a schema as a dict", "choice": "a list of texts"}
        raise ValueError(f"{name} is {value!r:.80}; pass {forms.get(name, 'a text')}")
    return None


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """`SamplingParams` from keyword options, without a model; ValueError, with a suggestion, for an unknown one."""
    _check_names(options)
    return generation.sampling_params(options, {})


def _check_names(options: Mapping[str, Any]) -> None:
    known = {f.name for f in fields(SamplingParams)}
    engine = {f.name for f in fields(EngineConfig)}
    for name in options:
        if name in engine:
            raise ValueError(
                f"{name!r} is an option of the engine, not of a call; set it once: fastgen_jax.pipeline(model, {name}=...)"
            )
        if name not in known:
            raise unknown_option(name, {*known, *CALL_OPTIONS}, _OTHER_NAMES, kind="generation")


class LimitNotice:
    """Logs, once for each kind of limit, that an answer ended at a limit that the caller did not set."""

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def note(self, call: Generation, output: RequestOutput) -> None:
        """Checks the last output of an answer."""
        params, num_prompt, num_generated = call.params, output.num_prompt_tokens, output.num_generated_tokens
        if output.finish_reason != "length" or num_generated == params.max_new_tokens:
            return
        if num_prompt + num_generated == params.max_length:
            return
        if num_generated >= call.intake.room(num_prompt):
            config = call.intake.config
            name = "num_blocks" if config.longest_sequence < config.max_context_len else "max_context_len"
            self._log_once(
                name,
                f"an answer was cut off: after a prompt of {num_prompt} tokens there was room for "
                f"{num_generated}; shorten the prompt, or start with a larger {name}",
            )
        else:
            limit = "limit of the model's generation_config" if call.intake.default_new_tokens else "default limit"
            self._log_once(
                "length",
                f"an answer was cut off after {num_generated} tokens, the {limit}; pass max_new_tokens=... to change it",
            )

    def _log_once(self, kind: str, text: str) -> None:
        if kind not in self._shown:
            self._shown.add(kind)
            log.warning("%s (shown once)", text)
