"""Requests with LoRA adapters: several in one step, loaded and unloaded while requests run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest

from fastgen_jax import Engine, EngineConfig, RequestOutput, SamplingParams
from fastgen_jax.engine.metrics import compile_count
from fastgen_jax.training import merge_lora
from pallas_kernels import native
from tests.adapters import COUNT, RANK, SCALE, adapter_engine, new_engine, random_lora, tiny_lora
from tests.models.parity import load, variants
from tests.tiny import drain, greedy, tiny_engine, tiny_model, tokens_of

NAMES = (None, *(f"a{number}" for number in range(COUNT)))
PROMPTS = [np.random.default_rng(i).integers(3, 96, 3 + 2 * i).tolist() for i in range(len(NAMES))]
LONG = np.random.default_rng(9).integers(3, 96, 17).tolist()
NUM_NEW = 5


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = adapter_engine()
    engine.reset_prefix_cache()
    yield engine
    assert not engine.has_work
    engine.scheduler.check_integrity()
    for name in [*engine.adapters]:
        if engine.adapters[name].version != 0 or name not in NAMES:
            engine.unload_adapter(name)
    for number in range(COUNT):
        if f"a{number}" not in engine.adapters:
            engine.load_adapter(f"a{number}", tiny_lora(number), scale=SCALE)


def add(engine: Engine, index: int, *, prompt: list[int] | None = None, num_new: int = NUM_NEW) -> str:
    params = greedy(num_new, logprobs=0, adapter=NAMES[index])
    return engine.add(PROMPTS[index] if prompt is None else prompt, params)


def numbers(outputs: list[RequestOutput]) -> list[tuple[int, float]]:
    """Tokens and their log-probabilities."""
    return [(entry.token_id, entry.logprob) for output in outputs for entry in output.logprobs or ()]


def alone(engine: Engine, index: int, **options) -> list[tuple[int, float]]:
    engine.reset_prefix_cache()
    request_id = add(engine, index, **options)
    return numbers(drain(engine)[request_id])


@pytest.mark.skipif(not native.available(), reason="plain XLA picks the order of a sum by the number of rows")
def test_every_adapter_in_a_batch_with_all_others_computes_what_it_computes_alone_to_the_last_bit(engine: Engine):
    ids = [add(engine, index) for index in range(len(NAMES))]
    together = drain(engine)
    for index, request_id in enumerate(ids):
        assert numbers(together[request_id]) == alone(engine, index), NAMES[index]
    assert engine.metrics.compiles_while_serving == 0


def test_an_adapter_computes_what_the_model_with_merged_weights_computes(engine: Engine):
    params, _ = tiny_model(stack_layers=True)
    merged = tiny_engine()
    try:
        for number in (0, 3):  # of one matrix, and of all
            (scores,) = engine.score([LONG], SamplingParams(adapter=f"a{number}"))
            merged.update_params(merge_lora(params, tiny_lora(number), scale=SCALE))
            (want,) = merged.score([LONG])
            np.testing.assert_allclose(scores.logprobs, want.logprobs, atol=2e-5)
    finally:
        merged.update_params(params, version=0)


STATE = ("mix_in", "mix_gates", "mix_out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "variant", "targets"),
    [
        *((family, None, STATE) for family in ("lfm2", "granitemoehybrid", "falcon_h1", "qwen3_5")),
        ("gemma4", "default", None),
        ("gemma4", "keys_as_values", None),
        ("gemma4", "experts", None),
    ],
)
def test_an_adapter_computes_what_the_merged_weights_compute(family: str, variant: str | None, targets):
    variant = variant or next(variant for name, variant in variants() if name == family)
    params, model = load(family, variant, stack_layers=True)
    lora = random_lora(model, 0, targets=targets)
    shape = {"token_budget": 16, "budget_ladder": (), "max_num_seqs": 4, "block_size": 4, "num_blocks": 32}
    engine = Engine(params, model, EngineConfig(dtype="float32", max_adapters=1, max_adapter_rank=RANK, **shape))
    engine.load_adapter("x", lora, scale=SCALE)
    tokens = [token % model.vocab_size for token in LONG]
    base, adapted = (engine.score([tokens], SamplingParams(adapter=name))[0].logprobs for name in (None, "x"))
    assert np.abs(adapted - base).max() > 1e-2
    engine.update_params(merge_lora(params, lora, scale=SCALE))
    (merged,) = engine.score([tokens])
    np.testing.assert_allclose(adapted, merged.logprobs, atol=1e-4)


def test_adapters_change_the_answers(engine: Engine):
    ids = [add(engine, index, prompt=LONG) for index in range(len(NAMES))]
    answers = drain(engine)
    assert len({tuple(numbers(answers[request_id])) for request_id in ids}) == len(NAMES)


def test_prefixes_are_shared_only_by_requests_of_one_adapter(engine: Engine):
    def cached(name: str | None) -> int:
        request_id = engine.add(LONG, greedy(1, adapter=name))
        return drain(engine)[request_id][-1].num_cached_tokens

    assert [cached("a0"), cached("a1"), cached(None)] == [0, 0, 0]
    assert [cached("a0"), cached("a1"), cached(None)] == [16, 16, 16]
    engine.unload_adapter("a0")
    engine.load_adapter("a0", tiny_lora(3), scale=SCALE, version=1)
    assert cached("a0") == 0


def test_an_adapter_is_unloaded_and_another_loaded_while_its_requests_run(engine: Engine):
    want, other = alone(engine, 1, num_new=12), alone(engine, 2, num_new=12)
    engine.reset_prefix_cache()
    compiles = compile_count()
    running, beside = add(engine, 1, num_new=12), add(engine, 2, num_new=12)
    outputs = engine.step() + engine.step()
    engine.unload_adapter("a0")
    with pytest.raises(ValueError, match="adapter is 'a0', which is not loaded; loaded: a1, a2"):
        add(engine, 1)
    with pytest.raises(ValueError, match="cannot be loaded yet: requests of an unloaded adapter are unfinished"):
        engine.load_adapter("new", tiny_lora(3))
    outputs += [output for many in drain(engine).values() for output in many]
    assert numbers([o for o in outputs if o.request_id == running]) == want
    assert numbers([o for o in outputs if o.request_id == beside]) == other
    engine.load_adapter("new", tiny_lora(0), scale=SCALE)
    request_id = engine.add(PROMPTS[1], greedy(12, logprobs=0, adapter="new"))
    assert numbers(drain(engine)[request_id]) == want
    assert compile_count() == compiles


def test_running_requests_continue_with_an_updated_adapter_and_say_which_version_computed_each_token(engine: Engine):
    running, beside = add(engine, 1, num_new=10), add(engine, 2, num_new=10)
    outputs = engine.step() + engine.step() + engine.step()
    assert engine.update_adapter("a0", tiny_lora(3), scale=SCALE) == 1
    assert engine.update_adapter("a0", tiny_lora(3), scale=SCALE, version=7, recompute=True) == 7
    outputs += [output for many in drain(engine).values() for output in many]
    versions = [o.weight_version for o in outputs if o.request_id == running]
    assert versions == sorted(versions)
    assert {*versions} == {0, 7}
    assert {o.weight_version for o in outputs if o.request_id == beside} == {0}
    tokens = tokens_of([o for o in outputs if o.request_id == running])
    kept = versions.count(0)
    rest = engine.add(PROMPTS[1] + tokens[:kept], greedy(10 - kept, adapter="a0"))
    assert tokens_of(drain(engine)[rest]) == tokens[kept:]


def test_an_interrupted_engine_repeats_the_requests_of_adapters_with_their_adapters(engine: Engine):
    want = [alone(engine, index) for index in (1, 2)]
    engine.reset_prefix_cache()
    ids = [add(engine, index) for index in (1, 2)]
    outputs = engine.step() + engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.exclusive(_interrupted)
    engine._journal.begin()
    engine._journal.start_over()
    outputs += [output for many in drain(engine).values() for output in many]
    for request_id, numbers_alone in zip(ids, want, strict=True):
        tokens = tokens_of([o for o in outputs if o.request_id == request_id])
        assert tokens == [token for token, _ in numbers_alone]


def _interrupted() -> None:
    raise KeyboardInterrupt


def test_an_engine_without_places_has_the_programs_that_it_had():
    engine = tiny_engine()
    (bucket, *_) = (program.bucket for program in engine.runner.compiled.values())
    assert engine.runner.adapters is None
    assert "adapters" not in bucket.new_buffer()[1]
    with pytest.raises(ValueError, match=r"adapter is 'a0', but this engine has no place for adapters; start it with"):
        engine.add([5], SamplingParams(adapter="a0"))
    with pytest.raises(ValueError, match="this engine has no place for adapters; start it with max_adapters=1"):
        engine.load_adapter("a0", tiny_lora(0))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a0", lambda: tiny_lora(0), "an adapter 'a0' is loaded already; update or unload it"),
        (
            "b",
            lambda: tiny_lora(0),
            "max_adapters is 8, and a0, a1, .* are loaded; unload one, or start with max_adapters=9",
        ),
        ("b:c", lambda: tiny_lora(0), "an adapter is called 'b:c'"),
    ],
)
def test_an_adapter_for_which_there_is_no_place_is_refused(engine: Engine, name: str, make, message: str):
    with pytest.raises(ValueError, match=message):
        engine.load_adapter(name, make())


def wrong(**layers) -> dict:
    return {"layers": {name: tuple(parts) for name, parts in layers.items()}}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            lambda: wrong(embed=()),
            "the adapter changes 'embed', which is not a matrix that .* choose from qkv, o, gate_up, down",
        ),
        (lambda: wrong(o=[tiny_lora(1)["layers"]["o"][0]] * 2), "2 pairs for 'o', but must have one for each of 1"),
        (lambda: wrong(o=tiny_lora(1)["layers"]["down"]), r"for 'o' has the shapes .* must have \[2, 32, rank\]"),
        (
            lambda: random_lora(tiny_model()[1], 0, rank=RANK + 1),
            "has rank 5, but max_adapter_rank is 4; start with max_adapter",
        ),
        (lambda: {"qkv": ()}, "an adapter is a dict {'layers'"),
    ],
    ids=["matrix", "parts", "shape", "rank", "form"],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused_before_anything_changes(engine: Engine, source, message: str):
    stacks = engine.runner.adapters
    with pytest.raises(ValueError, match=message):
        engine.update_adapter("a0", source())
    assert engine.runner.adapters is stacks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": ["a"]}, "adapters has 'a'; pass NAME=FOLDER"),
        ({"adapters": {"a b": "x"}}, "an adapter is called 'a b'"),
        ({"adapters": ["a=x", "a=y"]}, "adapters has a name twice"),
        ({"adapters": ["a=x"], "max_adapters": 0}, "max_adapters is 0; it must be an integer of at least 1"),
        ({"max_adapter_rank": 0}, "max_adapter_rank is 0"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_weights_have_adapters_too(quantize):
    engine = new_engine(quantize=quantize)
    plain = new_engine()
    (rounded,), (base,) = engine.score([LONG]), plain.score([LONG])
    rounding = np.abs(rounded.logprobs - base.logprobs).mean()
    for index in (1, 4, 8):
        (scores,) = engine.score([LONG], SamplingParams(adapter=NAMES[index]))
        (want,) = plain.score([LONG], SamplingParams(adapter=NAMES[index]))
        assert np.abs(scores.logprobs - want.logprobs).mean() < 1.5 * rounding, (
            "the error of the weights, not of the adapter"
        )
        assert np.abs(scores.logprobs - rounded.logprobs).mean() > 0.7 * np.abs(want.logprobs - base.logprobs).mean() > 0
    ids = [add(engine, index) for index in range(len(NAMES))]
    together = drain(engine)
    for index, request_id in enumerate(ids):
        assert numbers(together[request_id]) == alone(engine, index), NAMES[index]


def test_the_leaves_of_a_trainer_are_accepted_on_its_devices(engine: Engine):
    lora = jax.tree.map(jax.numpy.asarray, tiny_lora(0))
    want = alone(engine, 1)
    engine.update_adapter("a0", lora, scale=SCALE)
    assert alone(engine, 1) == want


def test_sampling_params_name_an_adapter_by_a_text():
    with pytest.raises(ValueError, match="adapter is 3; pass the name of a loaded adapter"):
        SamplingParams(adapter=3)  # pyright: ignore[reportArgumentType]
    assert replace(SamplingParams(), adapter="x").adapter == "x"
