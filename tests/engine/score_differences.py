"""How far the log-probabilities of rollouts and their scores are apart, in batches of 16 and programs of two sizes.

python -m tests.engine.score_differences                            # 0 with native kernels
python -m tests.engine.score_differences --plain-xla --dtype bfloat16
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from fastgen_jax import Engine, SamplingParams
from pallas_kernels import native
from tests.tiny import drain, tokens_of

BATCH = 16


def differences(engine: Engine, num_rollouts: int) -> np.ndarray:
    """The absolute difference for each token of so many sampled answers."""
    rng, found = np.random.default_rng(0), []
    for start in range(0, num_rollouts, BATCH):
        prompts = {}
        for seed in range(start, start + BATCH):
            prompt = rng.integers(3, engine.model.vocab_size, int(rng.integers(1, 40))).tolist()
            params = SamplingParams(max_new_tokens=40, ignore_eos=True, seed=seed, logprobs=0)
            prompts[engine.add(prompt, params)] = prompt
        outputs = drain(engine)
        sequences = [prompt + tokens_of(outputs[request_id]) for request_id, prompt in prompts.items()]
        scores = engine.score(sequences, start=[len(prompt) for prompt in prompts.values()])
        for score, request_id in zip(scores, prompts, strict=True):
            entries = [entry for output in outputs[request_id] for entry in output.logprobs or ()]
            found.append(np.abs(score.logprobs - np.array([entry.logprob for entry in entries], np.float32)))
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sotu-1m", help="a checkpoint (default: sotu-1m)")
    parser.add_argument("--dtype", default=None, help="data type (default: the engine's)")
    parser.add_argument("--rollouts", type=int, default=64, help="number of answers of 40 tokens (default: 64)")
    parser.add_argument("--plain-xla", action="store_true", help="without native kernels")
    options = parser.parse_args()
    if options.plain_xla:
        native.available = lambda: False
    settings: dict[str, Any] = {"token_budget": 64, "budget_ladder": (8,), "max_num_seqs": BATCH, "num_blocks": 400}
    settings |= {"block_size": 8, "max_context_len": 128, "background_compile": False}
    engine = Engine.from_pretrained(options.model, dtype=options.dtype, **settings)
    found = differences(engine, options.rollouts)
    print(f"{engine.describe()}: {found.size} tokens, largest {found.max():.2e}, mean {found.mean():.2e} nats")


if __name__ == "__main__":
    main()
