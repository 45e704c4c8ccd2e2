"""Checks that need a GPU: `make gpu-check` on a machine with an H100, an H200 or an A100, under eight minutes in all.

  variants   every variant of the attention kernels against the reference, on the device
  products   those of weights in every form against the matrices that they stand for, and their times against the library's
             product in bfloat16
  kernels    the times of attention: single queries against the memory bandwidth that a copy reaches, prompt chunks against
             the rate that a matrix product reaches, and both against cuDNN through `jax.nn.dot_product_attention` and
             PyTorch's `scaled_dot_product_attention` (if torch with CUDA is installed), which receive the same keys in dense
             arrays
  engine     see `gpu_engine`

`--json` writes all figures to one file; a part that is run later adds its own to those that are there. A part ends after
`--seconds`, and names what it did not reach. With `--tiny` it runs anywhere, kernels in the Pallas interpreter, to test this
script itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before JAX starts: with `--tiny`, the interpreter may need more threads than there are cores.
if "--tiny" in sys.argv:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
elif tuple(map(int, version("jaxlib").split(".")[:2])) >= (
    0,
    12,
):  # older ones do not know it; a trace shows graphs as they run
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_enable_command_buffers_during_profiling=true"

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.json_types import JsonObject
from pallas_kernels import gpu_target
from pallas_kernels.ragged_attention import CacheLayer, Latents, RaggedIndex, Scoring
from pallas_kernels.ragged_attention.gpu.call import ragged_attention_gpu
from pallas_kernels.ragged_attention.gpu.tile_sizes import modeled
from pallas_kernels.ragged_attention.quantized import is_quantized
from pallas_kernels.ragged_attention.reference import ragged_attention_reference
from tests.gate import gpu_products
from tests.gate.calls import Call
from tests.pallas_kernels.ragged_attention.ragged_batches import make_batch, make_latent

SINGLE_STREAM_MS = 6.44  # a token of Llama-3.1-8B in bfloat16 on one H100, as published for vLLM 0.19
DECODE_TARGET, PROMPT_TARGET = 0.8, 0.6  # fractions of the measured bandwidth and of the measured matrix-product rate
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3, "int8": 2e-2, "float8_e4m3fn": 2e-2}
TINY = "--tiny" in sys.argv
ROUNDS, REPEATS = (1, 1) if TINY else (5, 10)

# Unused rows, chunks of one token, chunks that end at a block boundary, contexts of many steps.
CHUNKS = [(1, 4000), (0, 0), (40, 200), (1, 5), (3, 3), (32, 64), (1, 1024), (1, 1), (200, 1500), (130, 130)]
TINY_CHUNKS = [(1, 150), (0, 0), (5, 70), (2, 2)]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float16": {"dtype": jnp.float16},
    "one head": {"num_kv_heads": 8, "group": 1},
    "GQA 3": {"group": 3},
    "GQA 71": {"num_kv_heads": 1, "group": 71, "head_dim": 64},
    "D=64": {"head_dim": 64},
    "D=80": {"head_dim": 80},
    "D=96": {"head_dim": 96},
    "D=256": {"head_dim": 256},
    "B=8": {"block_size": 8},
    "B=128": {"block_size": 128},
    "B=256": {"block_size": 256},
    "window": {"sliding_window": 100},
    "window beyond the contexts": {"sliding_window": 2**31 - 1},
    "soft cap": {"soft_cap": 5.0},
    "ALiBi": {"alibi": True},
    "sinks": {"sinks": True},
    "rotation": {"rotation": True},
    "int8": {"dtype": jnp.int8, "block_size": 128},
    "int8, B=64, D=64": {"dtype": jnp.int8, "block_size": 64, "head_dim": 64},
    "float8": {"dtype": jnp.float8_e4m3fn, "block_size": 128},
    "latents": {"num_kv_heads": 1, "group": 16, "head_dim": 576, "latents": Latents(key_dim=576, value_dim=512)},
    "latents, 128 heads": {
        "num_kv_heads": 1,
        "group": 128,
        "head_dim": 640,
        "latents": Latents(key_dim=576, value_dim=512),
    },
    "latents, D=288": {"num_kv_heads": 1, "group": 40, "head_dim": 288, "latents": Latents(key_dim=288, value_dim=256)},
    "D=512": {"head_dim": 512, "group": 8},
    "D=512, window, cap, sinks": {"head_dim": 512, "sliding_window": 100, "soft_cap": 5.0, "sinks": True},
    "all": {"sliding_window": 300, "soft_cap": 5.0, "alibi": True, "sinks": True, "group": 3},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernel under test."""

    generation: str
    interpret: Any  # False on a GPU

    def attention(self, head_dim: int, group: int, latents: Latents | None = None) -> Callable[..., Any]:
        """The kernel as used in production, or interpreted with few thread blocks."""
        if not self.interpret:
            return ragged_attention_gpu
        tiles = modeled(head_dim, group, self.generation, quantized=True, latents=latents)
        tiles = dataclasses.replace(tiles, blocks=2, pieces=4)
        return functools.partial(ragged_attention_gpu, tiles=tiles, generation=self.generation, interpret=self.interpret)


def check_variant(options: dict[str, Any], chunks: list[tuple[int, int]], kernels: Kernels) -> float:
    """The largest difference from the reference over its tolerance; NaN if unused KV reached a result."""
    options = dict(options)
    scoring = {name: options.pop(name) for name in ("sliding_window", "soft_cap") if name in options}
    alibi, sinks, turns, latents = (options.pop(name, None) for name in ("alibi", "sinks", "rotation", "latents"))
    shape = {"num_kv_heads": 2, "group": 4, "head_dim": 128, "block_size": 32, "dtype": jnp.bfloat16} | options
    batch = make_batch(chunks, **shape)
    heads, dtype = shape["num_kv_heads"] * shape["group"], jnp.dtype(shape["dtype"])
    for name in ("q", "k", "v"):
        batch.arrays[name] = batch.arrays[name].astype(jnp.bfloat16 if is_quantized(dtype) else dtype)
    if latents is not None:
        make_latent(batch, latents)
    extras: dict[str, Any] = {"latents": latents}
    extras |= {"alibi_slopes": jnp.asarray(2.0 ** -np.linspace(1, 8, heads), jnp.float32)} if alibi else {}
    extras |= {"sinks": jnp.asarray(np.linspace(-3, 6, heads), jnp.float32)} if sinks else {}
    if turns:
        angle = np.random.default_rng(1).normal(size=(len(batch.arrays["q"]), shape["head_dim"] // 2)).astype(np.float32)
        extras["rotation"] = jnp.cos(angle), jnp.sin(angle)
    if latents is not None and latents.key_dim == shape["head_dim"]:
        extras["v_cache"] = None  # others have one, as beside an indexer
    arguments = batch.arguments(**scoring, **extras)
    results = [
        jax.jit(function)(**arguments)
        for function in (ragged_attention_reference, kernels.attention(shape["head_dim"], shape["group"], latents))
    ]
    (expected, *caches), (out, *ours) = [[np.asarray(x, np.float32) for x in jax.tree.leaves(result)] for result in results]
    for mine, theirs in zip(ours, caches, strict=True):
        # Whether a product and a sum are rounded once or twice is a matter of the compiler.
        np.testing.assert_allclose(mine, theirs, rtol=2**-7 if turns else 0, atol=2**-7 if turns else 0)
    width = None if latents is None else latents.value_dim  # other numbers are not results
    return float(np.max(np.abs(out - expected)[..., :width])) / TOLERANCE[dtype.name]


def seconds(call: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    """Seconds per call: the median over rounds, each of which starts several calls and then waits."""
    wait(call())
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(REPEATS):
            result = call()
        wait(result)
        times.append((time.perf_counter() - start) / REPEATS)
    return statistics.median(times)


def measured_bandwidth(size: int) -> float:
    """Bytes per second moved by reading one array and writing another."""
    x = jnp.ones((size,), jnp.bfloat16)
    add = jax.jit(lambda x: x + jnp.bfloat16(1))
    return 2 * x.nbytes / seconds(lambda: add(x))


def measured_peak(n: int) -> float:
    """Operations per second of a bfloat16 matrix product."""
    key = jax.random.key(0)
    a, b = (jax.random.normal(k, (n, n), jnp.bfloat16) for k in jax.random.split(key))
    multiply = jax.jit(lambda a, b: a @ b)
    return 2 * n**3 / seconds(lambda: multiply(a, b))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Lower bounds on the work of a call."""

    bytes: int  # keys and values
    flops: int  # both products, only for visible keys


def work_of(call: Call) -> Work:
    decode = call.num_tokens == call.num_sequences
    keys = call.num_sequences * call.context
    seen = keys if decode else call.num_tokens * call.context - call.num_tokens * (call.num_tokens - 1) // 2
    return Work(bytes=4 * keys * call.num_kv_heads * call.head_dim, flops=4 * seen * call.num_heads * call.head_dim)


def ours(call: Call, kernels: Kernels) -> Callable[[], Any]:
    """A call of the kernel on a fresh cache whose blocks are assigned in random order."""
    rng = np.random.default_rng(0)
    s, blocks = call.num_sequences, -(-call.context // call.block_size)
    dtype = jnp.dtype(call.dtype)
    key = jax.random.key(0)
    shape = (s * blocks, call.num_kv_heads, call.block_size, call.head_dim)
    caches = [jax.random.normal(k, shape, dtype) for k in jax.random.split(key)]
    new = jax.random.normal(key, (call.num_tokens, call.num_kv_heads, call.head_dim), dtype)
    q = jax.random.normal(key, (call.num_tokens, call.num_heads, call.head_dim), dtype)
    tables = rng.permutation(s * blocks).astype(np.int32).reshape(s, blocks)
    length = call.num_tokens // s
    positions = call.context - length + np.arange(length)
    slots = tables[:, positions // call.block_size] * call.block_size + positions % call.block_size
    index = RaggedIndex(
        kv_slots=jnp.asarray(slots.reshape(-1), jnp.int32),
        query_starts=jnp.arange(s + 1, dtype=jnp.int32) * length,
        context_lens=jnp.full((s,), call.context, jnp.int32),
        block_tables=jnp.asarray(tables),
    )
    layer, scoring = CacheLayer(number=0, num_blocks=s * blocks), Scoring(scale=call.head_dim**-0.5)
    attend = jax.jit(kernels.attention(call.head_dim, call.num_heads // call.num_kv_heads), donate_argnums=(3, 4))

    def run() -> Any:
        out, *caches[:] = attend(q, new, new, *caches, index, layer, scoring)
        return out

    return run


def cudnn(call: Call) -> Callable[[], Any]:
    """Attention of a dense batch of the same lengths by cuDNN; raises JAX's error if cuDNN is not available."""
    s, length = call.num_sequences, call.num_tokens // call.num_sequences
    key, dtype = jax.random.key(0), jnp.dtype(call.dtype)
    q = jax.random.normal(key, (s, length, call.num_heads, call.head_dim), dtype)
    k, v = (jax.random.normal(x, (s, call.context, call.num_kv_heads, call.head_dim), dtype) for x in jax.random.split(key))

    # cuDNN's causal mask begins at the first key, so a chunk at the end of a context needs a bias instead.
    causal = jnp.arange(call.context)[None, :] <= (call.context - length + jnp.arange(length))[:, None]
    mask = causal[None, None] if length > 1 else None
    attend = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn"))
    return lambda: attend(q, k, v)


def torch_sdpa(call: Call) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The same in PyTorch; raises ImportError or RuntimeError if torch has no GPU."""
    import torch  # pyright: ignore[reportMissingImports]

    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU")
    s, length = call.num_sequences, call.num_tokens // call.num_sequences
    dtype = getattr(torch, call.dtype)
    q = torch.randn(s, call.num_heads, length, call.head_dim, device="cuda", dtype=dtype)
    k, v = (torch.randn(s, call.num_kv_heads, call.context, call.head_dim, device="cuda", dtype=dtype) for _ in range(2))
    mask = None
    if length > 1:
        last = call.context - length + torch.arange(length, device="cuda")
        mask = torch.arange(call.context, device="cuda")[None, :] <= last[:, None]

    def run() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return run, lambda _: torch.cuda.synchronize()


def calls(tiny: bool) -> list[Call]:
    if tiny:
        return [
            Call(name="decode 2 x 64", num_tokens=2, num_sequences=2, context=64, num_heads=4, num_kv_heads=1),
            Call(name="prompt 16, context 64", num_tokens=16, num_sequences=1, context=64, num_heads=4, num_kv_heads=1),
        ]
    decode = [
        Call(name=f"decode {s} x {context}", num_tokens=s, num_sequences=s, context=context)
        for s in (64, 256)
        for context in (1024, 2048, 4096, 8192)
    ]
    return [*decode, Call(name="prompt 2048, context 4096", num_tokens=2048, num_sequences=1, context=4096)]


def other(measure: Callable[[], float]) -> float | str:
    """Microseconds, or the beginning of the error."""
    try:
        return 1e6 * measure()
    except Exception as error:  # an error in another library is reported in the table
        return type(error).__name__[:10]


class Deadline:
    """The end of a part, and what it did not reach."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.missed: list[str] = []

    def allows(self, name: str) -> bool:
        """Whether there is time left; otherwise `name` is missed."""
        if time.monotonic() < self._end:
            return True
        self.missed.append(name)
        return False


def run_variants(options: argparse.Namespace, kernels: Kernels, deadline: Deadline) -> tuple[JsonObject, int]:
    """The largest difference of each variant, and how many failed."""
    found: JsonObject = {}
    failed = 0
    print("\nlargest difference from the reference, divided by its tolerance")
    for name, variant in VARIANTS.items():
        if options.only not in name or (options.tiny and not options.only and name not in ("plain", "int8", "all")):
            continue
        if kernels.generation == "ampere" and name == "float8":
            print(f"  {name:28} refused on this GPU")
            continue
        if not deadline.allows(name):
            continue
        try:
            difference = check_variant(variant, TINY_CHUNKS if options.tiny else CHUNKS, kernels)
            words = "" if difference <= 1 else "WRONG"
        except Exception as error:  # the other variants must run too
            difference, words = float("nan"), f"FAILED {type(error).__name__}: {error}"[:300]
        failed += bool(words)
        found[name] = words or difference
        print(f"  {name:28} {difference:6.3f}  {words}", flush=True)
    return found, failed


def run_kernels(options: argparse.Namespace, kernels: Kernels, deadline: Deadline) -> tuple[JsonObject, int]:
    """Microseconds of each call and what it reached, and how many missed their target."""
    bandwidth, peak = measured(options.tiny)
    found: JsonObject = {"copy_bytes_per_s": bandwidth, "product_flops_per_s": peak}
    failed = 0
    print(f"\nmeasured: copy {bandwidth / 1e9:,.0f} GB/s, matrix product {peak / 1e12:,.1f} TFLOP/s")
    print(f"  {'':26} {'us':>10} {'cuDNN us':>10} {'torch us':>10} {'reached':>8} {'target':>7}")
    for call in calls(options.tiny):
        if options.only not in call.name or not deadline.allows(call.name):
            continue
        try:
            took = seconds(ours(call, kernels))
        except Exception as error:  # for example out of memory: the other shapes must run too
            failed += 1
            found[call.name] = f"FAILED {type(error).__name__}: {error}"[:300]
            print(f"  {call.name:26} {found[call.name]}", flush=True)
            continue
        work = work_of(call)
        decode = call.num_tokens == call.num_sequences
        reached = work.bytes / took / bandwidth if decode else work.flops / took / peak
        target = DECODE_TARGET if decode else PROMPT_TARGET
        missed = reached < target and not options.tiny
        failed += missed
        theirs = other(lambda call=call: seconds(cudnn(call))), other(lambda call=call: seconds(*torch_sdpa(call)))
        found[call.name] = {"us": 1e6 * took, "cudnn_us": theirs[0], "torch_us": theirs[1], "reached": reached}
        shown = [f"{x:>10}" if isinstance(x, str) else f"{x:10.0f}" for x in theirs]
        print(
            f"  {call.name:26} {1e6 * took:10.0f} {shown[0]} {shown[1]} {100 * reached:7.1f}% {100 * target:6.0f}%"
            f"{'  MISSED' if missed else ''}",
            flush=True,
        )
    return found, failed


def run_products(options: argparse.Namespace, kernels: Kernels, deadline: Deadline) -> tuple[JsonObject, int]:
    """The differences of all products, and the times of some, and how many failed or missed their target."""
    differences: JsonObject = {}
    times: JsonObject = {}
    failed = 0
    print("\nlargest difference of products, divided by the tolerance")
    for product in gpu_products.variants(kernels.generation, options.tiny):
        if options.only not in product.name or not deadline.allows(product.name):
            continue
        try:
            difference = gpu_products.difference(product, kernels.generation, kernels.interpret)
            words = "" if difference <= 1 else "WRONG"
        except Exception as error:  # the others must run too
            difference, words = float("nan"), f"FAILED {type(error).__name__}: {error}"[:300]
        failed += bool(words)
        differences[product.name] = words or difference
        print(f"  {product.name:48} {difference:6.3f}  {words}", flush=True)
    bandwidth, peak = measured(options.tiny)
    print(f"  {'':48} {'us':>8} {'library us':>10} {'reached':>8} {'target':>7}")
    for product in gpu_products.timed(kernels.generation, options.tiny):
        if options.only not in product.name or not deadline.allows(f"time of {product.name}"):
            continue
        x, w = gpu_products.arguments_of(product)
        call = gpu_products.call_of(product, kernels.generation, kernels.interpret)
        try:
            took = seconds(lambda call=call, x=x, w=w: call(x, w))
        except Exception as error:  # for example out of memory
            failed += 1
            times[product.name] = f"FAILED {type(error).__name__}: {error}"[:300]
            print(f"  {product.name:48} {times[product.name]}", flush=True)
            continue
        of_memory, of_products = gpu_products.weight_bytes(product, w) / bandwidth, product.flops / peak
        reached, target = max(of_memory, of_products) / took, DECODE_TARGET if of_memory > of_products else PROMPT_TARGET
        missed = reached < target and not options.tiny
        failed += missed
        theirs = 1e6 * seconds(gpu_products.library(product))
        times[product.name] = {"us": 1e6 * took, "library_us": theirs, "reached": reached}
        print(
            f"  {product.name:48} {1e6 * took:8.0f} {theirs:10.0f} {100 * reached:7.1f}% {100 * target:6.0f}%"
            f"{'  MISSED' if missed else ''}",
            flush=True,
        )
    return {"differences": differences, "times": times}, failed


def run_engine(options: argparse.Namespace, kernels: Kernels, deadline: Deadline) -> tuple[JsonObject, int]:
    """The figures of `gpu_engine`, and how many targets were missed."""
    from tests.gate import gpu_engine

    del kernels
    sizes = gpu_engine.TINY if options.tiny else gpu_engine.FULL
    if options.deterministic:
        sizes = dataclasses.replace(sizes, options={**sizes.options, "deterministic": True})
    if options.no_graphs:
        sizes = dataclasses.replace(sizes, options={**sizes.options, "cuda_graphs": False})
    bandwidth, peak = measured(options.tiny)
    print("\nengine, Llama-3-8B with random weights" if not options.tiny else "\nengine, a tiny model")
    start = time.monotonic()
    engine = gpu_engine.make_engine(sizes)
    print(f"  {engine.describe()}; ready in {time.monotonic() - start:.0f} s", flush=True)
    try:
        say = lambda line: print(f"  {line}", flush=True)  # noqa: E731
        found = gpu_engine.measure_engine(engine, sizes, bandwidth=bandwidth, peak=peak, say=say, allows=deadline.allows)
    finally:
        engine.destroy()
    greedy = found.get("greedy")
    wrong = options.deterministic and greedy is not None and greedy["equal"] < greedy["requests"]
    single = (found.get("single stream") or {}).get("generating_step_ms")
    slow = not options.tiny and single is not None and single > SINGLE_STREAM_MS
    if slow:
        print(f"  MISSED: a single stream takes {single:.2f} ms a token, more than {SINGLE_STREAM_MS}")
    return found, wrong + slow


@functools.cache
def measured(tiny: bool) -> tuple[float, float]:
    """Bytes per second of a copy, and operations per second of a matrix product."""
    return measured_bandwidth(2**20 if tiny else 2**30), measured_peak(256 if tiny else 8192)


PARTS = {"variants": run_variants, "products": run_products, "kernels": run_kernels, "engine": run_engine}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="(default: all)")
    parser.add_argument("--seconds", type=float, default=115.0, help="for each part (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="a file for all figures; other parts that it holds are kept")
    parser.add_argument("--tiny", action="store_true", help="small shapes in the interpreter, to test this script")
    parser.add_argument("--generation", default="hopper", choices=("hopper", "ampere"), help="for --tiny only")
    parser.add_argument("--only", default="", help="run only variants and calls whose name contains this")
    parser.add_argument("--deterministic", action="store_true", help="the engine's tokens must not depend on other requests")
    parser.add_argument("--no-graphs", action="store_true", help="the engine's kernels are started one by one")
    options = parser.parse_args()
    device = jax.devices()[0]
    if options.tiny:
        from tests.pallas_kernels.ragged_attention.gpu_interpreter import InterpretGPUParams, compile_once

        compile_once()
        kernels = Kernels(generation=options.generation, interpret=InterpretGPUParams())
    else:
        generation = gpu_target.generation()
        if generation is None:
            print(f"gpu-check needs compute capability 9.0 or 8 (H100, A100); JAX's first device is {device.device_kind}")
            return 2
        kernels = Kernels(generation=generation, interpret=False)
    print(f"{device.device_kind}, jax {jax.__version__}")

    failed = 0
    for part in options.parts:
        start, deadline = time.monotonic(), Deadline(options.seconds)
        found, failures = PARTS[part](options, kernels, deadline)
        if deadline.missed:
            print(f"  not reached in {options.seconds:.0f} s: {', '.join(deadline.missed)}")
        failed += failures + len(deadline.missed)
        about = {"device": device.device_kind, "jax": jax.__version__, "seconds": time.monotonic() - start}
        if options.json is not None:  # after each part: a later one may not come to its end
            figures = json.loads(options.json.read_text()) if options.json.exists() else {}
            figures[part] = {**about, "failed": failures, "not_reached": deadline.missed, **found}
            options.json.write_text(json.dumps(figures, indent=1))
    print("all passed" if not failed else f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
