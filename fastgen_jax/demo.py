"""What `make demo` shows: prompts of different lengths, answered together, and what the engine did for it."""

from __future__ import annotations

import textwrap
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen_jax.api.pipeline import Pipeline

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
    "passed, and one thing that she had learned that day. When the light was automated, the harbour master asked what "
    "should become of the forty notebooks. Ada said: give them to the school. For years the children of the town "
    "learned to read from her sentences, and to this day its sailors know that fog comes from the east in October, "
    "that a ship low in the water turns late, and that one may be alone without being lonely. "
)


def run(pipe: Pipeline, generation: dict[str, Any], *, started_in: float, colors: bool = False) -> int:
    """Answers the questions, prints them with a summary, and returns the exit code 0.

    `started_in` is how many seconds it took to make `pipe`; with `colors` the questions are bold.
    """
    prompts = [*QUESTIONS, f"Summarise this story in two sentences. {LONG_TEXT * 2}"]
    messages = [[{"role": "user", "content": text}] for text in prompts]
    start = time.perf_counter()
    responses = pipe(messages, **generation, progress=True)
    seconds = time.perf_counter() - start
    for prompt, response in zip(prompts, responses, strict=True):
        question = f"> {textwrap.shorten(prompt, 100)}"
        print(f"\n\033[1m{question}\033[0m" if colors else f"\n{question}")
        print(textwrap.indent(textwrap.fill(response.generated_text.strip(), 100), "  "))
    m = pipe.engine.metrics.snapshot()
    first_step = pipe.engine.metrics.timeline[0]  # it holds short prompts whole, so their first tokens
    config = pipe.engine.config
    prompt_tokens = sum(response.prompt_length for response in responses)
    cached = sum(response.cached_length for response in responses)
    generated = sum(response.generated_length for response in responses)
    print(f"""
{len(prompts)} requests in {seconds:.2f} s: {prompt_tokens} prompt tokens ({cached} from the prefix cache) and {generated} \
generated
  start        {started_in:7.1f} s to load the weights and have the programs ready
  first token  {first_step.done - start:7.2f} s after the requests were sent
  throughput   {generated / seconds:7.1f} generated tokens/s, {(prompt_tokens + generated) / seconds:.1f} in all
  steps        {m["steps"]:5d}     of at most {config.token_budget} tokens; programs for {config.budget_ladder}
  budget fill  {100 * m["budget_fill"]:7.1f} % of the programs' rows held a token, the others were padding
  host work    {m["host_ms"]:7.2f} ms a step to plan, pack and commit
  compiled     {m["compiles_while_serving"]:5d}     programs while serving""")
    return 0
