from __future__ import annotations

from pathlib import Path

import pytest
from fastgen_jax.bench.__main__ import main

from fastgen_jax.bench import policies
from fastgen_jax.bench.results import read
from tests.tiny import tiny_engine

LOAD = ["--prompt", "24", "--output", "24", "--max-prompt", "30", "--requests", "6", "--clients", "4"]


@pytest.fixture
def options(monkeypatch) -> list[dict]:
    """What each engine of a run was asked to be; they are tiny ones."""
    asked: list[dict] = []

    def make_engine(args, **given):
        asked.append(given)
        return tiny_engine(prefix_caching=False, num_blocks=64, policy=given["policy"])

    monkeypatch.setattr(policies, "make_engine", make_engine)
    return asked


def test_policies_take_turns_on_the_same_load_and_their_steps_are_kept(options, tmp_path: Path, capsys) -> None:
    path = tmp_path / "runs.jsonl"
    argv = ["policies", "--policies", "splitfuse", "prompts_first", *LOAD, "--generation-rates", "5", "-o", str(path)]
    assert main([*argv, "--whole-budget", "64"]) == 0
    first, second = read(path)
    assert (first.settings["policy"], second.settings["policy"]) == ("splitfuse", "prompts_first")
    wanted = [(r.request_id, r.num_prompt_tokens, len(r.token_times)) for r in first.requests]
    assert sorted(wanted) == sorted((r.request_id, r.num_prompt_tokens, len(r.token_times)) for r in second.requests)
    assert len(wanted) == 6
    # SplitFuse mixes prompts with generation; the other never does.
    kinds = [[{length == 1 for _, _, length in chunks} for _, _, _, chunks in run.steps] for run in (first, second)]
    assert [{True, False} in kind for kind in kinds] == [True, False]
    assert "effective throughput at 5 tokens/s" in capsys.readouterr().out
    assert "token_budget" not in options[0], "SplitFuse has the budget of the engine"
    # Generation alone has a step of its own size, and no step is more than half empty.
    assert (options[1]["token_budget"], options[1]["budget_ladder"]) == (64, (4, 8, 16, 32))


def test_the_steps_of_whole_prompts_are_as_asked(options) -> None:
    assert main(["policies", "--policies", "orca", *LOAD, "--whole-ladder", "4", "16", "100"]) == 0
    assert (options[0]["token_budget"], options[0]["budget_ladder"]) == (30, (4, 16))


def test_a_budget_that_cuts_whole_prompts_is_refused(options, capsys) -> None:
    assert main(["policies", "--policies", "orca", *LOAD, "--whole-budget", "20"]) == 2
    assert "--whole-budget is 20, but a prompt has 30 tokens; raise it to that" in capsys.readouterr().err
