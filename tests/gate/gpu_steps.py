"""Compiles whole steps and vision towers for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tests.gate.gpu_kernels import (
    MIB,
    SPILLED_BYTES,
    SPILLED_BYTES_WHERE_TIGHT,
    Kernel,
    assembler_reports,
    kernel_complaint,
    memory_complaint,
)
from tests.gate.models import LLAMA_3_8B
from tests.gate.stored import forms_of

if TYPE_CHECKING:
    from fastgen_jax.engine.sampling.sampler import Work

STEP_TEMPORARIES = 768 * MIB  # activations of 512 tokens and their logits
TOWER_TEMPORARIES = 1024 * MIB  # of 25,600 patches
# Of kernels in a layer of a Llama, which has four products, two norms and four kernels of attention.
LAUNCHES_PER_LAYER = 14
LAUNCHES_PER_LAYER_IN_INT8 = 16  # parts of products are added up, as in int4
LAUNCHES_ON_SEVERAL = 20  # with two sums over devices
LAUNCHES_IN_ORDER = 22  # each of them two collectives and the additions
LAUNCHES_IN_ORDER_WITH_EXPERTS = 46
LAUNCHES_PER_LAYER_IN_FP8 = 20  # rows are rounded before each product
LAUNCHES_PER_LAYER_WITH_EXPERTS = 43
LAUNCHES_WITHOUT_A_KERNEL = 44  # outside of the loops of portable attention
LAUNCHES_IN_HALVES = 46  # the same, with rows that become two halves before each product, and one result after it
LAUNCHES_WITH_A_STATE = {
    "Granite-4.0-H-Micro": 190,
    "Qwen3-Next, 8 layers": 193,
    "Granite-4.0-H-Tiny": 420,
    "Granite-4.0-H-Tiny, int8": 440,
    "LFM2-1.2B": 43,
    "Nemotron-3-Nano, 20 layers": 143,
}
"""In a period of layers, outside of the loops over pieces."""
LAUNCHES_OF_LATENTS_IN_FP8 = 74  # DeepSeek V3
LAUNCHES_OF_SPARSE_ATTENTION = 88  # outside of its loops
LAUNCHES_WITH_WIDE_HEADS = {"DeepSeek-V3, 5 layers": 70, "Gemma-4-31B": 160}
"""In the layer with the most of DeepSeek V3, one with experts; in a period of six layers of Gemma 4."""


def family_config(hf: dict[str, Any]) -> Any:
    """The model's config, imported here because the environment must be set before JAX is."""
    from fastgen_jax.models.families import family_of

    return family_of(hf["architectures"][0]).config_from_hf(hf)


def check_step(
    hf: dict[str, Any],
    mesh: Any,
    *,
    tokens: int = 512,
    num_blocks: int = 4096,
    work: str = "any",
    dtype: str = "bfloat16",
    quantize: str | None = None,
    in_blocks: bool = False,
    stored: dict[str, Any] | None = None,
    launches: int = LAUNCHES_PER_LAYER,
    has_kernel: bool = True,
    images: Any = None,
    cuda_graphs: bool = True,
    facts: list[str],
) -> tuple[int, list[Kernel], str]:
    """The whole step: the kernel must have been chosen, the cache updated in place, every weight read where it is, and
    everything must be one CUDA graph, so that the host waits for nothing. Weights are those of a
    checkpoint with the settings `stored`.
    """
    from fastgen_jax.plan.program import compile_step
    from fastgen_jax.plan.tower import step_images

    model, kernels = family_config(hf), list[Kernel]()
    with assembler_reports(kernels):
        program = compile_step(
            model,
            mesh,
            token_budget=tokens,
            max_num_seqs=64,
            max_context_len=8192,
            block_size=32,
            num_blocks=num_blocks,
            dtype=dtype,
            quantize=quantize,
            in_blocks=in_blocks,
            kept=forms_of(stored, model, mesh),
            work=work,  # pyright: ignore[reportArgumentType]
            cuda_graphs=cuda_graphs,
            images=None if images is None else step_images(images, tokens, mesh, dtype),
            has_grids=images is not None and images.in_grid,
        )
    copied = sum(copy.bytes * copy.times for copy in program.copies)
    inside = f" and {program.inner_operations} in loops" if program.inner_operations else ""
    facts.append(
        f"{program.operations} nodes{inside}, {program.started} started, {program.waits} waits, "
        f"{copied / MIB:.0f} MiB of weights copied"
    )
    words = memory_complaint(program.compiled.memory_analysis(), program.cache, STEP_TEMPORARIES)
    if not words and has_kernel and "ragged_attention_chunks" not in program.compiled.as_text():
        words = "the GPU kernel was not chosen"
    tight = model.head_dim > 128
    spilled, head_dim = SPILLED_BYTES_WHERE_TIGHT if tight else SPILLED_BYTES, model.cache_head_dim if has_kernel else 0
    words = words or kernel_complaint(kernels, spilled, mesh, head_dim=head_dim)
    if not words and copied:
        words = f"weights are copied: {program.copies[0].name} writes {program.copies[0].bytes / MIB:.0f} MiB"
    if not words and program.operations > launches:
        words = f"each layer launches {program.operations} kernels, more than {launches}"
    if not words and program.started is not None and program.started > 1:
        words = f"no CUDA graph: the host starts {program.started} things and waits for {program.waits} values"
    return program.temporaries, kernels, words


def check_same_layers(
    hf: dict[str, Any],
    mesh: Any,
    *,
    other_tokens: int | None = None,
    works: Sequence[Work] = ("greedy", "sampled", "any"),
    quantize: str | None = None,
    launches: int | None = None,
    facts: list[str] | None = None,
) -> tuple[int, list[Kernel], str]:
    """With `deterministic`, which of its programs runs a step must not change how a layer is computed, no sum over devices
    may have an order that a library chooses, and no weight may be copied.

    `other_tokens` is the size of the program for all `works`, to test the gate itself; `launches` is the most that a layer
    may have.
    """
    from fastgen_jax.plan.hlo import layer_instructions, sums_of_floats
    from fastgen_jax.plan.program import compile_step

    layers: list[list[str]] = []
    for work in works:
        program = compile_step(
            family_config(hf),
            mesh,
            token_budget=(other_tokens or 256) if work == "any" else 256,
            max_num_seqs=64,
            max_context_len=8192,
            block_size=32,
            num_blocks=2048,
            quantize=quantize,
            work=work,
            deterministic=True,
        )
        text = program.compiled.as_text() or ""
        if facts is not None:
            facts.append(
                f"{work}: {program.operations} nodes, {program.collectives} collectives, {program.started} started, "
                f"{program.waits} waits"
            )
        if sums := sums_of_floats(text):
            return program.temporaries, [], f"sums over devices in an order that is not ours: {sums[0][:200]}"
        if program.copies:
            return program.temporaries, [], f"weights are copied: {program.copies[0].name}"
        if launches is not None and program.operations > launches:
            return program.temporaries, [], f"each layer launches {program.operations} kernels, more than {launches}"
        layers.append(layer_instructions(text))
        if layers[-1] != layers[0]:
            return (
                program.temporaries,
                [],
                f"the program for {work} steps computes layers in another way",
            )
    return program.temporaries, [], ""


def check_sums(mesh: Any) -> tuple[int, list[Kernel], str]:
    """Tests the gate itself: without `deterministic` a library orders the two sums of a layer."""
    from fastgen_jax.plan.hlo import sums_of_floats
    from fastgen_jax.plan.program import compile_step

    program = compile_step(
        family_config(LLAMA_3_8B),
        mesh,
        token_budget=256,
        max_num_seqs=64,
        max_context_len=8192,
        block_size=32,
        num_blocks=2048,
        work="greedy",
    )
    sums = sums_of_floats(program.compiled.as_text() or "")
    return program.temporaries, [], "" if len(sums) == 2 else f"{len(sums)} sums over devices were found instead of 2"


def check_other_layers(mesh: Any) -> tuple[int, list[Kernel], str]:
    """Tests the gate itself: layers for another number of rows are others."""
    *rest, words = check_same_layers(LLAMA_3_8B, mesh, other_tokens=128)
    return *rest, "" if "in another way" in words else "other layers went unnoticed"


def check_tower(images: Any, mesh: Any, *, facts: list[str]) -> tuple[int, list[Kernel], str]:
    """A vision tower for its largest image: no weight is copied, and the host waits for nothing."""
    from fastgen_jax.plan.tower import compile_tower

    program = compile_tower(images, mesh)
    copied = sum(copy.bytes * copy.times for copy in program.copies)
    facts.append(f"{program.operations} launches, {program.waits} waits, {copied / MIB:.0f} MiB of weights copied")
    words = ""
    if program.temporaries > TOWER_TEMPORARIES:
        words = f"temporaries of {program.temporaries / MIB:.0f} MiB exceed the bound of {TOWER_TEMPORARIES / MIB:.0f} MiB"
    if not words and copied:
        words = f"weights are copied: {program.copies[0].name} writes {program.copies[0].bytes / MIB:.0f} MiB"
    return program.temporaries, [], words or ("the host waits" if program.waits else "")


def check_copies(mesh: Any) -> tuple[int, list[Kernel], str]:
    """Tests the gate itself: XLA's Triton products copy the weights of each layer, which must be reported."""
    from fastgen_jax.engine import xla_options

    kept, xla_options._GPU_PRODUCTS = xla_options._GPU_PRODUCTS, {}
    try:
        *rest, words = check_step(LLAMA_3_8B, mesh, facts=[])
    finally:
        xla_options._GPU_PRODUCTS = kept
    return *rest, "" if "weights are copied" in words else f"copies of weights went unnoticed ({words!r})"


def check_graphs(mesh: Any) -> tuple[int, list[Kernel], str]:
    """Tests the gate itself: kernels that the host starts one by one, and its waits for a sampler's branches."""
    *rest, words = check_step(LLAMA_3_8B, mesh, cuda_graphs=False, facts=[])
    noticed = "no CUDA graph" in words and "waits for 0" not in words
    return *rest, "" if noticed else f"kernels that are started one by one went unnoticed ({words!r})"
