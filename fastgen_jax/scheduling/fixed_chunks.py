"""Chunks whose ends depend on their own request alone, so that other requests never change how its tokens are computed.

    position  0       C       2C     P                    C tokens a chunk, P tokens of prompt
              | chunk | chunk | chunk | . | . | . |       one token a chunk after it, generated or computed again

A prompt whose log-probabilities are needed has chunks of one token from the first of them on: a step may have a single row
of logits left for it. Only whole chunks of C tokens are shared among prompts, since a block of any other chunk holds keys
and values that another request would compute in a chunk of another length.

A chunk whose end would be within an image that one step must compute ends before the image, and that of the image with it:

    position  0       C    [ 2C ]   3C
              | chunk | .. | .. | . | chunk |
"""

from __future__ import annotations

from fastgen_jax.scheduling.sequence import Sequence


def end_of_fixed_chunk(sequence: Sequence, start: int, size: int) -> int:
    """The end of the chunk that begins at position `start`, in chunks of `size` tokens, which hold the largest image."""
    end = start - start % size + size
    for image in sequence.request.images:
        if image.is_whole and image.start < end < image.stop:
            end = image.start if image.start > start else image.stop
    return max(start + 1, min(end, _end_of_chunks(sequence)))


def num_shareable(sequence: Sequence, size: int) -> int:
    """How many positions are in whole chunks of `size` tokens, from the first one on."""
    end = _end_of_chunks(sequence)
    for image in sequence.request.images:
        border = image.start - image.start % size + size  # the next one after its first token
        if image.is_whole and border < image.stop:
            end = min(end, border - 1)
    return end - end % size


def _end_of_chunks(sequence: Sequence) -> int:
    """Where chunks of one token begin."""
    return min(sequence.num_prompt_tokens, sequence.first_prompt_row)


def fixed_chunk_size(token_budget: int, *, max_num_seqs: int, block_size: int) -> int:
    """Tokens of a prompt that one step computes: as many whole blocks as fit beside the other sequences."""
    return (token_budget - max_num_seqs + 1) // block_size * block_size


def check_size(size: int, *, block_size: int, token_budget: int, max_num_seqs: int) -> None:
    """ValueError unless whole chunks are whole blocks, and every step has room for one beside generating sequences."""
    if size < 1 or size % block_size:
        raise ValueError(f"chunk_size is {size}; it must be a multiple of block_size={block_size}")
    if size + max_num_seqs - 1 > token_budget:
        raise ValueError(
            f"chunk_size={size} and max_num_seqs={max_num_seqs} need steps of {size + max_num_seqs - 1} tokens, but "
            f"token_budget is {token_budget}; raise it"
        )
