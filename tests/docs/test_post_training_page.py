"""The snippets of docs/post-training.md, from top to bottom, as a reader would run them."""

from __future__ import annotations

import jax

from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs" / "post-training.md"


def test_every_snippet_of_the_page_on_post_training_runs(fast_compilation):
    names: dict = {}
    for snippet in blocks(PAGE, "python"):
        line = PAGE.read_text()[: PAGE.read_text().index(snippet)].count("\n")
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies integers by floats
            exec(compile("\n" * line + snippet, str(PAGE), "exec"), names)
    engine = names["engine"]
    assert engine.weight_version == 43
    assert len(names["scores"].logprobs) == 12
    assert (names["scores"].log_kept_masses < 0).any()
    assert engine.scheduler.num_free_blocks == engine.config.num_blocks
