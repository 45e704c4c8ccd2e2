"""`fastgen plan`: checks whether a model fits on devices that are not attached."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math

from fastgen_jax.cli.parser import Options
from fastgen_jax.devices import DEVICES, parse_topology
from fastgen_jax.engine.config import quantize_of_snapshot
from fastgen_jax.flags import MODEL_HELP
from fastgen_jax.json_types import JsonObject
from fastgen_jax.plan.kernels import multiplies_float8
from fastgen_jax.plan.report import Plan, make_plan, table
from fastgen_jax.plan.source import describe
from pallas_kernels.ragged_attention import QUANTIZED_DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("--model", required=True, help=f"{MODEL_HELP}, or a config.json alone; no weights are read")
    parser.add_argument(
        "--topology",
        required=True,
        help=f"device kind and count, such as v5e:2x4, v6e:2x2 or h100:8; kinds: {', '.join(DEVICES)}",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=None,
        metavar="TOKENS",
        help="tokens per sequence, prompt and output together (default: the model's own limit, which is the maximum)",
    )
    parser.add_argument(
        "--budget",
        type=int,
        nargs="+",
        default=[64, 256, 512, 2048],
        metavar="TOKENS",
        help="token budgets to plan for (default: 64 256 512 2048)",
    )
    parser.add_argument(
        "--max-num-seqs", type=int, default=64, metavar="N", help="sequences that run at the same time (default: 64)"
    )
    parser.add_argument("--block-size", type=int, default=128, metavar="TOKENS", help="tokens per KV block (default: 128)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="number format of the weights and the KV cache (default: %(default)s)",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4", "fp8", "w8a8", "none"),
        default=None,
        help="quantize matrices to 8 bits with one scale per output channel, or to 4 with one per 32 inputs; fp8 for H100, "
        "H200 and TPU7x, and w8a8 for TPU v5e and v6e, round activations, too; none: all in --dtype (default: as in the "
        "checkpoint where kernels multiply its 4 bits or 8-bit floats, or in the snapshot, else none)",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=("bfloat16", "float32", *QUANTIZED_DTYPES),
        default=None,
        help="number format of the KV cache; 8-bit formats have one scale per token and KV head (default: --dtype)",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile with the device's own compiler, which takes about a minute per budget (default: yes)",
    )
    parser.add_argument(
        "--images",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="plan for the vision tower of a model that reads images (default: yes)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(options: Options) -> int:
    """Prints the plan; returns 1 if the model does not fit or does not compile."""
    model = describe(options["model"])
    float8 = multiplies_float8(parse_topology(options["topology"]).device)
    plan = make_plan(
        model.config,
        stored_as=model.stored_as,
        stored=model.stored,
        quantize=quantize_of_snapshot(model.quantize, options["quantize"], packs=False, float8=float8),
        topology=options["topology"],
        context=options["context"],
        budgets=sorted(set(options["budget"])),
        max_num_seqs=options["max_num_seqs"],
        block_size=options["block_size"],
        dtype=options["dtype"],
        kv_dtype=options["kv_dtype"],
        images=options["images"],
        compile=options["compile"],
    )
    print(json.dumps(as_json(plan), indent=1) if options["json"] else table(plan))
    return 0 if plan.fits else 1


def as_json(plan: Plan) -> JsonObject:
    """The plan as plain numbers, including the values its properties derive."""
    steps = [
        dataclasses.asdict(step) | {"seconds": step.seconds, "bound": step.bound, "tokens_per_s": step.tokens / step.seconds}
        for step in plan.steps
    ]
    memory = dataclasses.asdict(plan.memory) | {"free": plan.memory.free, "num_blocks": plan.memory.num_blocks}
    rest = dataclasses.asdict(plan) | {"memory": memory, "steps": steps, "fits": plan.fits}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in rest.items()}
