"""Regenerates `gguf/`: a tiny model of every supported GGUF architecture, written by llama.cpp's own converter.

    python tests/reference/make_gguf.py .../llama.cpp [ARCH ...]   # needs torch, transformers and llama.cpp's scripts

Each architecture has ARCH.gguf (float16, with a minimal tokenizer) and ARCH.json, the original config.json. The weights are
those of `gguf_values.py`.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from gguf_values import values

SIZES = {
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
LFM2 = {**SIZES, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3}
GRANITE_HYBRID = {
    **SIZES,
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    "shared_intermediate_size": 40,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,  # as in every release; llama.cpp would divide the norm into groups
    "mamba_d_state": 16,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
DELTA_NET: dict[str, Any] = {
    **SIZES,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}
OF_IMAGES = DELTA_NET | {
    "rope_parameters": DELTA_NET["rope_parameters"] | {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
}
NEMOTRON_H = {
    **{name: value for name, value in SIZES.items() if name != "num_hidden_layers"},
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
}
GEMMA4 = {
    **SIZES,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 32,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
CONFIGS = {
    "llama": hf.LlamaConfig(**SIZES, attention_bias=False),
    "qwen2": hf.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": hf.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "gemma": hf.GemmaConfig(**SIZES, head_dim=16),
    "gemma2": hf.Gemma2Config(**SIZES, head_dim=16, sliding_window=32, query_pre_attn_scalar=16),
    "gemma3": hf.Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 7}, head_dim=16, sliding_window=32, query_pre_attn_scalar=16
    ),
    "gemma3n": hf.Gemma3nTextConfig(
        **{**SIZES, "num_hidden_layers": 7},
        head_dim=16,
        sliding_window=32,
        layer_types=[f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full", "sliding", "full")],
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0, 0.0, 0.0, 0.0],
        vocab_size_per_layer_input=280,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
    ),
    "gemma4": hf.Gemma4TextConfig(
        **{**GEMMA4, "num_hidden_layers": 6},
        layer_types=[f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "sliding", "full")],
        num_kv_shared_layers=3,
        use_double_wide_mlp=True,
        vocab_size_per_layer_input=280,
        hidden_size_per_layer_input=8,
    ),
    "gemma4-moe": hf.Gemma4TextConfig(
        **{**GEMMA4, "num_hidden_layers": 3},
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=24,
    ),
    "gpt2": hf.GPT2Config(vocab_size=280, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2),
    "granite": hf.GraniteConfig(
        **SIZES, attention_multiplier=0.25, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0
    ),
    "smollm3": hf.SmolLM3Config(**{**SIZES, "num_hidden_layers": 4}),
    "olmo2": hf.Olmo2Config(**SIZES),
    "olmo3": hf.Olmo3Config(
        **{**SIZES, "num_hidden_layers": 4},
        sliding_window=32,
        rope_parameters={
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": 1.1386294,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "phi3": hf.Phi3Config(**SIZES),
    "phi2": hf.PhiConfig(
        **{**SIZES, "num_key_value_heads": 4}, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "stablelm": hf.StableLmConfig(
        **SIZES,
        use_qkv_bias=True,
        use_parallel_residual=True,
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ),
    "stablelm-12b": hf.StableLmConfig(
        **SIZES,
        qk_layernorm=True,
        use_parallel_residual=True,
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ),
    "command-r": hf.CohereConfig(**SIZES, logit_scale=0.25, use_qk_norm=True, rope_parameters={"rope_theta": 8e6}),
    "cohere2": hf.Cohere2Config(**{**SIZES, "num_hidden_layers": 4}, sliding_window=32, logit_scale=0.25),
    "falcon": hf.FalconConfig(
        vocab_size=280,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    "bloom": hf.BloomConfig(
        vocab_size=280, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, seq_length=128
    ),
    "mixtral": hf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen2moe": hf.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=40),
    "qwen3moe": hf.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, norm_topk_prob=True),
    "olmoe": hf.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "granitemoe": hf.GraniteMoeConfig(
        **SIZES,
        num_local_experts=4,
        num_experts_per_tok=2,
        attention_multiplier=0.25,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
    ),
    "gpt-oss": hf.GptOssConfig(
        **{**SIZES, "num_hidden_layers": 3}, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=32
    ),
    "glm4": hf.Glm4Config(
        **SIZES, head_dim=16, attention_bias=True, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "seed_oss": hf.SeedOssConfig(**SIZES, head_dim=16, attention_bias=True),
    "ernie4_5": hf.Ernie4_5Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "exaone4": hf.Exaone4Config(**{**SIZES, "num_hidden_layers": 4}, sliding_window=32),
    "starcoder2": hf.Starcoder2Config(**SIZES, sliding_window=4096),
    "gptneox": hf.GPTNeoXConfig(
        **{**SIZES, "num_key_value_heads": 4},
        tie_word_embeddings=False,
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ),
    "glm4moe": hf.Glm4MoeConfig(
        **SIZES,
        head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        n_shared_experts=2,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        use_qk_norm=True,
        attention_bias=True,
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "arcee": hf.ArceeConfig(**SIZES, tie_word_embeddings=False),
    "apertus": hf.ApertusConfig(**SIZES),
    "hunyuan-dense": hf.HunYuanDenseV1Config(**SIZES, head_dim=16),
    "mpt": hf.MptConfig(
        vocab_size=280,
        d_model=32,
        n_layers=2,
        n_heads=4,
        max_seq_len=128,
        attn_config={"clip_qkv": 6.0},
        bos_token_id=1,
        eos_token_id=2,
    ),
    "nemotron": hf.NemotronConfig(**SIZES, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    "olmo": hf.OlmoConfig(**SIZES, clip_qkv=8.0),
    "starcoder": hf.GPTBigCodeConfig(
        vocab_size=280, n_embd=32, n_layer=2, n_head=4, n_inner=128, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "mistral3": hf.Ministral3Config(
        **SIZES,
        head_dim=16,
        sliding_window=None,
        rope_parameters=DEEPSEEK_ROPE | {"llama_4_scaling_beta": 0.1},
    ),
    "ernie4_5-moe": hf.Ernie4_5_MoeConfig(
        **SIZES,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_intermediate_size=24,
        moe_layer_start_index=1,
        moe_layer_interval=1,
    ),
    "llama4": hf.Llama4TextConfig(
        **{**SIZES, "num_hidden_layers": 4},
        head_dim=16,
        intermediate_size_mlp=64,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "minimax-m2": hf.MiniMaxM2Config(
        **SIZES,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    ),
    "phimoe": hf.PhimoeConfig(
        **SIZES,
        num_local_experts=4,
        attention_bias=True,
        lm_head_bias=True,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.125, 1.25, 1.5],
            "long_factor": [1.0, 1.5, 2.0, 4.0],
            "short_mscale": 1.243163121016122,
            "long_mscale": 1.243163121016122,
            "original_max_position_embeddings": 32,
        },
    ),
    "lfm2": hf.Lfm2Config(**LFM2, block_auto_adjust_ff_dim=True, block_multiple_of=8, tie_embedding=True),
    "lfm2moe": hf.Lfm2MoeConfig(
        **LFM2, num_dense_layers=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, tie_embedding=True
    ),
    "granitehybrid": hf.GraniteMoeHybridConfig(
        **GRANITE_HYBRID | {"intermediate_size": 40}, num_local_experts=0, num_experts_per_tok=0
    ),
    "granitehybrid-moe": hf.GraniteMoeHybridConfig(**GRANITE_HYBRID, num_local_experts=4, num_experts_per_tok=2),
    "qwen3next": hf.Qwen3NextConfig(
        **DELTA_NET, **EXPERTS, shared_expert_intermediate_size=40, decoder_sparse_step=1, norm_topk_prob=True
    ),
    "qwen35": hf.Qwen3_5TextConfig(**OF_IMAGES),
    "qwen35moe": hf.Qwen3_5MoeTextConfig(**OF_IMAGES, **EXPERTS, shared_expert_intermediate_size=40),
    "falcon-h1": hf.FalconH1Config(
        **SIZES,
        head_dim=16,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=2,
        mamba_d_state=16,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
        embedding_multiplier=2.0,
        lm_head_multiplier=0.5,
        key_multiplier=0.5,
        attention_in_multiplier=0.5,
        attention_out_multiplier=2.0,
        ssm_in_multiplier=2.0,
        ssm_multipliers=[0.5, 2.0, 1.0, 0.25, 4.0],
        ssm_out_multiplier=0.25,
        mlp_multipliers=[2.0, 0.5],
    ),
    "nemotron_h": hf.NemotronHConfig(**NEMOTRON_H, hybrid_override_pattern="M-*M"),
    "nemotron_h_moe": hf.NemotronHConfig(
        **NEMOTRON_H,
        hybrid_override_pattern="ME*M",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=40,
        routed_scaling_factor=2.5,
    ),
    "deepseek2": hf.DeepseekV3Config(
        **LATENT,
        q_lora_rank=24,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        rope_parameters=DEEPSEEK_ROPE,
    ),
    "deepseek2-lite": hf.DeepseekV2Config(
        **LATENT, q_lora_rank=None, n_routed_experts=64, n_group=1, topk_group=1, topk_method="greedy", norm_topk_prob=False
    ),
}
# Fields that only the converter reads, or that the releases contain but transformers does not write.
FURTHER = {
    "gpt2": {"n_ctx": 128},
    "cohere2": {"rotary_pct": 1.0},
    "gptneox": {"rotary_pct": 0.25},
    "deepseek2": {"scoring_func": "sigmoid"},
    "minimax-m2": {"rotary_dim": 8, "scoring_func": "sigmoid"},
    "mpt": {"architectures": ["MPTForCausalLM"]},
    "phimoe": {"architectures": ["PhiMoEForCausalLM"]},
    "deepseek2-lite": {"scoring_func": "softmax"},
    "nemotron_h": {
        "hybrid_override_pattern": "M-*M",
        **dict.fromkeys(("num_experts_per_tok", "n_routed_experts", "n_group", "topk_group")),
    },
    "granitehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "granitehybrid-moe": {"layer_types": ["mamba", "attention", "mamba"]},
}
# The converter expects layers for multi-token prediction, unless it is told that there are none.
WITHOUT_PREDICTION = ("qwen3next", "qwen35", "qwen35moe")
LLAMA_LIKE = {
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN_1 = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": 128,
    "max_position_embeddings": 128,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "use_dynamic_ntk": False,
    "use_logn_attn": False,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MINICPM = {"scale_emb": 3.0, "scale_depth": 1.4, "dim_model_base": 16, "num_key_value_heads": 2, "rope_theta": 1e4}
QWEN_1_SHAPES = {
    "transformer.wte.weight": (280, 32),
    "lm_head.weight": (280, 32),
    "transformer.ln_f.weight": (32,),
    **{
        f"transformer.h.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            "ln_1.weight": (32,),
            "ln_2.weight": (32,),
            "attn.c_attn.weight": (96, 32),
            "attn.c_attn.bias": (96,),
            "attn.c_proj.weight": (32, 32),
            "mlp.w1.weight": (48, 32),
            "mlp.w2.weight": (48, 32),
            "mlp.c_proj.weight": (32, 48),
        }.items()
    },
}


def llama_shapes(*, embed: str, head: str, names: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model of two layers with the sizes above; `names` are those of the tensors of a layer."""
    outside = {f"{embed}.weight": (280, 32), f"{head}.weight": (280, 32), "model.norm.weight": (32,)}
    return outside | {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in names.items()}


MLP = {"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}
NORMS = {"input_layernorm": (32,), "post_attention_layernorm": (32,)}
# Fields and shapes of the families that transformers does not have.
OF_THEIR_OWN_CODE: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "qwen": (QWEN_1, QWEN_1_SHAPES),
    "baichuan": (
        LLAMA_LIKE | {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan"},
        llama_shapes(
            embed="model.embed_tokens",
            head="lm_head",
            names={"self_attn.W_pack": (96, 32), "self_attn.o_proj": (32, 32), **MLP, **NORMS},
        ),
    ),
    "internlm2": (
        LLAMA_LIKE
        | {
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "num_key_value_heads": 2,
            "bias": False,
            "rope_theta": 1e6,
        },
        llama_shapes(
            embed="model.tok_embeddings",
            head="output",
            names={
                "attention.wqkv": (64, 32),
                "attention.wo": (32, 32),
                "feed_forward.w1": (48, 32),
                "feed_forward.w2": (32, 48),
                "feed_forward.w3": (48, 32),
                "attention_norm": (32,),
                "ffn_norm": (32,),
            },
        ),
    ),
    "minicpm": (
        LLAMA_LIKE | MINICPM | {"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm"},
        llama_shapes(
            embed="model.embed_tokens",
            head="lm_head",
            names={
                "self_attn.q_proj": (32, 32),
                "self_attn.k_proj": (16, 32),
                "self_attn.v_proj": (16, 32),
                "self_attn.o_proj": (32, 32),
                **MLP,
                **NORMS,
            },
        ),
    ),
}


def main() -> None:
    """Writes the architectures named on the command line, or all."""
    converter = Path(sys.argv[1]) / "convert_hf_to_gguf.py"
    home = Path(__file__).with_name("gguf")
    home.mkdir(exist_ok=True)
    for name in sys.argv[2:] or (*CONFIGS, *OF_THEIR_OWN_CODE):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "model.safetensors")
            fields, shapes = OF_THEIR_OWN_CODE.get(name) or made(CONFIGS[name], file)
            tensors = {key: torch.from_numpy(values(key, shape)) for key, shape in shapes.items()}
            save_file(tensors, file)
            Path(folder, "config.json").write_text(json.dumps(fields | FURTHER.get(name, {})))
            write_tokenizer(Path(folder))
            subprocess.run(
                [
                    sys.executable,
                    Path(__file__).with_name("gguf_converter.py"),
                    converter,
                    folder,
                    "--outtype",
                    "f16",
                    "--outfile",
                    home / f"{name}.gguf",
                    *(["--no-mtp"] if name in WITHOUT_PREDICTION else []),
                ],
                check=True,
                env={**os.environ, "PYTHONPATH": f"{converter.parent / 'gguf-py'}:{converter.parent}"},
            )
            (home / f"{name}.json").write_text(json.dumps(fields))


def made(config: hf.PretrainedConfig, file: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The config.json fields and tensor shapes of a model, as transformers saves them beside `file`."""
    hf.AutoModelForCausalLM.from_config(config).float().save_pretrained(file.parent)
    with safe_open(file, "pt") as saved:  # names in the file can differ from those in memory
        shapes = {key: tuple(saved.get_slice(key).get_shape()) for key in list(saved.keys())}
    if config.model_type == "qwen3_5_moe_text":
        shapes = joined_experts(shapes)
    # As it is published; transformers 5 saves it under another name.
    shapes = {name.replace("backbone.embedding.", "backbone.embeddings."): shape for name, shape in shapes.items()}
    return json.loads(file.with_name("config.json").read_text()), shapes


def joined_experts(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes with one tensor for the experts of a layer, as Qwen3.5 is published."""
    first = ".experts.0.down_proj.weight"
    for name in [name for name in shapes if name.endswith(first)]:
        block, (width, inner) = name.removesuffix(".0.down_proj.weight"), shapes[name]
        own = [other for other in shapes if other.startswith(f"{block}.")]
        count = len(own) // 3  # gate, up and down
        shapes = {other: shape for other, shape in shapes.items() if other not in own}
        shapes |= {f"{block}.gate_up_proj": (count, 2 * inner, width), f"{block}.down_proj": (count, width, inner)}
    return shapes


def write_tokenizer(folder: Path) -> None:
    """Writes the files of both kinds of tokenizer, as minimal input for the converter."""
    out = io.BytesIO()
    lines = ["one two three four five six seven", "eight nine ten eleven twelve"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 50),
        model_writer=out,
        vocab_size=280,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))


if __name__ == "__main__":
    main()
