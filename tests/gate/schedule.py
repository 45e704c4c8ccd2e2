"""Compares our TPU attention with JAX's `ragged_paged_attention` by the schedules that the compiler produces.

    python -m tests.gate.schedule --kinds v5e v6e tpu7x

If the package tpu-inference is found, its kernel is included (see `tests.gate.tpu_inference_v3`).

Nothing is executed. The compiler schedules every kernel as VLIW bundles, one per cycle without stalls, so the number of
bundles is a lower bound on cycles. Loops whose trip count depends on data are expanded here from the shape of the call:
both kernels fetch keys in pieces and spend almost all of their time in the loop over pieces.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.gate import tpu_inference_v3 as v3
from tests.gate.calls import Call, lower_attention

MIB = 2**20
SHAPES = {
    "decode": Call(name="decode", num_tokens=64, num_sequences=64),  # 64 x 1 token, context 4096
    "prompt": Call(name="prompt", num_tokens=2048, num_sequences=1, context=2048),  # one chunk from the start
    "mixed": Call(name="mixed", num_tokens=2048, num_sequences=64),  # 63 x 1 token and a chunk of 1985 after 2111
    # The block size that an 8-bit cache requires, and such a cache; only our kernel.
    "decode-128": Call(name="decode", num_tokens=64, num_sequences=64, block_size=128),
    "decode-int8": Call(name="decode", num_tokens=64, num_sequences=64, block_size=128, kv_dtype="int8"),
    "prompt-128": Call(name="prompt", num_tokens=2048, num_sequences=1, context=2048, block_size=128),
    "prompt-int8": Call(name="prompt", num_tokens=2048, num_sequences=1, context=2048, block_size=128, kv_dtype="int8"),
    # Heads of 64; before they were packed, they were stored and computed as the heads of 128 above.
    "decode-64": Call(name="decode", num_tokens=64, head_dim=64, block_size=128, packed=True),
    "decode-64-int8": Call(name="decode", num_tokens=64, head_dim=64, block_size=128, kv_dtype="int8", packed=True),
    "prompt-64": Call(
        name="prompt", num_tokens=2048, num_sequences=1, context=2048, head_dim=64, block_size=128, packed=True
    ),
}
COMPARED = ("decode", "prompt", "mixed")


def chunks_of(shape: str) -> list[tuple[int, int]]:
    """(query length, context length) of each sequence."""
    return {
        "decode": [(1, 4096)] * 64,
        "prompt": [(2048, 2048)],
        "mixed": [(1, 4096)] * 63 + [(1985, 4096)],
    }[SHAPES[shape].name]


@dataclasses.dataclass
class Loop:
    """A loop of a schedule: addresses of its first and last bundle, and its inner loops."""

    start: int
    end: int
    inside: list[Loop] = dataclasses.field(default_factory=list)

    @property
    def own(self) -> int:
        """Bundles outside the inner loops."""
        return self.end - self.start + 1 - sum(loop.end - loop.start + 1 for loop in self.inside)

    @property
    def once(self) -> int:
        """Bundles if every inner loop runs once."""
        return self.end - self.start + 1


def read_schedule(path: Path) -> Loop:
    """The tree of loops of a `final_bundles` file; a loop is a branch back to where a region starts."""
    starts: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    address = 0
    for line in path.read_text().splitlines():
        bundle = re.match(r"\s*(0x[0-9a-f]+)\s", line)
        if bundle:
            address = int(bundle[1], 16)
            starts |= dict.fromkeys(re.findall(r"Start region (\d+)", line), address)
            branches += [(address, target) for target in re.findall(r"target = \$region(\d+)", line)]
    ends: dict[int, int] = {}
    for at, target in branches:
        if starts.get(target, at + 1) <= at:
            ends[starts[target]] = max(at, ends.get(starts[target], 0))
    root = Loop(0, address)
    stack = [root]
    for start, end in sorted(ends.items()):
        while stack[-1].end < end:
            stack.pop()
        stack[-1].inside.append(Loop(start, end))
        stack.append(stack[-1].inside[-1])
    return root


def vmem_of(path: Path) -> int:
    """Bytes of VMEM that a kernel allocates, including the compiler's own, from its `pre-finalize` dump."""
    sizes = re.findall(r"#allocation\d+ \[.*space=vmem, size = (0x[0-9a-f]+)", path.read_text())
    return sum(int(size, 16) for size in sizes)


# --- bundles of each kernel for a shape ----------------------------------------------------------------------------


def count_ours(shape: str, root: Loop, tiles: Any, call: Call) -> dict[str, float]:
    """Bundles of our kernel: tile loops > piece loops > copies and heads."""
    tile_loops = [loop for loop in root.inside if any(len(inside.inside) >= 4 for inside in loop.inside)]
    single, chunk = tile_loops[0], tile_loops[1] if len(tile_loops) > 1 else None
    blocks = tiles.keys // call.block_size
    bundles = float(root.own)
    fetched = 0
    a_head = call.head_dim + 4 if call.kv_dtype == "int8" else 2 * call.head_dim
    row_bytes = 2 * call.num_kv_heads * a_head

    def piece_of(tile: Loop) -> Loop:
        return max(tile.inside, key=lambda loop: len(loop.inside))

    def copies(piece: Loop, share: int) -> float:
        # Two unrolled loops of 8 blocks (next piece, next tile), of which one runs; the rest is for partial pieces.
        unrolled = [loop for loop in piece.inside if loop.once > 60 and loop.once < 400][:1]
        return sum(loop.once * share / min(8, share) for loop in unrolled)

    for queries, context in chunks_of(shape):
        if queries == 1:
            share = tiles.keys // tiles.sequences
            pieces = math.ceil(context / share)
            piece = piece_of(single)
            cost = piece.own + copies(piece, share // call.block_size) * tiles.sequences
            bundles += (single.own + pieces * cost) / tiles.sequences
            fetched += context * row_bytes
            continue
        assert chunk is not None
        piece = piece_of(chunk)
        # A loop over heads for a fully visible piece, and a loop over halves of a piece > over heads.
        seen, part = [loop for loop in piece.inside if loop.once >= 400][-2:]
        masked = max(part.inside, key=lambda loop: loop.once)
        for first in range(0, queries, tiles.queries):
            position = context - queries + first
            end = position + min(tiles.queries, queries - first)
            pieces, whole = math.ceil(end / tiles.keys), (position + 1) // tiles.keys
            bundles += chunk.own + pieces * (piece.own + copies(piece, blocks))
            halves = math.ceil((end - whole * tiles.keys) / (tiles.keys // 2))
            bundles += call.num_kv_heads * (whole * seen.once + halves * masked.once) + 2 * (pieces - whole) * part.own
            fetched += math.ceil(end / call.block_size) * call.block_size * row_bytes
    return {"bundles": bundles, "bytes": fetched}


def count_upstream(shape: str, root: Loop, pages: int, queries: int, call: Call) -> dict[str, float]:
    """Bundles of JAX's kernel: a loop over the sequences of a q block > a loop over all of their keys."""
    every = []

    def walk(loop: Loop) -> None:
        every.append(loop)
        for inside in loop.inside:
            walk(inside)

    walk(root)
    keys_loop = max((loop for loop in every if loop is not root and not loop.inside), key=lambda loop: loop.once)
    keys = pages * call.block_size
    row_bytes = 2 * call.num_kv_heads * call.head_dim * 2
    start, passes, fetched = 0, 0, 0
    for length, context in chunks_of(shape):
        blocks = (start + length - 1) // queries - start // queries + 1  # q blocks that contain part of the chunk
        passes += blocks * math.ceil(context / keys)
        fetched += blocks * math.ceil(context / keys) * keys * row_bytes
        start += length
    outside = root.once - keys_loop.once
    return {"bundles": passes * keys_loop.once + math.ceil(start / queries) * outside, "bytes": fetched}


# --- compiling, one program per process, because dumps are enabled when the compiler is loaded -----------------------


def compile_one(which: str, shape: str, kind: str, *, jax_keys: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from fastgen_jax.devices import parse_topology
    from fastgen_jax.plan.program import deviceless_mesh, lowering_for
    from pallas_kernels.ragged_attention.tpu import tile_sizes
    from pallas_kernels.ragged_attention.tpu.call import ragged_attention_tpu
    from tests.gate.tpu_check import TOPOLOGIES

    call = SHAPES[shape]
    mesh = deviceless_mesh(parse_topology(TOPOLOGIES[kind]), num_devices=1)
    sharding = NamedSharding(mesh, PartitionSpec())

    def array(*dims: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    bf16 = jnp.bfloat16
    max_blocks = call.context // call.block_size
    num_blocks = call.num_sequences * max_blocks
    q = array(call.num_tokens, call.num_heads, call.head_dim, dtype=bf16)
    index = array(call.num_sequences), array(call.num_sequences, max_blocks), array(call.num_sequences + 1)
    facts: dict[str, Any] = {}
    with lowering_for(mesh):
        if which == "ours":
            chosen = tile_sizes.modeled(
                tile_sizes.Shape(
                    num_heads=call.num_heads,
                    num_kv_heads=call.num_kv_heads,
                    head_dim=call.head_dim,
                    block_size=call.block_size,
                    num_tokens=call.num_tokens,
                    num_sequences=call.num_sequences,
                    dtype=call.kv_dtype or "bfloat16",
                ),
                kind,
            )
            facts["tiles"] = dataclasses.asdict(chosen)
            attention = functools.partial(ragged_attention_tpu, tiles=chosen)
            program, _ = lower_attention(
                call, attention, lambda dims, dtype: array(*dims, dtype=dtype), num_blocks=num_blocks
            )
        elif which == "v3":
            program, facts["sizes"] = v3.lower(call, kind, array, num_blocks=num_blocks, max_blocks=max_blocks)
        else:
            from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention, tuned_block_sizes

            # Its table queries the process's own device, so it is given the target device instead.
            version = {"v4": 4, "v5e": 5, "v5p": 5, "v6e": 6, "tpu7x": 7}[kind]
            tuned_block_sizes.get_tpu_version = lambda: version
            tuned_block_sizes.get_device_name = lambda: "TPU7x" if version == 7 else f"TPU v{version}"
            sizes = tuned_block_sizes.get_tuned_block_sizes(
                bf16, bf16, call.num_heads, call.num_kv_heads, call.head_dim, call.block_size, call.num_tokens, max_blocks
            )
            facts["pages"], facts["queries"] = min(int(sizes[0]), jax_keys // call.block_size), int(sizes[1])
            pages = array(num_blocks, call.block_size, 2 * call.num_kv_heads, call.head_dim, dtype=bf16)
            program = jax.jit(
                functools.partial(
                    ragged_paged_attention,
                    sm_scale=0.1,
                    num_kv_pages_per_block=facts["pages"],
                    num_queries_per_block=facts["queries"],
                    vmem_limit_bytes=64 * MIB if kind != "v4" else None,
                )
            ).lower(q, pages, index[0], index[1], index[2], array(1))
        start = time.process_time()  # excludes other processes
        program.compile()
    return facts | {"seconds": time.process_time() - start}


def measure(which: str, shape: str, kind: str, *, timeout: float, jax_keys: int) -> dict[str, Any]:
    """Compiles one kernel in a child process and reads its schedule; {"failed": words} if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"
        command = [sys.executable, "-m", "tests.gate.schedule", "--one", which, shape, kind]
        command += ["--jax-keys", str(jax_keys)]

        def run(**environment: str) -> str | dict[str, Any]:
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"} | environment
            try:
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
            except subprocess.TimeoutExpired:
                return f"no program after {timeout:.0f} s"
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            return json.loads(lines[-1]) if done.returncode == 0 and lines else done.stderr.strip()[-300:]

        facts = run(LIBTPU_INIT_ARGS=flags)
        if isinstance(facts, str):
            return {"failed": facts}
        undumped = run()  # writing the dumps takes longer than compiling
        facts["seconds"] = undumped["seconds"] if isinstance(undumped, dict) else math.nan
        call = SHAPES[shape]

        def schedule_of(name: str) -> Loop:
            """The largest schedule of that name; its VMEM counts if it is the most."""
            path = max(Path(folder).glob(f"*{name}*final_bundles.txt"), key=lambda path: path.stat().st_size)
            facts["vmem"] = max(facts.get("vmem", 0), vmem_of(next(Path(folder).glob(f"*{name}*pre-finalize*"))))
            return read_schedule(path)

        if which == "ours":
            from pallas_kernels.ragged_attention.tpu.tile_sizes import Tiles

            return facts | count_ours(shape, schedule_of("ragged_attention"), Tiles(**facts["tiles"]), call)
        if which == "v3":
            chunks = chunks_of(shape)
            used = {
                name: schedule_of(file)
                for name, file in v3.SCHEDULES.items()
                if any((length == 1) == (name == "DECODE") for length, _ in chunks)
            }
            return facts | v3.count(chunks, used, facts["sizes"], call)
        root = schedule_of("ragged_paged_attention")
        return facts | count_upstream(shape, root, facts["pages"], facts["queries"], call)


def tiles_in_words(facts: dict[str, Any], call: Call) -> str:
    if "tiles" in facts:
        return f"{facts['tiles']['queries']} q, {facts['tiles']['keys']} k"
    if "sizes" in facts:
        return "; ".join(f"{name.lower()} {sizes['bq_sz']} q, {sizes['bkv_sz']} k" for name, sizes in facts["sizes"].items())
    return f"{facts['queries']} q, {facts['pages'] * call.block_size} k"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--kinds", nargs="+", default=["v5e", "v6e", "tpu7x"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(COMPARED))
    parser.add_argument(
        "--kernels", nargs="+", choices=("ours", "JAX", "v3"), default=["ours", "JAX"] + ["v3"] * v3.is_here()
    )
    parser.add_argument(
        "--jax-keys",
        type=int,
        default=1024,
        help="maximum keys per piece of JAX's kernel; its own table has up to 4096, which takes minutes to "
        "compile and does not change the bundles per key (default: 1024, as in our kernel)",
    )
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds per compilation")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compile_one(*options.one, jax_keys=options.jax_keys)))
        return 0
    print("| device | shape | kernel | tiles | compile, CPU | VMEM | bundles per token | KV bytes per token |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in options.kinds:
        for shape in options.shapes:
            for which in options.kernels if shape in COMPARED else ["ours"]:
                facts = measure(which, shape, kind, timeout=options.timeout, jax_keys=options.jax_keys)
                if "failed" in facts:
                    print(f"| {kind} | {shape} | {which} | | {facts['failed']!r} |", flush=True)
                    continue
                tokens = SHAPES[shape].num_tokens
                print(
                    f"| {kind} | {shape} | {which} | {tiles_in_words(facts, SHAPES[shape])} | {facts['seconds']:.1f} s "
                    f"| {facts['vmem'] / MIB:.1f} MiB | {facts['bundles'] / tokens:,.0f} "
                    f"| {facts['bytes'] / tokens / 1024:,.0f} KiB |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
