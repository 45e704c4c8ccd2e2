"""Cache groups: blocks behind a window are freed while a sequence runs, and a prefix needs only the last window of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.scheduling import BlockGroups, ContextLengthError, Scheduler, Sequence
from tests.scheduling.fake_device import device_for, drive, make_request, naive_tokens


def make_scheduler(**changes: Any) -> Scheduler:
    arguments: dict[str, Any] = {
        "num_blocks": 64,
        "block_size": 4,
        "windows": (None, 8),
        "token_budget": 16,
        "max_num_seqs": 8,
        "max_context_len": 200,
        "max_sample_rows": 8,
        "watermark_blocks": 0,
    }
    return Scheduler(**(arguments | changes))


class Server:
    """A scheduler and the device that it serves one request after another on."""

    def __init__(self, **changes: Any) -> None:
        self.scheduler = make_scheduler(**changes)
        self.device = device_for(self.scheduler)

    def run(self, prompt: list[int], new_tokens: int) -> Sequence:
        request = make_request("a", prompt, new_tokens, ignore_eos=True)
        return drive(self.scheduler, {0: [request]}, device=self.device).sequences["a"]


@given(
    window=st.integers(1, 40), size=st.sampled_from([1, 3, 8]), chunks=st.lists(st.integers(1, 24), min_size=1, max_size=9)
)
def test_a_sequence_never_holds_more_blocks_than_its_groups_say(window: int, size: int, chunks: list[int]) -> None:
    groups = BlockGroups(windows=(None, window), block_size=size, token_budget=max(chunks))
    start = 0
    for length in chunks:
        held = sum(-(-(start + length) // size) - groups.first_block(w, start) for w in groups.windows)
        assert held <= groups.blocks_needed(start + length)
        if length == 1:
            assert held <= groups.blocks_held(start + length)
        start += length
    longest = groups.longest(groups.blocks_needed(start), start)
    assert longest == start
    assert groups.blocks_needed(groups.longest(5, 1000)) <= 5


def test_blocks_behind_the_window_are_freed_while_the_sequence_runs() -> None:
    scheduler = make_scheduler()
    sequence = scheduler.add(make_request("a", range(40), 100, ignore_eos=True))
    for _ in range(60):
        step = scheduler.schedule()
        assert step is not None
        scheduler.commit(step, [0] * len(step.sampled))
        full, windowed = (len(table) - n for table, n in zip(sequence.tables, sequence.num_freed, strict=True))
        assert full == -(-sequence.num_computed // 4)
        assert windowed <= 3, "the 7 keys before the next query, and its own, are in 3 blocks"
        assert scheduler.num_free_blocks == 64 - full - windowed


def test_with_windows_alone_a_sequence_may_be_longer_than_the_cache() -> None:
    server = Server(windows=(8,), num_blocks=8, max_context_len=100)
    sequence = server.run([1] * 50, 40)
    assert sequence.output_token_ids == naive_tokens(sequence.request, 100)
    assert server.scheduler.stats.num_preemptions == 0


def test_more_sequences_fit_into_the_same_memory() -> None:
    def fit(count: int, windows: tuple[int | None, ...], num_blocks: int) -> bool:
        scheduler = make_scheduler(
            windows=windows, num_blocks=num_blocks, max_num_seqs=20, max_sample_rows=20, token_budget=200
        )
        requests = [make_request(i, [i % 5] * 10, 70, ignore_eos=True, seed_number=i) for i in range(count)]
        drive(scheduler, {0: requests})
        return not scheduler.stats.num_preemptions

    # Four layers, of which three have a window: a block of all of them is as large as four blocks of one.
    assert (fit(5, (None,), 100), fit(6, (None,), 100)) == (True, False)
    assert (fit(13, (None, 8, 8, 8), 400), fit(14, (None, 8, 8, 8), 400)) == (True, False)


def test_a_prefix_is_cached_if_the_window_before_its_end_is() -> None:
    server = Server()
    first, again = server.run([1] * 40, 3), server.run([1] * 40, 3)
    assert again.num_cached == 36, "all full blocks before the last token"
    assert again.output_token_ids == first.output_token_ids
    # A prompt that goes on differently finds the window before the place where it does.
    assert server.run([1] * 24 + [2] * 16, 3).num_cached == 24


def test_without_its_last_window_a_shorter_prefix_is_used() -> None:
    server = Server()
    server.run([1] * 40, 1)
    scheduler = server.scheduler
    sequence = scheduler.add(make_request("b", [1] * 40, 1))
    found = scheduler._cached_prefix(sequence)
    assert found.num_blocks == 9
    assert [len(table) for table in found.tables] == [9, 2], "of the window only the blocks with its 7 last keys"
    scheduler._pool._forget(found.tables[1][0])
    assert scheduler._cached_prefix(sequence).num_blocks == 7


def test_generated_tokens_behind_the_window_leave_the_prefix_cache() -> None:
    server = Server()
    text = [1] * 20 + server.run([1] * 20, 60).output_token_ids
    # The whole answer is found, as the last window of it is kept.
    assert server.run([*text, 3], 1).num_cached == 76
    # A prompt that ends within the answer finds only the first prompt.
    assert server.run([*text[:50], 3], 1).num_cached == 20


def test_a_request_that_no_division_of_the_blocks_can_hold_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=20)
    with pytest.raises(ContextLengthError, match=r"120 tokens, 37 blocks of 4, but the KV cache has 20 blocks"):
        scheduler.add(make_request("a", [1] * 20, 100))
    with pytest.raises(ValueError, match="windows is \\(None, 0\\)"):
        make_scheduler(windows=(None, 0))
