"""What the TPU gate must notice: programs with the faults that it looks for."""

from __future__ import annotations

from typing import Any


def check_copies_are_found(mesh: Any) -> tuple[int, str]:
    """Tests the gate itself: experts whose width is not filled up are copied, and the copy must be found."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from fastgen_jax.plan import hlo
    from fastgen_jax.plan.program import compile_lowered, lowering_for, matrix_shapes
    from pallas_kernels.grouped_matmul.tpu import grouped_matmul_tpu

    whole = NamedSharding(mesh, PartitionSpec())
    stack = jax.ShapeDtypeStruct((2 * 32, 2880, 720), jnp.bfloat16, sharding=whole)  # two layers
    x = jax.ShapeDtypeStruct((512, 2880), jnp.bfloat16, sharding=whole)
    sizes = jax.ShapeDtypeStruct((32,), jnp.int32, sharding=whole)

    def layers(x: Any, stack: Any, sizes: Any) -> Any:
        def layer(n: Any, x: Any) -> Any:
            return x.at[:, :720].add(grouped_matmul_tpu(x, stack, sizes, n * 32).astype(x.dtype))

        return jax.lax.fori_loop(0, 2, layer, x)

    with lowering_for(mesh):
        compiled = compile_lowered(jax.jit(layers).lower(x, stack, sizes))
    copies = hlo.copied_weights(compiled.as_text() or "", matrix_shapes({"stack": stack}, 512))
    return (
        compiled.memory_analysis().temp_size_in_bytes,
        "" if copies else "a stack of experts in another layout was accepted",
    )


def check_operands_are_found(mesh: Any) -> tuple[int, str]:
    """Tests the gate itself: products with int8 weights are those of bfloat16, unless rows are rounded, too."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from fastgen_jax.plan import hlo
    from fastgen_jax.plan.program import compile_lowered, lowering_for
    from pallas_kernels.matmul import Int8Weight, linear

    whole = NamedSharding(mesh, PartitionSpec())
    values = jax.ShapeDtypeStruct((4, 1024, 1024), jnp.int8, sharding=whole)
    scales = jax.ShapeDtypeStruct((4, 1024), jnp.float32, sharding=whole)
    x = jax.ShapeDtypeStruct((64, 1024), jnp.bfloat16, sharding=whole)

    def layers(x: Any, w: Int8Weight) -> Any:
        return jax.lax.scan(lambda x, w: (linear(x, w), None), x, w)[0]

    found = []
    for rounds_rows in (False, True):
        w = Int8Weight(values=values, scales=scales, rounds_rows=rounds_rows)  # pyright: ignore[reportArgumentType] (shapes)
        with lowering_for(mesh):
            compiled = compile_lowered(jax.jit(layers).lower(x, w))
        found.append(hlo.layer_products(compiled.as_text() or ""))
    only, both = found
    is_told_apart = len(only) == 1 and "s8" not in only[0][:1] and both == [("s8", "s8")]
    return compiled.memory_analysis().temp_size_in_bytes, "" if is_told_apart else f"{only} and {both}"


def check_layouts_are_found(mesh: Any) -> tuple[int, str]:
    """Tests the gate itself: rows that are cut into pieces get another layout, those that are reduced as they are do not."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from fastgen_jax.plan import hlo
    from fastgen_jax.plan.program import compile_lowered

    logits = jax.ShapeDtypeStruct((64, 128_256), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    in_pieces = jax.jit(lambda x: x.reshape(64, -1, 128).max(axis=2).argmax(axis=1))
    found = []
    for program in (in_pieces, jax.jit(lambda x: x.max(axis=1))):
        compiled = compile_lowered(program.lower(logits))
        found.append(hlo.relaid_rows(compiled.as_text() or "", *logits.shape))
    noticed = found[0] and not found[1]
    return compiled.memory_analysis().temp_size_in_bytes, "" if noticed else f"found {found[0]}, and {found[1]}"
