"""Replacing the weights of an engine, and resetting its prefix cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax import Engine, EngineConfig, Research
from fastgen_jax.checkpoint import kept_in_blocks, load_params, open_checkpoint
from fastgen_jax.engine.footprint import weight_bytes
from fastgen_jax.engine.resolve import resolve
from fastgen_jax.engine.weights import prepare_leaf, prepare_params
from fastgen_jax.models.params import stack, unstack
from tests.models import parity
from tests.tiny import drain, greedy, random_params, tiny_engine, tiny_model, tokens_of

SMALL = {"token_budget": 16, "budget_ladder": (), "max_num_seqs": 4, "block_size": 4, "num_blocks": 64}
EXPERTS = ("layers.expert_gate_up", "layers.expert_down")
PROMPT = np.random.default_rng(5).integers(3, 96, 21).tolist()


def answer(engine: Engine) -> list[int]:
    request_id = engine.add(PROMPT, greedy(8))
    return tokens_of(drain(engine)[request_id])


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("default", {}),
        ("multi_head_tied", {"stack_layers": True, "quantize": "int8"}),
    ],
)
def test_new_weights_produce_the_answers_of_an_engine_started_with_them(variant, options):
    params, model = tiny_model(variant)
    engine = Engine(params, model, EngineConfig(**SMALL, **options))
    new = random_params(model)
    want = Engine(new, model, EngineConfig(**SMALL, **options))
    programs = dict(engine.runner._compiled)
    old_answer, new_answer = answer(engine), answer(want)
    assert old_answer != new_answer
    engine.update_params(new)
    assert answer(engine) == new_answer, "and no prefix of the old weights was found"
    on_host = jax.tree.map(np.asarray, new)
    engine.update_params({**on_host, "layers": unstack(on_host["layers"], model)})
    assert answer(engine) == new_answer
    engine.update_params(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    engine.update_params(params)
    assert answer(engine) == old_answer
    engine.update_params(want.params)
    assert answer(engine) == new_answer
    assert engine.runner._compiled == programs
    assert engine.metrics.compiles_while_serving == 0


def without(params: Any, *path: Any) -> Any:
    key, *rest = path
    if rest:
        return {**params, key: without(params[key], *rest)}
    return {name: leaf for name, leaf in params.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, m: None, "params must be a dict whose 'layers'"),
        (lambda p, m: without(p, "layers"), "params must be a dict whose 'layers'"),
        (lambda p, m: {**p, "layers": ()}, r"a tuple of \d dicts"),
        (lambda p, m: without(p, "final_norm"), r"params\['final_norm'\] \[\d+\] is missing"),
        (lambda p, m: without(p, "layers", "qkv"), r"params\['layers'\]\['qkv'\] \[.*\] is missing"),
        (lambda p, m: {**p, "bias": p["final_norm"]}, r"params\['bias'\] is not a weight of this model"),
        (lambda p, m: {**p, "embed": p["embed"].T}, r"params\['embed'\] has shape .* but this model has"),
        (lambda p, m: {**p, "embed": "x"}, r"params\['embed'\] is a str, but must be an array"),
        (lambda p, m: {**p, "embed": p["embed"].astype(jnp.int32)}, r"params\['embed'\] has dtype int32"),
        (lambda p, m: jax.eval_shape(lambda: p), r"is a ShapeDtypeStruct, but must be an array"),
    ],
)
def test_weights_of_wrong_shapes_are_refused_and_the_old_ones_stay(change, message):
    engine = tiny_engine()
    _, model = tiny_model()
    before, old = answer(engine), engine.params
    with pytest.raises(ValueError, match=message):
        engine.update_params(change(random_params(model), model))
    assert engine.params is old
    assert answer(engine) == before


def test_weights_that_were_prepared_for_another_config_are_refused():
    engine = tiny_engine()
    params, model = tiny_model()
    quantized = prepare_params(params, model, resolve(EngineConfig(**SMALL, quantize="int8"), model))
    with pytest.raises(ValueError, match=r"is int8.* but the engine computes with float32.*pass plain weights"):
        engine.update_params(quantized)
    stacked = {**engine.params, "layers": stack(tiny_model()[0]["layers"])}
    engine.update_params(stacked)
    assert engine.params["layers"].keys() == engine.runner.params["layers"].keys()
    engine.update_params(prepare_params(params, model, engine.config))


def test_weights_are_not_replaced_while_there_are_sequences_of_put():
    engine = tiny_engine()
    params, _ = tiny_model()
    Research(engine).put(["a"], [[5, 6]])
    with pytest.raises(ValueError, match=r"1 sequences of put, .* weights can be replaced only without them"):
        engine.update_params(params)
    Research(engine).flush("a")
    engine.update_params(params)


def cached(engine: Engine) -> int:
    request_id = engine.add(PROMPT, greedy(2))
    return drain(engine)[request_id][-1].num_cached_tokens


def test_a_reset_of_the_prefix_cache_is_seen_by_new_requests_and_not_by_running_ones():
    engine = tiny_engine()
    engine.reset_prefix_cache()
    alone = answer(engine)
    assert cached(engine) == 20
    engine.reset_prefix_cache()
    assert cached(engine) == 0
    engine.add(PROMPT, greedy(8), request_id="running")
    outputs = engine.step() + engine.step() + engine.step()
    engine.reset_prefix_cache()
    outputs += drain(engine)["running"]
    assert tokens_of(outputs) == alone
    assert outputs[-1].num_cached_tokens == 20
    assert cached(engine) == 0
    engine.scheduler.check_integrity()


def test_a_measured_step_leaves_cached_prefixes_as_they_are():
    engine = tiny_engine()
    before = answer(engine)
    engine.measure_step(8)
    assert cached(engine) > 0
    assert answer(engine) == before


@pytest.mark.parametrize("form", ["float32", "int8", "int4", "as stored"])
def test_experts_take_the_memory_that_is_counted_for_them(form):
    checkpoint = open_checkpoint(parity.folder("gpt_oss", "mxfp4"))
    model, quantize = checkpoint.config, form if form.startswith("int") else None
    config = resolve(EngineConfig(dtype="float32", quantize=quantize, num_blocks=8), model)
    if not config.packed_weights:
        pytest.skip("needs the native kernels of a CPU")
    stored = kept_in_blocks(checkpoint) if form == "as stored" else {}
    kept = tuple((path, kind.bits) for path, kind in stored.items())

    def held(spec, array):
        leaf = prepare_leaf(spec, array, model, config)
        return np.asarray(sum(part.nbytes for part in jax.tree.leaves(leaf)))

    found = load_params(checkpoint, dtype=None, prepare=held, keep_blocks=form == "as stored", stack_layers=False)
    without = weight_bytes(model, 1, 4, quantize=quantize, packed=True, kept=(*kept, *((path, 0.0) for path in EXPERTS)))
    counted = weight_bytes(model, 1, 4, quantize=quantize, packed=True, kept=kept) - without
    assert counted == sum(layer[path.removeprefix("layers.")] for layer in found["layers"] for path in EXPERTS)
