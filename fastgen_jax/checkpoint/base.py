"""The interface to a checkpoint of any format."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from fastgen_jax.checkpoint.block_kind import BlockKind
from fastgen_jax.checkpoint.gguf_file import GGUFFile
from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families.common import Source

if TYPE_CHECKING:
    from pallas_kernels.matmul import BlockWeight

# Saved by transformers, in any number format: rotary frequencies and causal masks (old versions), constants of xIELU.
_BUFFER = re.compile(r".*\.(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|act_fn\.(beta|eps))")


class Checkpoint(Protocol):
    """A model on disk, under the tensor names of Hugging Face. Tensor data is only read by `read`."""

    @property
    def path(self) -> Path:
        """The directory or file."""
        ...

    @property
    def config(self) -> ModelConfig:
        """The architecture of the model."""
        ...

    @property
    def config_json(self) -> JsonFields:
        """The same in the fields of a Hugging Face config.json."""
        ...

    @property
    def generation_config(self) -> JsonFields:
        """The fields of its generation_config.json, or their equivalents in a GGUF file; empty if there are none."""
        ...

    @property
    def quantization(self) -> str:
        """The method and the settings with which the checkpoint says that it is quantized; empty if it does not."""
        ...

    @property
    def tensor_names(self) -> frozenset[str]:
        """All tensors, by their Hugging Face names."""
        ...

    @property
    def sources(self) -> Mapping[str, Source]:
        """The tensors of each weight of `param_specs`."""
        ...

    @property
    def tokenizer_source(self) -> Path | GGUFFile:
        """What `fastgen_jax.text.load_tokenizer` reads."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        ...

    def dtype(self, name: str) -> str:
        """How a tensor is stored: "float32", "bfloat16", "float16", "int8", or a type of GGUF such as "Q4_K"."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor: float32, float16 or bfloat16; a quantized one is returned as float32. Matrices are [out, in]."""
        ...


@runtime_checkable
class HoldsBlocks(Protocol):
    """A checkpoint some of whose quantized matrices the native CPU kernels multiply as they are stored."""

    def block_kind(self, name: str) -> BlockKind | None:
        """How `read_blocks` stores the matrix, or each matrix, of a tensor; None if it cannot read it."""
        ...

    def read_blocks(self, name: str, entry: int | None = None) -> BlockWeight:
        """A quantized matrix [in, out] in the bits of the file; `read` returns its values, in the layout of the model.

        Of a tensor with a matrix for each expert, it is that of number `entry`.
        """
        ...


def missing_tensor(name: str, path: Path, names: Iterable[str]) -> ValueError:
    """The error for a tensor that a checkpoint lacks; it names the nearest existing one."""
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    hint = f"; the nearest name is {nearest[0]!r}" if nearest else "; it holds no tensors"
    return ValueError(f"{path} has no tensor {name!r}{hint}")


def is_buffer(name: str) -> bool:
    """Whether a tensor is no weight, but was computed from the config."""
    return _BUFFER.fullmatch(name) is not None
