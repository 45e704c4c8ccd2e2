"""Measures transformers. Run by its path, under a Python that has torch and transformers: see `protocol`.

Options: model (folder), threads, dtype, mode ("static": left-padded batches; "continuous": its own scheduler),
batch_size (for static batches).
"""

from __future__ import annotations

import time
from typing import Any

from protocol import JsonObject, Request, Run, Timeline, serve


class Clock:
    """A streamer that records when each token of a batch arrives; the first call passes the prompts and is skipped."""

    def __init__(self, requests: list[Request], begin: float, timeline: Timeline) -> None:
        self._requests = requests
        self._begin = begin
        self._timeline = timeline
        self._calls = 0

    def put(self, value: Any) -> None:
        if self._calls:
            now = time.perf_counter() - self._begin
            for request, token_id in zip(self._requests, value.tolist(), strict=True):
                if self._calls <= request["max_new_tokens"]:
                    self._timeline.add(request["request_id"], now, [token_id])
        self._calls += 1

    def end(self) -> None:
        pass


def load(options: JsonObject) -> tuple[JsonObject, Run]:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, GenerationConfig  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(options["threads"])
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=getattr(torch, options["dtype"])).eval()
    # Without an end-of-text token every request runs to its full length.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)

    def run_static(requests: list[Request]) -> JsonObject:
        timeline = Timeline(requests)
        begin = time.perf_counter()
        for first in range(0, len(requests), options["batch_size"]):
            batch = requests[first : first + options["batch_size"]]
            width = max(len(request["prompt_token_ids"]) for request in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for row, request in enumerate(batch):
                prompt = request["prompt_token_ids"]
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            with torch.inference_mode():
                model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max(request["max_new_tokens"] for request in batch),
                    streamer=Clock(batch, begin, timeline),
                )
        return timeline.result()

    def run_continuous(requests: list[Request]) -> JsonObject:
        timeline = Timeline(requests)
        begin = time.perf_counter()
        with model.continuous_batching_context_manager(warmup=False) as manager:
            for request in requests:
                manager.add_request(
                    request["prompt_token_ids"],
                    request_id=request["request_id"],
                    max_new_tokens=request["max_new_tokens"],
                    streaming=True,
                    eos_token_id=-1,
                )
            unfinished = len(requests)
            for output in manager:
                if output.error is not None:
                    raise RuntimeError(f"{output.request_id}: {output.error}")
                timeline.update(output.request_id, time.perf_counter() - begin, list(output.generated_tokens))
                unfinished -= output.is_finished()
                if not unfinished:
                    break
        return timeline.result()

    run = {"static": run_static, "continuous": run_continuous}[options["mode"]]
    return {"engine": "transformers", "version": transformers.__version__, "options": options}, run


if __name__ == "__main__":
    serve(load)
