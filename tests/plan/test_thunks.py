"""Listings of what XLA's runtime executes on a GPU."""

from __future__ import annotations

from pathlib import Path

from fastgen_jax.plan.thunks import find_listing, is_one_graph, started_by_host

GRAPH = """\
000: kCommandBuffer [source | sink]
    001: kCustomKernel [source | next=002 (1)] loop_fusion
    002: kWhile        [prev=001 (1) | sink  ]
condition:
    003: kCustomKernel [source | sink] loop_compare_fusion
  body:
    004: kDynamicSliceFusion [source | sink] params=2, results=2
        005: kCublasLtMatmul [source | sink] kCublasLtMatmul
"""
ONE_BY_ONE = """\
000: kCommandBuffer [source | next=003 (1)]
    001: kCopy [source | sink] kCopy
003: kWhile         [prev=000 (1) | next=006 (1)]
condition:
    004: kCustomKernel [source | sink] loop_compare_fusion
  body:
    005: kCustomCall [source | sink] kCustomCall
006: kCustomKernel [prev=003 (1) | sink] loop_fusion
"""


def test_what_is_within_a_graph_is_not_started_by_the_host() -> None:
    assert (started_by_host(GRAPH), is_one_graph(GRAPH)) == (1, True)
    assert (started_by_host(ONE_BY_ONE), is_one_graph(ONE_BY_ONE)) == (3, False)
    assert (started_by_host(""), is_one_graph("")) == (0, False)
    alone = ONE_BY_ONE.splitlines()[-1]
    assert (started_by_host(alone), is_one_graph(alone)) == (1, False)


def test_the_listing_after_all_passes_of_the_largest_program_is_read(tmp_path: Path) -> None:
    assert find_listing(tmp_path) == ""
    (tmp_path / "module_0001.jit_step.thunk_sequence.txt").write_text(ONE_BY_ONE * 9)
    (tmp_path / "module_0001.jit_step.thunk_sequence_after_thunk_passes.txt").write_text(GRAPH * 2)
    (tmp_path / "module_0002.jit_seed.thunk_sequence.txt").write_text(GRAPH)
    assert find_listing(tmp_path) == GRAPH * 2
