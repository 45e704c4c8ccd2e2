"""Decides on the host which tokens each step computes. Uses only the standard library."""

from fastgen_jax.scheduling.block_pool import BlockLedger, BlockPool
from fastgen_jax.scheduling.groups import BlockGroups
from fastgen_jax.scheduling.images import Grid, PromptImage
from fastgen_jax.scheduling.limits import ContextLengthError, max_total_tokens
from fastgen_jax.scheduling.pace import Pace, Promise
from fastgen_jax.scheduling.plan import Admission, StepLimits, StepPlan
from fastgen_jax.scheduling.plan_check import checked_policy
from fastgen_jax.scheduling.planner import Planner
from fastgen_jax.scheduling.policies import NEED_PROMISE, POLICIES, Policy, orca, prompts_first, sla, splitfuse
from fastgen_jax.scheduling.prefix import Prefix
from fastgen_jax.scheduling.request import Request, SamplingParams
from fastgen_jax.scheduling.scheduler import Scheduler
from fastgen_jax.scheduling.sequence import FinishReason, Sequence, SequenceStatus
from fastgen_jax.scheduling.step import Chunk, SchedulerStats, Step

__all__ = [
    "NEED_PROMISE",
    "POLICIES",
    "Admission",
    "BlockGroups",
    "BlockLedger",
    "BlockPool",
    "Chunk",
    "ContextLengthError",
    "FinishReason",
    "Grid",
    "Pace",
    "Planner",
    "Policy",
    "Prefix",
    "Promise",
    "PromptImage",
    "Request",
    "SamplingParams",
    "Scheduler",
    "SchedulerStats",
    "Sequence",
    "SequenceStatus",
    "Step",
    "StepLimits",
    "StepPlan",
    "checked_policy",
    "max_total_tokens",
    "orca",
    "prompts_first",
    "sla",
    "splitfuse",
]
