"""`fastgen demo`, with a tiny model."""

from __future__ import annotations

import pytest

from fastgen_jax import Engine
from fastgen_jax.api.pipeline import Pipeline
from fastgen_jax.cli import demo, main


def test_the_demo_answers_all_prompts_and_summarizes_the_run(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[dict[str, object]] = []

    def make_pipeline(options: dict[str, object]) -> tuple[Pipeline, dict[str, object]]:
        given.append({"ignore_eos": True, "max_new_tokens": 3})
        return Pipeline(engine), given[0]

    monkeypatch.setattr(demo, "make_pipeline", make_pipeline)
    monkeypatch.setattr(demo, "LONG_TEXT", "Ada kept a notebook. ")  # the context of the tiny model is short
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    num_prompts = len(demo.QUESTIONS) + 1
    assert out.count("\n> ") == num_prompts
    assert f"\n{num_prompts} requests in " in out
    assert f" {3 * num_prompts} generated\n" in out
    assert "compiled         0     programs while serving" in out
    assert given[0]["do_sample"] is False, "the answers are the same on every run"
