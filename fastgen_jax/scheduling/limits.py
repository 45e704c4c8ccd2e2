"""Whether a request can ever run."""

from __future__ import annotations

from fastgen_jax.scheduling.request import Request


def max_total_tokens(request: Request, *, max_context_len: int, num_blocks: int, block_size: int) -> int:
    """The most tokens that a request may grow to, prompt and generated.

    Raises:
        ValueError: it can never run within these limits; the message has the numbers and the remedy.
    """
    params, num_prompt = request.params, len(request.prompt_token_ids)
    if num_prompt >= max_context_len:
        raise ValueError(
            f"prompt of request {request.request_id!r} has {num_prompt} tokens but max_context_len is "
            f"{max_context_len} and must hold a generated one too; shorten the prompt to "
            f"{max_context_len - 1} tokens, or raise max_context_len"
        )
    if params.max_length is not None and params.max_length <= num_prompt:
        raise ValueError(
            f"max_length is {params.max_length} but the prompt of request {request.request_id!r} "
            f"alone has {num_prompt} tokens; raise max_length to at least {num_prompt + 1}, "
            "or use max_new_tokens"
        )
    limit = max_context_len
    if params.max_new_tokens is not None:
        limit = num_prompt + params.max_new_tokens
    elif params.max_length is not None:
        limit = params.max_length
    limit = min(limit, max_context_len)
    if params.min_new_tokens > limit - num_prompt:
        raise ValueError(
            f"min_new_tokens is {params.min_new_tokens} but only {limit - num_prompt} tokens can follow "
            f"the prompt of {num_prompt} tokens within {limit}; "
            "lower min_new_tokens or shorten the prompt"
        )
    num_needed = -(-limit // block_size)
    if num_needed > num_blocks:
        most = num_blocks * block_size - num_prompt
        remedy = f"use max_new_tokens={most} or less" if most > 0 else "shorten the prompt"
        raise ValueError(
            f"request {request.request_id!r} may grow to {limit} tokens, {num_needed} blocks of "
            f"{block_size}, but the KV cache has {num_blocks} blocks; {remedy}, "
            "or start with more blocks"
        )
    return limit
