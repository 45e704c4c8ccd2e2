"""The snippets of README.md and of the quick start, as a newcomer would run them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks, name


@pytest.mark.slow
@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "quick-start.md"], ids=name)
def test_the_first_snippets_run_on_the_real_model(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = [block for block in blocks(page, "python") if "openai" not in block]  # those need a server
    assert snippets
    names: dict = {}
    for block in snippets:
        exec(compile(block, str(page), "exec"), names)
        assert capsys.readouterr().out.strip(), f"nothing was printed by\n{block}"
    names["pipe"].destroy()
