"""Our logits compared with those of transformers, for every tiny checkpoint of tests/reference.

python -m tests.models.parity          # rewrites the tables of docs/models.md, in about two minutes
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.cli.models import table
from fastgen_jax.core import RaggedBatch
from fastgen_jax.models.cache import empty_cache
from fastgen_jax.models.cache_groups import cache_groups
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.decoder import Execution, forward
from fastgen_jax.models.families import FAMILIES
from fastgen_jax.models.weight_spec import Params
from pallas_kernels.ragged_attention import RaggedIndex

REFERENCE = Path(__file__).parents[1] / "reference"
BLOCK_SIZE = 4
NUM_BLOCKS = 24
DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"


def variants() -> list[tuple[str, str]]:
    """(family, variant) of every checkpoint, those of Llama from `tiny/`."""
    llama = sorted((REFERENCE / "tiny").glob("*/config.json"))
    others = sorted((REFERENCE / "families").glob("*/*/config.json"))
    names = [("llama", path.parent.name) for path in llama] + [(path.parts[-3], path.parts[-2]) for path in others]
    return [(family, variant) for family, variant in names if family in FAMILIES]


def folder(family: str, variant: str) -> Path:
    """The folder of the checkpoint and its expected.npz."""
    return REFERENCE / "tiny" / variant if family == "llama" else REFERENCE / "families" / family / variant


@cache
def load(family: str, variant: str, *, stack_layers: bool = False) -> tuple[Params, ModelConfig]:
    """Float32 weights and config of a variant."""
    checkpoint = open_checkpoint(folder(family, variant))
    return load_params(checkpoint, dtype="float32", stack_layers=stack_layers), checkpoint.config


@cache
def expected(family: str, variant: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Token ids i64[P + N], the logits f32[P + N, V] of transformers, and the prompt length P."""
    saved = np.load(folder(family, variant) / "expected.npz")
    tokens, logits = saved["token_ids"], saved["logits"]
    if family == "llama":  # see make_tiny.py, and for the others make_families.py
        answer = saved["greedy_logits"]
        return np.concatenate([tokens, saved["greedy"][: len(answer)]]), np.concatenate([logits, answer]), len(tokens)
    return tokens, logits, len(tokens) - 10


class Runs:
    """One compiled program of a model, for the tokens of its prompt and answer, run on any split into chunks."""

    def __init__(
        self, params: Params, config: ModelConfig, num_tokens: int, *, platform: str | None = None, **options: Any
    ) -> None:
        self.params, self.config, self.num_tokens = params, config, num_tokens
        self.platform = platform or jax.default_backend()  # for which the cache is made
        self.table = np.random.default_rng(0).permutation(NUM_BLOCKS).astype(np.int32)
        self.program = jax.jit(partial(forward, config=config, execution=Execution(**options)), donate_argnums=1)

    def logits(self, token_ids: np.ndarray, sizes: list[int], *, prompt_length: int) -> np.ndarray:
        """f32[sum(sizes), V]: every row, the tokens cut into chunks of `sizes`, each padded to the program's length."""
        cache = empty_cache(
            self.config,
            num_rows=cache_groups(self.config, 1).num_rows,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            num_slots=2,
            dtype=self.params["embed"].dtype,
            platform=self.platform,
        )
        rows, start = [], 0
        for size in sizes:
            logits, cache = self.program(self.params, cache, self._batch(token_ids, start, size, prompt_length))
            rows.append(np.asarray(logits)[:size])
            start += size
        return np.concatenate(rows)

    def _batch(self, token_ids: np.ndarray, start: int, size: int, prompt_length: int) -> RaggedBatch:
        count = self.num_tokens

        def padded(values: Any, padding: int = 0) -> jax.Array:
            return jnp.asarray(np.concatenate([values, np.full(count - size, padding)]), jnp.int32)

        positions = np.arange(start, start + size)
        slots = self.table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        return RaggedBatch(
            token_ids=padded(token_ids[start : start + size]),
            token_slots=jnp.full(count, 1, jnp.int32),
            positions=padded(positions),
            rope_lengths=padded(np.maximum(positions + 1, prompt_length)),
            index=RaggedIndex(
                kv_slots=padded(slots, NUM_BLOCKS * BLOCK_SIZE),
                query_starts=jnp.asarray([0, size], jnp.int32),
                context_lens=jnp.asarray([start + size], jnp.int32),
                block_tables=jnp.asarray(self.table[None]),
            ),
            sample_rows=padded(np.arange(size)),
            num_sample_rows=jnp.asarray(size, jnp.int32),
            slots=jnp.ones(1, jnp.int32),
        )


def random_cut(length: int, *, seed: int) -> list[int]:
    """Chunk sizes that add up to `length`."""
    rng = np.random.default_rng(seed)
    borders = np.sort(rng.choice(np.arange(1, length), size=4, replace=False))
    return np.diff([0, *borders, length]).tolist()


def error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference, in units of the largest logit."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def measure(family: str, variant: str) -> dict[str, float]:
    """The errors of a variant: whole prompt, prompt in random chunks, then token by token; and in bfloat16."""
    params, config = load(family, variant)
    tokens, want, prompt = expected(family, variant)
    runs = Runs(params, config, len(tokens))
    ways = {
        "whole": [len(tokens)],
        "chunks": random_cut(len(tokens), seed=0),
        "generation": [prompt] + [1] * (len(tokens) - prompt),
    }
    errors = {name: error(runs.logits(tokens, sizes, prompt_length=prompt), want) for name, sizes in ways.items()}
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    got = Runs(half, config, len(tokens)).logits(tokens, [len(tokens)], prompt_length=prompt)
    return errors | {"bfloat16": float(np.abs(got - want).mean() / np.abs(want).max())}


def main() -> None:
    """Measures everything and rewrites the tables."""
    columns = ["family", "variant", "whole prompt", "random chunks", "generation", "bfloat16, mean"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for family, variant in variants():
        errors = measure(family, variant)
        lines.append(f"| {family} | {variant} | " + " | ".join(f"{value:.0e}" for value in errors.values()) + " |")
        print(lines[-1], flush=True)
    text = replace_between(DOCUMENT.read_text(), "families", table())
    DOCUMENT.write_text(replace_between(text, "parity", lines))


def replace_between(text: str, name: str, lines: list[str]) -> str:
    """`text` with `lines` between its marks `<!-- name -->` and `<!-- end of name -->`."""
    before, rest = text.split(f"<!-- {name} -->")
    after = rest.split(f"<!-- end of {name} -->")[1]
    return "\n".join([f"{before}<!-- {name} -->", "", *lines, "", f"<!-- end of {name} -->{after}"])


if __name__ == "__main__":
    main()
