"""Exports weights as a Hugging Face directory: config.json, safetensors, the tokenizer's files.

The declarations that name a family's tensors for loading are read backwards: parts are separated, matrices transposed,
reordered outputs put back. So a directory that was loaded is written with the same names, shapes and bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastgen_jax.checkpoint.base import Checkpoint
from fastgen_jax.checkpoint.convert import tokenizer_files
from fastgen_jax.checkpoint.huggingface import GENERATION_FILE, model_config
from fastgen_jax.checkpoint.load import Weight, assemble, check_tensors, stored_shapes, stored_weights, weights_of
from fastgen_jax.checkpoint.shards import DTYPES, Planned, write_directory
from fastgen_jax.checkpoint.snapshot import check_target
from fastgen_jax.checkpoint.tensor_files import number_type
from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import FAMILIES
from fastgen_jax.models.families.fields import is_multimodal, text_part
from fastgen_jax.models.params import layers_with
from fastgen_jax.models.weight_spec import Leaf, Params, WeightSpec

log = logging.getLogger(__name__)

# Of families whose model_type in transformers is not the name of the family here.
_MODEL_TYPES = {"gemma3": "gemma3_text"}
# The fields of a text model that a multimodal config.json may leave out.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
}
_OF_IMAGES = ("mrope_section", "mrope_interleaved")
# Families whose text model alone would not be the published one, and why.
NOT_EXPORTED = {
    "mllama": "its layers of cross-attention are not loaded, and the others have new numbers",
    "qwen3_vl_moe": "no architecture of transformers is its text model alone",
}


def export_params(
    out: str | Path,
    params: Params,
    like: Checkpoint | JsonFields,
    *,
    dtype: str | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Writes `params` as a Hugging Face directory into the new local directory `out`.

    `params` are plain weights, as `load_params`, `init_params` and a trainer have them, stacked or not, on the host or on
    devices; one layer's weight is copied to the host at a time. `like` is the checkpoint that training began with, whose
    config, generation config and tokenizer files are carried along, or the fields of a config.json alone. `dtype`
    ("float32", "bfloat16", "float16") converts weights; None keeps the dtype of each. Files hold at most `shard_bytes`, by
    default 5 GB.

    ValueError, before anything is written, if a weight is missing, of another shape, quantized or prepared for an engine, or
    if `out` has contents; nothing is left if the disk is full.
    """
    hf = like if isinstance(like, Mapping) else like.config_json
    _check_exportable(hf)
    config = model_config(hf, "config_json")
    rows = _Rows(params, config)
    weights = list(weights_of(config, FAMILIES[config.family].sources(config)))

    def leaf_dtype(weight: Weight) -> str:
        leaf = rows.leaf(weight)
        expected = (
            weight.spec.shape if weight.layer is None or not rows.stacked else (rows.count(weight), *weight.spec.shape)
        )
        if not hasattr(leaf, "dtype") or str(leaf.dtype) not in DTYPES:
            what = str(leaf.dtype) if hasattr(leaf, "dtype") else type(leaf).__name__
            raise ValueError(
                f"the weight {weight.spec.path!r} is {what}, which is quantized or prepared for one engine; export the "
                "floating-point weights: those of the trainer, or of load_params without prepare"
            )
        if tuple(leaf.shape) != expected:
            raise ValueError(
                f"the weight {weight.spec.path!r} has shape {tuple(leaf.shape)}; its config requires {expected}"
            )
        if not getattr(leaf, "is_fully_addressable", True):
            raise ValueError(
                f"the weight {weight.spec.path!r} is spread over several processes; gather it with "
                "jax.experimental.multihost_utils.process_allgather, or write a snapshot, which processes write together"
            )
        return str(leaf.dtype)

    _export(out, weights, leaf_dtype, rows.read, like=like, dtype=dtype, shard_bytes=shard_bytes, progress=False)


def export_checkpoint(
    out: str | Path,
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    progress: bool = False,
) -> None:
    """Writes a checkpoint of any format as a Hugging Face directory into the new local directory `out`.

    Weights are read, converted and written one at a time. With `dtype`, the values of quantized matrices are written;
    without it, they are a ValueError. See `export_params` for the rest.
    """
    check_target(out, source=checkpoint.path)
    _check_exportable(checkpoint.config_json)
    check_tensors(checkpoint)

    def stored_dtype(weight: Weight) -> str:
        found = checkpoint.dtype(weight.names[0])
        if found in DTYPES:
            return found
        if dtype is None:
            raise ValueError(
                f"{checkpoint.path}: the tensor {weight.names[0]!r} is quantized ({checkpoint.quantization or found}), but "
                "safetensors are written in floating point; choose a number format for the values of quantized "
                "weights, such as --dtype bfloat16 (dtype='bfloat16'), or export the model before quantization"
            )
        return "float32"

    def read(weight: Weight) -> np.ndarray:
        array = assemble(checkpoint, weight)
        if isinstance(array, np.ndarray):
            return array
        return array.values.astype(np.float32) * np.expand_dims(array.scales, -2)  # an Int8Weight

    weights = list(stored_weights(checkpoint))
    _export(out, weights, stored_dtype, read, like=checkpoint, dtype=dtype, shard_bytes=shard_bytes, progress=progress)


def _check_exportable(hf: JsonFields) -> None:
    family = model_config(hf, "config_json").family
    if family in NOT_EXPORTED:
        (architecture,) = hf["architectures"]
        raise ValueError(f"{architecture} cannot be exported as a Hugging Face directory: {NOT_EXPORTED[family]}")


def take_apart(weight: Weight, array: np.ndarray) -> Iterator[np.ndarray]:
    """The tensors of a weight in the shape of its spec, in the order of its names: the inverse of `load.assemble`."""
    source, count = weight.source, len(weight.source.names)
    if source.rearrange is not None and source.keeps_values:
        order = source.rearrange(np.arange(weight.spec.shape[-1]))
        array = array[..., np.argsort(order)]
    entries = array if source.stacked else array[None]
    pieces = count // len(entries)
    borders = np.cumsum(weight.spec.parts)[:-1] if pieces > 1 else []
    for entry in entries:
        for piece in np.split(entry, borders, axis=-1):
            piece = piece.swapaxes(-1, -2) if source.transpose else piece
            yield piece.T[:, None] if source.is_conv else piece[None] if source.is_row else piece


def _export(
    out: str | Path,
    weights: Sequence[Weight],
    dtype_of: Callable[[Weight], str],
    read: Callable[[Weight], np.ndarray],
    *,
    like: Checkpoint | JsonFields,
    dtype: str | None,
    shard_bytes: int | None,
    progress: bool,
) -> None:
    from fastgen_jax.core.progress import shown

    if "://" in str(out):
        raise ValueError(f"{out}: safetensors are written to a local disk; choose a local directory, and copy it from there")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}, or None to keep that of each weight")
    check_target(out)
    hf = like if isinstance(like, Mapping) else like.config_json
    config = model_config(hf, "config_json")
    sources = FAMILIES[config.family].sources(config)
    published = [replace(weight, source=sources[weight.spec.path], omitted="") for weight in weights]
    dtypes = [_written_dtype(weight.spec, dtype_of(weight), dtype) for weight in weights]
    tensors = [
        Planned(name, number, shape)
        for weight, number in zip(published, dtypes, strict=True)
        for name, shape in [
            *zip(weight.names, stored_shapes(weight), strict=True),
            *((name, ()) for name, _ in weight.constants),
        ]
    ]
    embed = next(number for weight, number in zip(published, dtypes, strict=True) if weight.spec.name == "embed")
    generation = {} if isinstance(like, Mapping) else like.generation_config
    texts = {**({GENERATION_FILE: generation} if generation else {}), "config.json": published_config(hf, embed)}
    files = {} if isinstance(like, Mapping) else _tokenizer_files(like)
    with shown(log, "writing weights", total=len(weights), unit="weight", bar=progress) as advance:

        def arrays() -> Iterator[np.ndarray]:
            for weight, target, number in zip(weights, published, dtypes, strict=True):
                array = read(weight).astype(number_type(number), copy=False)
                yield from take_apart(target, array)
                yield from (np.array(value, number_type(number)) for _, value in target.constants)
                advance()

        sizes = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
        write_directory(Path(out), tensors, arrays(), texts=texts, files=files, **sizes)


def _written_dtype(spec: WeightSpec, stored: str, wanted: str | None) -> str:
    return stored if wanted is None or spec.dtype == "float32" else wanted


def published_config(hf: JsonFields, dtype: str) -> JsonObject:
    """The fields of a config.json for weights in `dtype`, of the text model alone, without what is not exported.

    Layers for multi-token prediction and parts for images are not loaded, so the config must not announce them.
    """
    config = model_config(hf, "config_json")
    name = config.family
    fields = dict(hf)
    if is_multimodal(hf):
        fields = text_part(hf) | {"architectures": [FAMILIES[name].ARCHITECTURES[0]]}
        fields = {field: getattr(config, size) for field, size in _SIZES.items()} | fields
        if fields.get("model_type") not in (name, f"{name}_text"):
            fields["model_type"] = _MODEL_TYPES.get(name, name)
        for name_of_rope in ("rope_scaling", "rope_parameters"):
            rope = fields.get(name_of_rope)
            if isinstance(rope, dict):
                fields[name_of_rope] = _without_images(rope)
    fields.setdefault("model_type", _MODEL_TYPES.get(name, name))
    ends = fields.get("eos_token_id")
    if isinstance(ends, list | tuple) and len(ends) < 2:  # there, one id is a number
        fields["eos_token_id"] = ends[0] if ends else None
    if fields.get("num_nextn_predict_layers"):
        fields["num_nextn_predict_layers"] = 0
    fields.pop("quantization_config", None)
    fields["dtype" if "dtype" in fields else "torch_dtype"] = dtype
    return fields


def _without_images(rope: JsonFields) -> JsonObject:
    kept = {name: value for name, value in rope.items() if name not in _OF_IMAGES}
    return {name: "default" if value == "mrope" else value for name, value in kept.items()}


def _tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files of its tokenizer, if it has one, without the configs, which are written anew."""
    try:
        source = checkpoint.tokenizer_source
    except ValueError:  # a snapshot without a tokenizer
        return {}
    found = tokenizer_files(source)
    return {name: content for name, content in found.items() if name not in ("config.json", GENERATION_FILE)}


class _Rows:
    """The weights of a `Params` as host arrays, one by one."""

    def __init__(self, params: Params, config: ModelConfig) -> None:
        self._params = params
        self._having = layers_with(config)
        self.stacked = isinstance(params["layers"], Mapping)
        """Whether the layers of a weight are one array."""

    def leaf(self, weight: Weight) -> Leaf:
        """The array of a weight, or of all its layers; ValueError if there is none."""
        tree = self._params
        if weight.layer is not None:
            tree = tree["layers"] if self.stacked else tree["layers"][weight.layer]
        if weight.spec.name not in tree:
            where = "" if weight.layer is None else f" of layer {weight.layer}"
            raise ValueError(f"params lacks the weight {weight.spec.name!r}{where}, which the config requires")
        return tree[weight.spec.name]

    def count(self, weight: Weight) -> int:
        """The number of layers that have this weight."""
        return len(self._having[weight.spec.name])

    def read(self, weight: Weight) -> np.ndarray:
        """The weight (of one layer) on the host."""
        leaf = self.leaf(weight)
        if weight.layer is not None and self.stacked:
            row = self._having[weight.spec.name].index(weight.layer)
            # An array of a CPU is read where it is; of others, only the row is copied.
            on_host = isinstance(leaf, np.ndarray) or [device.platform for device in leaf.devices()] == ["cpu"]
            leaf = np.asarray(leaf)[row] if on_host else leaf[row]
        return np.asarray(leaf)
