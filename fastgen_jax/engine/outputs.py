"""The outputs of a request, and how its text is assembled."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastgen_jax.engine.sampling.sampler import SampleOutput
from fastgen_jax.scheduling import Chunk, Sequence, Step
from fastgen_jax.text import IncrementalDetokenizer, StopStrings, Tokenizer, stops_with_tokens
from fastgen_jax.text.filters import Matcher


class TokenLogprob(NamedTuple):
    """Log-probabilities of one token: raw, and processed."""

    token_id: int
    logprob: float
    """Raw, of the model: before logits processor, penalties, bias and temperature."""
    rank: int
    """1 for the most probable token of the vocabulary, raw."""
    top: dict[int, float]
    """The most probable tokens, best first: token id -> raw log-probability."""
    processed_logprob: float | None = None
    """With which this token was drawn: after all of the above, masks, and top-k, top-p and min-p. 0 for greedy decoding,
    -inf for a prompt token that is never drawn. None for a prompt token, unless `logprobs_mode` is "processed"."""
    log_kept_mass: float | None = None
    """Natural logarithm of the probability that top-k, top-p and min-p kept. `processed_logprob + log_kept_mass` is the
    log-probability without these three, over the whole vocabulary. None as above."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class RequestOutput:
    """What one step added to a request."""

    request_id: str
    new_token_ids: tuple[int, ...]
    text: str
    """New text; text that may be the start of a stop string or of a character is held back."""
    finished: bool
    finish_reason: str | None
    """"stop" (end of sequence, stop token or stop string), "length", "abort", "refused"; None while it runs."""
    logprobs: tuple[TokenLogprob, ...] | None
    """One entry for each new token, if requested."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None
    """One entry for each prompt token except the first; only in the output with the first new token."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose keys and values were already in the cache."""
    num_generated_tokens: int
    weight_version: int = 0
    """The version of the weights that computed the new token; see `Engine.update_params`."""
    queue_seconds: float = 0.0
    """From the request's arrival to the first step that computed for it."""
    stop_reason: str | int | None = None
    """The stop string, or the id in `stop_token_ids`, that ended the text; None at an end of sequence."""
    error: str | None = None
    """Why the request ended with "abort" without being aborted: its grammar could not be continued, or a step failed."""

    def __repr__(self) -> str:
        end = f", finish_reason={self.finish_reason!r}" if self.finished else ""
        error = f", error={self.error!r}" if self.error else ""
        return f"RequestOutput({self.request_id!r}, {self.text!r}, new_token_ids={self.new_token_ids}{end}{error})"


class VersionRuns:
    """The versions of the weights that generated the tokens of an answer, run-length encoded."""

    def __init__(self) -> None:
        self._runs: list[list[int]] = []

    def add(self, output: RequestOutput) -> None:
        """Adds the tokens of the next output."""
        count = len(output.new_token_ids)
        if self._runs and self._runs[-1][0] == output.weight_version:
            self._runs[-1][1] += count
        elif count:
            self._runs.append([output.weight_version, count])

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Each version, in order, with its number of tokens."""
        return tuple((version, count) for version, count in self._runs)


class Outbox:
    """Holds the outputs of one client's requests until the client takes them.

    Several threads may share an engine: each takes the outputs of its own requests from its own box.
    """

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []


class RequestState:
    """The answer to one request so far.

    `num_known` of its tokens are in outputs that were put into `box`; no exception can take these back.
    """

    def __init__(
        self, sequence: Sequence, tokenizer: Tokenizer | None, matcher: Matcher | None = None, *, box: Outbox
    ) -> None:
        self.sequence = sequence
        self.matcher = matcher
        self.box = box
        self.num_known = 0
        self._tokenizer = tokenizer
        params = sequence.request.params
        self.prompt_logprobs: list[TokenLogprob] = []
        self._first_prompt_logprob = max(1, params.prompt_logprobs_start)
        self._num_returned = 0
        self._weight_version = 0
        self._queue_seconds: float | None = None
        self._detokenizer = None
        self._stops = None
        self._marks: Mapping[int, str] = {}
        if tokenizer is not None:
            skips = params.skip_special_tokens
            stops, self._marks = stops_with_tokens(tuple(params.stop), tokenizer) if skips else (tuple(params.stop), {})
            shown = {id: tokenizer.token_bytes(id).decode(errors="replace") for id in sequence.request.shown_token_ids}
            self._detokenizer = IncrementalDetokenizer(
                tokenizer,
                prompt_ids=sequence.request.prompt_token_ids,
                skip_special_tokens=skips,
                marks={**shown, **self._marks},
            )
            if stops:
                self._stops = StopStrings(
                    stops, unseen=self._marks.values(), includes_match=params.include_stop_str_in_output
                )

    def restarted(self) -> RequestState:
        """A new state rebuilt from the tokens of the sequence, whatever state an exception left this one in."""
        matcher = self.matcher.restarted() if self.matcher else None
        state = RequestState(self.sequence, self._tokenizer, matcher, box=self.box)
        for token_id in self.sequence.output_token_ids:
            state.advance([token_id], [])
        state.num_known = self.num_known
        state._queue_seconds, state._weight_version = self._queue_seconds, self._weight_version
        return state

    def ended(self, error: str | None = None) -> RequestOutput:
        """The last output of a request that ends without another token: it was aborted, or there was an `error`."""
        text = ""
        if error is None and self._detokenizer is not None:
            text = self._detokenizer.flush()
            if self._stops is not None:  # a stop string that has not come whole is text
                text = self._stops.push(text, may_end=False)[0] + self._stops.flush()[0]
        return RequestOutput(
            request_id=self.sequence.request_id,
            new_token_ids=(),
            text=text,
            finished=True,
            finish_reason="abort",
            logprobs=None,
            prompt_logprobs=None,
            num_prompt_tokens=self.sequence.num_prompt_tokens,
            num_cached_tokens=self.sequence.num_cached,
            num_generated_tokens=self.num_known,
            weight_version=self._weight_version,
            queue_seconds=self._queue_seconds or 0.0,
            error=error,
        )

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are wanted and have not been returned."""
        return not self._num_returned and self.sequence.request.params.prompt_logprobs is not None

    def note_start(self) -> None:
        """Records that the request runs now; calls after a preemption have no effect."""
        if self._queue_seconds is None:
            self._queue_seconds = time.monotonic() - self.sequence.request.arrival_time

    def add_prompt_logprob(self, position: int, logprob: TokenLogprob) -> None:
        """Stores the log-probability of the prompt token at `position`, unless it was computed again after a preemption."""
        if position == len(self.prompt_logprobs) + self._first_prompt_logprob:
            self.prompt_logprobs.append(logprob)

    def advance(self, token_ids: Tokens[int], logprobs: Tokens[TokenLogprob], *, weight_version: int = 0) -> RequestOutput:
        """The output for `token_ids`; finished if the sequence or its grammar has ended, or a stop string was found."""
        sequence = self.sequence
        params = sequence.request.params
        ended = sequence.finish_reason is not None
        if self.matcher is not None:
            ended |= any(self.matcher.advance(token_id) for token_id in token_ids)
        error = self.matcher.error if self.matcher else None
        text, match = "", None
        if self._detokenizer is not None:
            text = self._detokenizer.push(token_ids[:-1] if self._hides_last(token_ids) else token_ids)
            if ended:
                text += self._detokenizer.flush()
            if self._stops is not None:
                # A stop string ends the text only once the minimum is reached, like every other reason to stop.
                text, match = self._stops.push(text, may_end=self._num_returned + len(token_ids) > params.min_new_tokens)
                if ended and match is None:
                    rest, match = self._stops.flush()
                    text += rest
        stopped = match is not None
        self._weight_version = weight_version
        first = self._num_returned == 0
        self._num_returned += len(token_ids)
        finished = stopped or ended
        error = None if stopped else error  # text after a stop string does not matter
        is_complete = stopped or (self.matcher is not None and self.matcher.is_complete)
        reason = "abort" if error else "stop" if is_complete else sequence.finish_reason or "stop"
        return RequestOutput(
            request_id=sequence.request.request_id,
            new_token_ids=tuple(token_ids),
            text=text,
            finished=finished,
            finish_reason=reason if finished else None,
            logprobs=tuple(logprobs) if params.logprobs is not None else None,
            prompt_logprobs=tuple(self.prompt_logprobs) if first and params.prompt_logprobs is not None else None,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached,
            num_generated_tokens=self._num_returned,
            weight_version=weight_version,
            queue_seconds=self._queue_seconds or 0.0,
            stop_reason=self._stop_reason(match, token_ids) if finished else None,
            error=error,
        )

    def _hides_last(self, token_ids: Tokens[int]) -> bool:
        """Whether the last token ends the request and is not shown although special tokens are."""
        params = self.sequence.request.params
        if params.skip_special_tokens or params.include_stop_str_in_output or self.sequence.finish_reason != "stop":
            return False
        return bool(token_ids) and self._tokenizer is not None and token_ids[-1] in self._tokenizer.special_ids

    def _stop_reason(self, match: str | None, token_ids: Tokens[int]) -> str | int | None:
        if match is not None and self._tokenizer is not None:
            for token_id, mark in self._marks.items():
                match = match.replace(mark, self._tokenizer.token_bytes(token_id).decode(errors="replace"))
        elif match is None and self.sequence.finish_reason == "stop" and token_ids:
            return token_ids[-1] if token_ids[-1] in self.sequence.request.params.stop_token_ids else None
        return match


class SampledRows:
    """The sampled rows of a step on the host; log-probabilities are read only if a request asked for them."""

    def __init__(self, step: Step, sampled: SampleOutput) -> None:
        """Waits for the device."""
        self.tokens: list[int] = np.asarray(sampled.tokens).tolist()
        self.chunks: list[tuple[int, Chunk]] = []
        """The chunks that have sampled rows, each with the row after its last one."""
        row, wants_logprobs, num_top = 0, False, 0
        for chunk in step.chunks:
            if chunk.num_sample_rows:
                row += chunk.num_sample_rows
                self.chunks.append((row, chunk))
                params = chunk.sequence.request.params
                for count in (params.logprobs, params.prompt_logprobs):
                    if count is not None:
                        wants_logprobs, num_top = True, max(num_top, count)
        self._of_tokens: tuple[list[Any], ...] | None = None
        if wants_logprobs:  # each array that is read takes time, and that of a step is short
            of_tokens = (sampled.logprobs, sampled.ranks, sampled.processed_logprobs, sampled.log_kept_masses)
            self._of_tokens = tuple(np.asarray(array).tolist() for array in of_tokens)
        self._top = tuple(map(np.asarray, (sampled.top_ids, sampled.top_logprobs))) if num_top else ()

    @property
    def new_tokens(self) -> list[int]:
        """The tokens of the sequences in `Step.sampled`, in order."""
        return [self.tokens[end - 1] for end, chunk in self.chunks if chunk.samples]

    def logprob(self, row: int, token_id: int, num_top: int, *, processed: bool) -> TokenLogprob:
        """The log-probabilities of `token_id`, which is the token sampled in `row` or the row's target."""
        assert self._of_tokens is not None
        logprobs, ranks, processed_logprobs, log_kept_masses = self._of_tokens
        top = dict(zip(*(array[row, :num_top].tolist() for array in self._top), strict=True)) if num_top else {}
        more = (processed_logprobs[row], log_kept_masses[row]) if processed else ()
        return TokenLogprob(token_id, logprobs[row], ranks[row], top, *more)

    def prompt_logprobs(self, end: int, chunk: Chunk) -> Iterator[tuple[int, TokenLogprob]]:
        """Position and log-probability of each prompt token that a row of `chunk`, which ends before row `end`, predicts."""
        params, prompt = chunk.sequence.request.params, chunk.sequence.request.prompt_token_ids
        processed = params.logprobs_mode == "processed"
        assert params.prompt_logprobs is not None
        for back in range(chunk.num_sample_rows, 0, -1):
            position = chunk.start + chunk.length - back + 1
            if position < len(prompt):
                yield position, self.logprob(end - back, prompt[position], params.prompt_logprobs, processed=processed)
