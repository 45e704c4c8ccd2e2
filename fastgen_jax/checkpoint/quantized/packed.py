"""What the readers of quantized formats have in common: a matrix that several tensors make up, and how they are found."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastgen_jax.checkpoint.block_kind import BlockKind
from fastgen_jax.checkpoint.quantized.numbers import Groups
from fastgen_jax.checkpoint.tensor_files import StoredTensor
from fastgen_jax.json_types import JsonFields

if TYPE_CHECKING:
    from pallas_kernels.matmul import BlockWeight

REMEDY = "otherwise pass the original checkpoint (quantize='int8' applies while loading) or a GGUF file"

Parts = Mapping[str, StoredTensor]
"""The tensors of one matrix, by the endings of their names."""


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """One tensor that is stored as several. `dtype` is how it is stored; `map` returns its values."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[StoredTensor | None, ...]  # the arguments of `values`
    values: Callable[..., np.ndarray | Groups]
    of_entry: Callable[..., Groups] | None = None
    """For a stack of matrices: one of them, from this entry of each part."""
    transposed: bool = False
    """Whether a matrix of this shape is [in, out]; that of `values` is [out, in]."""

    def map(self) -> np.ndarray:
        """The values, float32 or bfloat16."""
        found = self.values(*self._parts())
        whole = found.values() if isinstance(found, Groups) else found
        return whole.T if self.transposed else whole

    @functools.cached_property
    def block_kind(self) -> BlockKind | None:
        """How `blocks` stores the matrix, or each matrix; None if it cannot be kept in its bits."""
        found = self._found(None if self.of_entry is None else 0)
        return found.block_kind() if isinstance(found, Groups) else None

    def blocks(self, entry: int | None = None) -> BlockWeight:
        """The matrix [in, out], or that of an entry, in its bits, if it has a `block_kind`."""
        found = self._found(entry)
        assert isinstance(found, Groups), "it has a block_kind"
        return found.blocks()

    def _found(self, entry: int | None) -> np.ndarray | Groups:
        if entry is None:
            return self.values(*self._parts())
        assert self.of_entry is not None, "it is a stack"
        return self.of_entry(*(None if part is None else part[entry] for part in self._parts()))

    def _parts(self) -> list[np.ndarray | None]:
        return [None if part is None else part.map() for part in self.parts]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way to store a matrix: as tensors with the name of its module and one of these endings."""

    needs: tuple[str, ...]
    """The first identifies the format."""
    dtypes: tuple[str, ...]
    """Those of the first tensor; one of another dtype is not in this format."""
    weight: Callable[[str, Parts], PackedTensor]
    """The matrix of the module with this name."""
    may_have: tuple[str, ...] = ()
    becomes: str = ".weight"
    """The ending of the matrix's name in a checkpoint that is not quantized."""


def assemble(
    tensors: Mapping[str, StoredTensor], formats: Sequence[Format], *, unused: tuple[str, ...] = ()
) -> dict[str, StoredTensor | PackedTensor]:
    """The tensors with those of each quantized matrix replaced by one. Names that end in one of `unused` are left out.

    What a module's tensors are decides whether it is quantized, so that exceptions such as `ignore` need not be matched.
    """
    left = {name: tensor for name, tensor in tensors.items() if not (unused and name.endswith(unused))}
    found: dict[str, PackedTensor] = {}
    for form in formats:
        first = form.needs[0]
        for name in [name for name, tensor in left.items() if name.endswith(first) and tensor.dtype in form.dtypes]:
            module = name.removesuffix(first)
            if missing := [module + ending for ending in form.needs if module + ending not in left]:
                raise ValueError(
                    f"there is a tensor {name!r} of {left[name].dtype}, but {missing[0]!r} is absent; download the "
                    "checkpoint again"
                )
            parts = {end: left.pop(module + end) for end in (*form.needs, *form.may_have) if module + end in left}
            found[module + form.becomes] = form.weight(module, parts)
    return {**left, **found}


def only(settings: JsonFields, supported: Mapping[str, tuple[object, ...]]) -> None:
    """Raises ValueError if a field has a value that is not `supported`."""
    for name, values in supported.items():
        if settings.get(name) not in values:
            known = ", ".join(repr(value) for value in values if value is not None)
            raise ValueError(f"quantization_config has {name}={settings.get(name)!r}; supported: {known}; {REMEDY}")


def expect_shape(module: str, ending: str, tensor: StoredTensor, *expected: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor has one of the shapes."""
    if tensor.shape not in expected:
        raise ValueError(
            f"{module + ending!r} has shape {tensor.shape}; the matrix and quantization_config require "
            f"{' or '.join(map(str, expected))}; download the checkpoint again"
        )
