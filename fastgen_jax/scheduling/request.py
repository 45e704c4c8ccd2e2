"""Sampling parameters, and a request to continue one prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from fastgen_jax.scheduling.checks import as_tuple, check_float, check_int, check_token_ids
from fastgen_jax.scheduling.converted import converted

LogprobsMode = Literal["raw", "processed"]
MAX_TOP_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS_ENTRIES = 300
_MAX_SEED = 2**32 - 1  # seeds are transferred as uint32


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else as_tuple("stop", stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop contains {string!r}; every stop must be a non-empty string; remove it")
    return strings


def _no_limit(top_k: object) -> object:
    """None for 0 and -1, with which vLLM and transformers switch top_k off."""
    return None if type(top_k) is int and top_k in (0, -1) else top_k


def _stop_token_ids(stop_token_ids: object) -> tuple[int, ...]:
    ids = as_tuple("stop_token_ids", stop_token_ids)
    check_token_ids("stop_token_ids", ids)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise ValueError(
            f"stop_token_ids has {len(ids)} entries but at most {MAX_STOP_TOKEN_IDS} are supported; "
            "keep the most frequent, or use stop strings"
        )
    return ids


def _texts(bad_words: object) -> tuple[str, ...]:
    texts = (bad_words,) if isinstance(bad_words, str) else as_tuple("bad_words", bad_words)
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"bad_words contains {text!r}; every one must be a text with something visible; remove it")
    return texts


def _allowed_token_ids(allowed_token_ids: object) -> tuple[int, ...] | None:
    if allowed_token_ids is None:
        return None
    ids = as_tuple("allowed_token_ids", allowed_token_ids)
    check_token_ids("allowed_token_ids", ids)
    if not ids:
        raise ValueError("allowed_token_ids is empty, so that no token could be sampled; list some, or use None for all")
    return tuple(sorted(set(ids)))


def _logit_bias_pairs(logit_bias: Any) -> tuple[tuple[int, float], ...]:
    pairs = logit_bias.items() if isinstance(logit_bias, Mapping) else logit_bias
    try:
        biases = dict(pairs)
    except (TypeError, ValueError):
        raise ValueError(
            f"logit_bias is {logit_bias!r}; it must be a mapping from token id to bias; use for example {{50: -1.5}}"
        ) from None
    check_token_ids("logit_bias", tuple(biases))
    for token_id, bias in biases.items():
        check_float(f"logit_bias[{token_id}]", bias, -100, 100, "-100 forbids a token in practice, 100 forces it")
    if len(biases) > MAX_LOGIT_BIAS_ENTRIES:
        raise ValueError(
            f"logit_bias has {len(biases)} entries but at most {MAX_LOGIT_BIAS_ENTRIES} are supported; "
            "keep those with the largest biases"
        )
    return tuple(sorted((token_id, float(bias)) for token_id, bias in biases.items()))


@dataclass(frozen=True, kw_only=True, repr=False)
class SamplingParams:
    """How a prompt is continued. Checked when constructed; lengths are in tokens.

    Collections (`stop`, `stop_token_ids`, `logit_bias`) are stored as tuples, so that the parameters are hashable.

    Raises:
        ValueError: an argument is out of its range or contradicts another; the message says which, and what to change.
    """

    max_new_tokens: int | None = None
    """Maximum number of generated tokens. None: up to the engine's context length."""
    max_length: int | None = None
    """Maximum number of tokens, prompt and generated together; an alternative to `max_new_tokens`."""
    min_new_tokens: int = 0
    """Number of tokens generated before an end-of-sequence or stop token can end the request."""
    ignore_eos: bool = False
    """Ignore the model's end-of-sequence tokens: only stops and length limits end the request."""
    stop: str | Iterable[str] = converted(_stop_strings, default=())
    """One or more strings that end the text; they are not included in it."""
    include_stop_str_in_output: bool = False
    """Include in the text the stop string that ends it, and the stop token if special tokens are shown."""
    skip_special_tokens: bool = True
    """Leave special tokens, such as the end of a turn, out of the text."""
    bad_words: str | Iterable[str] = converted(_texts, default=())
    """Texts that are not generated, neither at the start of a word nor within one."""
    allowed_token_ids: Iterable[int] | None = converted(_allowed_token_ids, default=None)
    """Sample only these tokens. None: all."""
    stop_token_ids: Iterable[int] = converted(_stop_token_ids, default=())
    """Token ids that end the request, in addition to the model's own."""
    do_sample: bool = True
    """Sample each token; otherwise the most likely one is chosen, as with temperature 0."""
    temperature: float | None = None
    """Divisor of the logits: below 1, likely tokens become more likely; 0 chooses the most likely. None: 1."""
    top_k: int | None = converted(_no_limit, default=None)
    """Sample only from this many of the most likely tokens. None: from all, as with 0 or -1."""
    top_p: float | None = None
    """Sample from the fewest tokens whose probabilities add up to this, above 0 and at most 1. None: from all."""
    min_p: float | None = None
    """Sample only from tokens at least this fraction as likely as the most likely one, 0 to 1. None: from all."""
    presence_penalty: float = 0.0
    """Value subtracted from the logits of tokens that were already generated, -2 to 2."""
    frequency_penalty: float = 0.0
    """Value subtracted from the logits of a token once for each time it was generated, -2 to 2."""
    repetition_penalty: float = 1.0
    """Value that divides positive and multiplies negative logits of tokens in the prompt or output, above 0 and at most
    10."""
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = converted(_logit_bias_pairs, default=())
    """Values added to the logits of tokens: a mapping from token id to bias, or pairs, stored in ascending order of
    token id."""
    seed: int | None = None
    """Seed of the random numbers, 0 to 2**32 - 1: the same seed yields the same text. None: a new one each time."""
    n: int = 1
    """Number of continuations of the prompt, sampled independently."""
    logprobs: int | None = None
    """Return the log-probability of each generated token and of the `logprobs` most likely tokens. None: no
    log-probabilities."""
    prompt_logprobs: int | None = None
    """The same for the prompt tokens. None: no log-probabilities."""
    prompt_logprobs_start: int = 0
    """Position of the first prompt token with a log-probability; what precedes it may come from the prefix cache."""
    logprobs_mode: LogprobsMode = "raw"
    """"processed": prompt tokens have, besides the log-probability of the model, the one after logit bias, temperature,
    top-k, top-p and min-p. Generated tokens have both in either mode."""

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_distribution()
        self._check_contradictions()

    def __repr__(self) -> str:
        changed = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is chosen at every position."""
        return not self.do_sample or self.temperature == 0

    def _check_lengths(self) -> None:
        if self.max_new_tokens is not None:
            check_int("max_new_tokens", self.max_new_tokens, 1, None, "request at least one token")
        if self.max_length is not None:
            check_int("max_length", self.max_length, 2, None, "it counts the prompt and the generated tokens")
        check_int("min_new_tokens", self.min_new_tokens, 0, None, "use 0 for no minimum")
        check_int("n", self.n, 1, None, "request at least one continuation")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                check_int(name, value, 0, MAX_TOP_LOGPROBS, "use None for no log-probabilities")
        check_int("prompt_logprobs_start", self.prompt_logprobs_start, 0, None, "use 0 for the whole prompt")
        for name in ("ignore_eos", "do_sample", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")

    def _check_distribution(self) -> None:
        if self.temperature is not None:
            check_float("temperature", self.temperature, 0, None, "use 0 for greedy, None for 1")
        if self.top_k is not None:
            check_int("top_k", self.top_k, 1, None, "use None, 0 or -1 to keep every token")
        if self.top_p is not None:
            check_float("top_p", self.top_p, 0, 1, "use None to keep every token", open_low=True)
        if self.min_p is not None:
            check_float("min_p", self.min_p, 0, 1, "use None to keep every token")
        check_float("presence_penalty", self.presence_penalty, -2, 2, "use 0 for no penalty")
        check_float("frequency_penalty", self.frequency_penalty, -2, 2, "use 0 for no penalty")
        check_float("repetition_penalty", self.repetition_penalty, 0, 10, "use 1 for no penalty", open_low=True)
        if self.seed is not None:
            check_int("seed", self.seed, 0, _MAX_SEED, "reduce it modulo 2**32, or use None for a random one")

    def _check_contradictions(self) -> None:
        self._check_mode()
        if self.max_new_tokens is not None and self.max_length is not None:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} and max_length={self.max_length} are both set; "
                "set only one of them: max_length is the prompt's length plus max_new_tokens"
            )
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens} but max_new_tokens is {self.max_new_tokens}; "
                f"lower min_new_tokens to at most {self.max_new_tokens}"
            )
        if not self.do_sample:
            if self.temperature not in (None, 0):
                raise ValueError(
                    f"do_sample=False chooses the most likely token, but temperature is {self.temperature}; "
                    "remove temperature, or set do_sample=True"
                )
            for name in ("top_k", "top_p", "min_p", "seed"):
                value = getattr(self, name)
                if value is not None:
                    raise ValueError(
                        f"do_sample=False chooses the most likely token, but {name} is {value}; "
                        f"remove {name}, or set do_sample=True"
                    )
        if self.n > 1 and self.greedy:
            raise ValueError(
                f"n is {self.n} but greedy decoding returns the same continuation every time; "
                "use n=1, or sample with a temperature above 0"
            )

    def _check_mode(self) -> None:
        if self.logprobs_mode not in get_args(LogprobsMode):
            raise ValueError(f"logprobs_mode is {self.logprobs_mode!r}; choose one of {', '.join(get_args(LogprobsMode))}")
        if self.logprobs_mode == "raw" or self.prompt_logprobs is None:
            return
        if self.greedy:
            raise ValueError(
                "logprobs_mode='processed' requires a temperature above 0 for the prompt: with greedy decoding every other "
                "token than the most likely one is impossible; set a temperature, or use logprobs_mode='raw'"
            )
        names = ("presence_penalty", "frequency_penalty", "repetition_penalty", "min_new_tokens")
        for name in names:
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which depends on the tokens generated before, so that "
                    f"logprobs_mode='processed' cannot apply it to prompt tokens; omit {name}, or use logprobs_mode='raw'"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt, to be continued once.

    `request_id` is unique among unfinished requests. A lower `priority` runs first; requests with the same priority run
    in order of `arrival_time`, in seconds on any one clock, then in the order in which they were added. `seed` is the
    seed in use, even if `params.seed` is None. `awaits_each_token` means that the tokens allowed next depend on the last
    one, so that the engine must read it before it samples another. A request with `next_token_id` samples nothing: it
    scores its prompt and that token, which ends it. Cached prefixes are shared only among requests with the same
    `cache_salt`. `shown_token_ids` are special tokens that appear in the text.

    Raises:
        ValueError: an empty prompt, or a value that is out of range.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    arrival_time: float = 0.0
    seed: int
    awaits_each_token: bool = False
    next_token_id: int | None = None
    shown_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.request_id, str) or not self.request_id:
            raise ValueError(f"request_id is {self.request_id!r}; it must be a non-empty string")
        for name in ("prompt_token_ids", "eos_token_ids"):
            if type(getattr(self, name)) is not tuple:
                raise ValueError(
                    f"{name} of request {self.request_id!r} is a {type(getattr(self, name)).__name__}; it must be a tuple; "
                    "convert it with tuple()"
                )
        if not self.prompt_token_ids:
            raise ValueError(
                f"prompt_token_ids of request {self.request_id!r} is empty; "
                "a prompt needs at least one token, for example the beginning-of-sequence token"
            )
        for name in ("prompt_token_ids", "eos_token_ids"):
            check_token_ids(name, getattr(self, name))
        if self.next_token_id is not None:
            check_token_ids("next_token_id", (self.next_token_id,))
            if self.params.max_new_tokens != 1:
                raise ValueError(f"max_new_tokens is {self.params.max_new_tokens}; with a next_token_id it must be 1")
        if self.params.prompt_logprobs_start > len(self.prompt_token_ids):
            raise ValueError(
                f"prompt_logprobs_start is {self.params.prompt_logprobs_start} but the prompt has "
                f"{len(self.prompt_token_ids)} tokens; use a position in it"
            )
        check_int("priority", self.priority, None, None, "lower runs first")
        check_float("arrival_time", self.arrival_time, None, None, "use seconds on one clock")
        check_int("seed", self.seed, 0, _MAX_SEED, "reduce it modulo 2**32")
