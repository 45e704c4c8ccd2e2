"""Checks for policies that users provide: whether a function can be one, and whether a plan can be executed."""

from __future__ import annotations

import inspect

from fastgen_jax.scheduling.fixed_chunks import end_of_fixed_chunk
from fastgen_jax.scheduling.images import end_of_chunk
from fastgen_jax.scheduling.plan import StepPlan
from fastgen_jax.scheduling.planner import Planner
from fastgen_jax.scheduling.policies import POLICIES, Policy
from fastgen_jax.scheduling.prefix import Prefix
from fastgen_jax.scheduling.sequence import Sequence


def checked_policy(policy: str | Policy) -> str | Policy:
    """The policy; a built-in one as its name.

    Raises:
        ValueError: it is neither the name of a built-in policy nor a function of one planner.
    """
    names = ", ".join(map(repr, POLICIES))
    for name, known in POLICIES.items():
        if policy is known or policy == name:
            return name
    if isinstance(policy, str) or not callable(policy):
        raise ValueError(f"policy is {policy!r}; choose one of {names}, or pass a function policy(planner) -> StepPlan")
    try:
        inspect.signature(policy).bind(None)
    except (TypeError, ValueError) as error:  # ValueError: it has no signature
        raise ValueError(
            f"policy is {policy!r}, which cannot be called with a planner: {error}; "
            "use the signature policy(planner) -> StepPlan"
        ) from None
    return policy


class CheckedPolicy:
    """A policy from a user. It gets a separate planner, and its plan is checked before it is executed."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __call__(self, planner: Planner) -> StepPlan:
        """Returns the plan.

        Raises:
            RuntimeError: the plan cannot be executed; the message says why.
        """
        plan = self._policy(planner.isolated())
        if not isinstance(plan, StepPlan):
            raise RuntimeError(f"the policy {self._policy!r} returned {type(plan).__name__}, not a StepPlan")
        fault = fault_of(plan, planner)
        if fault is not None:
            raise RuntimeError(f"the policy {self._policy!r} planned a step that cannot be run: {fault}")
        return plan


def fault_of(plan: StepPlan, planner: Planner) -> str | None:
    """Why a plan cannot be executed; None if it can. Counts in `planner.blocks`, so use a planner only once."""
    blocks, max_num_seqs = planner.blocks, planner.limits.max_num_seqs
    running, waiting = set(planner.running), set(planner.waiting)
    admitted: dict[Sequence, Prefix] = dict(plan.admissions)
    preempted, refused = set(plan.preempted), set(plan.refused)
    if not preempted <= running or len(preempted) != len(plan.preempted):
        return "preempted names a sequence that does not run, or one twice"
    if not admitted.keys() <= waiting or len(admitted) != len(plan.admissions):
        return "admissions names a sequence that does not wait, or one twice"
    if any(sequence.num_in_flight for sequence in admitted):
        return "it admits a sequence that has tokens in flight"
    stays = waiting - admitted.keys()
    if not refused <= stays or len(refused) != len(plan.refused):
        return "refused names a sequence that does not wait or is admitted, or one twice"
    if not set(plan.bypassed) <= stays:
        return "bypassed names a sequence that does not wait or is admitted"
    runs = (running - preempted) | admitted.keys()
    if len(runs) > max_num_seqs:
        return f"{len(runs)} sequences would run, and max_num_seqs is {max_num_seqs}"
    for sequence in plan.preempted:
        blocks.free(sequence.block_ids)
    for cached in admitted.values():
        blocks.share(cached.block_ids)
    return _fault_of_chunks(plan, runs, admitted, planner)


def _fault_of_chunks(plan: StepPlan, runs: set[Sequence], admitted: dict[Sequence, Prefix], planner: Planner) -> str | None:
    limits, blocks = planner.limits, planner.blocks
    size = limits.block_size
    with_chunk: set[Sequence] = set()
    for sequence, start, length, rows, samples in plan.chunks:
        if sequence not in runs or sequence in with_chunk:
            return f"a chunk belongs to {sequence}, which does not run in this step or has another chunk"
        with_chunk.add(sequence)
        cached = admitted.get(sequence)
        first = sequence.num_computed if cached is None else cached.num_blocks * size
        stop, last = start + length, min(sequence.num_tokens, sequence.max_total_tokens - 1)
        if start != first or not first < stop <= last:
            return f"a chunk of {sequence} is [{start}, {stop}); it must begin at {first} and end in {first + 1}..{last}"
        needed = max(0, stop - max(start, sequence.first_row))
        if stop != end_of_chunk(sequence.request.images, stop):
            return f"a chunk of {sequence} ends at {stop}, within an image whose tokens one step must compute"
        if limits.chunk_size is not None and stop != (end := end_of_fixed_chunk(sequence, start, limits.chunk_size)):
            return f"a chunk of {sequence} ends at {stop}; with chunks of a fixed size it must end at {end}"
        if rows != needed or samples != (stop == sequence.num_tokens):
            return (
                f"a chunk of {sequence} that ends at {stop} has num_sample_rows={rows} and samples={samples}; it must "
                f"have {needed} and {stop == sequence.num_tokens}"
            )
        held = sequence.capacity // size if cached is None else cached.num_blocks
        blocks.take(max(0, -(-stop // size) - held) * limits.groups.num_groups)
    if not admitted.keys() <= with_chunk:
        return "a sequence is admitted without a chunk"
    num_tokens, num_rows = sum(c.length for c in plan.chunks), sum(c.num_sample_rows for c in plan.chunks)
    if num_tokens > limits.token_budget or num_rows > limits.max_sample_rows:
        return (
            f"it has {num_tokens} tokens and {num_rows} rows of logits; at most {limits.token_budget} (token_budget) and "
            f"{limits.max_sample_rows} (max_sample_rows) fit"
        )
    return f"it needs {-blocks.available} more KV blocks than are free" if blocks.available < 0 else None
