"""The state of one request while it is served."""

from __future__ import annotations

import enum
from typing import Literal

from fastgen_jax.scheduling.request import Request

NEVER = 2**63
"""A position that no sequence reaches."""
FinishReason = Literal["stop", "length", "abort", "refused"]


class SequenceStatus(enum.Enum):
    """The status of a sequence: a running one has a slot and blocks, the others have neither."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """The progress of one request. Any component may read it; only the scheduler writes it.

    ```
    position  0          num_prompt_tokens      num_known_tokens   num_tokens   max_total_tokens
              |  prompt  |  output_token_ids    |  in flight       |            |
              |  KV dispatched ........ num_computed |  remaining  |
    ```

    `num_tokens` includes the tokens in flight: sampled by steps that were dispatched but not yet committed. A
    sequence that generates has one token left to compute (`remaining == 1`). The very last token, at position
    `max_total_tokens - 1`, is sampled but never computed.

    `tables` lists its KV blocks in order of position, in one table for each cache group, and `capacity` is how many
    positions a table covers. A windowed group has freed the first `num_freed` blocks of its table, whose entries have no
    meaning, and frees the next one when `next_free` positions are computed. `num_cached` is how many prompt tokens came
    from the prefix cache when the sequence first ran. `next_prompt_row` is the first prompt position whose logits are
    still needed for `prompt_logprobs`; it equals `num_prompt_tokens` when none are.
    The KV of the first `num_shareable` positions may be shared with other sequences.
    `num_bypasses` counts the later sequences that were admitted while there was no room for this one.
    """

    __slots__ = (
        "awaits_each_token",
        "block_digests",
        "capacity",
        "finish_reason",
        "max_new_tokens",
        "max_total_tokens",
        "min_new_tokens",
        "next_block_end",
        "next_free",
        "next_prompt_row",
        "num_bypasses",
        "num_cached",
        "num_computed",
        "num_freed",
        "num_preemptions",
        "num_prompt_tokens",
        "num_shareable",
        "num_tokens",
        "order",
        "output_token_ids",
        "request",
        "slot",
        "status",
        "stop_ids",
        "tables",
    )

    def __init__(self, request: Request, *, max_total_tokens: int, order: tuple[int, float, int]) -> None:
        params = request.params
        self.request = request
        self.awaits_each_token = request.awaits_each_token
        self.order = order  # (priority, arrival time, serial number): unique, the smallest runs first
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_total_tokens = max_total_tokens
        self.max_new_tokens = max_total_tokens - self.num_prompt_tokens
        self.min_new_tokens = params.min_new_tokens
        eos_token_ids = () if params.ignore_eos else request.eos_token_ids
        self.stop_ids = frozenset((*eos_token_ids, *params.stop_token_ids))
        self.output_token_ids: list[int] = []
        self.num_tokens = self.num_prompt_tokens
        self.num_computed = 0
        self.tables: list[list[int]] = []
        self.num_freed: list[int] = []
        self.next_free = NEVER
        self.capacity = 0
        self.slot: int | None = None
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.num_cached = 0
        self.num_preemptions = 0
        self.num_bypasses = 0
        self.num_shareable = NEVER
        self.next_prompt_row = self.first_prompt_row
        self.block_digests: list[bytes] = []  # of full blocks of known tokens, computed on demand
        self.next_block_end = 0  # the end of the first block that is not registered with the prefix cache

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def block_ids(self) -> list[int]:
        """The blocks that it holds, those of each cache group in order of position."""
        if len(self.tables) == 1 and not self.num_freed[0]:
            return self.tables[0]
        return [block for table, freed in zip(self.tables, self.num_freed, strict=True) for block in table[freed:]]

    @property
    def num_known_tokens(self) -> int:
        """Prompt tokens plus committed output tokens."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def num_in_flight(self) -> int:
        """Tokens sampled by steps that are dispatched but not committed."""
        return self.num_tokens - self.num_prompt_tokens - len(self.output_token_ids)

    @property
    def remaining(self) -> int:
        """Tokens left to compute: 1 for a sequence that generates."""
        return self.num_tokens - self.num_computed

    @property
    def first_prompt_row(self) -> int:
        """The first prompt position whose logits are needed for `prompt_logprobs`; `num_prompt_tokens` if none are."""
        params = self.request.params
        return self.num_prompt_tokens if params.prompt_logprobs is None else max(0, params.prompt_logprobs_start - 1)

    @property
    def first_row(self) -> int:
        """The first uncomputed position whose logits are needed; those of all later ones are needed too."""
        return self.next_prompt_row if self.next_prompt_row < self.num_prompt_tokens else self.num_tokens - 1

    @property
    def is_finished(self) -> bool:
        """Whether it has a finish reason and will not run again."""
        return self.status is SequenceStatus.FINISHED

    def token_ids(self, start: int, stop: int) -> list[int]:
        """The known tokens at positions `[start, stop)`; tokens in flight are missing."""
        prompt = self.num_prompt_tokens
        if start >= prompt:
            return self.output_token_ids[start - prompt : stop - prompt]
        known = list(self.request.prompt_token_ids[start:stop])
        if stop > prompt:
            known += self.output_token_ids[: stop - prompt]
        return known

    def restart(self, num_output_tokens: int) -> None:
        """Keeps `num_output_tokens` output tokens and computes all KV again; counts as a preemption if it was running."""
        self.num_preemptions += self.slot is not None
        del self.output_token_ids[num_output_tokens:]
        self.num_tokens = self.num_known_tokens
        self.num_computed = 0
        self.slot, self.block_digests = None, []
        self.forget_blocks()
        self.status, self.finish_reason = SequenceStatus.WAITING, None
        # The log-probabilities of a prompt are returned with the first output token.
        self.next_prompt_row = self.num_prompt_tokens if self.output_token_ids else self.first_prompt_row

    def forget_blocks(self) -> None:
        """Leaves it without blocks."""
        self.tables, self.num_freed = [], []
        self.next_free, self.capacity = NEVER, 0

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}, {self.status.value}, slot={self.slot}, "
            f"computed {self.num_computed} of {self.num_tokens} tokens, {len(self.block_ids)} blocks)"
        )
