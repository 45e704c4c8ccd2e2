"""Translates the metadata of each GGUF architecture to a Hugging Face config.json, so that one family reads both formats.

An architecture is supported only if the metadata and tensors determine all that the model computes, or if what they leave
out is the same in every release.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastgen_jax.checkpoint import gguf_own_fields as own
from fastgen_jax.checkpoint import gguf_states as states
from fastgen_jax.checkpoint.gguf_experts import (
    deepseek2,
    ernie4_5_moe,
    experts,
    glm4moe,
    gpt_oss,
    llama4,
    minimax_m2,
    phimoe,
    qwen2moe,
    qwen3moe,
)
from fastgen_jax.checkpoint.gguf_file import GGUFFile
from fastgen_jax.checkpoint.gguf_gemma import gemma3n, gemma4
from fastgen_jax.checkpoint.gguf_metadata import (
    Metadata,
    llama_like,
    longrope,
    partial_rope,
    rope_parameters,
)
from fastgen_jax.json_types import JsonObject
from fastgen_jax.models.config import ModelConfig

_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}  # the attention scale of the 27B differs, and only the depth identifies it


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one GGUF architecture differs from Llama's metadata and tensors."""

    name: str  # in config.json
    fields: Callable[[Metadata], JsonObject] = (
        lambda metadata: {}
    )  # config.json fields that add to or replace those of Llama
    halves_interleaved: bool = False  # rows of q and k are permuted for llama.cpp's rotation
    stored_norm_offset: float = 0.0  # what the converter added to the weights of norms
    layer_norm: bool = False  # LayerNorm instead of RMSNorm
    partial_rotary: bool = False  # `fields` returns the rotary settings
    own_fields: bool = False  # `fields` returns all fields
    transposed: tuple[str, ...] = ()  # suffixes of the modules whose matrices are [in, out] in Hugging Face
    joined: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # suffix of a module -> the tensors that are concatenated to it
    joined_rows: bool = False  # joined matrices are concatenated by rows; without it there are only stacks, and their biases
    alternating: bool = False  # the rows of concatenated tensors are interleaved
    of_metadata: Mapping[str, str] = field(default_factory=dict)  # suffix of a tensor -> array in the metadata, by layer
    qkv_by_kind: bool = False  # rows of q, k and v, fused or to be joined, are all q, all k, all v, not head by head
    swapped: tuple[str, ...] = ()  # tensors of the file whose last two axes are swapped, before they are concatenated
    flattened: tuple[str, ...] = ()  # suffixes of the modules whose leading axes are merged, after concatenation
    plain_norms: tuple[str, ...] = ()  # suffixes of the norms to which `stored_norm_offset` was not added
    restored: Callable[[ModelConfig], Mapping[str, states.Restored]] = (
        lambda config: {}
    )  # by the suffixes of tensors of Hugging Face


def _llama(m: Metadata) -> JsonObject:
    m.only("attention.sliding_window", 0)
    if m.get("expert_count", 0):
        return {"architectures": ["MixtralForCausalLM"], **experts(m, "num_local_experts")}
    return {"attention_bias": m.has("blk.0.attn_output.bias"), "mlp_bias": m.has("blk.0.ffn_down.bias")}


def _gemma(m: Metadata) -> JsonObject:
    return {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}


def _gemma2(m: Metadata) -> JsonObject:
    return _gemma(m) | {
        "attn_logit_softcapping": m.get("attn_logit_softcapping"),
        "final_logit_softcapping": m.get("final_logit_softcapping"),
        "sliding_window": m.get("attention.sliding_window"),
        "query_pre_attn_scalar": _gemma_scale(m),
    }


def _gemma3(m: Metadata) -> JsonObject:
    rope = rope_parameters(m)
    local = float(m.get("rope.freq_base_swa", 10_000.0))
    if m.fields.get("final_logit_softcapping"):
        raise m.refusal("gemma3.final_logit_softcapping is not supported")
    return _gemma(m) | {
        "sliding_window": m.get("attention.sliding_window"),
        "sliding_window_pattern": 6,  # every sixth layer has full attention; not recorded, the same in every release
        "query_pre_attn_scalar": _gemma_scale(m),
        "rope_theta": rope.pop("rope_theta"),
        "rope_local_base_freq": local,
        "rope_scaling": rope if rope["rope_type"] != "default" else None,
        "rope_parameters": None,
    }


def _gemma_scale(m: Metadata) -> float:
    heads = m.get("attention.head_count")
    if m.get("block_count") == _GEMMA_27B_LAYERS[m.kind]:
        return m.get("embedding_length") / heads
    return m.get("attention.key_length", m.get("embedding_length") // heads)


def _cohere(m: Metadata) -> JsonObject:
    return {"logit_scale": m.get("logit_scale"), "use_qk_norm": m.has("blk.0.attn_q_norm.weight")}


def _cohere2(m: Metadata) -> JsonObject:
    # Every fourth layer has full attention and no positions; not recorded, the same in every release.
    return {"logit_scale": m.get("logit_scale"), "sliding_window": m.get("attention.sliding_window")}


def _stablelm(m: Metadata) -> JsonObject:
    m.get("use_parallel_residual", False)  # the converter's guess if config.json lacks it; the norms identify it
    return {
        "use_parallel_residual": not m.has("blk.0.ffn_norm.weight"),
        "use_qkv_bias": m.has("blk.0.attn_q.bias"),
        "qk_layernorm": m.has("blk.0.attn_q_norm.weight"),
        "rope_parameters": partial_rope(m),
    }


def _phi2(m: Metadata) -> JsonObject:
    return {"intermediate_size": m.file.tensors["blk.0.ffn_up.weight"].shape[0], "rope_parameters": partial_rope(m)}


def _granite(m: Metadata) -> JsonObject:
    m.only("expert_count", 0)
    return _granite_multipliers(m)


def _granite_multipliers(m: Metadata) -> JsonObject:
    return {
        "attention_multiplier": m.get("attention.scale"),
        "embedding_multiplier": m.get("embedding_scale"),
        "residual_multiplier": m.get("residual_scale"),
        "logits_scaling": m.get("logit_scale"),
        "attention_bias": m.has("blk.0.attn_output.bias"),
        "mlp_bias": m.has("blk.0.ffn_down.bias"),
    }


def _smollm3(m: Metadata) -> JsonObject:
    # Every fourth layer has no rotary embedding; not recorded, the same in every release.
    return {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(m.get("block_count"))], "use_sliding_window": False}


def _phi3(m: Metadata) -> JsonObject:
    heads, width = m.get("attention.head_count"), m.get("embedding_length")
    return longrope(m) | {
        "sliding_window": m.get("attention.sliding_window", 0) or None,
        "partial_rotary_factor": m.get("rope.dimension_count", width // heads) / (width // heads),
    }


def _minicpm(m: Metadata) -> JsonObject:
    # The first files lack the multipliers, which were the same in all releases then.
    depth, width = m.get("block_count"), m.get("embedding_length")
    m.only("rope.dimension_count", width // m.get("attention.head_count"))
    return longrope(m) | {
        "scale_emb": m.get("embedding_scale", 12.0),
        "scale_depth": round(m.get("residual_scale", 1.4 / math.sqrt(depth)) * math.sqrt(depth), 5),  # stored in float32
        "dim_model_base": round(width / m.get("logit_scale", width / 256), 3),
    }


def _apertus(m: Metadata) -> JsonObject:
    for key, constant in (("xielu.beta", 0.5), ("xielu.eps", -1e-6)):
        if any(abs(value - constant) > 1e-9 for value in m.file.metadata.get(key, ())):  # stored in float32
            raise m.refusal(f"{key} is {m.file.metadata[key]}; only {constant} is supported")
    return {"attention_bias": m.has("blk.0.attn_output.bias")}


def _olmo(m: Metadata) -> JsonObject:
    m.only("attention.layer_norm_epsilon", 1e-5)
    return {"layer_norm_eps": None, "clip_qkv": m.get("attention.clamp_kqv", 0.0) or None}


def _nemotron(m: Metadata) -> JsonObject:
    m.only("rope.scaling.type", "none")
    m.get("attention.layer_norm_rms_epsilon", 0.0)  # a copy
    return {
        "layer_norm_eps": None,
        "norm_eps": m.get("attention.layer_norm_epsilon"),
        "attention_bias": m.has("blk.0.attn_output.bias"),
        "mlp_bias": m.has("blk.0.ffn_down.bias"),
        "rope_parameters": partial_rope(m),
    }


def _mistral3(m: Metadata) -> JsonObject:
    """Ministral 3 and Devstral 2, which scale queries by position, and earlier models with this name, which do not."""
    m.only("attention.sliding_window", 0)
    m.only("rope.dimension_count", m.get("attention.key_length"))
    rope = rope_parameters(m, further=("scaling.yarn_log_multiplier",))
    growth = m.get("attention.temperature_scale", 0.0)
    if rope["rope_type"] == "yarn":  # mscale is not recorded; in every release it equals mscale_all_dim
        mscale = m.get("rope.scaling.yarn_log_multiplier", 0.0)
        rope |= {"mscale": mscale, "mscale_all_dim": mscale} if mscale else {}
    return {
        "architectures": ["Ministral3ForCausalLM" if growth else "MistralForCausalLM"],
        "sliding_window": 0,
        "rope_parameters": rope | ({"llama_4_scaling_beta": growth} if growth else {}),
    }


def _olmo2(m: Metadata) -> JsonObject:
    window = m.get("attention.sliding_window", 0)
    if not window:
        return {}
    rope = rope_parameters(m)
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "sliding_window": window,
        "layer_types": _layer_types(m.get("attention.sliding_window_pattern")),
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_theta": float(m.get("rope.freq_base_swa", rope["rope_theta"]))},
        },
    }


def _layer_types(pattern: list[bool]) -> list[str]:
    return ["sliding_attention" if windowed else "full_attention" for windowed in pattern]


def _seed_oss(m: Metadata) -> JsonObject:
    return {
        "attention_bias": m.has("blk.0.attn_q.bias"),
        "attention_out_bias": m.has("blk.0.attn_output.bias"),
        "mlp_bias": m.has("blk.0.ffn_down.bias"),
    }


def _exaone4(m: Metadata) -> JsonObject:
    pattern = m.get("attention.sliding_window_pattern", [False] * m.get("block_count"))
    return {"sliding_window": m.get("attention.sliding_window", 0), "layer_types": _layer_types(pattern)}


def _starcoder2(m: Metadata) -> JsonObject:
    # The window of 4096 tokens and the activation are not recorded, and the same in every release.
    return {
        "norm_epsilon": m.get("attention.layer_norm_epsilon"),
        "layer_norm_eps": None,
        "sliding_window": 4096,
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": m.has("blk.0.attn_output.bias"),
    }


_LATENT = ("attn_k_b.weight", "attn_v_b.weight")
_QKV = ("attn_q.weight", "attn_k.weight", "attn_v.weight")
_GPT_OSS_EXPERTS = {
    "experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    "experts.down_proj": ("ffn_down_exps.weight",),
    "experts.down_proj_bias": ("ffn_down_exps.bias",),
}
_NEMOTRON_H: dict[str, Any] = {
    "fields": states.nemotron_h,
    "own_fields": True,
    "halves_interleaved": True,
    "restored": states.mamba,
}
_DELTA_NET: dict[str, Any] = {
    "fields": states.qwen3next,
    "partial_rotary": True,
    "stored_norm_offset": 1.0,
    "plain_norms": ("linear_attn.norm.weight",),
}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(name="LlamaForCausalLM", fields=_llama, halves_interleaved=True),
    "qwen2": Architecture(name="Qwen2ForCausalLM", fields=lambda m: {"use_sliding_window": False}),
    "qwen3": Architecture(name="Qwen3ForCausalLM", fields=lambda m: {"use_sliding_window": False, "attention_bias": False}),
    "gemma": Architecture(name="GemmaForCausalLM", fields=_gemma, stored_norm_offset=1.0),
    "gemma2": Architecture(name="Gemma2ForCausalLM", fields=_gemma2, stored_norm_offset=1.0),
    "gemma3": Architecture(name="Gemma3ForCausalLM", fields=_gemma3, stored_norm_offset=1.0),
    "gemma3n": Architecture(name="Gemma3nForCausalLM", partial_rotary=True, fields=gemma3n),
    "gemma4": Architecture(
        name="Gemma4ForCausalLM",
        partial_rotary=True,
        fields=gemma4,
        joined={"router.scale": ("ffn_gate_inp.scale",), "router.per_expert_scale": ("ffn_down_exps.scale",)},
    ),
    "gpt2": Architecture(name="GPT2LMHeadModel", fields=own.gpt2, own_fields=True, transposed=("c_attn", "c_proj", "c_fc")),
    "granite": Architecture(name="GraniteForCausalLM", fields=_granite, halves_interleaved=True),
    "smollm3": Architecture(name="SmolLM3ForCausalLM", fields=_smollm3, halves_interleaved=True),
    "olmo2": Architecture(name="Olmo2ForCausalLM", fields=_olmo2),
    "phi3": Architecture(name="Phi3ForCausalLM", fields=_phi3, partial_rotary=True),
    "phi2": Architecture(name="PhiForCausalLM", fields=_phi2, layer_norm=True, partial_rotary=True),
    "stablelm": Architecture(name="StableLmForCausalLM", fields=_stablelm, layer_norm=True, partial_rotary=True),
    "command-r": Architecture(name="CohereForCausalLM", fields=_cohere, layer_norm=True),
    "cohere2": Architecture(name="Cohere2ForCausalLM", fields=_cohere2, layer_norm=True),
    "falcon": Architecture(name="FalconForCausalLM", fields=own.falcon, own_fields=True, qkv_by_kind=True),
    "bloom": Architecture(name="BloomForCausalLM", fields=own.bloom, own_fields=True, qkv_by_kind=True),
    "qwen2moe": Architecture(name="Qwen2MoeForCausalLM", fields=qwen2moe),
    "qwen3moe": Architecture(name="Qwen3MoeForCausalLM", fields=qwen3moe),
    "olmoe": Architecture(name="OlmoeForCausalLM", fields=lambda m: experts(m, "num_experts") | {"norm_topk_prob": False}),
    "granitemoe": Architecture(
        name="GraniteMoeForCausalLM",
        halves_interleaved=True,
        fields=lambda m: _granite_multipliers(m) | experts(m, "num_local_experts") | {"mlp_bias": None},
        joined={"input_linear.weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight")},
    ),
    "gpt-oss": Architecture(
        name="GptOssForCausalLM",
        fields=gpt_oss,
        joined=_GPT_OSS_EXPERTS,
        alternating=True,
        transposed=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "glm4": Architecture(
        name="Glm4ForCausalLM",
        partial_rotary=True,
        fields=lambda m: {"attention_bias": m.has("blk.0.attn_q.bias"), "rope_parameters": partial_rope(m)},
    ),
    "seed_oss": Architecture(name="SeedOssForCausalLM", fields=_seed_oss),
    "ernie4_5": Architecture(name="Ernie4_5ForCausalLM", fields=lambda m: {"use_bias": m.has("blk.0.attn_output.bias")}),
    "exaone4": Architecture(name="Exaone4ForCausalLM", fields=_exaone4),
    "starcoder2": Architecture(name="Starcoder2ForCausalLM", fields=_starcoder2, layer_norm=True),
    "gptneox": Architecture(name="GPTNeoXForCausalLM", fields=own.gptneox, own_fields=True, qkv_by_kind=True),
    "qwen": Architecture(name="QWenLMHeadModel", fields=own.qwen, own_fields=True),
    "glm4moe": Architecture(name="Glm4MoeForCausalLM", partial_rotary=True, fields=glm4moe),
    "arcee": Architecture(
        name="ArceeForCausalLM",
        halves_interleaved=True,
        fields=lambda m: {"attention_bias": m.has("blk.0.attn_output.bias"), "mlp_bias": m.has("blk.0.ffn_down.bias")},
    ),
    "apertus": Architecture(
        name="ApertusForCausalLM",
        fields=_apertus,
        of_metadata={"act_fn.alpha_p": "xielu.alpha_p", "act_fn.alpha_n": "xielu.alpha_n"},
    ),
    "baichuan": Architecture(
        name="BaichuanForCausalLM",
        halves_interleaved=True,
        fields=own.baichuan,
        own_fields=True,
        joined={"W_pack.weight": _QKV},
        joined_rows=True,
    ),
    "hunyuan-dense": Architecture(
        name="HunYuanDenseV1ForCausalLM", fields=lambda m: {"attention_bias": m.has("blk.0.attn_output.bias")}
    ),
    "internlm2": Architecture(
        name="InternLM2ForCausalLM",
        halves_interleaved=True,
        fields=lambda m: {"bias": m.has("blk.0.attn_output.bias")},
        joined={"attention.wqkv.weight": _QKV},
        joined_rows=True,
        qkv_by_kind=True,
    ),
    "minicpm": Architecture(name="MiniCPMForCausalLM", halves_interleaved=True, partial_rotary=True, fields=_minicpm),
    "mistral3": Architecture(name="Ministral3ForCausalLM", halves_interleaved=True, partial_rotary=True, fields=_mistral3),
    "mpt": Architecture(name="MptForCausalLM", fields=own.mpt, own_fields=True),
    "nemotron": Architecture(
        name="NemotronForCausalLM", fields=_nemotron, stored_norm_offset=1.0, layer_norm=True, partial_rotary=True
    ),
    "olmo": Architecture(name="OlmoForCausalLM", fields=_olmo, halves_interleaved=True, layer_norm=True),
    "starcoder": Architecture(name="GPTBigCodeForCausalLM", fields=own.starcoder, own_fields=True),
    "ernie4_5-moe": Architecture(name="Ernie4_5_MoeForCausalLM", fields=ernie4_5_moe),
    "llama4": Architecture(
        name="Llama4ForCausalLM",
        fields=llama4,
        joined={
            "experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
            "experts.down_proj": ("ffn_down_exps.weight",),
        },
        transposed=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "minimax-m2": Architecture(name="MiniMaxM2ForCausalLM", partial_rotary=True, fields=minimax_m2),
    "phimoe": Architecture(name="PhiMoEForCausalLM", partial_rotary=True, fields=phimoe),
    "lfm2": Architecture(name="Lfm2ForCausalLM", fields=states.lfm2, restored=states.short_conv),
    "lfm2moe": Architecture(name="Lfm2MoeForCausalLM", fields=states.lfm2, restored=states.short_conv),
    "granitehybrid": Architecture(
        name="GraniteMoeHybridForCausalLM",
        fields=states.granitehybrid,
        halves_interleaved=True,
        joined={
            "block_sparse_moe.input_linear.weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
            "shared_mlp.input_linear.weight": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
            "shared_mlp.output_linear.weight": ("ffn_down_shexp.weight",),
        },
        joined_rows=True,
        restored=states.mamba,
    ),
    "falcon-h1": Architecture(name="FalconH1ForCausalLM", fields=states.falcon_h1, restored=states.mamba),
    "nemotron_h": Architecture(name="NemotronHForCausalLM", **_NEMOTRON_H),
    "nemotron_h_moe": Architecture(name="NemotronHForCausalLM", **_NEMOTRON_H),
    "qwen3next": Architecture(
        name="Qwen3NextForCausalLM",
        joined={"in_proj_qkvz.weight": ("attn_qkv.weight", "attn_gate.weight")},
        joined_rows=True,
        restored=states.delta_net,
        **_DELTA_NET,
    ),
    "qwen35": Architecture(name="Qwen3_5ForCausalLM", restored=states.tiled_delta_net, **_DELTA_NET),
    "qwen35moe": Architecture(
        name="Qwen3_5MoeForCausalLM",
        joined={
            "experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
            "experts.down_proj": ("ffn_down_exps.weight",),
        },
        restored=states.tiled_delta_net,
        **_DELTA_NET,
    ),
    "deepseek2": Architecture(
        name="DeepseekV3ForCausalLM",
        fields=deepseek2,
        own_fields=True,
        joined={"kv_b_proj.weight": _LATENT},
        swapped=_LATENT[:1],
        flattened=("kv_b_proj",),
    ),
}
"""By general.architecture. Whether the family is supported is checked later, by `family_of`."""


def config_json(file: GGUFFile) -> JsonObject:
    """The metadata in the fields of a Hugging Face `config.json`."""
    kind = file.metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{file.path}: GGUF architecture {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if "token_embd.weight" not in file.tensors:
        if not file.tensors:
            raise ValueError(f"{file.path} holds a vocabulary, not a model")
        raise ValueError(f"{file.path} has no tensor 'token_embd.weight'; the file is incomplete, convert it again")
    architecture, m = ARCHITECTURES[kind], Metadata(file)
    if m.get("block_count") > len(file.tensors):  # checked before anything loops over it
        raise m.refusal(
            f"{kind}.block_count is {m.get('block_count'):,}, but the file holds only {len(file.tensors)} "
            "tensors; it is corrupt, download it again"
        )
    eos = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    config = {
        "architectures": [architecture.name],
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(id for id in eos if id is not None)),
    }
    if not architecture.own_fields:
        config |= llama_like(m, layer_norm=architecture.layer_norm, partial_rotary=architecture.partial_rotary)
    config |= architecture.fields(m)
    m.refuse_unread()
    return {name: value for name, value in config.items() if value is not None}
