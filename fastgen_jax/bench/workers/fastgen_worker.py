"""Measures this engine in its own process: see `protocol`. Options: model, config (fields of `EngineConfig`)."""

from __future__ import annotations

import time

from fastgen_jax.bench.workers.protocol import JsonObject, Request, Run, Timeline, serve


def load(options: JsonObject) -> tuple[JsonObject, Run]:
    import jax

    import fastgen_jax
    from fastgen_jax import Engine, EngineConfig
    from fastgen_jax.bench.driver import outputs_of
    from fastgen_jax.bench.machine import matmul_peak
    from fastgen_jax.models.counts import flops_per_token

    config = EngineConfig.from_options(options["config"])
    engine = Engine.from_pretrained(options["model"], config=config)
    engine.wait_until_compiled()
    dtype = engine.config.dtype or "float32"

    def flops_of(request: Request) -> float:
        """Floating-point operations that one request requires, without padding and recomputation."""
        num_output = request["max_new_tokens"]
        num_computed = len(request["prompt_token_ids"]) + num_output - 1  # the last token is never an input
        # Linear in the context, so the mean context stands for every token.
        body = flops_per_token(engine.model, context_len=(num_computed + 1) // 2, sampled=False)
        head = flops_per_token(engine.model, sampled=True) - flops_per_token(engine.model, sampled=False)
        return num_computed * body + num_output * head

    def run(requests: list[Request]) -> JsonObject:
        timeline = Timeline(requests)
        before = engine.metrics.snapshot()
        begin = time.perf_counter()
        triples = ((r["request_id"], r["prompt_token_ids"], r["max_new_tokens"]) for r in requests)
        for now, outputs in outputs_of(engine, triples):
            for output in outputs:
                timeline.add(output.request_id, now - begin, list(output.new_token_ids))
        after = engine.metrics.snapshot()
        return {
            **timeline.result(),
            "engine_metrics": {"before": before, "after": after},
            "model_flops": sum(flops_of(request) for request in requests),
            # Right after the run, so that both see the machine in the same state.
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
