"""Which fields of a config.json are read, ignored, named in a warning, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastgen_jax.json_types import JsonObject
from fastgen_jax.models.families import FAMILIES, family_of, fields
from tests.models.parity import folder, variants


def hf_config(family: str, variant: str | None = None) -> JsonObject:
    """The config.json of a family's reference checkpoint, by default of its first variant, without quantization."""
    variant = variant or next(second for first, second in variants() if first == family)
    hf = json.loads((folder(family, variant) / "config.json").read_text())
    hf.pop("quantization_config", None)  # read by the checkpoint, not by the family
    return hf if variant != "not_normalized" else hf | {"norm_topk_prob": False}  # it has a warning of its own


@pytest.mark.parametrize(("family", "variant"), variants())
def test_unknown_fields_are_named_in_one_warning_or_refused(family, variant, caplog):
    hf = hf_config(family, variant)
    read = family_of(hf["architectures"][0]).config_from_hf
    unknown = {f"{family}_{variant}_welcome": "# Warning", "another_note": 1}
    assert read(hf | unknown) == read(hf | unknown) == read(hf)
    (warning,) = caplog.messages  # the second reading says nothing new
    assert f"ignored: another_note, {family}_{variant}_welcome;" in warning
    with pytest.raises(ValueError, match=f"another_note=1 and {family}_{variant}_welcome='# Warning', which is unknown"):
        read(hf | unknown, strict=True)
    assert read(hf | {"use_new_mathematics": False}, strict=True) == read(hf)


@pytest.mark.parametrize(("family", "variant"), variants())
def test_a_field_that_changes_the_output_of_other_models_is_refused(family, variant):
    hf = hf_config(family, variant)
    read = family_of(hf["architectures"][0]).config_from_hf
    with pytest.raises(ValueError, match=r"config.json has mup_scale=0.5 and ssm_scale=16, which would change the output"):
        read(hf | {"mup_scale": 0.5, "ssm_scale": 16})


def test_every_field_that_one_family_reads_is_refused_or_harmless_in_the_others():
    """A field that is neither would be ignored, with a warning, by a family that does not read it."""
    # Sizes, which the shapes of the tensors must match; settings that all families read or that mean nothing alone.
    alone = {
        *("intermediate_size_mlp", "router_jitter_noise", "text_config"),
        *("do_layer_norm_before", "ffn_dim", "ffn_hidden_size"),
        *("hidden_act", "hidden_activation", "layer_norm_elementwise_affine"),
        *("hidden_size", "intermediate_size", "kv_channels", "layer_norm_eps", "layer_norm_epsilon", "v_head_dim"),
        *("n_head_kv", "d_model", "max_seq_len", "n_heads", "n_layers", "norm_eps", "num_heads", "num_layers"),
        *("max_position_embeddings", "max_window_layers", "model_max_length", "n_embd", "n_head", "n_inner", "n_layer"),
        *("n_positions", "norm_epsilon", "num_attention_heads", "num_hidden_layers", "num_kv_heads", "seq_length"),
        *("num_ln_in_parallel_attn", "qk_nope_head_dim", "qk_rope_head_dim", "rms_norm_eps"),
        *("scale_attn_weights", "sliding_window_pattern", "tie_word_embeddings", "vocab_size"),
        *("attention_head_dim", "block_auto_adjust_ff_dim", "block_ff_dim", "block_multiple_of", "head_dim", "n_groups"),
        *("num_key_value_heads", "shared_intermediate_size", "tie_embedding", "word_embed_proj_dim"),
        "vocab_size_per_layer_input",
    }
    read = set()
    for module in FAMILIES.values():
        source = Path(module.__file__).read_text()
        read |= set(re.findall(r"""hf(?:\.get\(|\[|\.first\()"(\w+)\"""", source))
    assert {name for name in read if not (fields.changes_output(name) or fields.is_harmless(name, True))} == alone


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}}, 131_072),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 131_072),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, 65_536),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 65_536),
        # The field is the extended length already.
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 512}}, 32_768),
        (
            "llama",
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            32_768,
        ),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 16_384, "local_size": 8192}}, 16_384),
    ],
)
def test_rope_scaling_extends_the_context(family, changes, expected):
    hf = {name: value for name, value in hf_config(family).items() if not name.startswith("rope_")} | {
        "max_position_embeddings": 32_768
    }
    assert FAMILIES[family].config_from_hf(hf | changes, strict=True).max_context_len == expected


PUBLISHED = [
    ("phi3", {"full_attn_mod": 1, "interpolate_factor": 1}, {"full_attn_mod": 2}),
    ("gemma2", {"sliding_window_size": 4096, "sliding_window": 4096}, {"sliding_window_size": 512}),
    ("qwen3_moe", {"use_qk_norm": True, "qkv_bias": False}, {"use_qk_norm": False}),
    ("phi", {"rotary_dim": 4}, {"rotary_dim": 8}),
    ("nemotron", {"kv_channels": 12}, {"kv_channels": 16}),
    ("gptj", {"rotary": True, "scale_attn_weights": True}, {"rotary": False}),
    ("stablelm", {"rotary_scaling_factor": 1.0, "num_heads": 4}, {"rotary_scaling_factor": 2.0}),
]


@pytest.mark.parametrize(("family", "usual", "other"), PUBLISHED)
def test_a_field_that_says_what_is_computed_anyway_is_read(family, usual, other):
    hf = hf_config(family)
    read = FAMILIES[family].config_from_hf
    read(hf | usual, strict=True)
    with pytest.raises(ValueError, match="which is not supported"):
        read(hf | usual | other)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen2", {"attention_bias": True}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None}),
        ("qwen2_moe", {"use_sliding_window": False, "sliding_window": 32_768, "max_window_layers": 21, "layer_types": None}),
        ("qwen3_moe", {"use_sliding_window": False, "sliding_window": 32_768, "max_window_layers": 48}),
        ("smollm3", {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}),
    ],
)
def test_fields_of_releases_that_change_nothing_are_read(family, fields):
    hf, read = hf_config(family), FAMILIES[family].config_from_hf
    assert read(hf | fields, strict=True) == read(hf)


def test_remarks_within_the_rotary_settings_are_read():
    hf = {name: value for name, value in hf_config("llama").items() if not name.startswith("rope_")}
    read, yarn = FAMILIES["llama"].config_from_hf, {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16}
    published = yarn | {"finetuned": True, "extrapolation_factor": 1.0, "attn_factor": 1}
    assert read(hf | {"rope_scaling": published}, strict=True) == read(hf | {"rope_scaling": yarn})
    with pytest.raises(ValueError, match=r"unknown fields {'attn_factor': 0.8}; remove them"):
        read(hf | {"rope_scaling": yarn | {"attn_factor": 0.8}})


WITHOUT_EFFECT = [
    ("deepseek_v2", "lite", {"norm_topk_prob": True}),
    ("llama", "default", {"partial_rotary_factor": 0.5}),
    ("mixtral", "default", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}),
]


@pytest.mark.parametrize(("family", "variant", "changes"), WITHOUT_EFFECT)
def test_a_field_that_transformers_ignores_for_an_architecture_is_ignored_with_a_warning(family, variant, changes, caplog):
    hf, read = hf_config(family, variant), FAMILIES[family].config_from_hf
    fields._warn_of_no_effect.cache_clear()
    assert read(hf | changes) == read(hf | changes) == read(hf)
    (warning,) = caplog.messages
    assert "which is ignored for this architecture, as in transformers; other implementations may" in warning
    with pytest.raises(ValueError, match=r"which transformers ignores for this architecture .* strict_config=False"):
        read(hf | changes, strict=True)


def test_partial_rotation_with_scaling_is_refused_where_transformers_cannot_compute_it_either():
    hf = hf_config("llama", "rope_linear")
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0.5 with scaled rotary embeddings .* remove it"):
        FAMILIES["llama"].config_from_hf(hf | {"partial_rotary_factor": 0.5})


# Of their own functions: the GELU of BLOOM and MPT, the clamped SwiGLU of gpt-oss, the SiLU of LFM2 and Qwen 1.
FIXED_ACTIVATION = ("bloom", "gpt_oss", "lfm2", "lfm2_moe", "mpt", "qwen")
ACTIVATION_FIELDS = {
    **dict.fromkeys(("opt", "gpt2", "gptj", "gpt_neo", "gpt_bigcode"), "activation_function"),
    "falcon": "activation",
    "nemotron_h": "mlp_hidden_act",
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3n", "gemma4"), "hidden_activation"),
}


def with_activation(hf: JsonObject, name: str, value: str) -> JsonObject:
    """`hf` with a field set, in the text model of a multimodal one."""
    return hf | ({"text_config": hf["text_config"] | {name: value}} if "text_config" in hf else {name: value})


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(FIXED_ACTIVATION)))
def test_every_family_reads_its_activation(family):
    hf, name = hf_config(family), ACTIVATION_FIELDS.get(family, "hidden_act")
    if name == "hidden_activation":
        hf.pop("hidden_act", None)
    config = FAMILIES[family].config_from_hf(with_activation(hf, name, "mish"), strict=True)
    of_layers = [] if config.moe is None else [config.moe.activation]
    if config.moe is None or len(config.moe.layers) < config.num_layers:
        of_layers.append(config.activation)
    assert set(of_layers) == {"mish"}
    with pytest.raises(ValueError, match=f"{name}='prelu', which is not supported; supported: silu, .*, mish"):
        FAMILIES[family].config_from_hf(with_activation(hf, name, "prelu"))


DEFAULTS = json.loads((Path(__file__).parent.parent / "reference" / "config_defaults.json").read_text())
# What the default configs of transformers leave open, or set to a value that no model can have.
SIZES = {"deepseek_v2": {"num_experts_per_tok": 6}, "glm4_moe": {"head_dim": 128}}


@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_omitted_fields_have_the_defaults_of_transformers(family):
    read = FAMILIES[family].config_from_hf
    sizes = SIZES.get(family, {})
    complete = DEFAULTS[family] | sizes
    expected = read(complete)
    required = []
    for name in sorted(complete.keys() - {"bos_token_id", "eos_token_id"} - sizes.keys()):
        without = {key: value for key, value in complete.items() if key != name}
        try:
            assert read(without) == expected, name
        except KeyError as error:  # "config.json lacks the field": a checkpoint always has it
            required.append(error.args[0])
    assert len(required) <= 12
