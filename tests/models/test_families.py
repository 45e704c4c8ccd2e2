"""Every family and variant against transformers: whole prompt, chunks, generation; unsupported settings are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.cli import main
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.resolve import resolve
from fastgen_jax.engine.weights import prepare_params
from fastgen_jax.models.config import RopeConfig
from fastgen_jax.models.counts import count_params
from fastgen_jax.models.families import FAMILIES, family_of
from fastgen_jax.models.params import init_params, param_specs
from tests.models import test_moe_families
from tests.models.parity import DOCUMENT, Runs, error, expected, folder, load, random_cut, variants

# Two float32 programs that sum in different orders; transformers' own cached decode differs from its full forward
# by as much. In units of the largest logit.
TOLERANCE = 1e-4
# 8 significant bits in weights and activations, two to four layers with weights of standard deviation 0.3.
BFLOAT16_MEAN_TOLERANCE = 0.02
# Rounding changes which experts tokens choose, and a state remembers it.
WITH_STATES_AND_EXPERTS = {"qwen3_next": 0.08, "qwen3_5_moe": 0.08, "granitehybrid": 0.04, "nemotron_h": 0.04}
WITH_TESTS_OF_THEIR_OWN = ("llama", *test_moe_families.FAMILIES)
ALL = [pytest.param(*names, id="-".join(names)) for names in variants()]
OTHERS = [pytest.param(*names, id="-".join(names)) for names in variants() if names[0] not in WITH_TESTS_OF_THEIR_OWN]
# Compared in test_decoder.py too, without the answer; and families without a feature that no other family has.
IN_SLOW_TESTS = (
    *("llama", "glm", "olmo3", "exaone4", "seed_oss", "ernie4_5"),
    *("arcee", "gpt_bigcode", "internlm2", "internlm3", "mpt", "llava", "mllama"),
    *("gemma3n", "gemma4"),  # the former as in tests/engine/test_shared_keys.py
    # With states, as in tests/engine/test_states.py.
    *("lfm2", "lfm2_moe", "falcon_h1", "granitemoehybrid", "nemotron_h", "qwen3_next", "qwen3_5", "qwen3_5_moe"),
)
COMPARED = [
    pytest.param(*names, id="-".join(names), marks=pytest.mark.slow if names[0] in IN_SLOW_TESTS else ())
    for names in variants()
    if names[0] not in test_moe_families.FAMILIES
]


@pytest.mark.parametrize(("family", "variant"), COMPARED)
def test_logits_equal_those_of_transformers_however_the_tokens_are_cut(family, variant):
    params, config = load(family, variant)
    tokens, want, prompt = expected(family, variant)
    runs = Runs(params, config, len(tokens))
    token_by_token = [prompt] + [1] * (len(tokens) - prompt)
    for sizes in ([len(tokens)], random_cut(len(tokens), seed=0), token_by_token):
        assert error(runs.logits(tokens, sizes, prompt_length=prompt), want) < TOLERANCE


def test_every_family_has_a_variant():
    made_by_hand = {"qwen"}  # remote code: transformers cannot make it, see test_qwen.py
    assert {family for family, _ in variants()} == FAMILIES.keys() - made_by_hand


def test_the_document_lists_every_family_and_variant(capsys):
    document = DOCUMENT.read_text()
    assert main(["models", "--markdown"]) == 0
    assert capsys.readouterr().out in document, "run python -m tests.models.parity"
    assert all(f"| {family} | {variant} |" in document for family, variant in variants())
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert all(family in listed for family in FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), ALL)
def test_scanned_layers_and_plain_attention_give_the_same_logits(family, variant):
    params, config = load(family, variant, stack_layers=True)
    tokens, want, prompt = expected(family, variant)
    runs = Runs(params, config, len(tokens), attention="xla")
    assert error(runs.logits(tokens, random_cut(len(tokens), seed=1), prompt_length=prompt), want) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), ALL)
def test_prepared_weights_give_the_same_logits(family, variant):
    params, config = load(family, variant)
    prepared = prepare_params(params, config, resolve(EngineConfig(dtype="float32", num_blocks=8), config))
    tokens, want, prompt = expected(family, variant)
    runs = Runs(prepared, config, len(tokens))
    assert error(runs.logits(tokens, random_cut(len(tokens), seed=2), prompt_length=prompt), want) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), ALL)
def test_bfloat16_stays_near_float32(family, variant):
    params, config = load(family, variant)
    specs = param_specs(config)

    def narrow(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        spec = (specs["layers"] if path[0].key == "layers" else specs)[path[-1].key]
        return leaf if spec.dtype == "float32" else leaf.astype(jnp.bfloat16)

    half = jax.tree_util.tree_map_with_path(narrow, params)
    tokens, want, prompt = expected(family, variant)
    got = Runs(half, config, len(tokens)).logits(tokens, [len(tokens)], prompt_length=prompt)
    assert np.abs(got - want).mean() < WITH_STATES_AND_EXPERTS.get(family, BFLOAT16_MEAN_TOLERANCE) * np.abs(want).max()


QUICK = {("llama", "default"), ("opt", "post_norm"), ("deepseek_v2", "lite")}


@pytest.mark.parametrize(
    "formats",
    [
        pytest.param({"dtype": "bfloat16"}, id="bfloat16"),
        pytest.param({"dtype": "float32", "quantize": "int8"}, id="int8"),
        pytest.param({"dtype": "float16"}, id="float16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("family", "variant"),
    [pytest.param(*names, id="-".join(names), marks=() if names in QUICK else pytest.mark.slow) for names in variants()],
)
def test_prepared_narrow_weights_stay_near_float32(family, variant, formats):
    params, config = load(family, variant)
    resolved = resolve(EngineConfig(num_blocks=8, **formats), config)
    tokens, want, prompt = expected(family, variant)
    runs = Runs(prepare_params(params, config, resolved), config, len(tokens), activation_dtype=resolved.activation_dtype)
    got = runs.logits(tokens, random_cut(len(tokens), seed=3), prompt_length=prompt)
    assert np.abs(got - want).mean() < WITH_STATES_AND_EXPERTS.get(family, BFLOAT16_MEAN_TOLERANCE) * np.abs(want).max()


def test_scanned_layers_that_differ_look_up_their_own_settings():
    for family, variant in (("gemma3", "default"), ("smollm3", "window_bias")):
        params, config = load(family, variant, stack_layers=True)
        tokens, want, prompt = expected(family, variant)
        got = Runs(params, config, len(tokens)).logits(tokens, [len(tokens)], prompt_length=prompt)
        assert error(got, want) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "variant", "changes"),
    [
        ("mistral", "window", {"layer_windows": ()}),
        ("gemma2", "default", {"attention_soft_cap": None}),
        ("gemma2", "default", {"logits_soft_cap": None}),
        ("gemma3", "default", {"layer_ropes": ()}),
        pytest.param("gemma3n", "default", {"gate_cutoffs": ()}, marks=pytest.mark.slow),
        pytest.param("gemma3n", "default", {"v_norm": False}, marks=pytest.mark.slow),
        pytest.param("gemma4", "default", {"layer_scale": False}, marks=pytest.mark.slow),
        ("smollm3", "default", {"layer_ropes": ()}),
        ("falcon", "rw", {"alibi_slopes": ()}),
        ("granite", "default", {"residual_multiplier": 1.0}),
        ("granite", "default", {"embed_multiplier": 1.0}),
        ("opt", "default", {"position_offset": 0}),
        ("olmo", "clipped", {"clip_qkv": None}),
        ("gpt2", "scaled_by_layer", {"attention_scale_by_layer": False}),
        ("nemotron", "default", {"norm_offset": 0.0}),
        ("hunyuan_v1_dense", "default", {"qk_norm_rotated": False}),
        ("mistral", "ministral3", {"query_growth": None}),
        ("minicpm", "default", {"residual_multiplier": 1.0}),
        ("baichuan", "13b", {"alibi_slopes": ()}),
        pytest.param("llama4", "default", {"window_chunks": False}, marks=pytest.mark.slow),
        pytest.param("llama4", "default", {"query_growth": None}, marks=pytest.mark.slow),
        pytest.param("llama4", "default", {"qk_norm": None}, marks=pytest.mark.slow),
    ],
)
def test_the_checkpoints_are_sensitive_to_what_sets_a_family_apart(family, variant, changes):
    """Without its distinguishing setting a family must give other logits; otherwise the parity tests could not fail."""
    params, config = load(family, variant)
    tokens, want, prompt = expected(family, variant)
    got = Runs(params, replace(config, **changes), len(tokens)).logits(tokens, [len(tokens)], prompt_length=prompt)
    assert error(got, want) > 100 * TOLERANCE


def _without_windows(config):
    wide = tuple(window and 1024 for window in config.layer_windows)  # than every prompt
    return {"layer_windows": wide} if any(wide) else {}


def _without_scaling(config):
    def plain(rope):
        return rope and RopeConfig(theta=rope.theta, dim=rope.dim)

    if all(rope.kind == "default" for rope in config.ropes):
        return {}
    return {"rope": plain(config.rope), "layer_ropes": tuple(plain(rope) for rope in config.layer_ropes)}


@pytest.mark.slow
@pytest.mark.parametrize("without", [_without_windows, _without_scaling])
@pytest.mark.parametrize(("family", "variant"), ALL)
def test_every_prompt_crosses_the_windows_and_the_trained_length(family, variant, without):
    params, config = load(family, variant)
    changes = without(config)
    if not changes:
        pytest.skip("it has none")
    tokens, want, prompt = expected(family, variant)
    got = Runs(params, replace(config, **changes), len(tokens)).logits(tokens, [len(tokens)], prompt_length=prompt)
    assert error(got, want) > 100 * TOLERANCE


@pytest.mark.parametrize(("family", "variant"), OTHERS)
def test_parameters_are_counted_as_they_are_made(family, variant):
    config = open_checkpoint(folder(family, variant)).config
    made = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert count_params(config) == sum(leaf.size for leaf in jax.tree.leaves(made))


@pytest.mark.parametrize(
    ("family", "variant", "changes", "message"),
    [
        ("bloom", "default", {"apply_residual_connection_post_layernorm": True}, "connection_post_layernorm=True"),
        ("gpt2", "default", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gemma2", "default", {"hidden_act": "relu"}, "hidden_act='relu', which is not supported; supported: 'gelu_pytorch"),
        ("mixtral", "default", {"attention_bias": True}, "attention_bias=True"),
        ("olmoe", "clipped", {"clip_qkv": -1.0}, "clip_qkv is -1.0; it must be positive"),
        ("falcon", "40b", {"parallel_attn": False}, "parallel_attn=False"),
        ("falcon", "7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        ("gemma", "default", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", "default", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3n", "default", {"num_kv_shared_layers": 5}, "no layer before the last 5 of 7 has keys for full attention"),
        ("gemma4", "default", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ("gemma4", "default", {"per_layer_config": {"0": {"head_dim": 4}}}, "the same head_dim and num_key_value_heads"),
        ("gemma3n", "default", {"intermediate_size": [40] * 6 + [80]}, "the same width in all layers"),
        ("gemma3n", "default", {"activation_sparsity_pattern": [1.0] * 7}, "at least 0 and below 1"),
        (
            "mistral",
            "window",
            {"layer_types": ["chunked_attention"] * 2},
            "supported: 'sliding_attention' or 'full_attention'",
        ),
        (
            "qwen2",
            "tied",
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            "rope_type 'proportional' is not supported",
        ),
        (
            "qwen2",
            "tied",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mystery": 1}},
            "mystery",
        ),
        ("cohere2", "default", {"position_embedding_type": "rope_neox"}, "position_embedding_type='rope_neox'"),
        ("starcoder2", "default", {"norm_type": "rms_norm"}, "norm_type='rms_norm'"),
        (
            "gemma3",
            "default",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            r"fields \['factor', 'rope_type'\]",
        ),
        ("exaone4", "default", {"layer_types": None, "sliding_window_pattern": "LGLG"}, "sliding_window_pattern='LGLG'"),
        ("glm4_moe", "default", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("deepseek_v2", "lite", {"mlp_bias": True}, "mlp_bias=True, which is not supported; supported: False"),
        ("deepseek_v2", "lite", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v2", "lite", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ("gpt_oss", "default", {"swiglu_alpha": 1.0}, "swiglu_alpha=1.0"),
        ("gpt_oss", "default", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", "default", {"rope_interleaved": True}, "rope_interleaved=True"),
        ("starcoder2", "default", {"mlp_type": "gated"}, "mlp_type='gated'"),
        ("apertus", "default", {"post_norm": True}, "post_norm=True"),
        ("hunyuan_v1_dense", "default", {"use_cla": True}, "use_cla=True"),
        ("minicpm", "default", {"sparse_config": {"topk": 64}}, "sparse_config={'topk': 64}"),
        ("minicpm", "default", {"num_experts": 8}, "num_experts=8"),
        ("mpt", "default", {"attn_config": {"qk_ln": True}}, "qk_ln=True"),
        ("mpt", "default", {"attn_config": {"rope": True}}, r"attn_config has the unknown fields \['rope'\]"),
        ("mpt", "default", {"logit_scale": 0.5}, "logit_scale=0.5"),
        ("gpt_neo", "default", {"attention_types": [[["sparse"], 3]]}, "'sparse'"),
        ("gptj", "default", {"rotary": False}, "rotary=False"),
        ("ernie4_5_moe", "default", {"use_bias": True}, "use_bias=True"),
        ("llama4", "default", {"for_llm_compressor": True}, "for_llm_compressor=True"),
        ("llama4", "default", {"layer_types": ["sliding_attention"] * 4}, "'sliding_attention'"),
        ("glm4_moe_lite", "groups", {"mlp_layer_types": ["sparse"]}, r"mlp_layer_types=\['sparse'\]"),
        ("minimax_m2", "default", {"attn_type_list": [0, 1]}, "attn_type_list"),
        ("minimax_m2", "default", {"qk_norm_type": "per_head"}, "qk_norm_type='per_head'"),
        ("phimoe", "longrope", {"rope_parameters": {"short_mscale": 1.0, "long_mscale": 1.2}}, "that differ"),
        ("llava", "default", {"text_config": {"model_type": "gemma"}}, "text_config.model_type='gemma'"),
    ],
)
def test_unsupported_fields_are_refused_by_name(family, variant, changes, message):
    hf = json.loads((folder(family, variant) / "config.json").read_text()) | changes
    with pytest.raises(ValueError, match=message):
        family_of(hf["architectures"][0]).config_from_hf(hf)


def test_an_unknown_architecture_names_the_nearest():
    with pytest.raises(ValueError, match="nearest supported: Qwen3ForCausalLM"):
        family_of("Qwen3ForCausalLm")


def test_old_and_new_spellings_of_a_config_are_the_same_model():
    """Files from before transformers 5 have rope_theta, rope_scaling and the patterns as numbers."""
    hf = json.loads((folder("gemma3", "scaled") / "config.json").read_text())
    read = FAMILIES["gemma3"].config_from_hf
    old = {name: value for name, value in hf.items() if name not in ("rope_parameters", "layer_types", "dtype")}
    old |= {
        "rope_theta": 1e6,
        "rope_local_base_freq": 5000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
        "torch_dtype": "bfloat16",
    }
    assert read(old) == read(hf)
    hf = json.loads((folder("olmo3", "yarn") / "config.json").read_text())
    read = FAMILIES["olmo3"].config_from_hf
    old = {name: value for name, value in hf.items() if name not in ("rope_parameters", "dtype")} | {
        "rope_theta": 10000.0,
        "rope_scaling": hf["rope_parameters"]["full_attention"],
        "torch_dtype": "bfloat16",
    }
    assert read(old) == read(hf)
    hf = json.loads((folder("phi3", "longrope_long") / "config.json").read_text())
    read = FAMILIES["phi3"].config_from_hf
    rope = hf["rope_parameters"]
    for kind in ("su", "longrope", "yarn"):
        old = {name: value for name, value in hf.items() if name != "rope_parameters"} | {
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 32,
            "rope_scaling": {"type": kind, "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]},
        }
        assert read(old) == read(hf)


def test_a_multimodal_checkpoint_loads_alike_under_its_old_and_new_names(tmp_path):
    source = folder("gemma3", "multimodal")
    tensors = load_file(source / "model.safetensors")
    new = {f"model.{name.replace('language_model.model.', 'language_model.')}": value for name, value in tensors.items()}
    save_file(new, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    params = load_params(open_checkpoint(tmp_path), dtype="float32", stack_layers=False)
    jax.tree.map(np.testing.assert_array_equal, params, load("gemma3", "multimodal")[0])


def test_only_known_parts_of_a_multimodal_checkpoint_are_left_out(tmp_path):
    source = folder("mistral", "multimodal")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"audio_tower.weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(ValueError, match=r"1 tensors that the mistral family does not know \('model.audio_tower.weight'\)"):
        load_params(open_checkpoint(tmp_path), dtype="float32")


def test_a_shape_that_does_not_fit_the_config_is_refused(tmp_path):
    source = folder("falcon", "40b")
    hf = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf | {"num_kv_heads": 4}))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"query_key_value.weight' has shape \(64, 32\), but .* requires \(96, 32\)"):
        load_params(open_checkpoint(tmp_path), dtype="float32")


def test_a_checkpoint_of_the_bare_model_with_saved_masks_is_the_same_model(tmp_path):
    """The files of GPT-2 on the hub are like this: names without `transformer.`, and the causal mask as a tensor."""
    source = folder("gpt2", "default")
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(source / "model.safetensors").items()}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 96, 96), np.float32))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    params = load_params(open_checkpoint(tmp_path), dtype="float32", stack_layers=False)
    jax.tree.map(np.testing.assert_array_equal, params, load("gpt2", "default")[0])


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_the_text_part_of_a_model_that_sees_and_hears_loads_without_keys_that_no_layer_uses(family, tmp_path):
    """As Gemma 3n and 4 are published: layers that read the keys of others have projections for keys nevertheless."""
    source = folder(family, "default")
    tensors = load_file(source / "model.safetensors")
    new = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
    unused = np.zeros((4, 4), np.float32)
    new |= {f"model.{part}.weight": unused for part in ("audio_tower", "vision_tower", "embed_vision", "embed_audio")}
    last = f"model.language_model.layers.{load(family, 'default')[1].num_layers - 1}.self_attn"
    new |= {f"{last}.{part}.weight": unused for part in ("k_proj", "v_proj", "k_norm")}
    save_file(new, tmp_path / "model.safetensors")
    text = json.loads((source / "config.json").read_text())
    around = {"audio_config": {}, "vision_config": {}, "audio_soft_tokens_per_image": 188, "eoa_token_id": 60}
    hf = {"architectures": [FAMILIES[family].ARCHITECTURES[1]], "model_type": family, "text_config": text, **around}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    params = load_params(open_checkpoint(tmp_path, strict_config=True), dtype="float32", stack_layers=False)
    jax.tree.map(np.testing.assert_array_equal, params, load(family, "default")[0])
