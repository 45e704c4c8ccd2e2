"""Reasoning in answers: how a model marks it, whether a prompt begins it, and which variables of a template switch it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastgen_jax.json_types import JsonObject
from fastgen_jax.serving.tool_formats import harmony
from fastgen_jax.serving.tool_formats.pieces import Source, Steps, until
from fastgen_jax.text import Tokenizer
from fastgen_jax.text.grammar import ReasoningLimits

_SWITCHES = ("enable_thinking", "thinking")  # Qwen3, GLM-4.5, SmolLM3 and others; DeepSeek V3.1, Granite
TAIL = 16  # tokens at the end of a prompt, more than those of a tag and white space


@dataclass(frozen=True, kw_only=True)
class ReasoningFormat:
    """The texts that delimit the reasoning at the start of an answer."""

    name: str
    """As in `--reasoning-format`."""
    open: str
    close: str
    forced: str
    """What ends it when its budget is spent."""
    before_calls: str = ""
    before_text: str = ""
    """What follows it before calls, and before a text for the user."""
    channels: bool = False
    """Whether a tool format reads it, with the rest of the answer."""

    def limits(
        self, tokenizer: Tokenizer, *, is_open: bool, budget: int | None, calls: bool, constrained: bool
    ) -> ReasoningLimits:
        """The limits of an answer that continues with calls or with a text, `constrained` by a grammar or not.

        `is_open`: the prompt has begun the reasoning.
        """
        then = self.before_calls if calls else self.before_text
        texts = (self.open, self.close, self.forced + then, then)
        opening, closing, forced, after = (_ids(tokenizer, text) for text in texts)
        return ReasoningLimits(
            opening=() if is_open else opening,
            closing=closing,
            blanks=tuple(ids[0] for blank in ("\n", "\n\n") if len(ids := _ids(tokenizer, blank)) == 1),
            forced=forced,
            then=after if constrained else (),
            budget=budget,
        )


def _ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


FORMATS = {
    "think": ReasoningFormat(
        name="think", open="<think>", close="</think>", forced="\n</think>", before_calls="\n\n", before_text="\n\n"
    ),
    "mistral": ReasoningFormat(name="mistral", open="[THINK]", close="[/THINK]", forced="[/THINK]"),
    "seed": ReasoningFormat(name="seed", open="<seed:think>", close="</seed:think>", forced="</seed:think>"),
    "harmony": ReasoningFormat(
        name="harmony",
        open=harmony.ANALYSIS,
        close="<|end|>",
        forced="<|end|>",
        before_calls=harmony.NEXT,
        before_text=harmony.NEXT + harmony.FINAL,
        channels=True,
    ),
}


def reasoning_format(name: str | None, template: str) -> ReasoningFormat | None:
    """The format with that name, "none" for no format; without a name, the one that a chat template names."""
    if name is not None:
        return FORMATS.get(name)
    if harmony.FORMAT.recognizes(template):
        return FORMATS["harmony"]
    return next((form for form in FORMATS.values() if form.close in template and not form.channels), None)


def is_open(form: ReasoningFormat, tokenizer: Tokenizer, prompt: Sequence[int]) -> bool | None:
    """Whether a prompt has begun the reasoning; None if it has also ended it."""
    tail = tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False).rstrip()
    return True if tail.endswith(form.open) else None if tail.endswith(form.close) and not form.channels else False


def read_reasoning(source: Source, form: ReasoningFormat, *, opened: bool) -> Steps[None]:
    """Yields the reasoning at the start of an answer; the source is left at the rest."""
    if not opened:
        while form.open.startswith(source.text.lstrip()) and source.text.lstrip() != form.open and not source.ended:
            yield None
        if not source.text.lstrip().startswith(form.open):
            return
        source.text = source.text.lstrip().removeprefix(form.open)
    yield from until(source, (form.close,), "reasoning")


def effort_variables(effort: str | None, variables: frozenset[str]) -> JsonObject:
    """The variables of a template that ask for this effort; none if it has no switch for it."""
    if effort is None:
        return {}
    switches = {name: effort != "none" for name in _SWITCHES if name in variables}
    if "reasoning_effort" in variables and effort != "none":
        return {**switches, "reasoning_effort": effort}
    return dict(switches)
