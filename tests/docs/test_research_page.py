"""The snippets of docs/research.md, from top to bottom, as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

PAGE = Path(__file__).parents[2] / "docs" / "research.md"


def test_every_snippet_of_the_page_on_research_runs(fast_compilation):
    text = PAGE.read_text()
    snippets = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(snippets) == text.count("```") // 2, "every snippet is Python"
    names: dict = {}
    for snippet in snippets:
        line = text[: text.index(snippet)].count("\n")
        exec(compile("\n" * line + snippet, str(PAGE), "exec"), names)
    engine, strict, prompt = names["engine"], names["strict"], names["prompt"]
    assert len(names["entries"]) == 8
    assert all(0 < weight < np.inf and abs(weight - 1) > 1e-3 for weight in names["weights"])
    np.testing.assert_array_equal(names["sentence"], names["hidden"][-1])
    request = strict.add(prompt, names["SamplingParams"](max_new_tokens=20, temperature=2.0, seed=1, ignore_eos=True))
    tokens = list(prompt)
    while strict.has_work:
        tokens += [token for output in strict.step() if output.request_id == request for token in output.new_token_ids]
    assert all(a != b for a, b in zip(tokens[len(prompt) - 1 :], tokens[len(prompt) :], strict=False))
    assert float(np.abs(names["gradient"]["embed"]).max()) > 0
    assert engine.scheduler.num_free_blocks == engine.config.num_blocks
