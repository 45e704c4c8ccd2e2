"""Loads argv[1] on one mesh of eight devices, saves it as the snapshot argv[2] and reads that on others.

Prints "same on every mesh" at the end. The number of devices is fixed when JAX starts.
"""

from __future__ import annotations

import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastgen_jax.checkpoint import load_params, open_checkpoint, save_snapshot

source, out = sys.argv[1:]


def sharding(rows: int, columns: int):
    mesh = Mesh(np.array(jax.devices()).reshape(rows, columns), ("x", "y"))
    return lambda spec: NamedSharding(mesh, PartitionSpec("x", "y") if len(spec.shape) == 2 else PartitionSpec("y"))


def load(path: str, where, stack: bool):
    return load_params(open_checkpoint(path), dtype="float32", stack_layers=stack, sharding=where)


assert jax.device_count() == 8
first = load(source, sharding(4, 2), True)
assert first["layers"]["qkv"].sharding.spec == PartitionSpec(None, "x", "y"), first["layers"]["qkv"].sharding
save_snapshot(out, first, open_checkpoint(source).config_json, tokenizer_files={})
for where, stack in ((sharding(2, 4), True), (sharding(8, 1), False), (None, True)):
    again = load(out, where, stack)
    if not stack:
        names = first["layers"]
        again["layers"] = {name: np.stack([np.asarray(layer[name]) for layer in again["layers"]]) for name in names}
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, first), jax.tree.map(np.asarray, again))
    if where and stack:
        assert {shard.data.shape for shard in again["embed"].addressable_shards} == {(512 // 2, 32 // 4)}
        assert {shard.data.shape for shard in again["layers"]["down"].addressable_shards} == {(2, 64 // 2, 32 // 4)}
print("same on every mesh")
