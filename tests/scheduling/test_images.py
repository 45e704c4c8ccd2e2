"""Images in prompts: chunks do not end within them, and cached prefixes go by their content."""

from __future__ import annotations

import pytest

from fastgen_jax.scheduling import PromptImage, Request, SamplingParams, Scheduler


def image(start: int, stop: int, key: bytes = b"a", *, is_whole: bool = True) -> PromptImage:
    return PromptImage(start=start, stop=stop, key=key, is_whole=is_whole, content=None)


def request(name: str, length: int, *images: PromptImage, output: int = 1) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=tuple(range(length)),
        params=SamplingParams(max_new_tokens=output, ignore_eos=True),
        seed=0,
        images=images,
    )


def scheduler(**options: int) -> Scheduler:
    sizes = {"num_blocks": 32, "block_size": 4, "token_budget": 16, "max_num_seqs": 4, "max_context_len": 64}
    return Scheduler(**{**sizes, "max_sample_rows": 4, **options})  # type: ignore[arg-type]


def chunks(made: Scheduler, *requests: Request) -> dict[str, list[tuple[int, int]]]:
    """[start, stop) of every chunk of each request, until all have ended."""
    for added in requests:
        made.add(added)
    found: dict[str, list[tuple[int, int]]] = {}
    while (step := made.schedule()) is not None:
        for chunk in step.chunks:
            found.setdefault(chunk.sequence.request_id, []).append((chunk.start, chunk.start + chunk.length))
        made.commit(step, [0] * len(step.sampled))
    made.check_integrity()
    return found


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        pytest.param([image(10, 22)], [(0, 10), (10, 26), (26, 40)], id="one that would be split"),
        pytest.param([image(10, 22, is_whole=False)], [(0, 16), (16, 32), (32, 40)], id="one that may be split"),
        pytest.param([image(4, 16), image(16, 28)], [(0, 16), (16, 32), (32, 40)], id="two, each in a step"),
        pytest.param([image(2, 10), image(10, 18)], [(0, 10), (10, 26), (26, 40)], id="the second in the next step"),
    ],
)
def test_a_chunk_does_not_end_within_an_image(images, expected):
    assert chunks(scheduler(), request("a", 40, *images)) == {"a": expected}


@pytest.mark.parametrize(
    ("images", "expected", "shareable"),
    [
        pytest.param([image(2, 7)], [(0, 12), (12, 24), (24, 30)], 24, id="within a chunk"),
        pytest.param([image(14, 26)], [(0, 12), (12, 14), (14, 26), (26, 30)], 12, id="across a border"),
        pytest.param([image(12, 24)], [(0, 12), (12, 24), (24, 30)], 24, id="a whole chunk"),
        pytest.param([image(8, 18), image(18, 28)], [(0, 8), (8, 18), (18, 28), (28, 30)], 0, id="two across borders"),
        pytest.param([image(14, 26, is_whole=False)], [(0, 12), (12, 24), (24, 30)], 24, id="one that may be split"),
    ],
)
def test_fixed_chunks_end_before_and_after_an_image_at_a_border(images, expected, shareable):
    options = {"chunk_size": 12, "token_budget": 16}
    alone = chunks(scheduler(**options), request("a", 30, *images))
    assert alone == {"a": expected}
    others = [request(f"g{i}", 5 + 7 * i, image(1, 4), output=9) for i in range(3)]
    assert chunks(scheduler(**options), *others, request("a", 30, *images))["a"] == expected
    made = scheduler(**options)
    first, second = (chunks(made, request(name, 30, *images))[name] for name in "ab")
    assert first == expected
    assert second == [chunk for chunk in expected if chunk[0] >= shareable]


def test_an_image_waits_for_a_step_that_holds_it_while_others_generate():
    others = [request(f"g{i}", 2, output=12) for i in range(3)]
    made = scheduler()
    found = chunks(made, *others, request("a", 15, image(1, 14)))
    assert (1, 15) in found["a"] or (1, 14) in found["a"]
    assert all(stop <= 1 or stop >= 14 for _, stop in found["a"])


def test_a_prefix_is_reused_only_with_the_same_image_at_the_same_place():
    made = scheduler()

    first = chunks(made, request("a", 24, image(6, 14, b"a")))["a"]
    assert first[0] == (0, 14) or first[0] == (0, 16)
    assert chunks(made, request("b", 24, image(6, 14, b"b")))["b"][0][0] == 4  # the block before the image
    assert chunks(made, request("c", 24, image(7, 15, b"a")))["c"][0][0] == 4
    assert chunks(made, request("d", 24))["d"][0][0] == 4
    assert chunks(made, request("e", 24, image(6, 14, b"a")))["e"][0][0] == 20
    assert chunks(made, request("f", 24, image(6, 14, b"b")))["f"][0][0] == 20


def test_a_sequence_can_start_within_an_image_after_a_cached_part_of_it():
    made = scheduler(num_blocks=8)
    chunks(made, request("a", 20, image(2, 14)))
    # The last blocks of the first prompt are evicted first.
    chunks(made, request("b", 20))
    found = chunks(made, request("c", 20, image(2, 14)))["c"]
    assert all(not 2 < stop < 14 for _, stop in found)
