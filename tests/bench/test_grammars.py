"""`fastgen bench grammars`, with a tiny model: streams that a grammar holds, beside free ones."""

from __future__ import annotations

import pytest

from fastgen_jax.bench import grammars
from fastgen_jax.cli import main
from tests.serving.tiny_server import engine


@pytest.mark.slow
def test_held_streams_generate_a_token_in_every_step_of_free_ones() -> None:
    shared = engine()
    rates = grammars.measure(shared, streams=1, tokens=20, rounds=1, greedy=False)
    (alone,), (beside,) = rates["alone"], rates["beside"]
    assert alone.held == 0 < alone.free
    assert beside.masks == 20
    lines = list(grammars.report(rates))
    assert "held / free in the same steps: 1.000 (1.000-1.000)" in lines
    assert not shared.has_work


@pytest.mark.parametrize("flags", [["--streams", "0"], ["--tokens", "8"]])
def test_too_few_streams_or_tokens_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "grammars", *flags]) == 2
    assert "--tokens more than 8" in capsys.readouterr().err
