"""The fields of a Hugging Face `config.json`: each one is read, known to be harmless, refused, or named in a warning."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.models.config import ModelConfig

log = logging.getLogger(__name__)

# Fields of config.json that do not change what a forward pass computes: training, generation defaults, bookkeeping.
_INERT = frozenset(
    {
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "auto_map",
        "_name_or_path",
        "name_or_path",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "sep_token_id",
        "cls_token_id",
        "unk_token_id",
        "decoder_start_token_id",
        "forced_eos_token_id",
        "tokenizer_class",
        "initializer_range",
        "init_std",
        "initializer_factor",
        "output_router_logits",
        "router_aux_loss_coef",
        "id2label",
        "label2id",
        "problem_type",
        "num_labels",
        "task_specific_params",
        "pretraining_tp",
        "vocab_file",
        "_attn_implementation_autoset",
        "attn_implementation",
        "transformers.js_config",
        "is_llama_config",
        "unsloth_version",
        "unsloth_fixed",
        "max_length",
        "min_length",
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "do_sample",
        "num_beams",
        "chunk_size_feed_forward",
        "return_dict",
        "prefix",
        "layerdrop",
        "cache_implementation",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
        "summary_last_dropout",
        "gradient_checkpointing",
    }
)
# Fields that change what some released model computes: a family that does not read one of them cannot compute a model that
# sets it. The pattern covers groups of names, such as `moe_intermediate_size` and `moe_k`.
_CHANGES_OUTPUT = frozenset(
    {
        # attention
        "alibi",
        "attention_chunk_size",
        "attention_window_size",
        "attention_types",
        "attn_config",
        "attn_output_gate",
        "attn_logit_softcapping",
        "attn_scale",
        "attn_temperature_tuning",
        "attn_type_list",
        "floor_scale",
        "clip_qkv",
        "dual_chunk_attention_config",
        "full_attention_interval",
        "full_attn_idxs",
        "hybrid_override_pattern",
        "layer_types",
        "layers_block_type",
        "multi_query",
        "new_decoder_architecture",
        "num_kv_shared_layers",
        "position_embedding_type",
        "qk_layernorm",
        "qk_norm",
        "query_pre_attn_scalar",
        "scale_attn_by_inverse_layer_idx",
        "sliding_window",
        "sparse_attention_config",
        "time_step_limit",
        "use_alibi",
        "use_conv_bias",
        "use_bidirectional_attention",
        "use_logn_attn",
        "use_qk_norm",
        "use_sliding_window",
        "window_size",
        "attention_k_eq_v",
        "enable_moe_block",
        "top_k_experts",
        "global_head_dim",
        "num_global_key_value_heads",
        "per_layer_config",
        # rotary embeddings
        "llama_4_scaling",
        "no_rope_layers",
        "no_rope_layer_interval",
        "partial_rotary_factor",
        "rope_interleave",
        "rope_interleaved",
        "rope_local_base_freq",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "rotary_dim",
        "rotary_emb_base",
        "rope_pct",
        "rotary_pct",
        "rotary_scaling_factor",
        "use_dynamic_ntk",
        # biases
        "attention_bias",
        "attention_out_bias",
        "bias",
        "enable_bias",
        "lm_head_bias",
        "mlp_bias",
        "qkv_bias",
        "use_bias",
        "use_qkv_bias",
        # scales and caps
        "dim_model_base",
        "embedding_scale",
        "final_logit_softcapping",
        "logit_scale",
        "logits_scaling",
        "logits_soft_cap",
        "scale_depth",
        "scale_emb",
        # arrangement of a layer
        "apply_residual_connection_post_layernorm",
        "hc_mult",
        "hidden_size_per_layer_input",
        "laurel_rank",
        "layer_switch",
        "parallel_attn",
        "parallel_residual",
        "use_double_wide_mlp",
        "use_parallel_block",
        "use_parallel_embedding",
        "use_parallel_residual",
        # experts
        "decoder_sparse_step",
        "experts_per_token",
        "first_k_dense_replace",
        "interleave_moe_layer_step",
        "mlp_layer_types",
        "mlp_only_layers",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "norm_topk_prob",
        "num_dense_layers",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
        "routed_scaling_factor",
        "scoring_func",
        "shared_expert_intermediate_size",
        "swiglu_alpha",
        "swiglu_limit",
        "topk_group",
        "topk_method",
        "use_expert_bias",
        # latent attention
        "kv_lora_rank",
        "q_lora_rank",
        # attention to images
        "cross_attention_layers",
    }
)
_CHANGES_OUTPUT_PATTERN = re.compile(
    r"(altup|conv|index|indexer|linear|mamba|moe|mup|ssm)_.*|.*_multipliers?|.*activation_sparsity.*|.*_clip_limit"
)
# Fields of a multimodal model outside its text model. They do not affect text-only input.
_AROUND_TEXT = frozenset(
    {
        "vision_config",
        "text_config",
        "image_token_index",
        "image_token_id",
        "video_token_id",
        "vision_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "boi_token_index",
        "boi_token_id",
        "eoi_token_index",
        "eoi_token_id",
        "mm_tokens_per_image",
        "multimodal_projector_bias",
        "projector_hidden_act",
        "spatial_merge_size",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "vision_aspect_ratio",
        "image_seq_length",
        "image_grid_pinpoints",
        "use_image_newline_parameter",
        "ignore_index",
        "media_placeholder_token_id",
        "downsample_ratio",
        "scale_factor",
        "adapter_layer_norm_eps",
        "alignment_intermediate_size",
        "boa_token_id",
        "audio_token_id",
        "audio_config",
        "audio_soft_tokens_per_image",
        "vision_soft_tokens_per_image",
        "eoa_token_id",
        "eoa_token_index",
        "use_unified_vision_chunk",
        "video_placeholder",
    }
)
_INERT_ENDINGS = ("_dropout", "_pdrop", "dropout")


class Fields(Mapping[str, Any]):
    """A config.json that records which of its fields have been read, so that none is overlooked."""

    def __init__(self, hf: JsonFields) -> None:
        self._hf = hf
        self._read: set[str] = set()
        self._without_effect: JsonObject = {}

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._hf[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._hf)

    def __len__(self) -> int:
        return len(self._hf)

    def __contains__(self, name: object) -> bool:
        return name in self._hf

    def first(self, *names: str, default: Any = None) -> Any:
        """The value of the first of these fields that is present and not null, else `default`; all of them count as read.

        Raises KeyError if there is neither.
        """
        self.ignore(*names)
        value = next((self._hf[name] for name in names if self._hf.get(name) is not None), default)
        if value is None:
            raise KeyError(names[0])
        return value

    def ignore(self, *names: str) -> None:
        """Counts these fields as read, because they have no effect in this family or were checked elsewhere."""
        self._read.update(names)

    def have_no_effect(self, **fields: Any) -> None:
        """Records fields, with their values, that have an effect in other implementations but not in transformers."""
        self.ignore(*fields)
        self._without_effect.update(fields)

    def check_unread(self, *, strict: bool) -> None:
        """Checks the fields that were not read: harmless or unset ones are ignored, others refused or named in a warning.

        Raises ValueError, with the names of all of them, if any is known to change the output, or if there are any at all
        and `strict` is set.
        """
        unread = {
            name: self._hf[name] for name in sorted(self._hf.keys() - self._read) if not is_harmless(name, self._hf[name])
        }
        changes = [name for name in unread if changes_output(name)]
        if changes:
            shown = _shown({name: unread[name] for name in changes})
            raise ValueError(
                f"config.json has {shown}, which would change the output and is not supported for this "
                "architecture; remove it from config.json if the model was trained without it"
            )
        if unread and strict:
            raise ValueError(
                f"config.json has {_shown(unread)}, which is unknown for this architecture; "
                "strict_config=False loads the model without it"
            )
        if self._without_effect and strict:
            raise ValueError(
                f"config.json has {_shown(self._without_effect)}, which transformers ignores for this architecture and "
                "other implementations may not; strict_config=False ignores it as well"
            )
        if unread:
            _warn(tuple(unread))
        if self._without_effect:
            _warn_of_no_effect(_shown(self._without_effect))


def is_harmless(name: str, value: object) -> bool:
    """Whether a field of config.json is unset, or has nothing to do with what a forward pass computes."""
    is_unset = value is None or value is False or value in (0, "", [], {})
    return is_unset or name in _INERT or name.endswith(_INERT_ENDINGS) or name.startswith("_")


def changes_output(name: str) -> bool:
    """Whether some released model computes something else if this field of config.json is set."""
    return name in _CHANGES_OUTPUT or _CHANGES_OUTPUT_PATTERN.fullmatch(name) is not None


@functools.cache  # one warning per process, even if the checkpoint is opened several times
def _warn(names: tuple[str, ...]) -> None:
    log.warning(
        "config.json has fields that are unknown for this architecture and ignored: %s; strict_config=True refuses them",
        ", ".join(names),
    )


@functools.cache
def _warn_of_no_effect(shown: str) -> None:
    log.warning(
        "config.json has %s, which is ignored for this architecture, as in transformers; other implementations may compute "
        "something else; strict_config=True refuses it",
        shown,
    )


def _shown(values: Mapping[str, object]) -> str:
    """`a=1 and b=2`; long values are shortened."""
    texts = [f"{name}={text if len(text := repr(value)) <= 60 else text[:57] + '...'}" for name, value in values.items()]
    return " and ".join(texts)


def reads_every_field(read: Callable[[Fields], ModelConfig]) -> Callable[..., ModelConfig]:
    """`config_from_hf(hf, *, strict=False)`, which checks the fields that `read` did not read; see `Fields.check_unread`."""

    @functools.wraps(read)
    def config_from_hf(hf: JsonFields, *, strict: bool = False) -> ModelConfig:
        fields = Fields(text_part(hf) if is_multimodal(hf) else hf)
        config = read(fields)
        fields.check_unread(strict=strict)
        return config

    return config_from_hf


def is_multimodal(hf: JsonFields) -> bool:
    """Whether a config.json describes more than a text model, whose fields may be beside the others."""
    return "text_config" in hf or "vision_config" in hf


def text_part(hf: JsonFields) -> JsonObject:
    """The fields of the text model of a multimodal checkpoint, with the outer fields as defaults."""
    around, text = (
        {name: value for name, value in part.items() if name not in _AROUND_TEXT} for part in (hf, hf.get("text_config", {}))
    )
    ends = {name: around[name] for name in ("eos_token_id", "bos_token_id") if around.get(name)}
    return around | text | ends
