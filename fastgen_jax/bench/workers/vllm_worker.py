"""Measures vLLM's engine. Run by its path, under a Python that has vLLM: see `protocol`.

Options: model, threads, dtype, enforce_eager, max_num_batched_tokens, max_num_seqs, max_model_len, kv_gb, engine_process.
"""

from __future__ import annotations

import os
import time
from typing import Any

from protocol import JsonObject, Request, Run, Timeline, serve


def load(options: JsonObject) -> tuple[JsonObject, Run]:
    # vLLM reads these when it is imported.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{options['threads'] - 1}"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options["kv_gb"])
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if options["engine_process"] else "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    import vllm  # pyright: ignore[reportMissingImports]
    from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore[reportMissingImports]

    arguments: dict[str, Any] = {
        "model": options["model"],
        "dtype": options["dtype"],
        "enforce_eager": options["enforce_eager"],
        "enable_prefix_caching": False,
        "max_num_seqs": options["max_num_seqs"],
        "max_model_len": options["max_model_len"],
        "max_num_batched_tokens": options["max_num_batched_tokens"],
        "skip_tokenizer_init": True,
    }
    engine = LLMEngine.from_engine_args(EngineArgs(**arguments))

    def run(requests: list[Request]) -> JsonObject:
        timeline = Timeline(requests)
        begin = time.perf_counter()
        for request in requests:
            sampling = vllm.SamplingParams(
                temperature=0.0, max_tokens=request["max_new_tokens"], ignore_eos=True, detokenize=False
            )
            engine.add_request(request["request_id"], {"prompt_token_ids": request["prompt_token_ids"]}, sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - begin
            for output in outputs:
                timeline.update(output.request_id, now, list(output.outputs[0].token_ids))
        return timeline.result()

    return {"engine": "vllm", "version": vllm.__version__, "options": options}, run


if __name__ == "__main__":
    serve(load)
