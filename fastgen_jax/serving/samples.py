"""What an answer computes for each of its samples: where tokens start in the text, and how likely the text is."""

from __future__ import annotations

from collections.abc import Sequence

from fastgen_jax.engine.outputs import RequestOutput
from fastgen_jax.serving.sampling_fields import Sampling
from fastgen_jax.text import IncrementalDetokenizer, Tokenizer


class TextOffsets:
    """Where tokens start in the text of an answer, in characters; a token within a character starts where that does."""

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int], *, echo: bool) -> None:
        self._tokenizer = tokenizer
        self._next = 0
        self._prompt_ids = prompt_ids
        self._prompt = self._answer = None
        if tokenizer is not None:
            self._prompt = IncrementalDetokenizer(tokenizer, skip_special_tokens=False) if echo else None
            self._answer = IncrementalDetokenizer(tokenizer, prompt_ids=prompt_ids)

    def start_of(self, token_id: int, *, in_prompt: bool = False) -> int:
        """Returns where the next token starts."""
        start, detokenizer = self._next, self._prompt if in_prompt else self._answer
        self._next += len(detokenizer.push((token_id,))) if detokenizer is not None else 0
        return start


class Scores:
    """The mean log-probability of each sample, from which the best are chosen."""

    def __init__(self, body: Sampling, num_samples: int) -> None:
        self._body = body
        self._sums = [0.0] * num_samples
        self._counts = [0] * num_samples

    def add(self, index: int, outputs: Sequence[RequestOutput]) -> None:
        """Adds the tokens of `outputs` to those of sample `index`."""
        for output in outputs if self._body.selects else ():
            self._sums[index] += sum(entry.logprob for entry in output.logprobs or ())
            self._counts[index] += len(output.new_token_ids)

    def chosen(self) -> list[int]:
        """The samples to return, for each prompt the best ones first."""
        each, count = self._body.num_samples, self._body.num_choices
        means = [total / max(1, number) for total, number in zip(self._sums, self._counts, strict=True)]
        groups = (range(start, start + each) for start in range(0, len(means), each))
        return [i for group in groups for i in (sorted(group, key=lambda i: -means[i])[:count] if each > count else group)]
