"""LoRA adapters in the folders of PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastgen_jax.checkpoint.huggingface import how_to_replace, read_json, text_name
from fastgen_jax.checkpoint.tensor_files import StoredTensor, read_safetensors
from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import FAMILIES
from fastgen_jax.models.params import layers_with
from fastgen_jax.models.targets import Lora, adaptable

if TYPE_CHECKING:
    from fastgen_jax.models.families.common import Source
    from fastgen_jax.models.weight_spec import WeightSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_MERGE = "merge the adapter into its base model with PEFT, and serve the result"
# Fields that change what an adapter computes -> why they are not supported.
_REFUSED = {
    "use_dora": "DoRA scales each output of the whole weight, so that it is not a change that can be added for each request",
    "lora_bias": "the adapter has biases of its own",
    "modules_to_save": "it replaces whole modules, which all requests share",
    "trainable_token_indices": "it replaces rows of the embedding, which all requests share",
    "target_parameters": "it changes parameters that are not linear layers, such as stacked experts",
    "layer_replication": "it changes the number of layers",
    "megatron_config": "it was made for Megatron's layers",
    "alora_invocation_tokens": "it begins in the middle of a prompt",
    "use_qalora": "it averages its inputs in groups",
    "use_bdlora": "its matrices are block-diagonal",
    "arrow_config": "it mixes several adapters",
}
# Fields that do not change what it computes, or that are read below.
_KNOWN = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "unsloth_fixed",
        "use_rslora",
    ]
)
# The base weights stay as they are with these.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Columns of a weight that come from one module of a checkpoint."""

    module: int  # its number among those of the weight
    part: int  # the projection that the columns belong to
    of_part: np.ndarray  # i64[n]: the columns of the projection
    of_module: np.ndarray  # i64[n]: the outputs of the module


def read_peft(folder: str | os.PathLike[str], model: ModelConfig) -> Lora:
    """The adapter in a folder that PEFT has saved, for a model, as `lora_params` has its leaves: float32 on the host.

    The scale of each module is included: the change of a weight is a @ b. A projection without an adapter has rank 0 if
    others of its matrix have one.

    Raises:
        ValueError: the adapter is missing, damaged, made for another model, or of a kind that is not supported.
    """
    path = Path(folder).expanduser()
    fields = _config(path)
    modules = _modules(path, model)
    specs, having, sources = adaptable(model), layers_with(model), FAMILIES[model.family].sources(model)
    places = {module: place for place, module in _names(model)}
    _check_targets(path, fields, modules, places)
    pairs = {}
    for module, tensors in modules.items():
        if module not in places:
            raise ValueError(f"{path}: {_why_not(module, specs)}")
        name, _, number = places[module]
        a, b = _pair(path, module, fields, tensors)
        inputs, outputs = specs[name].shape[0], _outputs(specs[name], sources[specs[name].path], number)
        if (a.shape[1], b.shape[0]) != (inputs, outputs):
            raise ValueError(
                f"{path}: the adapter of {module!r} maps {a.shape[1]} inputs to {b.shape[0]} outputs, but this model's has "
                f"{inputs} and {outputs}; it was made for another model"
            )
        pairs[places[module]] = a, b
    layers = {}
    for name in dict.fromkeys(name for name, _, _ in pairs):
        spec = specs[name]
        widths = spec.parts or spec.shape[-1:]
        pieces: list[list[tuple[int, np.ndarray, np.ndarray]]] = [[] for _ in widths]  # of each part: row, a, b
        for columns in _columns(spec, sources[spec.path]):
            for (weight, row, number), (a, b) in pairs.items():
                if (weight, number) == (name, columns.module):
                    placed = np.zeros((b.shape[1], widths[columns.part]), np.float32)
                    placed[:, columns.of_part] = b[columns.of_module].T
                    pieces[columns.part].append((row, a.T, placed))
        layers[name] = tuple(
            _stacked(found, len(having[name]), spec.shape[0], width) for found, width in zip(pieces, widths, strict=True)
        )
    return {"layers": layers}


def write_peft(
    folder: str | os.PathLike[str], lora: Lora, model: ModelConfig, *, scale: float, base_model: str | None = None
) -> None:
    """Saves adapters so that PEFT, and `read_peft`, load them; `scale` is that of `merge_lora`.

    `base_model` is the name or the path of the model, which PEFT's AutoPeftModel loads. Tensors are float32. Where a
    checkpoint has one module for several projections, as GPT-2 has, the adapter of the module has their ranks together.
    """
    specs, having, sources = adaptable(model), layers_with(model), FAMILIES[model.family].sources(model)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for place, module in _names(model):
        name, row, number = place
        if name not in lora["layers"]:
            continue
        parts, source = lora["layers"][name], sources[specs[name].path]
        assert len(having[name]) > row, "the module is in one of the layers"
        found = [columns for columns in _columns(specs[name], source) if columns.module == number]
        blocks: list[tuple[np.ndarray, np.ndarray]] = []  # a [r, in] and b [out, r], each for the parts that share an a
        for columns in found:
            a = np.asarray(parts[columns.part]["a"][row], np.float32).T
            b = np.asarray(parts[columns.part]["b"][row], np.float32).T
            if not a.shape[0]:
                continue
            shared = next((block for block in blocks if np.array_equal(block[0], a)), None)
            if shared is None:
                shared = (a, np.zeros((_outputs(specs[name], source, number), a.shape[0]), np.float32))
                blocks.append(shared)
            shared[1][columns.of_module] = b[columns.of_part]
        if not blocks:
            continue
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(np.concatenate([a for a, _ in blocks]))
        tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(np.concatenate([b for _, b in blocks], axis=1))
        ranks[module] = tensors[f"{prefix}.lora_A.weight"].shape[0]
    if not ranks:
        raise ValueError("the adapter changes nothing, so that there is nothing to save; pass the leaves of lora_params")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    from safetensors.numpy import save_file

    save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
    rank = max(ranks.values())
    others = {module: own for module, own in ranks.items() if own != rank}
    last = {module.rpartition(".")[2] for module in ranks}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(scale * rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "rank_pattern": others,
        "alpha_pattern": {module: _number(scale * own) for module, own in others.items()},
        # The last words of their names suffice unless others, such as experts, end in the same.
        "target_modules": sorted(last if model.moe is None and model.state is None else ranks),
        "fan_in_fan_out": not all(sources[specs[name].path].transpose for name in lora["layers"]),
    }
    (path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _config(path: Path) -> JsonObject:
    """The fields of adapter_config.json; ValueError for a kind of adapter that is not supported."""
    if not (path / CONFIG_FILE).is_file():
        raise ValueError(
            f"{path} is no adapter: it has no {CONFIG_FILE}; pass a folder that PEFT's save_pretrained has written"
        )
    fields = read_json(path / CONFIG_FILE)
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path} is an adapter of the kind {kind!r}; only LORA is supported: {_MERGE}")
    for name, value in fields.items():
        if not value:
            continue
        if name in _REFUSED:
            raise ValueError(
                f"{path}: {CONFIG_FILE} has {name}={value!r:.80}, which is not supported: {_REFUSED[name]}; {_MERGE}"
            )
        if name not in _KNOWN:
            raise ValueError(
                f"{path}: {CONFIG_FILE} has {name}={value!r:.80}, which is not known here and may change what the adapter "
                "computes; remove it from the file if it does not"
            )
    if fields.get("bias", "none") != "none":
        raise ValueError(
            f"{path}: the adapter has bias={fields['bias']!r}, which changes biases that all requests share; {_MERGE}"
        )
    start = fields.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"{path}: init_lora_weights is {start!r}, which changes the base weights too; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes it one for the original weights"
        )
    for name in ("r", "lora_alpha"):
        if isinstance(fields.get(name), bool) or not isinstance(fields.get(name), int | float):
            raise ValueError(f"{path}: {CONFIG_FILE} has {name}={fields.get(name)!r}, but it must be a number")
    return fields


def _modules(path: Path, model: ModelConfig) -> dict[str, dict[str, StoredTensor]]:
    """The tensors "A" and "B" of each adapted module, by its name in the text model."""
    file = path / WEIGHTS_FILE
    if not file.is_file():
        other = " but adapter_model.bin, which could run code" if (path / "adapter_model.bin").exists() else ""
        raise ValueError(f"{path} has no {WEIGHTS_FILE}{other}; save the adapter with safe_serialization=True")
    known = {module for _, module in _names(model)}
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in read_safetensors(file).items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ValueError(f"{file} holds {name!r}, which is no matrix A or B of a linear layer; {_MERGE}")
        module = match["module"]
        if module not in known:
            module = text_name(module) or module  # of a multimodal model, or of one without its head
        modules.setdefault(module, {})[match["part"]] = tensor
    for module, pair in modules.items():
        if len(pair) != 2:
            raise ValueError(f"{file} has only lora_{next(iter(pair))} of {module!r}; {how_to_replace(file)}")
    if not modules:
        raise ValueError(f"{file} holds no tensors; {how_to_replace(file)}")
    return modules


def _names(model: ModelConfig) -> Iterator[tuple[tuple[str, int, int], str]]:
    """Each module that can have an adapter, after its place: name and row of its weight, and its number in the weight."""
    sources, having = FAMILIES[model.family].sources(model), layers_with(model)
    for name, spec in adaptable(model).items():
        for row, layer in enumerate(having[name]):
            for number, tensor in enumerate(sources[spec.path].names):
                yield (name, row, number), tensor.format(layer=layer).removesuffix(".weight")


def _columns(spec: WeightSpec, source: Source) -> list[_Columns]:
    """Which columns of each projection of a weight come from which module."""
    total = spec.shape[-1]
    index = np.arange(total)
    if source.rearrange is not None:
        index = source.rearrange(index[None])[0]
    parts = np.cumsum((0, *(spec.parts or (total,))))
    modules = parts if len(source.names) > 1 else np.array([0, total])
    found = []
    for part, (start, stop) in enumerate(pairwise(parts)):
        of = index[start:stop]
        for module, (first, end) in enumerate(pairwise(modules)):
            (mine,) = np.nonzero((of >= first) & (of < end))
            if len(mine):
                found.append(_Columns(module=module, part=part, of_part=mine, of_module=of[mine] - first))
    return found


def _outputs(spec: WeightSpec, source: Source, module: int) -> int:
    """Outputs of one of the modules of a weight."""
    return spec.parts[module] if len(source.names) > 1 else spec.shape[-1]


def _pair(path: Path, module: str, fields: JsonFields, pair: Mapping[str, StoredTensor]) -> tuple[np.ndarray, np.ndarray]:
    """a [r, in], and b [out, r] with the scale of the module."""
    a, b = (np.asarray(pair[part].map(), np.float32) for part in "AB")
    rank = _of_module(fields.get("rank_pattern"), module, fields["r"])
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{path}: the adapter of {module!r} has the shapes {list(a.shape)} and {list(b.shape)}, but its rank is {rank} "
            f"according to {CONFIG_FILE}; the files do not match"
        )
    alpha = _of_module(fields.get("alpha_pattern"), module, fields["lora_alpha"])
    scale = alpha / math.sqrt(rank) if fields.get("use_rslora") else alpha / rank
    return a, np.float32(scale) * b


def _of_module(pattern: Mapping[str, float] | None, module: str, usual: float) -> float:
    """The value for a module: of the first pattern that its name ends with, else the usual one."""
    found = (value for key, value in (pattern or {}).items() if re.fullmatch(rf"(.*\.)?({key})", module))
    return next(found, usual)


def _check_targets(path: Path, fields: JsonFields, modules: Mapping[str, object], known: Mapping[str, object]) -> None:
    """ValueError if the config lists modules of the model of which the file has none."""
    targets = fields.get("target_modules")
    if not isinstance(targets, list) or fields.get("exclude_modules"):
        return
    found, existing = ({module.rpartition(".")[2] for module in names} for names in (modules, known))
    for target in targets:
        last = target.rpartition(".")[2]
        if last in existing - found:
            raise ValueError(f"{path}: {WEIGHTS_FILE} has nothing for {target!r} of target_modules; the files do not match")


def _why_not(module: str, specs: Mapping[str, WeightSpec]) -> str:
    last = module.rpartition(".")[2]
    if ".layers." not in module and ".h." not in module and ".blocks." not in module:
        reason = f"changes {module!r}, which is not in a layer: embedding and head are shared by all requests"
    else:
        reason = f"changes {module!r} ({last}), which is not a linear layer of this model's attention, state or MLP"
    return f"the adapter {reason}; requests can have adapters of {', '.join(specs)}. If it belongs to this model, {_MERGE}"


def _stacked(found: list[tuple[int, np.ndarray, np.ndarray]], count: int, inputs: int, width: int) -> dict[str, np.ndarray]:
    """a [L, in, r] and b [L, r, width] of a projection from its pieces; a row with several has their ranks together."""
    ranks = [0] * count
    for row, a, _ in found:
        ranks[row] += a.shape[1]
    whole = {"a": np.zeros((count, inputs, max(ranks)), np.float32), "b": np.zeros((count, max(ranks), width), np.float32)}
    filled = [0] * count
    for row, a, b in found:
        start, stop = filled[row], filled[row] + a.shape[1]
        whole["a"][row, :, start:stop], whole["b"][row, start:stop] = a, b
        filled[row] = stop
    return whole


def _number(value: float) -> float:
    """An int if it is whole, as PEFT writes it."""
    return int(value) if value == int(value) else value
