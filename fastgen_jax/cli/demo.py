"""`fastgen demo`: answers prompts of different lengths in one batch and summarizes how the engine ran them."""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastgen_jax.cli.options import add_pipeline_arguments, limit_new_tokens, make_pipeline
from fastgen_jax.cli.parser import Options
from fastgen_jax.cli.terminal import has_colors

if TYPE_CHECKING:
    from fastgen_jax.api.pipeline import Pipeline, Response

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "seed")
MAX_NEW_TOKENS = 64  # per answer, if no limit is given

QUESTIONS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a haiku about the sea.",
    "Give me three tips for a good night's sleep.",
    "What does a compiler do?",
    "Name four kinds of fruit, separated by commas.",
    "Why do we have leap years?",
    "Translate 'good morning' into Spanish.",
)
LONG_TEXT = (
    "A lighthouse keeper named Ada kept a notebook. Every evening she wrote down the weather, the ships that had "
    "passed, and one thing that she had learned that day. When the light was automated, the harbor master asked what "
    "should become of the forty notebooks. Ada said: give them to the school. For years the children of the town "
    "learned to read from her sentences, and to this day its sailors know that fog comes from the east in October, "
    "that a ship low in the water turns late, and that one may be alone without being lonely. "
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    add_pipeline_arguments(parser)


def run(options: Options) -> int:
    """Runs the command and returns the exit code."""
    begin = time.perf_counter()
    pipe, generation = make_pipeline(options)
    startup_seconds = time.perf_counter() - begin
    limit_new_tokens(generation, MAX_NEW_TOKENS)
    if not generation.keys() & set(SAMPLING):  # the same answers on every run
        generation["do_sample"] = False
    prompts = [*QUESTIONS, f"Summarize this story in two sentences. {LONG_TEXT * 2}"]
    start = time.perf_counter()
    responses = pipe([[{"role": "user", "content": text}] for text in prompts], **generation, progress=True)
    seconds = time.perf_counter() - start
    bold, plain = ("\033[1m", "\033[0m") if has_colors() else ("", "")
    for prompt, response in zip(prompts, responses, strict=True):
        print(f"\n{bold}> {textwrap.shorten(prompt, 100)}{plain}")
        print(textwrap.indent(textwrap.fill(response.generated_text.strip(), 100), "  "))
    print(summary(pipe, responses, startup_seconds=startup_seconds, start=start, seconds=seconds))
    return 0


def summary(pipe: Pipeline, responses: Sequence[Response], *, startup_seconds: float, start: float, seconds: float) -> str:
    """How the engine ran these responses, which were requested at `start` and finished `seconds` later."""
    m = pipe.engine.metrics.snapshot()
    first_step = pipe.engine.metrics.timeline[0]  # contains whole short prompts, so it yields their first tokens
    config = pipe.engine.config
    prompt_tokens = sum(response.prompt_length for response in responses)
    cached = sum(response.cached_length for response in responses)
    generated = sum(response.generated_length for response in responses)
    return f"""
{len(responses)} requests in {seconds:.2f} s: {prompt_tokens} prompt tokens ({cached} from the prefix cache), \
{generated} generated
  startup      {startup_seconds:7.1f} s to load the weights and prepare the programs
  first token  {first_step.done - start:7.2f} s after the requests were sent
  throughput   {generated / seconds:7.1f} generated tokens/s, {(prompt_tokens + generated) / seconds:.1f} including prompts
  steps        {m["steps"]:5d}     of at most {config.token_budget} tokens; programs for {config.budget_ladder}
  budget fill  {100 * m["budget_fill"]:7.1f} % of program rows held a token, the rest were padding
  host work    {m["host_ms"]:7.2f} ms per step to plan, pack and commit
  compiled     {m["compiles_while_serving"]:5d}     programs while serving"""
