"""Models with experts compared with transformers, in the engine, with scanned layers; unsupported ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file

from fastgen_jax import Engine, EngineConfig
from fastgen_jax.checkpoint import check_tensors, open_checkpoint
from fastgen_jax.engine.resolve import resolve
from fastgen_jax.models.dense import dense_forward
from fastgen_jax.models.families import deepseek_v3, deepseek_v32, qwen3_moe
from fastgen_jax.training.batch import padded_batch
from fastgen_jax.training.forward import logits as training_logits
from tests.models.parity import REFERENCE, Runs, error, expected, load, random_cut, variants
from tests.tiny import drain, greedy, tokens_of

HOME = REFERENCE / "families"
TOLERANCE = 1e-4  # of the largest logit: two float32 programs that sum in different orders
FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "olmoe",
    "granitemoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "ernie4_5_moe",
    "llama4",
    "glm4_moe_lite",
    "minimax_m2",
    "phimoe",
    "deepseek_v32",
    "qwen3_vl_moe",
)
QUICK = {
    ("mixtral", "relu2"),
    ("qwen2_moe", "every_second"),
    ("qwen2_moe", "window"),
    ("qwen3_moe", "default"),
    ("gpt_oss", "default"),
    ("deepseek_v2", "groups"),
    ("deepseek_v3", "default"),
    ("gpt_oss", "mxfp4"),
    ("deepseek_v3", "fp8"),
    ("ernie4_5_moe", "every_second"),
    ("llama4", "default"),
    ("phimoe", "longrope"),
    ("deepseek_v32", "glm5_sparse"),
}  # together they have every feature except the multipliers
VARIANTS = [
    pytest.param(*names, marks=() if names in QUICK else pytest.mark.slow) for names in variants() if names[0] in FAMILIES
]


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_logits_equal_those_of_transformers_however_the_tokens_are_cut(family: str, variant: str):
    params, config = load(family, variant)
    tokens, want, prompt = expected(family, variant)
    runs = Runs(params, config, len(tokens))
    token_by_token = [prompt] + [1] * (len(tokens) - prompt)
    for sizes in ([len(tokens)], random_cut(len(tokens), seed=0), token_by_token):
        assert error(runs.logits(tokens, sizes, prompt_length=prompt), want) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("qwen2_moe", "dense_first"),
        pytest.param("deepseek_v3", "default", marks=pytest.mark.slow),
    ],
)
def test_runs_of_similar_layers_are_scanned(family: str, variant: str):
    params, config = load(family, variant, stack_layers=True)
    assert config.moe is not None
    assert params["layers"]["router"].shape[0] == len(config.moe.layers)
    assert params["layers"]["gate_up"].shape[0] == config.num_layers - len(config.moe.layers)
    tokens, want, prompt = expected(family, variant)
    runs = Runs(params, config, len(tokens))
    assert error(runs.logits(tokens, [30, len(tokens) - 30], prompt_length=prompt), want) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "variant", "quantize"),
    [
        ("deepseek_v3", "default", None),
        ("deepseek_v3", "default", "int8"),
        ("llama4", "default", None),
        ("gemma4", "experts", None),
        ("gemma4", "experts", "int8"),
    ],
)
def test_a_request_gets_the_same_tokens_alone_and_in_a_batch(family: str, variant: str, quantize: str | None):
    params, config = load(family, variant)
    engine = Engine(
        params,
        config,
        EngineConfig(
            token_budget=24,
            budget_ladder=() if quantize else (4,),
            max_num_seqs=4,
            block_size=4,
            num_blocks=64,
            quantize=quantize,
        ),
    )
    tokens = expected(family, variant)[0].tolist()
    prompts = [tokens[:60], tokens[:7], tokens[20:41], tokens[5:6]]
    alone = []
    for prompt in prompts:
        engine.add(prompt, greedy(10))
        alone += [tokens_of(outputs) for outputs in drain(engine).values()]
    if quantize is None:
        assert alone[0] == tokens[60:]  # what transformers generates
    ids = [engine.add(prompt, greedy(10)) for prompt in prompts]
    together = drain(engine)
    assert [tokens_of(together[request]) for request in ids] == alone


def test_tokens_that_the_indexer_would_leave_out_are_refused_where_it_does_not_choose():
    params, config = load("deepseek_v32", "sparse", stack_layers=True)
    assert config.max_context_len == 128
    with pytest.raises(ValueError, match=r"kv_dtype='int8' is not supported for .* max_context_len=16"):
        resolve(EngineConfig(kv_dtype="int8"), config)
    assert resolve(EngineConfig(kv_dtype="int8", max_context_len=16, block_size=16), config).kv_dtype == "int8"
    with pytest.raises(ValueError, match=r"dense_forward got 17 tokens, .* pass at most 16"):
        dense_forward(params, jnp.zeros((1, 17), jnp.int32), config=config)
    with pytest.raises(ValueError, match=r"training got 17 tokens, .* pass at most 16"):
        training_logits(params, padded_batch(jnp.zeros((1, 17), jnp.int32)), config=config)


def test_the_layers_that_choose_follow_the_fields_of_glm():
    hf = json.loads((HOME / "deepseek_v32" / "glm5" / "config.json").read_text())
    del hf["indexer_types"]

    def choosing(**changes) -> tuple[int, ...]:
        mla = deepseek_v32.config_from_hf({**hf, **changes}).mla
        assert mla is not None
        assert mla.indexer is not None
        return mla.indexer.layers

    assert choosing() == (0, 1, 2)
    assert choosing(index_topk_pattern="FSF") == (0, 2)
    assert choosing(index_topk_freq=2, index_skip_topk_offset=1) == (0, 2)
    assert choosing(index_topk_freq=4) == (0, 1)
    with pytest.raises(ValueError, match="'full' or 'shared' for each of the 3 layers"):
        choosing(indexer_types=["full", "shared"])
    with pytest.raises(ValueError, match="layer 0 uses the choice of a layer before it, but there is none"):
        choosing(indexer_types=["shared", "full", "full"])


def test_unsupported_fields_are_refused():
    hf = json.loads((HOME / "deepseek_v3" / "default" / "config.json").read_text())
    for changes, message in [
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"topk_method": "greedy"}, "topk_method='greedy'"),
        ({"index_topk": 2048}, "config.json has index_topk=2048, which would change the output"),
    ]:
        with pytest.raises(ValueError, match=message):
            deepseek_v3.config_from_hf({**hf, **changes})
    hf = json.loads((HOME / "qwen3_moe" / "default" / "config.json").read_text())
    with pytest.raises(ValueError, match="qkv_bias=True"):
        qwen3_moe.config_from_hf({**hf, "qkv_bias": True})


def test_mxfp4_scales_of_another_shape_are_refused(tmp_path: Path):
    source = HOME / "gpt_oss" / "mxfp4"
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    save_file(tensors | {name: tensors[name][:, :-1].copy()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(ValueError, match=r"down_proj_scales' has shape \(4, 31, 1\); .* require \(4, 32, 1\)"):
        open_checkpoint(tmp_path)


def test_multi_token_prediction_layers_are_left_out_only_if_the_config_declares_them(tmp_path: Path):
    source = HOME / "deepseek_v3" / "fp8"
    hf = json.loads((source / "config.json").read_text())
    del hf["num_nextn_predict_layers"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"does not know \('model.layers.2.enorm.weight'\)"):
        check_tensors(open_checkpoint(tmp_path))
