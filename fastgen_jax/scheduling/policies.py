"""Which tokens make up the next step: one function per policy.

A policy is called with a `Planner`, which holds the sequences and the limits of a step, and returns a `StepPlan`.

What the policies share:

- **Generation**: one token for each running sequence with one token left to compute. If no block is free for it, the
  last running sequence is preempted, which may be the sequence itself; so the first one always advances.
- **Memory**: a waiting sequence is admitted as soon as the blocks for its next chunk exist and the watermark remains,
  so that it is not preempted immediately. A sequence that was preempted before is admitted only when there are blocks
  for all its tokens, because memory has proved short. When nothing else runs, no watermark is kept. Running prompts
  have the first claim on free blocks: while one of them lacks blocks no sequence is admitted, nor in a step that
  preempts.
- **Bounded bypass**: a waiting sequence that cannot start, because there is no memory or no row of logits for it or
  its tokens are in flight, is skipped. It is overtaken at most `max_bypasses` times, counted per sequence that
  overtakes it; then every sequence behind it waits until it is admitted.
- **Rows of logits**: a chunk that completes the known tokens of a sequence needs one row. A prompt whose
  log-probabilities were requested needs one per token and is split where the rows end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from fastgen_jax.scheduling.deadlines import feasible_prompts
from fastgen_jax.scheduling.plan import StepPlan
from fastgen_jax.scheduling.planner import Planner

Policy: TypeAlias = Callable[[Planner], StepPlan]
"""Plans one step. A plan without chunks means that nothing can run before a commit."""


def splitfuse(planner: Planner) -> StepPlan:
    """Fills every step to the token budget: generation first, then prompts, the last of them split to fit.

    Source: Dynamic SplitFuse, DeepSpeed-FastGen (arXiv:2401.08671).
    """
    planner.generate()
    planner.continue_prompts()
    planner.admit()
    return planner.finish()


def prompts_first(planner: Planner) -> StepPlan:
    """Plans whole prompts while any can be admitted, otherwise generation, as vLLM did in 2023.

    A prompt that no step can hold runs alone, in consecutive steps, once it is first in the queue.
    """
    if not planner.run_prompt_alone(with_generation=False):
        planner.admit(whole=True)
        if not planner.plan.chunks:
            planner.generate()
    return planner.finish()


def orca(planner: Planner) -> StepPlan:
    """Adds whole prompts next to generation.

    A prompt that does not fit next to the running sequences runs alone once it is first in the queue, if necessary in
    consecutive steps; generation pauses meanwhile. Source: iteration-level scheduling, Orca (OSDI 2022).
    """
    if not planner.run_prompt_alone(with_generation=True):
        planner.generate()
        planner.admit(whole=True)
    return planner.finish()


def sla(planner: Planner) -> StepPlan:
    """SplitFuse that keeps a promise: short steps, prompts by deadline, and refusal of requests that would be late.

    A step that generates holds no more tokens than fit into the promised gap between two tokens. Prompts share the
    rest: first the largest set of them that can all be on time, by deadline, then the others. A request without a
    first token `grace` seconds after it was due is refused, so every request is answered or refused within a bounded
    time. A request that was overtaken `max_bypasses` times is next.
    """
    assert planner.pace is not None  # the scheduler provides it to policies in NEED_PROMISE
    planner.generate()
    planner.limit_tokens(planner.pace.tokens_within_a_gap())
    prompts = feasible_prompts(planner, planner.pace)
    planner.plan.refused.extend(prompts.refused)
    planner.take_in_order(prompts.on_time, prompts.late)
    return planner.finish()


POLICIES: dict[str, Policy] = {"splitfuse": splitfuse, "prompts_first": prompts_first, "orca": orca, "sla": sla}
NEED_PROMISE = frozenset({"sla"})
