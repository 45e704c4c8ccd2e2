"""Starting the work of a request: what completions and chats do alike."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastgen_jax.engine.prompts import Prompt
from fastgen_jax.scheduling import SamplingParams
from fastgen_jax.serving.errors import ApiError
from fastgen_jax.serving.guided import Guide
from fastgen_jax.serving.protocol import Sampling
from fastgen_jax.serving.work import Backend, Work, start_work
from fastgen_jax.text.grammar import GrammarError


async def guide_of(body: Sampling) -> Guide | None:
    """Returns the grammar that a request demands of its answer, if any; ApiError if it cannot be used."""
    if not body.is_guided:
        return None
    try:
        return await asyncio.to_thread(body.guide)  # a large schema takes up to a second
    except GrammarError as error:
        raise ApiError(str(error), param=next(iter(body.constraints))) from None


async def start(
    backend: Backend,
    body: Sampling,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    guide: Guide | None,
    *,
    add_special_tokens: bool = True,
    shown_token_ids: tuple[int, ...] = (),
) -> Work:
    """Starts the samples of a request; raises as `start_work` does, and ApiError for a grammar that cannot be used."""
    try:
        work = await start_work(
            backend,
            prompts,
            params,
            num_samples=body.num_samples,
            priority=body.priority,
            timeout=body.timeout,
            grammar=guide.grammar if guide else None,
            new_tokens=backend.intake.default_new_tokens,
            add_special_tokens=add_special_tokens,
            keep_tokens=body.truncate_prompt_tokens,
            cache_salt=body.cache_salt or "",
            shown_token_ids=shown_token_ids,
        )
    except GrammarError as error:
        raise ApiError(str(error), param=guide.field if guide else None) from None
    work.relaxed = guide.relaxed if guide else ()
    return work
