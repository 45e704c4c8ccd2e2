"""The plan: what fits, how fast it could be, and what the compiler reports."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from fastgen_jax.checkpoint.quantized import quantization_method, split_settings
from fastgen_jax.devices import DEVICES, FLOAT8_KINDS, GIB, INT8_KINDS, NoCompiler, Topology, parse_topology
from fastgen_jax.engine import footprint, kept_forms
from fastgen_jax.engine.config import EngineConfig, wide_enough
from fastgen_jax.json_types import JsonObject
from fastgen_jax.models.cache_groups import choose_groups
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.counts import count_params
from fastgen_jax.models.division import check_num_devices, divided
from fastgen_jax.models.families import family_of
from fastgen_jax.models.vision.config import ImagesConfig
from fastgen_jax.models.vision.read import images_from_hf, largest, tower_bytes
from fastgen_jax.plan import estimate, tower
from fastgen_jax.plan.estimate import Memory, PlannedStep
from fastgen_jax.plan.kernels import int4_kernel_of, multiplies_float8
from fastgen_jax.scheduling import BlockGroups
from pallas_kernels.matmul import FLOAT8_BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileCheck:
    """The compiler's result for one token budget, or for the vision tower."""

    token_budget: int  # 0: the vision tower
    seconds: float | None  # None: it was rejected
    temporaries: int | None  # bytes of one device
    problem: str  # why it was rejected, or what is wrong with the program; "" if nothing is
    image_tokens: int = 0  # of the largest image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that `fastgen plan` prints. Bytes are per device."""

    topology: str
    num_devices: int
    num_params: int
    context: int
    block_size: int
    windows: tuple[int | None, ...]  # of the cache groups; None: one whose layers attend to all tokens
    dtype: str
    quantize: str | None  # "int8", "int4", "fp8" or "w8a8" if matrices are stored in 8 or 4 bits
    stored_as: str  # how the weights are quantized on disk; "" if they are not
    keeps: bool  # whether some of those stay as they are
    kept: str  # how many, and why others do not; "" if they were to be changed in any case
    kv_dtype: str
    max_num_seqs: int
    vision: int  # bytes of the vision tower, which are part of the weights; 0 without one
    memory: Memory
    sequences: int  # sequences of the full context that fit at the same time
    largest_budget: int
    steps: tuple[PlannedStep, ...]
    checks: tuple[CompileCheck, ...]
    advice: tuple[str, ...]
    not_compiled: str  # why requested checks are missing; "" if they are not

    @property
    def fits(self) -> bool:
        """Whether at least one sequence of the full context fits and no check found a problem."""
        return self.sequences >= 1 and not any(check.problem for check in self.checks)


def make_plan(
    config: JsonObject,
    *,
    topology: str,
    context: int | None,
    budgets: Sequence[int],
    max_num_seqs: int,
    block_size: int,
    dtype: str,
    kv_dtype: str | None = None,
    quantize: str | None = None,
    stored_as: str = "",
    stored: kept_forms.Stored = (),
    images: bool = True,
    compile: bool,
) -> Plan:
    """Plans for the model that `config` (the contents of a config.json) describes; see `describe`.

    Weights that are quantized according to the config or `stored_as` are planned as they are loaded: those of `stored`
    as they are where a kernel multiplies them, unless `quantize` says otherwise, the others dequantized, in `dtype` or
    quantized again. With `images` a vision tower is part of them. Raises ValueError for an unknown model, quantization or
    topology, a context beyond the model's limit, and if the model cannot be divided over the devices.
    """
    devices = parse_topology(topology)
    quantization, config = split_settings(config)
    stored_as = quantization_method(quantization) if quantization else stored_as
    in_blocks = _has_blocks(quantization) and devices.device.platform != "tpu"
    model: ModelConfig = family_of(config["architectures"][0]).config_from_hf(config)
    check_num_devices(model, devices.num_devices)
    context = model.max_context_len if context is None else context
    if context > model.max_context_len:
        raise ValueError(
            f"context is {context} but the model's limit is {model.max_context_len} tokens; choose at most that"
        )
    if min(budgets) < 1 or max_num_seqs < 1 or block_size < 1 or context < 1:
        raise ValueError("context, budgets, max_num_seqs and block_size must be at least 1")
    if quantize == "fp8" and devices.device.kind not in FLOAT8_KINDS:
        raise ValueError(
            f"quantize is 'fp8', but {devices.device.kind} does not multiply it; choose 'int8', or one of "
            f"{', '.join(FLOAT8_KINDS)}"
        )
    if quantize == "w8a8" and devices.device.kind not in INT8_KINDS:
        raise ValueError(
            f"quantize is 'w8a8', but {devices.device.kind} does not multiply int8 by int8; choose 'int8', or one of "
            f"{', '.join(INT8_KINDS)}"
        )
    choice = kept_forms.NOTHING
    if quantize in (None, "int4"):
        choice = kept_forms.choose_forms(
            stored,
            model,
            kernel=int4_kernel_of(devices.device),
            platform=devices.device.platform,
            activations=wide_enough(dtype, exceeds_float16=model.exceeds_float16),  # pyright: ignore[reportArgumentType]
            num_devices=devices.num_devices,
            float8=multiplies_float8(devices.device),
            requested=quantize == "int4",
        )
    quantize = None if quantize == "none" else quantize
    kept = tuple((path, form.bits) for path, form in choice.kept)
    itemsize = jnp.dtype(dtype).itemsize
    kv_dtype = kv_dtype or dtype
    shown = images_from_hf(config, {}) if images else None
    if shown is not None:
        shown = largest(shown, EngineConfig().max_image_tokens)
    vision = 0 if shown is None else tower_bytes(shown, itemsize)  # on each device
    windows = choose_groups(divided(model, devices.num_devices), context).windows
    groups = BlockGroups(windows=windows, block_size=block_size, token_budget=max(budgets))
    memory = Memory(
        total=devices.device.memory_bytes,
        reserved=int(devices.device.memory_bytes * estimate.RESERVED_SHARE),
        weights=footprint.weight_bytes(
            model,
            devices.num_devices,
            itemsize,
            quantize=quantize,
            kept=kept,
            platform=devices.device.platform,
            in_blocks=in_blocks,
        )
        + vision,
        state=footprint.sampler_bytes(model, max_num_seqs)
        + footprint.state_bytes(model, devices.device.platform, max_num_seqs),
        temporaries=max(
            footprint.temporary_bytes(
                model, devices.num_devices, token_budget=max(budgets), max_num_seqs=max_num_seqs, itemsize=itemsize
            ),
            0 if shown is None else tower.temporary_bytes(shown, itemsize),  # a tower runs between two steps
        ),
        block=estimate.block_bytes(
            model, devices, block_size=block_size, kv_dtype=jnp.dtype(kv_dtype), num_groups=groups.num_groups
        ),
    )
    checks: tuple[CompileCheck, ...] = ()
    not_compiled = ""
    if compile and groups.sequences(memory.num_blocks, context):
        try:
            checks = tuple(
                _check(
                    model,
                    devices,
                    budget,
                    memory,
                    max_num_seqs=max_num_seqs,
                    context=context,
                    block_size=block_size,
                    dtype=dtype,
                    kv_dtype=kv_dtype,
                    quantize=quantize,
                    in_blocks=in_blocks,
                    kept=dict(choice.kept),
                )
                for budget in budgets
            )
            if shown is not None:
                checks = (*checks, _check_tower(shown, devices, dtype))
        except NoCompiler as error:
            not_compiled = str(error)
        known = [check.temporaries for check in checks if check.temporaries is not None]
        if known and len(known) == len(checks):
            memory = dataclasses.replace(memory, temporaries=max(known))

    sequences = groups.sequences(memory.num_blocks, context)
    token_bytes = footprint.token_bytes(
        model, devices.device.platform, kv_dtype=jnp.dtype(kv_dtype), num_devices=devices.num_devices
    )
    steps = tuple(
        estimate.planned_step(
            model,
            devices,
            tokens=budget,
            sequences=min(budget, max_num_seqs, sequences),
            context=context,
            itemsize=itemsize,
            quantize=quantize,
            kept=kept,
            token_bytes=token_bytes / devices.num_devices,
            windows=groups.windows,
        )
        for budget in budgets
        if sequences
    )
    return Plan(
        topology=topology,
        num_devices=devices.num_devices,
        num_params=count_params(model),
        context=context,
        block_size=block_size,
        windows=groups.windows,
        dtype=dtype,
        quantize=quantize,
        stored_as=stored_as,
        keeps=bool(choice.kept),
        kept=kept_forms.described(choice, model, dtype, quantize),
        kv_dtype=kv_dtype,
        max_num_seqs=max_num_seqs,
        memory=memory,
        vision=vision,
        sequences=sequences,
        steps=steps,
        checks=checks,
        largest_budget=estimate.largest_budget(
            model, devices, memory, max_num_seqs=max_num_seqs, itemsize=itemsize, groups=groups, context=context
        ),
        advice=_advice(
            model,
            devices,
            memory,
            context=context,
            groups=groups,
            itemsize=itemsize,
            quantize=quantize,
            kept=kept,
            max_num_seqs=max_num_seqs,
            sequences=sequences,
        ),
        not_compiled=not_compiled,
    )


def _has_blocks(quantization: JsonObject | None) -> bool:
    """Whether weights of 8-bit floats have a scale for every 128 inputs."""
    block = (quantization or {}).get("weight_block_size")  # rows and columns of the stored matrix [out, in]
    return isinstance(block, list) and block[-1:] == [FLOAT8_BLOCK]


def _check(
    model: ModelConfig,
    topology: Topology,
    budget: int,
    memory: Memory,
    *,
    max_num_seqs: int,
    context: int,
    block_size: int,
    dtype: str,
    kv_dtype: str,
    quantize: str | None,
    in_blocks: bool,
    kept: Mapping[str, kept_forms.Form],
) -> CompileCheck:
    from fastgen_jax.plan.program import DoesNotCompile, compile_step, deviceless_mesh

    try:
        program = compile_step(
            model,
            deviceless_mesh(topology),
            token_budget=budget,
            max_num_seqs=max_num_seqs,
            max_context_len=context,
            block_size=block_size,
            num_blocks=memory.num_blocks,
            dtype=jnp.dtype(dtype),
            kv_dtype=jnp.dtype(kv_dtype),
            quantize=quantize,
            in_blocks=in_blocks,
            kept=kept,
        )
    except DoesNotCompile as error:
        return CompileCheck(token_budget=budget, seconds=None, temporaries=None, problem=str(error))
    problem = "" if program.aliased >= program.cache else "the KV cache is copied"
    return CompileCheck(token_budget=budget, seconds=program.seconds, temporaries=program.temporaries, problem=problem)


def _check_tower(images: ImagesConfig, topology: Topology, dtype: str) -> CompileCheck:
    from fastgen_jax.plan.program import DoesNotCompile, deviceless_mesh

    try:
        program = tower.compile_tower(images, deviceless_mesh(topology), dtype=jnp.dtype(dtype))
    except DoesNotCompile as error:
        return CompileCheck(
            image_tokens=images.most_tokens, token_budget=0, seconds=None, temporaries=None, problem=str(error)
        )
    return CompileCheck(
        image_tokens=images.most_tokens,
        token_budget=0,
        seconds=program.seconds,
        temporaries=program.temporaries,
        problem="weights are copied" if program.copies else "",
    )


def _advice(
    model: ModelConfig,
    topology: Topology,
    memory: Memory,
    *,
    context: int,
    groups: BlockGroups,
    itemsize: int,
    quantize: str | None,
    kept: tuple[tuple[str, float], ...],
    max_num_seqs: int,
    sequences: int,
) -> tuple[str, ...]:
    """What to change if fewer than `max_num_seqs` sequences of the full context fit."""
    if sequences >= max_num_seqs:
        return ()
    advice = []
    kind = topology.device
    left = groups.capacity(memory.num_blocks, context)
    cache = groups.blocks_needed(context) * memory.block
    if sequences < 1:
        if left:
            advice.append(f"a context of at most {left} tokens: --context {left}")
        sizes = [n for n in (2, 4, 8, 16, 32, 64, 128, 256) if topology.num_devices < n <= model.num_heads]
        for n in sizes:
            weights = footprint.weight_bytes(model, n, itemsize, quantize=quantize, kept=kept, platform=kind.platform)
            if (
                weights + cache * topology.num_devices // n + memory.state + memory.temporaries + memory.reserved
                <= kind.memory_bytes
            ):
                advice.append(f"{n} devices of {kind.kind} instead of {topology.num_devices}")
                break
        if quantize is None:
            int8 = footprint.weight_bytes(
                model, topology.num_devices, itemsize, quantize="int8", kept=kept, platform=kind.platform
            )
            if int8 + cache + memory.state + memory.temporaries + memory.reserved <= kind.memory_bytes:
                advice.append("8-bit weights: --quantize int8")
        larger = [d for d in DEVICES.values() if d.memory_bytes > kind.memory_bytes]
        fitting = [
            d.kind
            for d in larger
            if memory.weights + memory.state + memory.temporaries < d.memory_bytes * (1 - estimate.RESERVED_SHARE)
        ]
        if fitting:
            advice.append(f"the same number of devices with more memory: {', '.join(fitting)}")
    else:
        advice.append(
            f"{sequences} sequences of the full context fit, fewer than max_num_seqs={max_num_seqs}; shorter ones share "
            f"{left} tokens of KV, and requests that do not fit wait"
        )
    return tuple(advice)


def _of_groups(windows: tuple[int | None, ...]) -> str:
    """What the cache groups keep, if not all of them keep all tokens."""
    kept = Counter(windows)
    names = ["all tokens" if window is None else f"the last {window}" for window in kept]
    if kept.total() == kept[None]:
        return ""
    return "; groups of layers: " + ", ".join(f"{n} for {name}" for n, name in zip(kept.values(), names, strict=True))


def table(plan: Plan) -> str:
    """The plan as text for a terminal."""
    memory = plan.memory

    def gib(size: int) -> str:
        return f"{size / GIB:9.2f} GiB"

    kept = f"{plan.quantize} matrices, the rest {plan.dtype}" if plan.quantize else plan.dtype
    lines = [
        f"{plan.topology}: {plan.num_devices} devices, {plan.num_params:,} parameters, contexts of {plan.context} tokens",
        "",
        "memory per device",
        f"  total         {gib(memory.total)}",
        f"  reserved      {gib(memory.reserved)}   runtime and programs",
        f"  weights       {gib(memory.weights)}   {kept}"
        + (f"; {plan.vision / GIB:.2f} GiB of it the vision tower" if plan.vision else "")
        + (
            f"; on disk {plan.stored_as}, {'partly kept' if plan.keeps else 'dequantized while loading'}"
            if plan.stored_as
            else ""
        ),
        *([f"                               {plan.kept}"] if plan.kept else []),
        f"  states        {gib(memory.state)}   of the sampler and of running sequences",
        f"  temporaries   {gib(memory.temporaries)}   {'as compiled' if plan.checks else 'estimated'}, largest step",
        f"  KV cache      {gib(max(0, memory.free))}   {memory.num_blocks} blocks of {plan.block_size} tokens, "
        f"{plan.kv_dtype}{_of_groups(plan.windows)}",
        "",
        f"concurrent sequences of {plan.context} tokens: {plan.sequences}",
        f"largest token budget that leaves room for one of them: {plan.largest_budget}",
    ]
    if plan.steps:
        lines += [
            "",
            "roofline of a step at the peak rates of the data sheets (real steps are slower)",
            f"  {'budget':>7} {'sequences':>9} {'compute':>10} {'memory':>10} {'links':>10} {'step':>10}  bound    "
            f"{'tokens/s':>9} {'generated/s':>11}",
        ]
        for step in plan.steps:
            times = " ".join(f"{1e3 * x:7.2f} ms" for x in (step.compute, step.memory, step.links, step.seconds))
            lines.append(
                f"  {step.tokens:7} {step.sequences:9} {times}  {step.bound:8} {step.tokens / step.seconds:9,.0f} "
                f"{step.sequences / step.seconds:11,.0f}"
            )
    if plan.checks:
        lines += ["", "compiled with the device's compiler"]
        for check in plan.checks:
            name = f"{check.token_budget:7}" if check.token_budget else "  tower"
            fine = "KV cache updated in place" if check.token_budget else f"an image of {check.image_tokens} tokens"
            if check.seconds is None:
                lines.append(f"  {name} rejected: {check.problem}")
            else:
                lines.append(
                    f"  {name} {check.seconds:6.1f} s, temporaries {(check.temporaries or 0) / 2**20:.0f} MiB, "
                    f"{check.problem or fine}"
                )
    if plan.not_compiled:
        lines += ["", f"not compiled: {plan.not_compiled}"]
    lines += ["", "it fits" if plan.fits else "it does not fit", *(f"  try {line}" for line in plan.advice)]
    return "\n".join(lines)
