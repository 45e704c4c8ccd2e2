"""Names of `EngineConfig` options in other programs, for the error about an unknown option."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields

from fastgen_jax.scheduling import SamplingParams

_MEMORY = "the KV cache uses free memory; num_blocks sets its size in blocks"
_PLATFORM = "the environment chooses: JAX_PLATFORMS=cpu, CUDA_VISIBLE_DEVICES, TPU_VISIBLE_CHIPS"

_OTHER_NAMES = {
    "lora_modules": "adapters",
    "loras": "adapters",
    "enable_lora": "max_adapters",
    "max_loras": "max_adapters",
    "max_lora_rank": "max_adapter_rank",
    "max_model_len": "max_context_len",
    "max_length": "max_context_len",
    "max_seq_len": "max_context_len",
    "max_seq_length": "max_context_len",
    "context_length": "max_context_len",
    "n_ctx": "max_context_len",
    "num_ctx": "max_context_len",
    "max_position_embeddings": "max_context_len",
    "tensor_parallel_size": "tensor_parallel",
    "tp_size": "tensor_parallel",
    "tp": "tensor_parallel",
    "torch_dtype": "dtype",
    "kv_cache_dtype": "kv_dtype",
    "cache_dtype": "kv_dtype",
    "type_k": "kv_dtype",
    "max_num_batched_tokens": "token_budget",
    "max_ragged_batch_size": "token_budget",
    "chunked_prefill_size": "token_budget",
    "max_batch_size": "max_num_seqs",
    "max_num_sequences": "max_num_seqs",
    "max_running_requests": "max_num_seqs",
    "num_gpu_blocks_override": "num_blocks",
    "num_kv_blocks": "num_blocks",
    "page_size": "block_size",
    "enable_prefix_caching": "prefix_caching",
    "scheduling_policy": "policy",
    "attention_backend": "attention",
    "attn_implementation": "attention",
    "override_generation_config": "generation_config",
    "quantization": "quantize",
    "quantization_mode": "quantize",
    "quantization_config": "quantize",
    "load_in_8bit": "use quantize='int8'",
    "load_in_4bit": "use quantize='int4'",
    "gpu_memory_utilization": _MEMORY,
    "mem_fraction_static": _MEMORY,
    "swap_space": _MEMORY,
    "max_memory": _MEMORY,
    "device": _PLATFORM,
    "device_map": _PLATFORM,
    "n_gpu_layers": _PLATFORM,
    "enable_chunked_prefill": "omit it: prompts are always split, see token_budget",
    "enforce_eager": "use cuda_graphs=False on a GPU; elsewhere omit it: programs are compiled before the first request",
    "trust_remote_code": "omit it: no code from a checkpoint is run",
    "tokenizer": "the tokenizer is read from the checkpoint's folder",
    "data_parallel_size": "replicas belong to a server: fastgen_jax.serve(model, replica_num=...)",
    "replica_num": "replicas belong to a server: fastgen_jax.serve(model, replica_num=...)",
    "revision": "download the revision and pass its folder as the model",
}


def unknown_engine_option(name: str, known: Iterable[str]) -> ValueError:
    """The error for an option that `EngineConfig` does not have, with a suggestion if there is one."""
    generation = {f.name for f in fields(SamplingParams)} - {"max_length"}
    if name in generation:
        return ValueError(
            f"{name!r} is an option of a call, not of the engine; pass it there, pipe(prompt, {name}=...), or "
            f"as a default for all calls: generation_config={{{name!r}: ...}}"
        )
    return unknown_option(name, known, _OTHER_NAMES, kind="engine")


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" with the known name that is spelled most like `name`, or nothing if none is similar."""
    spelling = name.lower().replace("-", "_")
    found = difflib.get_close_matches(spelling, list(known), n=1, cutoff=0.7)
    return f"; did you mean {found[0]!r}?" if found else ""


def unknown_option(name: str, known: Iterable[str], others: Mapping[str, str], *, kind: str) -> ValueError:
    """The error for an option that is not among the `known` of a `kind`.

    `others` maps names in other programs to a known name, or to a sentence if there is no equivalent.
    """
    known = sorted(known)
    other = others.get(name.lower().replace("-", "_"))
    if other is None:
        hint = nearest(name, known)
    else:
        hint = f"; use {other!r}" if other in known else f"; {other}"
    return ValueError(f"unknown option {name!r}{hint}{'' if hint.endswith('?') else ';'} {kind} options: {', '.join(known)}")
