"""Measures this engine in a process of its own: see `protocol`. Options: model, config (fields of `EngineConfig`)."""

from __future__ import annotations

import time
from typing import Any

from fastgen_jax.bench.workers.protocol import Requests, Timeline, serve


def load(options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    import jax

    import fastgen_jax
    from fastgen_jax import Engine, EngineConfig, SamplingParams
    from fastgen_jax.bench.machine import matmul_peak
    from fastgen_jax.models.counts import flops_per_token

    config = EngineConfig.from_options(options["config"])
    engine = Engine.from_pretrained(options["model"], config=config)
    dtype = engine.config.dtype or "float32"

    def flops_of(request: dict[str, Any]) -> float:
        """Floating-point operations that one request takes, without padding and recomputation."""
        num_output = request["max_new_tokens"]
        num_computed = len(request["prompt_token_ids"]) + num_output - 1  # the last token is never an input
        # Linear in the context, so the mean context stands for every token.
        body = flops_per_token(engine.model, context_len=(num_computed + 1) // 2, sampled=False)
        head = flops_per_token(engine.model, sampled=True) - flops_per_token(engine.model, sampled=False)
        return num_computed * body + num_output * head

    def run(requests: Requests) -> dict[str, Any]:
        timeline = Timeline(requests)
        before = engine.metrics.snapshot()
        begin = time.perf_counter()
        for request in requests:
            params = SamplingParams(max_new_tokens=request["max_new_tokens"], ignore_eos=True, do_sample=False)
            engine.add(request["prompt_token_ids"], params, request_id=request["request_id"])
        while engine.has_work:
            outputs = engine.step()
            now = time.perf_counter() - begin
            for output in outputs:
                timeline.add(output.request_id, now, list(output.new_token_ids))
        after = engine.metrics.snapshot()
        return {
            **timeline.result(),
            "engine_metrics": {"before": before, "after": after},
            "model_flops": sum(flops_of(request) for request in requests),
            # Right after the run, so that both saw the machine in the same state.
            "matmul_peak": matmul_peak(dtype),
        }

    description = {
        "engine": "fastgen_jax",
        "token_budget": engine.config.token_budget,
        "version": f"{fastgen_jax.__version__}, jax {jax.__version__}, {jax.default_backend()}",
        "options": options,
    }
    return description, run


if __name__ == "__main__":
    serve(load)
