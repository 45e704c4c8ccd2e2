"""The arrays of an Orbax checkpoint, read with TensorStore, which Orbax uses to write them.

Orbax's restore reopens the checkpoint in each call, which takes longer than reading a layer. Here it is opened once; after
that the cost of an array is that of reading its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen_jax.models.weight_spec import DType, Leaf
from pallas_kernels.aligned import aligned_empty

if TYPE_CHECKING:
    from jax.sharding import Sharding
    from tensorstore import TensorStore

_DRIVERS = {"/.zarray": "zarr", "/zarr.json": "zarr3"}  # by the last part of the key of the metadata that every array has
_CONTEXT = {
    "cache_pool": {"total_bytes_limit": 0},  # every array is read once
    "file_io_mode": {"mode": "memmap"},  # local files are copied once, into the array
}


def open_arrays(folder: str) -> Mapping[str, TensorStore]:
    """Every array of a checkpoint by its name, as an open `tensorstore.TensorStore`; no values are read.

    `folder` is an absolute path, or a URL that TensorStore supports, such as gs://. ValueError if there are no arrays.
    """
    import tensorstore

    context = tensorstore.Context(_CONTEXT)
    base = folder if "://" in folder else {"driver": "file", "path": f"{folder}/"}
    # Snapshots are always OCDBT; other programs may store one folder for each array.
    is_ocdbt = "://" in folder or Path(folder, "manifest.ocdbt").exists()
    store: Any = {"driver": "ocdbt", "base": base} if is_ocdbt else base
    keys = (key.decode() for key in tensorstore.KvStore.open(store, context=context).result().list().result())
    drivers = {
        key.removesuffix(end): driver for key in sorted(keys) for end, driver in _DRIVERS.items() if key.endswith(end)
    }
    if not drivers:
        raise ValueError("it holds no arrays")
    opened = {
        name: tensorstore.open(
            {"driver": driver, "kvstore": {**store, "path": f"{store.get('path', '')}{name}/"}},
            context=context,
            open=True,
            read=True,
        )
        for name, driver in drivers.items()
    }
    return {name: array.result() for name, array in opened.items()}


def read_array(array: TensorStore, *, dtype: DType | None = None, sharding: Sharding | None = None) -> Leaf:
    """An open array's values in `dtype` (None: as stored), on the host or, with a `sharding`, on its devices.

    Each device reads its own part. A part that several devices need is read once.
    """
    if sharding is None:
        return _part(array, dtype)
    import jax

    parts: dict[tuple[tuple[int | None, int | None], ...], np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        bounds = tuple((axis.start, axis.stop) for axis in index)
        if bounds not in parts:
            parts[bounds] = _part(array[index], dtype)
        return parts[bounds]

    return jax.make_array_from_callback(tuple(array.shape), sharding, part)


def place_array(values: np.ndarray, sharding: Sharding) -> Leaf:
    """An array of the host on the devices of a sharding."""
    import jax

    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _part(array: TensorStore, dtype: DType | None) -> np.ndarray:
    import jax.numpy as jnp
    import tensorstore

    values = aligned_empty(tuple(array.shape), array.dtype.numpy_dtype)
    # A slice of a TensorStore keeps the coordinates of the whole array.
    target = tensorstore.array(values, copy=False)[tensorstore.d[:].translate_to[array.domain.origin]]
    target.write(array).result()
    return values if dtype is None else values.astype(jnp.dtype(dtype), copy=False)
