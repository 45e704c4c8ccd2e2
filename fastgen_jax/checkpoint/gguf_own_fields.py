"""Translates the metadata of GGUF architectures that name their sizes unlike Llama; see gguf_architectures.py."""

from __future__ import annotations

from fastgen_jax.checkpoint.gguf_metadata import Metadata
from fastgen_jax.json_types import JsonObject

_NEOX_20B_LAYERS = 44  # the 20B has the approximate GELU; Pythia, Dolly and the others have the exact one
_QWEN_TRAINED_LEN = 2048  # the shortest of any release
_BAICHUAN_13B_LAYERS = 40


def gpt2(m: Metadata) -> JsonObject:
    width = m.get("embedding_length")
    return {
        "n_embd": width,
        "n_layer": m.get("block_count"),
        "n_head": m.get("attention.head_count"),
        "n_positions": m.get("context_length"),
        "n_inner": m.get("feed_forward_length"),
        "layer_norm_epsilon": m.get("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "vocab_size": m.file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": not m.has("output.weight"),
    }


def falcon(m: Metadata) -> JsonObject:
    width, heads, kv_heads = m.get("embedding_length"), m.get("attention.head_count"), m.get("attention.head_count_kv")
    grouped = m.has("blk.0.attn_norm_2.weight")
    if m.has("blk.0.attn_qkv.bias") or (kv_heads > 1 and not grouped):
        raise m.refusal(
            "this is not Falcon 7B, 40B or 180B; the ALiBi of Falcon-RW and the rotary base of Falcon 11B are "
            "not recorded in GGUF, use the Hugging Face checkpoint"
        )
    return {
        "hidden_size": width,
        "num_hidden_layers": m.get("block_count"),
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "new_decoder_architecture": grouped,
        "multi_query": True,
        "parallel_attn": True,
        "ffn_hidden_size": m.get("feed_forward_length"),
        "max_position_embeddings": m.get("context_length"),
        "layer_norm_epsilon": m.get("attention.layer_norm_epsilon"),
        "vocab_size": m.file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": not m.has("output.weight"),
    }


def bloom(m: Metadata) -> JsonObject:
    heads = m.get("attention.head_count")
    m.only("attention.head_count_kv", heads)
    return {
        "hidden_size": m.get("embedding_length"),
        "n_layer": m.get("block_count"),
        "n_head": heads,
        "n_inner": m.get("feed_forward_length"),
        "seq_length": m.get("context_length"),
        "layer_norm_epsilon": m.get("attention.layer_norm_epsilon"),
        "vocab_size": m.file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": not m.has("output.weight"),
    }


def gptneox(m: Metadata) -> JsonObject:
    heads, width = m.get("attention.head_count"), m.get("embedding_length")
    turned = m.get("rope.dimension_count")
    approximate = m.get("block_count") == _NEOX_20B_LAYERS
    return {
        "vocab_size": m.file.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "num_hidden_layers": m.get("block_count"),
        "num_attention_heads": heads,
        "intermediate_size": m.get("feed_forward_length"),
        "max_position_embeddings": m.get("context_length"),
        "layer_norm_eps": m.get("attention.layer_norm_epsilon"),
        "use_parallel_residual": m.get("use_parallel_residual"),
        "attention_bias": m.has("blk.0.attn_output.bias"),
        "hidden_act": "gelu_fast" if approximate else "gelu",
        # The rotary base is not recorded, and the same in every release.
        "rotary_emb_base": float(m.get("rope.freq_base", 10_000.0)),
        "rotary_pct": turned / (width // heads),
        "tie_word_embeddings": not m.has("output.weight"),
    }


def qwen(m: Metadata) -> JsonObject:
    # Beyond its trained length the model scales queries and its rotary base. That length is not recorded and differs
    # between releases; up to the shortest, all of them compute the same.
    heads, width = m.get("attention.head_count"), m.get("embedding_length")
    m.only("attention.head_count_kv", heads)
    m.only("rope.dimension_count", width // heads)
    context = min(m.get("context_length"), _QWEN_TRAINED_LEN)
    eps = (
        "attention.layer_norm_rms_epsilon"
        if "attention.layer_norm_rms_epsilon" in m.fields
        else ("attention.layer_norm_epsilon")
    )  # depends on the version of the converter
    return {
        "vocab_size": m.file.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "num_hidden_layers": m.get("block_count"),
        "num_attention_heads": heads,
        "kv_channels": width // heads,
        "intermediate_size": m.get("feed_forward_length"),
        "layer_norm_epsilon": m.get(eps),
        "rotary_emb_base": float(m.get("rope.freq_base", 10_000.0)),
        "seq_length": context,
        "max_position_embeddings": context,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
        "tie_word_embeddings": not m.has("output.weight"),
    }


def starcoder(m: Metadata) -> JsonObject:
    # The activation is not recorded, and the same in every release.
    m.only("attention.head_count_kv", 1)
    width = m.get("embedding_length")
    return {
        "n_embd": width,
        "n_layer": m.get("block_count"),
        "n_head": m.get("attention.head_count"),
        "n_positions": m.get("context_length"),
        "n_inner": m.get("feed_forward_length"),
        "layer_norm_epsilon": m.get("attention.layer_norm_epsilon"),
        "activation_function": "gelu_pytorch_tanh",
        "multi_query": True,
        "vocab_size": m.file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": not m.has("output.weight"),
    }


def mpt(m: Metadata) -> JsonObject:
    heads, width = m.get("attention.head_count"), m.get("embedding_length")
    m.only("attention.head_count_kv", heads)
    m.only("attention.max_alibi_bias", 8.0)
    m.only("feed_forward_length", 4 * width)
    return {
        "d_model": width,
        "n_layers": m.get("block_count"),
        "n_heads": heads,
        "max_seq_len": m.get("context_length"),
        "layer_norm_epsilon": m.get("attention.layer_norm_epsilon"),
        "attn_config": {"clip_qkv": m.get("attention.clamp_kqv", 0.0) or None},
        "vocab_size": m.file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": not m.has("output.weight"),
    }


def baichuan(m: Metadata) -> JsonObject:
    """The 13B have ALiBi, and no `max_position_embeddings` in config.json; only the depth identifies them."""
    heads, width = m.get("attention.head_count"), m.get("embedding_length")
    m.only("attention.head_count_kv", heads)
    m.only("rope.dimension_count", width // heads)
    m.only("rope.freq_base", 10_000.0)
    context = "model_max_length" if m.get("block_count") == _BAICHUAN_13B_LAYERS else "max_position_embeddings"
    return {
        "hidden_size": width,
        "num_hidden_layers": m.get("block_count"),
        "num_attention_heads": heads,
        "intermediate_size": m.get("feed_forward_length"),
        context: m.get("context_length"),
        "rms_norm_eps": m.get("attention.layer_norm_rms_epsilon"),
        "vocab_size": m.file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": not m.has("output.weight"),
    }
