"""`fastgen plan`: whether and how a model fits on devices that need not be here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from fastgen_jax.plan.report import Plan, make_plan, table
from pallas_kernels.ragged_attention import QUANTIZED_DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is planned for."""
    parser.add_argument("--model", required=True, help="directory with a config.json, or that file; no weights needed")
    parser.add_argument("--topology", required=True, help="devices, such as v5e:2x4, v6e:2x2, tpu7x:2x2x1 or h100:8")
    parser.add_argument("--context", type=int, default=None, metavar="TOKENS",
                        help="tokens of a sequence, prompt and generated (default: the model's own limit)")
    parser.add_argument("--budget", type=int, nargs="+", default=[64, 256, 512, 2048], metavar="TOKENS",
                        help="token budgets of a step (default: 64 256 512 2048)")
    parser.add_argument("--max-num-seqs", type=int, default=64, metavar="N", help="sequences at once (default: 64)")
    parser.add_argument("--block-size", type=int, default=128, metavar="TOKENS", help="tokens of a KV block (default: 128)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of weights and KV")
    parser.add_argument("--kv-dtype", choices=("bfloat16", "float32", *QUANTIZED_DTYPES), default=None,
                        help="of the KV cache, if another than --dtype; of 8 bits: with a scale a token and KV head")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="ask the device's own compiler, which takes a minute a budget (default: yes)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(options: dict[str, Any]) -> int:
    """Prints the plan; 1 if the model does not fit or does not compile."""
    plan = make_plan(
        read_config(Path(options["model"])), topology=options["topology"], context=options["context"],
        budgets=sorted(set(options["budget"])), max_num_seqs=options["max_num_seqs"],
        block_size=options["block_size"], dtype=options["dtype"], kv_dtype=options["kv_dtype"],
        compile=options["compile"],
    )
    print(json.dumps(as_json(plan), indent=1) if options["json"] else table(plan))
    return 0 if plan.fits else 1


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain numbers, with what its properties derive."""
    steps = [
        dataclasses.asdict(step) | {"seconds": step.seconds, "bound": step.bound, "tokens_per_s": step.tokens / step.seconds}
        for step in plan.steps
    ]
    memory = dataclasses.asdict(plan.memory) | {"free": plan.memory.free, "num_blocks": plan.memory.num_blocks}
    rest = dataclasses.asdict(plan) | {"memory": memory, "steps": steps, "fits": plan.fits}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in rest.items()}


def read_config(path: Path) -> dict[str, Any]:
    """The dictionary in config.json; ValueError names what is missing."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(
            f"cannot read {file}: {error.strerror}; --model is a directory with a config.json, or that file"
        ) from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or not config.get("architectures"):
        raise ValueError(f"{file} names no architectures, so it is not the config.json of a model")
    return config
