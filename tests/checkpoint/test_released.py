"""Released checkpoints: their configs are read, their tensors are the declared ones, their logits those of transformers."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.models.counts import count_params
from fastgen_jax.models.families import FAMILIES, family_of
from tests.checkpoint import released
from tests.models.parity import DOCUMENT, folder

BY_NAME = {release.model: release for release in released.releases()}
MEASURED = released.measured()
# With layers that this package does not compute, or experts in a layout of their own.
REFUSED = {"meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8"}


def test_released_configs_are_read_and_the_others_are_refused_with_a_reason():
    refused = set()
    for release in BY_NAME.values():
        try:
            config, _ = released.read(release)
        except ValueError:
            refused.add(release.model)
        else:
            text = release.config.get("text_config", {})
            stated = next(
                (
                    fields[name]
                    for fields in (release.config, text)
                    for name in ("num_hidden_layers", "n_layer")
                    if name in fields
                ),
                32,  # the default of LLaVA's text model
            )
            assert config.num_layers == stated - len(text.get("cross_attention_layers", ()))
    assert refused == REFUSED
    for model in refused:
        with pytest.raises(ValueError, match=r"nearest supported|for_llm_compressor=True"):
            released.read(BY_NAME[model])


@pytest.mark.parametrize("which", ["one of each architecture", pytest.param("all", marks=pytest.mark.slow)])
def test_published_tensor_names_are_the_declared_ones(which):
    named = [model for model, entry in MEASURED.items() if "names" in entry]
    if which != "all":
        named = list({BY_NAME[model].config["architectures"][0]: model for model in named}.values())
    for model in named:
        names, (config, _) = MEASURED[model]["names"], released.read(BY_NAME[model])
        assert not names["missing"]
        assert not names["unexpected"]
        digests = (released.digest(released.required(config, prefix=prefix)) for prefix in (True, False))
        assert names["digest"] in digests, model
        if names["whole"] and names["bytes"]:
            assert names["bytes"] / count_params(config) in (2.0, 4.0), model


def test_the_document_has_the_table_that_the_command_makes():
    assert "\n".join(released.table()) in DOCUMENT.read_text(), "run make models-table"


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted((BY_NAME.keys() - REFUSED) & set(np.load(released.RELEASED / "logits.npz"))))
def test_logits_of_a_release_scaled_down_are_those_of_transformers(model):
    theirs = np.load(released.RELEASED / "logits.npz")[model]
    assert released.measure_values(BY_NAME[model], theirs) < 2e-5


def test_names_from_before_transformers_had_a_family_mean_the_family():
    assert [family_of(name) for name in ("LLaMAForCausalLM", "Ernie4_5_ForCausalLM", "BloomModel")] == [
        FAMILIES[name] for name in ("llama", "ernie4_5", "bloom")
    ]


def test_the_first_releases_of_qwen_name_the_sizes_as_gpt_2_does():
    renamed = {
        "num_attention_heads": "n_head",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "n_positions",
    }
    release = BY_NAME["stvlynn/Qwen-7B-Chat-Cantonese"]
    first = {renamed.get(name, name): value for name, value in release.config.items()}
    first |= {"activation": "swiglu", "pos_emb": "rotary", "bias_dropout_fusion": True, "n_inner": None}
    assert released.read(replace(release, config=first)) == released.read(release)


def test_experts_are_read_from_one_tensor_a_layer_and_from_one_each(tmp_path):
    """Qwen3.5-35B-A3B has the first layout, and its FP8 release the second."""
    source = folder("qwen3_5_moe", "default")
    tensors = load_file(source / "model.safetensors")
    for joined in [name for name in tensors if ".experts." in name]:
        block, part = joined.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
        for expert, matrix in enumerate(tensors.pop(joined)):
            pieces = np.split(matrix, len(parts))
            tensors |= {f"{block}.{expert}.{name}.weight": piece for name, piece in zip(parts, pieces, strict=True)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    read = [load_params(open_checkpoint(path), dtype="float32") for path in (source, tmp_path)]
    jax.tree.map(np.testing.assert_array_equal, *read)


def test_parts_beside_the_text_model_are_left_out(tmp_path):
    """As in Qwen2.5-VL, whose fields of the text model are beside `vision_config`, and in MiMo."""
    source = folder("qwen2", "tied")
    tensors = load_file(source / "model.safetensors")
    more = {
        "visual.merger.ln_q.weight": tensors["model.norm.weight"],
        "model.mtp_layers.0.input_proj.weight": np.ones((2, 2)),
    }
    save_file({**tensors, **{name: array.astype("float32") for name, array in more.items()}}, tmp_path / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    for changes in (
        {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "vision_config": {"depth": 1}, "video_token_id": 7},
        {"architectures": ["Qwen2VLForConditionalGeneration"], "text_config": {"vision_token_id": 7}},
        {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1, "vision_config": {}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        read = open_checkpoint(tmp_path, strict_config=True)
        assert read.tensor_names == tensors.keys()
        assert read.config == open_checkpoint(source).config
        load_params(read, dtype="float32")


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("Qwen/Qwen-72B", {"rope_theta": 10_000}, r"rope_theta=10000, which is not supported; supported: 1000000.0"),
        ("stabilityai/stable-code-3b", {"rotary_scaling_factor": 2.0}, r"rotary_scaling_factor=2.0, which is not supported"),
        ("microsoft/phi-1", {"rotary_dim": 64}, r"rotary_dim=64, which is not supported; supported: 32"),
    ],
)
def test_a_copy_of_a_field_that_says_something_else_is_refused(model, changes, message):
    release = BY_NAME[model]
    with pytest.raises(ValueError, match=message):
        released.read(replace(release, config=release.config | changes))
