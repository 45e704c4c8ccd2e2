"""Policies from outside: whether a function can be one, and whether what it plans can be carried out."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from fastgen_jax.scheduling.block_pool import BlockLedger
from fastgen_jax.scheduling.pace import Pace
from fastgen_jax.scheduling.plan import StepLimits, StepPlan
from fastgen_jax.scheduling.policies import POLICIES, Policy
from fastgen_jax.scheduling.sequence import Sequence


def checked_policy(policy: str | Policy) -> str | Policy:
    """The policy, a built-in one by its name.

    Raises:
        ValueError: it is neither the name of one nor a function that takes what `Policy` is called with.
    """
    names = ", ".join(map(repr, POLICIES))
    for name, known in POLICIES.items():
        if policy is known or policy == name:
            return name
    if isinstance(policy, str) or not callable(policy):
        raise ValueError(f"policy is {policy!r}; choose one of {names}, or give a function with the signature of `Policy`")
    try:
        inspect.signature(policy).bind([], [], limits=None, blocks=None, cached_prefix=None, pace=None)
    except (TypeError, ValueError) as error:  # the second is of what has no signature
        raise ValueError(
            f"policy is {policy!r}, which cannot be called as `Policy` is: {error}; "
            "give it the signature (running, waiting, *, limits, blocks, cached_prefix, pace=None)"
        ) from None
    return policy


class CheckedPolicy:
    """A policy from outside, each of whose plans is checked before it is carried out."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

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
        """Gives the plan; RuntimeError, which says what is wrong with it, if it cannot be carried out."""
        before = blocks.copy()
        plan = self._policy(running[:], waiting[:], limits=limits, blocks=blocks, cached_prefix=cached_prefix, pace=pace)
        if not isinstance(plan, StepPlan):
            raise RuntimeError(f"the policy {self._policy!r} returned {type(plan).__name__}, not a StepPlan")
        fault = fault_of(plan, running, waiting, limits=limits, blocks=before)
        if fault is not None:
            raise RuntimeError(f"the policy {self._policy!r} planned a step that cannot be run: {fault}")
        return plan


def fault_of(
    plan: StepPlan, running: list[Sequence], waiting: list[Sequence], *, limits: StepLimits, blocks: BlockLedger
) -> str | None:
    """What keeps a plan from being carried out; None if nothing does. `blocks` is used up."""
    admitted: dict[Sequence, list[int]] = dict(plan.admissions)
    preempted, refused = set(plan.preempted), set(plan.refused)
    if not preempted <= set(running) or len(preempted) != len(plan.preempted):
        return "preempted names a sequence that does not run, or one twice"
    if not admitted.keys() <= set(waiting) or len(admitted) != len(plan.admissions):
        return "admissions names a sequence that does not wait, or one twice"
    if any(sequence.num_in_flight for sequence in admitted):
        return "a sequence is admitted while tokens of it are in flight"
    stays = set(waiting) - admitted.keys()
    if not refused <= stays or len(refused) != len(plan.refused):
        return "refused names a sequence that does not wait or is admitted, or one twice"
    if not set(plan.bypassed) <= stays:
        return "bypassed names a sequence that does not wait or is admitted"
    runs = (set(running) - preempted) | admitted.keys()
    if len(runs) > limits.max_num_seqs:
        return f"{len(runs)} sequences would run, and max_num_seqs is {limits.max_num_seqs}"
    for sequence in plan.preempted:
        blocks.free(sequence.block_ids)
    for cached in admitted.values():
        blocks.share(cached)
    return _fault_of_chunks(plan, runs, admitted, limits, blocks)


def _fault_of_chunks(
    plan: StepPlan, runs: set[Sequence], admitted: dict[Sequence, list[int]], limits: StepLimits, blocks: BlockLedger
) -> str | None:
    size = limits.block_size
    with_chunk: set[Sequence] = set()
    for sequence, start, length, rows, samples in plan.chunks:
        if sequence not in runs or sequence in with_chunk:
            return f"a chunk is of {sequence}, which does not run in this step or has another chunk"
        with_chunk.add(sequence)
        cached = admitted.get(sequence)
        first = sequence.num_computed if cached is None else len(cached) * size
        stop, last = start + length, min(sequence.num_tokens, sequence.max_total_tokens - 1)
        if start != first or not first < stop <= last:
            return f"a chunk of {sequence} is [{start}, {stop}); it must begin at {first} and end in {first + 1}..{last}"
        wanted = max(0, stop - max(start, sequence.first_row))
        if rows != wanted or samples != (stop == sequence.num_tokens):
            return (
                f"a chunk of {sequence} that ends at {stop} has num_sample_rows={rows} and samples={samples}; it must "
                f"have {wanted} and {stop == sequence.num_tokens}"
            )
        if samples and sequence.awaits_each_token and sequence.num_in_flight:
            return f"{sequence} awaits a token in flight before it can sample the next"
        held = len(sequence.block_ids) if cached is None else len(cached)
        blocks.take(max(0, -(-stop // size) - held))
    if not admitted.keys() <= with_chunk:
        return "a sequence is admitted without a chunk"
    num_tokens, num_rows = sum(c.length for c in plan.chunks), sum(c.num_sample_rows for c in plan.chunks)
    if num_tokens > limits.token_budget or num_rows > limits.max_sample_rows:
        return (
            f"it has {num_tokens} tokens and {num_rows} logit rows; at most {limits.token_budget} (token_budget) and "
            f"{limits.max_sample_rows} (max_sample_rows) fit"
        )
    return f"it needs {-blocks.available} KV blocks more than are free" if blocks.available < 0 else None
