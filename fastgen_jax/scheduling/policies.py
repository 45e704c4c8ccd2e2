"""Which tokens make up the next step: one pure function a policy.

A policy reads the running and the waiting sequences and returns a `StepPlan`. It changes nothing but the
`BlockLedger` that it is given for this purpose. Sequences come in the order of their claim to run: by
priority, then arrival time, then order of adding.

What the policies share:

- **Generation**: one token for each running sequence with one token left to compute. If there is no block for
  it, the last of all running sequences is preempted, if need be the sequence itself; so the first one always
  advances.
- **Memory**: a waiting sequence is admitted as soon as the blocks for its next chunk exist and the watermark
  remains, which keeps it from being preempted at once. One that was preempted before is admitted only when
  there are blocks for all its tokens: it has shown that memory is short. When nothing else runs, no watermark
  is kept. Prompts under way have the first claim on free blocks: while one of them is short of blocks nobody
  is admitted, nor in a step that preempts.
- **Bounded bypass**: a waiting sequence for which there is no memory (or no logit row, or whose tokens are in
  flight) is stepped over. It is overtaken at most `max_bypasses` times, counted per sequence that overtakes
  it; then everybody behind it waits until it is admitted.
- **Logit rows**: a chunk that completes the known tokens of a sequence takes one row; a prompt whose
  log-probabilities are wanted takes one a token, and is cut where the rows end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fastgen_jax.scheduling.block_pool import BlockLedger
from fastgen_jax.scheduling.deadlines import feasible_line
from fastgen_jax.scheduling.pace import Pace
from fastgen_jax.scheduling.plan import Draft, StepLimits, StepPlan
from fastgen_jax.scheduling.sequence import Sequence


class Policy(Protocol):
    """Plans one step.

    `running` and `waiting` are in order and only read (a sequence carries its `request`, with priority and
    arrival time). `blocks` counts the free blocks as the plan grows. `cached_prefix` gives the registered
    blocks that a waiting sequence could start behind. `pace` tells the time, what steps cost and what was
    promised; it is there for policies in `NEED_PROMISE`.
    """

    def __call__(
        self,
        running: list[Sequence],
        waiting: list[Sequence],
        *,
        limits: StepLimits,
        blocks: BlockLedger,
        cached_prefix: Callable[[Sequence], list[int]],
        pace: Pace | None = None,
    ) -> StepPlan:
        """Gives the next step; one without chunks means that nothing can run before a commit."""
        ...


def splitfuse(
    running: list[Sequence],
    waiting: list[Sequence],
    *,
    limits: StepLimits,
    blocks: BlockLedger,
    cached_prefix: Callable[[Sequence], list[int]],
    pace: Pace | None = None,
) -> StepPlan:
    """Fills every step to the token budget: generation first, then prompts, the last of them split to fit.

    Source: Dynamic SplitFuse, DeepSpeed-FastGen (arXiv:2401.08671).
    """
    draft = Draft(running, waiting, limits, blocks, cached_prefix)
    draft.generate()
    draft.continue_prompts()
    draft.admit(whole=False)
    return draft.finish()


def prompts_first(
    running: list[Sequence],
    waiting: list[Sequence],
    *,
    limits: StepLimits,
    blocks: BlockLedger,
    cached_prefix: Callable[[Sequence], list[int]],
    pace: Pace | None = None,
) -> StepPlan:
    """Makes a step of whole prompts while any can be admitted, else of generation, as vLLM did in 2023.

    A prompt that no step can hold runs alone, in consecutive steps filled by it, once it is first in line.
    """
    draft = Draft(running, waiting, limits, blocks, cached_prefix)
    if not draft.prompt_alone(beside_generation=False):
        draft.admit(whole=True)
        if not draft.plan.chunks:
            draft.generate()
    return draft.finish()


def orca(
    running: list[Sequence],
    waiting: list[Sequence],
    *,
    limits: StepLimits,
    blocks: BlockLedger,
    cached_prefix: Callable[[Sequence], list[int]],
    pace: Pace | None = None,
) -> StepPlan:
    """Puts whole prompts beside generation.

    A prompt that does not fit beside the running sequences runs alone, in consecutive steps filled by it if
    need be, once it is first in line; generation pauses meanwhile. Source: iteration-level scheduling, Orca
    (OSDI 2022).
    """
    draft = Draft(running, waiting, limits, blocks, cached_prefix)
    if not draft.prompt_alone(beside_generation=True):
        draft.generate()
        draft.admit(whole=True)
    return draft.finish()


def sla(
    running: list[Sequence],
    waiting: list[Sequence],
    *,
    limits: StepLimits,
    blocks: BlockLedger,
    cached_prefix: Callable[[Sequence], list[int]],
    pace: Pace | None = None,
) -> StepPlan:
    """SplitFuse that keeps a promise: steps short enough for it, prompts by deadline, the hopeless refused.

    Beside generation a step takes no more tokens than fit into the promised gap between two tokens. Prompts share
    what is left: first the largest set of them that can all be in time, by deadline, then those that cannot. A request
    without a first token `grace` seconds after it was due is refused, so everybody is answered or refused within a
    bounded time; and who was overtaken `max_bypasses` times is next.
    """
    assert pace is not None  # the scheduler gives it to policies in NEED_PROMISE
    draft = Draft(running, waiting, limits, blocks, cached_prefix)
    draft.generate()
    draft.limit(pace.tokens_within_a_gap())
    line = feasible_line(
        running[: draft.num_kept],
        waiting,
        pace,
        limits,
        prompt_tokens=draft.tokens_left,
        num_generating=len(draft.plan.chunks),
        cached_prefix=cached_prefix,
    )
    draft.plan.refused.extend(line.refused)
    draft.take_in_line(line.in_time, line.leftover)
    return draft.finish()


POLICIES: dict[str, Policy] = {"splitfuse": splitfuse, "prompts_first": prompts_first, "orca": orca, "sla": sla}
NEED_PROMISE = frozenset({"sla"})
