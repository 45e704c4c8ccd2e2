"""Measures this engine in a process of its own: see `protocol`. Options: model, config (fields of `EngineConfig`)."""

from __future__ import annotations

import time
from typing import Any

from fastgen_jax.bench.workers.protocol import Requests, Timeline, serve


def load(options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    import jax

    import fastgen_jax
    from fastgen_jax import Engine, EngineConfig, SamplingParams

    config = EngineConfig.from_options(options["config"])
    engine = Engine.from_pretrained(options["model"], config=config)

    def run(requests: Requests) -> dict[str, Any]:
        timeline = Timeline(requests)
        before = engine.metrics.snapshot()
        begin = time.perf_counter()
        for request in requests:
            params = SamplingParams(max_new_tokens=request["max_new_tokens"], ignore_eos=True, do_sample=False)
            engine.add(
                prompt_token_ids=request["prompt_token_ids"], params=params, request_id=request["request_id"]
            )
        while engine.has_work:
            outputs = engine.step()
            now = time.perf_counter() - begin
            for output in outputs:
                timeline.add(output.request_id, now, list(output.new_token_ids))
        return {**timeline.result(), "engine_metrics": {"before": before, "after": engine.metrics.snapshot()}}

    description = {
        "engine": "fastgen_jax",
        "version": f"{fastgen_jax.__version__}, jax {jax.__version__}, {jax.default_backend()}",
        "options": options,
    }
    return description, run


if __name__ == "__main__":
    serve(load)
