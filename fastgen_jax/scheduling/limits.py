"""How long a sequence can get, and whether a request can ever run."""

from __future__ import annotations

from fastgen_jax.scheduling.groups import BlockGroups
from fastgen_jax.scheduling.request import Request


class ContextLengthError(ValueError):
    """A request needs more tokens than a sequence can have here."""

    def __init__(self, message: str, *, num_prompt: int, num_requested: int, limit: int) -> None:
        super().__init__(message)
        self.num_prompt = num_prompt
        self.num_requested = num_requested
        """Tokens requested by `max_new_tokens` or `max_length` after the prompt; 0 if the prompt alone is too long."""
        self.limit = limit
        """Tokens of the longest sequence."""


def max_total_tokens(request: Request, *, max_context_len: int, num_blocks: int, groups: BlockGroups) -> int:
    """The most tokens, prompt and generated, that a request can grow to; as many as fit if it sets no limit.

    Raises:
        ContextLengthError: its prompt does not fit, or the tokens that it requests do not fit into the KV cache.
        ValueError: it can never run within its own limits. The messages contain the numbers and the remedy.
    """
    params, num_prompt = request.params, len(request.prompt_token_ids)
    longest = groups.longest(num_blocks, max_context_len)
    if num_prompt >= max_context_len:
        raise ContextLengthError(
            f"prompt of request {request.request_id!r} has {num_prompt} tokens but max_context_len is "
            f"{max_context_len} and must also hold a generated token; shorten the prompt to "
            f"{longest - 1} tokens, or raise max_context_len",
            num_prompt=num_prompt,
            num_requested=0,
            limit=longest,
        )
    if params.max_length is not None and params.max_length <= num_prompt:
        raise ValueError(
            f"max_length is {params.max_length} but the prompt of request {request.request_id!r} "
            f"alone has {num_prompt} tokens; raise max_length to at least {num_prompt + 1}, "
            "or use max_new_tokens"
        )
    limit = max(longest, num_prompt + 1)
    if params.max_new_tokens is not None:
        limit = min(num_prompt + params.max_new_tokens, max_context_len)
    elif params.max_length is not None:
        limit = min(params.max_length, max_context_len)
    num_needed = groups.blocks_needed(limit)
    if num_needed > num_blocks:
        fits = num_prompt < longest
        remedy = f"use max_new_tokens={longest - num_prompt} or less" if fits else "shorten the prompt"
        raise ContextLengthError(
            f"request {request.request_id!r} may grow to {limit} tokens, {num_needed} blocks of "
            f"{groups.block_size}, but the KV cache has {num_blocks} blocks; {remedy}, "
            "or start with more blocks",
            num_prompt=num_prompt,
            num_requested=limit - num_prompt if fits else 0,
            limit=longest,
        )
    if params.min_new_tokens > limit - num_prompt:
        raise ValueError(
            f"min_new_tokens is {params.min_new_tokens} but only {limit - num_prompt} tokens can follow "
            f"the prompt of {num_prompt} tokens within {limit}; "
            "lower min_new_tokens or shorten the prompt"
        )
    return limit
