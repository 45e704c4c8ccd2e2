"""Options of XLA by kind of device, each with its reason."""

from __future__ import annotations

from typing import Any

from pallas_kernels.jax_versions import AMPERE_PRODUCT, COMMAND_BUFFERS, HOPPER_PRODUCT, too_old

Options = dict[str, bool | str]

# By the kind of a device, for all programs.
_OF_KIND: dict[str, Options] = {
    # The compiler prefers tiles of 16 x 128 16-bit numbers to the 8 x 128 in which arrays arrive, and would copy every stack
    # of weights in every step; the products take the same time with either.
    "TPU7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": False},
    # It would compute each sum over the vocabulary as a tree of four kernels, after one that writes all summands to memory:
    # sampling would take up to twice the time, and its compilation a third more.
    "cpu": {"xla_disable_hlo_passes": "tree_reduction_rewriter"},
}
# XLA lets programs have 80 % of a GPU's memory. Where weights and cache take more, as an engine's may, it would compute in
# every layer whatever is needed twice a second time, to no avail: 62 kernels of a layer of gpt-oss-20b instead of 41, among
# them sorts and a gather of the experts' rows.
_REMATERIALIZATION = "rematerialization"
# For programs with weights on a GPU, where kernels of ours or of cuBLAS multiply them.
_GPU_PRODUCTS: Options = {
    # XLA's Triton products copy a layer's weights out of the stack before they read them, three times the traffic. It can
    # wrap those of cuBLAS so that they read the stack in place; but cuBLAS does not convert 8-bit weights, which would be
    # written to memory as 16 bits and read again.
    "xla_gpu_enable_triton_gemm": False,
    # Where sizes are no multiples of 8, such as those of a vocabulary of 49,155, XLA would copy both operands into padded
    # ones.
    "xla_disable_hlo_passes": f"cublas-pad-for-gemms,{_REMATERIALIZATION}",
}
# Also where XLA multiplies.
_GPU_WEIGHTS: Options = {"xla_disable_hlo_passes": _REMATERIALIZATION}
# One CUDA graph for a whole step: the host starts one thing and not 13 in every layer, and waits for no branch and for no
# loop whose length is data, since these are nodes of the graph.
_GPU_GRAPH: Options = {
    # All kinds of operations, also those that are left out by default: loops, branches, sums over devices.
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,COLLECTIVES,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
    ),
    # A product that reads its layer's weights from the stack has another address in each turn of the loop over layers, so
    # the loop can only be part of a graph as its turns, one after another. (By default the body of the loop is a graph of
    # its own, whose addresses the host changes before each turn.)
    "xla_gpu_command_buffer_unroll_loops": True,
}
_NO_GRAPHS: Options = {"xla_gpu_enable_command_buffer": ""}
# Timing chooses among kernels of the same product, which round differently: not the same ones for every start or program.
_GPU_DETERMINISTIC: Options = {"xla_gpu_autotune_level": "0"}


def compiler_options(device: Any) -> Options | None:
    """For all programs on a device."""
    return _OF_KIND.get(device.device_kind)


def product_options(device: Any, *, has_int8_weights: bool = False, deterministic: bool = False) -> Options | None:
    """For programs that multiply with weights."""
    if device.platform != "gpu":
        return compiler_options(device)
    options = _GPU_WEIGHTS if has_int8_weights and not _reads_int8_in_place(device) else _GPU_PRODUCTS
    return {**options, **(_GPU_DETERMINISTIC if deterministic else {})}


def step_options(
    device: Any, *, has_int8_weights: bool = False, deterministic: bool = False, cuda_graphs: bool = True
) -> Options | None:
    """For the programs of steps."""
    options = product_options(device, has_int8_weights=has_int8_weights, deterministic=deterministic)
    if device.platform != "gpu":
        return options
    if too_old(COMMAND_BUFFERS) is None:
        graphs = _GPU_GRAPH if cuda_graphs else _NO_GRAPHS
    else:
        graphs = {}
    return {**(options or {}), **graphs} or None


def _reads_int8_in_place(device: Any) -> bool:
    """Whether `linear` multiplies with int8 weights where they are: see `pallas_kernels.matmul.hopper` and `ampere`."""
    capability = str(getattr(device, "compute_capability", ""))
    needed = {"8": AMPERE_PRODUCT, "9": HOPPER_PRODUCT}.get(capability.partition(".")[0])
    return needed is not None and too_old(needed) is None
