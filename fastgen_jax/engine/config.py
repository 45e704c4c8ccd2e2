"""The operator's choices."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import jax

from fastgen_jax.core.devices import supports_bfloat16
from fastgen_jax.engine import generation
from fastgen_jax.engine.kept_forms import NOTHING, Choice
from fastgen_jax.engine.option_names import unknown_engine_option
from fastgen_jax.engine.sampling.processor import LogitsProcessor
from fastgen_jax.models.vision.config import ImagesConfig
from fastgen_jax.scheduling import NEED_PROMISE, Policy, Promise, checked_policy
from fastgen_jax.scheduling.converted import converted
from pallas_kernels.ragged_attention import QUANTIZED_DTYPES

DType = Literal["float32", "bfloat16", "float16"]
KVDType = Literal["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"]
Quantization = Literal["int8", "int4", "fp8", "w8a8"]
Attention = Literal["reference", "xla", "cpu", "tpu", "gpu"]

SHOWN = 500  # characters of a value in a repr, which the log has: a chat template can be long


def _ladder(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _checked_template(value: object) -> object:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(
            f"chat_template is {value!r}; pass a file, the text of a template, or the name of one of the model's"
        )
    return value


def _named_folders(value: Any) -> object:
    """NAME=FOLDER for each adapter."""
    if isinstance(value, Mapping):
        value = [f"{name}={os.fspath(folder)}" for name, folder in value.items()]
    pairs = tuple(value) if isinstance(value, list | tuple) else (value,)
    for pair in pairs:
        name, separator, folder = pair.partition("=") if isinstance(pair, str) else ("", "", "")
        if not separator or not folder:
            raise ValueError(f"adapters has {pair!r}; pass NAME=FOLDER, with the folder of a PEFT adapter")
        check_adapter_name(name)
    names = [pair.partition("=")[0] for pair in pairs]
    if len({*names}) < len(names):
        raise ValueError(f"adapters has a name twice, of {', '.join(names)}; name each adapter once")
    return pairs


def check_adapter_name(name: object) -> None:
    """ValueError unless a text can be the name of an adapter: clients write it after the model's, as in base:name."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,128}", name):
        raise ValueError(f"an adapter is called {name!r}; use up to 128 letters, digits, points, hyphens and underscores")


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Number formats for a model on a device; see `fit.choose_formats`."""

    dtype: DType
    quantize: Quantization | None
    kv_dtype: KVDType
    kept: tuple[tuple[str, float], ...] = ()
    """The weights, by path, that stay in the blocks of the checkpoint, with their bits per value."""
    choice: Choice = NOTHING
    """On an accelerator, the form of those of `kept`, and why the other quantized weights of the checkpoint are not kept."""
    why: str = ""
    """Why they differ from the defaults, for the log; empty if they do not."""

    @property
    def of_weights(self) -> str:
        """Those of the weights, for people."""
        kept = sorted({form.short for _, form in self.choice.kept})
        return " and ".join((*kept, self.quantize or self.dtype))


@dataclass(frozen=True, kw_only=True, repr=False)
class EngineConfig:
    """How the engine runs a model. `resolve` fills every None from the model and the device."""

    fit: bool = True
    """Make a model fit the free memory by what is left open here: fewer KV blocks, then a shorter context, then smaller
    number formats for a checkpoint; one line of the log says what was chosen. Off: the defaults below, whatever is free."""
    formats: Formats | None = None
    """The number formats that `fit` chose for a checkpoint before its weights were loaded; set by `from_pretrained`."""
    dtype: DType | None = None
    """Data type of the weights and activations; native CPU kernels use float32 activations with any type. None: float32
    on a CPU, float16 on a GPU without bfloat16 (T4, V100), bfloat16 elsewhere."""
    quantize: Quantization | Literal["none"] | None = None
    """Weight-only quantization: "int8" with one scale per output channel; "int4" with one per 32 inputs, and int8 for the
    head, where integers of 4 bits of a checkpoint keep their values except on CPUs. Two formats round activations, too,
    with one scale per token: "fp8", on H100, H200 and TPU7x, multiplies 8-bit floats, and "w8a8", on TPU v5e and v6e, int8;
    the head is as for "int8" with "w8a8". None: as in the checkpoint where the kernels multiply its format (on CPUs most
    types of GGUF, and 4 and 8 bits of most other formats; on TPUs and on GPUs with a kernel for them, integers of 4 bits),
    with exactly the values that it stands for; 8-bit floats on devices that multiply them, to which activations are then
    rounded; else `dtype`. "none": `dtype` in any case."""
    kv_dtype: KVDType | None = None
    """Data type of the KV cache; 8-bit types have one scale per token and KV head. None: `dtype`."""
    tensor_parallel: int | None = None
    """Number of devices over which heads, MLP columns and vocabulary are sharded. None: one device, no sharding."""
    token_budget: int | None = None
    """Maximum number of tokens per step. None: derived from the device's ratio of arithmetic to memory bandwidth, or from
    steps that an earlier engine measured on this device."""
    budget_ladder: tuple[int, ...] | None = converted(_ladder, default=None)
    """Sizes of the smaller steps for a lightly loaded engine, in tokens. None: chosen like `token_budget`."""
    remeasure: bool = False
    """Compile and time seven step sizes before the first request, choose token budget and ladder by the results, and save
    them for later starts on this device."""
    refine_ladder: bool = True
    """Without a token budget: time the steps of an engine that has had no request for a while, once per device and model,
    and save the better choice of step sizes for later starts."""
    background_compile: bool | None = None
    """Start with the program of a full step, and compile those of smaller steps while it serves. None: yes in
    `from_pretrained`, unless policy "sla" needs to know how long steps take; no for an engine made from weights."""
    deterministic: bool = False
    """Compute the tokens of a request the same way, to the last bit, whatever else runs: one step size for all steps, and
    chunks of a prompt whose borders depend on the prompt alone. A step with one token then costs as much as a full one, and
    log-probabilities of a prompt are computed token by token. Devices add up in order. No effect on one device with native
    CPU kernels, whose results are exact."""
    cuda_graphs: bool | None = None
    """On GPUs: a step is one CUDA graph, which the host starts at once. With False it starts every kernel by itself, as a
    profile then shows. None: yes, with JAX 0.12 or newer; before, XLA decides."""
    max_num_seqs: int = 64
    """Maximum number of sequences that run at the same time; others wait."""
    max_context_len: int | None = None
    """Maximum number of tokens per sequence, prompt and generated together. None: the model's own limit, or with `fit`
    what the KV cache holds if that is less."""
    block_size: int | None = None
    """Tokens per KV block. None: 32, or 128 for an 8-bit cache on a TPU or GPU, where kernels cannot read smaller blocks."""
    num_blocks: int | None = None
    """KV blocks per layer. None: as many as fit in free memory, but no more than `max_num_seqs` full contexts need; the
    number from an earlier start is kept while it fits, so that its compiled programs can be reused."""
    prefix_caching: bool = True
    """Share KV blocks among prompts with a common prefix. Off for rope kind "dynamic", whose keys depend on the length."""
    policy: Literal["splitfuse", "prompts_first", "orca", "sla"] | Policy = converted(checked_policy, default="splitfuse")
    """How steps are filled; "sla" enforces the promised rates below. In Python, also a function of a `Planner`."""
    promised_prompt_rate: float | None = None
    """Policy "sla", tokens per second: the first token is due after (prompt tokens / this rate) seconds; a request that
    cannot meet this deadline is refused."""
    promised_generation_rate: float | None = None
    """Policy "sla", tokens per second: steps are kept short enough for each sequence to generate at this rate."""
    promise_grace: float | None = None
    """Policy "sla", seconds: how late the first token may be before the request is refused. None: 1."""
    overlap: bool = True
    """Dispatch each step before the tokens of the previous one are read."""
    stack_layers: bool | None = None
    """Scan over the layers as one stacked array, so that compile time does not grow with depth.

    None: yes, except on a CPU without native kernels, where a scan copies the weights.
    """
    logits_processor: LogitsProcessor | None = None
    """A jax.numpy function f(logits f32[R, V], rows) -> f32[R, V], compiled into every step. None: no processor."""
    attention: Attention | None = None
    """Implementation of ragged attention. None: the best one for the device."""
    generation_config: str | Mapping[str, Any] | tuple[tuple[str, Any], ...] = converted(
        generation.parse_setting, default="auto"
    )
    """Defaults for options that a request omits: "auto" for those in the checkpoint's generation_config.json, "none", or
    the defaults as a mapping or as JSON, such as {"temperature": 0.6}. Stored as pairs."""
    chat_template: str | None = converted(_checked_template, default=None)
    """Chat template for all conversations: a file (.jinja, or .json with the field "chat_template"), the text of a template,
    or the name of one of the model's templates, such as "rag". None: the model's own, "tool_use" if there are tools."""
    images: bool = True
    """Read images, if the checkpoint has a vision tower and Pillow is installed. Off: only its text model is loaded."""
    max_image_tokens: int = 4096
    """Tokens of the largest image, for models that read images of many sizes: larger ones are made smaller. The limit of the
    checkpoint applies as well."""
    vision: ImagesConfig | None = None
    """How the model reads images; set by `from_pretrained`."""
    strict_config: bool = False
    """Refuse a checkpoint whose config.json has fields that are unknown for its architecture, instead of warning."""
    adapters: Mapping[str, str | os.PathLike[str]] | Iterable[str] = converted(_named_folders, default=())
    """LoRA adapters that are loaded at the start: NAME=FOLDER, a folder of PEFT each, or in Python a mapping of names to
    folders. A request chooses one by its `adapter`. Stored as NAME=FOLDER."""
    max_adapters: int | None = None
    """Number of LoRA adapters that can be loaded at the same time. None: as many as `adapters`; without any, steps are the
    same as without this feature."""
    max_adapter_rank: int = 16
    """Largest rank of an adapter. Adapters of a lower rank take the same memory and time."""
    compile_cache_dir: str | None = None
    """Folder for compiled programs and measurements, or gs://bucket/prefix, which several machines can share. None:
    FASTGEN_CACHE_DIR, or ~/.cache/fastgen_jax; "": nothing is saved."""

    def __post_init__(self) -> None:
        sizes = ("tensor_parallel", "token_budget")
        for name in (
            *sizes,
            "max_num_seqs",
            "max_context_len",
            "block_size",
            "num_blocks",
            "max_adapter_rank",
            "max_image_tokens",
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        least = len(self.adapter_folders)
        if self.max_adapters is not None and (type(self.max_adapters) is not int or self.max_adapters < least):
            raise ValueError(
                f"max_adapters is {self.max_adapters!r}; it must be an integer of at least {least}"
                f"{', the number of adapters' if least else ''}"
            )
        choices: dict[str, tuple[str | None, ...]] = {
            "dtype": (*get_args(DType), None),
            "quantize": (*get_args(Quantization), "none", None),
            "kv_dtype": (*get_args(KVDType), None),
            "attention": (*get_args(Attention), None),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(map(str, allowed))}")
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise ValueError(f"logits_processor is {self.logits_processor!r}; pass a function f(logits, rows) or None")
        promises = (self.promised_prompt_rate, self.promised_generation_rate)
        is_set = [rate is not None for rate in promises]  # optional with a policy that is a function
        if is_set[0] != is_set[1] or (isinstance(self.policy, str) and is_set[0] != (self.policy in NEED_PROMISE)):
            raise ValueError(
                f"policy is {self.policy!r}, promised_prompt_rate {promises[0]} and promised_generation_rate {promises[1]}; "
                f"set both rates with policy {', '.join(sorted(NEED_PROMISE))}, and with no other"
            )
        if self.promise_grace is not None and None in promises:
            raise ValueError(f"promise_grace is {self.promise_grace}, but policy {self.policy!r} makes no promise; omit it")
        _ = self.promise  # checks the rates
        if self.remeasure and self.token_budget is not None:
            raise ValueError(
                f"remeasure with token_budget={self.token_budget}: an explicit budget is not measured; omit one of them"
            )
        if self.budget_ladder is not None:
            if self.token_budget is None:
                raise ValueError(f"budget_ladder={self.budget_ladder} requires token_budget, the size of a full step")
            if not isinstance(self.budget_ladder, tuple) or not all(type(b) is int for b in self.budget_ladder):
                raise ValueError(f"budget_ladder is {self.budget_ladder!r}; pass a list of integers, such as [16, 64]")
            if any(not 1 <= budget <= self.token_budget for budget in self.budget_ladder):
                raise ValueError(
                    f"budget_ladder={self.budget_ladder} has a step outside 1..{self.token_budget} (token_budget)"
                )

    @property
    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def __repr__(self) -> str:
        return shown(self, self.changed)

    @property
    def num_adapters(self) -> int:
        """Places for adapters in every step."""
        return len(self.adapter_folders) if self.max_adapters is None else self.max_adapters

    @property
    def adapter_folders(self) -> dict[str, str]:
        """The folders of `adapters` by their names."""
        return {name: folder for name, _, folder in (str(pair).partition("=") for pair in self.adapters)}

    @property
    def promise(self) -> Promise | None:
        """The promises of policy "sla", if set; ValueError for a rate that is not positive or a negative grace."""
        if self.promised_prompt_rate is None or self.promised_generation_rate is None:
            return None
        return Promise(
            prompt_rate=self.promised_prompt_rate,
            generation_rate=self.promised_generation_rate,
            grace=1.0 if self.promise_grace is None else self.promise_grace,
        )

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> EngineConfig:
        """A config from keyword options; an unknown one raises ValueError with a suggestion."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise unknown_engine_option(unknown[0], known)
        return cls(**options)


def shown(config: object, values: Mapping[str, object]) -> str:
    texts = {name: repr(value) for name, value in values.items() if name != "compile_cache_dir"}
    shown = ", ".join(f"{name}={text if len(text) <= SHOWN else text[:SHOWN] + '...'}" for name, text in texts.items())
    return f"{type(config).__name__}({shown})"


def formats_of(config: EngineConfig, platform: str) -> tuple[DType, Quantization | None, KVDType]:
    """dtype, quantization and KV dtype: those of `config`, those that `fit` chose, or the defaults for this device."""
    if config.formats is not None:
        return config.formats.dtype, config.formats.quantize, config.formats.kv_dtype
    dtype = config.dtype or default_dtype(platform, bfloat16=supports_bfloat16(jax.local_devices()[0]))
    return dtype, quantization(config), config.kv_dtype or dtype


def quantization(config: EngineConfig) -> Quantization | None:
    """How the engine itself quantizes weights."""
    return None if config.quantize == "none" else config.quantize


def quantize_of_snapshot(stored: str | None, chosen: str | None, *, packs: bool, float8: bool) -> Any:
    """The `quantize` of an engine that runs a snapshot, given what its conversion quantized to and the operator's choice.

    `packs` is whether native CPU kernels multiply its blocks, and `float8` whether the device multiplies 8-bit floats; if it
    does not, those are dequantized. Raises ValueError for a choice that the snapshot cannot have.
    """
    if stored is None:
        return chosen
    possible = {"int8": ("int8", "w8a8"), "int4": ("int4",), "fp8": ("fp8",)}[stored]
    if chosen not in (None, *possible):
        raise ValueError(
            f"quantize={chosen!r}, but the snapshot was made with --quantize {stored}; omit quantize or choose "
            f"{' or '.join(map(repr, possible))}, or convert the original checkpoint again"
        )
    if stored == "int4":
        return None if packs else "int4"
    if stored == "fp8":
        return chosen or ("fp8" if float8 else None)
    return chosen or "int8"


def default_dtype(platform: str, *, bfloat16: bool) -> DType:
    """The data type of weights that nobody chose, on a device that computes in bfloat16 or does not."""
    return "float32" if platform == "cpu" else "bfloat16" if bfloat16 else "float16"


def wide_enough(dtype: DType, *, exceeds_float16: bool) -> DType:
    """The data type of the activations of a model with weights of `dtype`, on a device that multiplies these."""
    return "float32" if dtype == "float16" and exceeds_float16 else dtype


def default_block_size(platform: str, kv_dtype: KVDType) -> int:
    """Tokens per KV block: kernels cannot read smaller blocks of an 8-bit cache than these."""
    return 128 if platform in ("tpu", "gpu") and kv_dtype in QUANTIZED_DTYPES else 32
