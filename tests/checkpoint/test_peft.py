"""Adapters in the folders of PEFT: their logits, their names in every family, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastgen_jax.checkpoint import load_params, open_checkpoint, read_peft, write_peft
from fastgen_jax.checkpoint.peft import CONFIG_FILE, WEIGHTS_FILE
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.dense import dense_forward
from fastgen_jax.models.families import FAMILIES
from fastgen_jax.models.targets import Lora
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.training import merge_lora
from tests.adapters import random_lora
from tests.models.parity import REFERENCE, folder, load, variants

ADAPTERS = REFERENCE / "adapters"
FAST = ("all_linear",)
# float32 sums in another order than PyTorch's; in units of the largest logit.
TOLERANCE = 1e-4


def adapted(name: str) -> tuple[Params, ModelConfig, Lora]:
    """The weights, config and adapter of a folder of tests/reference/adapters."""
    checkpoint = open_checkpoint(REFERENCE / str(np.load(ADAPTERS / name / "expected.npz")["model"]))
    return load_params(checkpoint, dtype="float32"), checkpoint.config, read_peft(ADAPTERS / name, checkpoint.config)


@pytest.mark.parametrize(
    "name",
    [pytest.param(p.name, marks=() if p.name in FAST else pytest.mark.slow) for p in sorted(ADAPTERS.iterdir())],
)
def test_logits_with_an_adapter_equal_those_of_peft(name: str, fast_compilation):
    saved = np.load(ADAPTERS / name / "expected.npz")
    params, config, lora = adapted(name)
    merged = merge_lora(params, lora, scale=1.0)
    logits = dense_forward(merged, jnp.asarray(saved["token_ids"][None], jnp.int32), config=config)[0]
    want = saved["logits"]
    assert np.abs(logits - want).max() < TOLERANCE * np.abs(want).max()


def merged_in_files(family: str, variant: str, adapter: Path, path: Path) -> Params:
    """The weights of a checkpoint in whose files the adapter is merged by the names and the shapes that PEFT has."""
    shutil.copytree(folder(family, variant), path)
    tensors = load_file(path / "model.safetensors")
    changes, config = load_file(adapter / WEIGHTS_FILE), json.loads((adapter / CONFIG_FILE).read_text())
    conv1d = config["fan_in_fan_out"]
    used = 0
    for name, a in changes.items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        if part != "A.weight":
            continue
        rank = config["rank_pattern"].get(module, config["r"])
        alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
        change = alpha / rank * changes[name.replace("lora_A", "lora_B")] @ a
        full = f"{module}.weight"
        full = full if full in tensors else full.partition(".")[2]  # without the prefix of the model
        tensors[full] = tensors[full].astype(np.float32) + (change.T if conv1d else change)
        used += 1
    assert used == len(changes) / 2
    save_file(tensors, path / "model.safetensors")
    return load_params(open_checkpoint(path), dtype="float32")


SOME = ("gpt2", "gpt_neox", "glm4")
FIRST = {
    family: variant for family, variant in reversed(variants()) if (folder(family, variant) / "model.safetensors").exists()
}


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in SOME else pytest.mark.slow) for f in sorted(FIRST)])
def test_a_saved_adapter_changes_the_modules_of_the_checkpoint_as_merging_changes_the_weights(family: str, tmp_path):
    params, config = load(family, FIRST[family], stack_layers=True)
    lora = random_lora(config, 0, rank=2)
    write_peft(tmp_path / "adapter", lora, config, scale=0.25)
    with_files = merged_in_files(family, FIRST[family], tmp_path / "adapter", tmp_path / "model")
    want = merge_lora(params, lora, scale=0.25)
    again = merge_lora(params, read_peft(tmp_path / "adapter", config), scale=1.0)
    for merged in (with_files, again):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), merged, want)


def test_every_family_was_compared_or_has_its_checkpoints_in_another_format():
    assert FAMILIES.keys() - FIRST.keys() <= {"qwen"}


@pytest.fixture
def copy(tmp_path) -> Path:
    """A folder with an adapter that may be changed."""
    shutil.copytree(ADAPTERS / "all_linear", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "an adapter of the kind 'IA3'; only LORA is supported"),
        ({"use_dora": True}, "has use_dora=True, which is not supported: DoRA scales each output of the whole weight"),
        ({"lora_bias": True}, "has lora_bias=True, which is not supported"),
        ({"bias": "all"}, "has bias='all', which changes biases that all requests share"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save=\['lm_head'\], .* replaces whole modules"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base weights too"),
        ({"new_idea": 0.5}, "has new_idea=0.5, which is not known here and may change what the adapter computes"),
        ({"r": 5}, r"has the shapes .* but its rank is 5 according to adapter_config.json"),
        ({"r": "4"}, "has r='4', but it must be a number"),
        ({"target_modules": ["q_proj", "lm_head", "o_proj"]}, None),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_added_for_each_request_is_refused_with_the_reason(copy, fields, message):
    config = json.loads((copy / CONFIG_FILE).read_text())
    (copy / CONFIG_FILE).write_text(json.dumps(config | fields))
    if message is None:
        read_peft(copy, load("llama", "default")[1])
        return
    with pytest.raises(ValueError, match=message):
        read_peft(copy, load("llama", "default")[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"base_model.model.lm_head.lora_A.weight": (4, 32), "base_model.model.lm_head.lora_B.weight": (96, 4)},
            "embedding and head",
        ),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": (4, 96)}, "which is no matrix A or B of a linear layer"),
        (
            {f"base_model.model.model.layers.0.mlp.gate.lora_{x}.weight": (4, 4) for x in "AB"},
            "is not a linear layer of this model's attention, state or MLP",
        ),
        ({"base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight": (4, 32)}, "has only lora_A of"),
        (
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (48, 2)},
            "to 48 outputs, .* made for another model",
        ),
    ],
    ids=["head", "embedding", "other", "half", "width"],
)
def test_tensors_that_do_not_fit_are_refused(copy, change: dict, message: str):
    tensors = load_file(copy / WEIGHTS_FILE)
    save_file(tensors | {name: np.zeros(shape, np.float32) for name, shape in change.items()}, copy / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=message):
        read_peft(copy, load("llama", "default")[1])


def test_a_file_without_a_module_that_the_config_lists_is_refused(copy):
    tensors = load_file(copy / WEIGHTS_FILE)
    save_file({name: x for name, x in tensors.items() if "o_proj" not in name}, copy / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"has nothing for '.*o_proj' of target_modules; the files do not match"):
        read_peft(copy, load("llama", "default")[1])


def test_what_is_no_adapter_is_refused(tmp_path):
    _, config = load("llama", "default")
    with pytest.raises(ValueError, match=r"is no adapter: it has no adapter_config.json; pass a folder that PEFT"):
        read_peft(tmp_path, config)
    (tmp_path / CONFIG_FILE).write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"but adapter_model.bin, .*; save the adapter with safe_serialization=True"):
        read_peft(tmp_path, config)
    with pytest.raises(ValueError, match="the adapter changes nothing"):
        write_peft(tmp_path, {"layers": {}}, config, scale=1.0)
