"""New weights while requests run, versions, pauses, and the memory of an engine beside a trainer."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from fastgen_jax import Engine, EngineConfig, SamplingParams
from fastgen_jax.engine.metrics import compile_count
from fastgen_jax.engine.outputs import Outbox
from fastgen_jax.engine.replacement import replacement_params
from fastgen_jax.engine.resolve import resolve
from fastgen_jax.engine.weights import prepare_params
from fastgen_jax.models.weight_spec import Params
from pallas_kernels import native
from tests.interrupts import Points
from tests.tiny import drain, greedy, random_params, tiny_engine, tiny_model, tokens_of

PROMPTS = [np.random.default_rng(i).integers(3, 96, 5 + 4 * i).tolist() for i in range(6)]
NUM_NEW = 14


@pytest.fixture
def engine():
    """The shared engine with the weights of the checkpoint, awake, at version 0 and without prefixes."""
    engine = tiny_engine()
    engine.update_params(old(), version=0)
    new()  # while the engine is idle
    yield engine
    assert not engine.has_work
    assert not engine.request_ids
    assert not engine.is_paused
    engine.scheduler.check_integrity()
    engine.update_params(old(), version=0)


@cache
def old() -> Params:
    """Prepared weights, as the engine uses them."""
    return prepare_params(*tiny_model(), tiny_engine().config)


@cache
def new() -> Params:
    _, model = tiny_model()
    return prepare_params(random_params(model), model, tiny_engine().config)


def run_alone(engine: Engine, params: Params, prompt: list[int], num_tokens: int) -> list[int]:
    engine.update_params(params, version=0)
    request_id = engine.add(prompt, greedy(num_tokens))
    return tokens_of(drain(engine)[request_id])


def start(engine: Engine, prompts: list[list[int]], **options: Any) -> tuple[list[str], dict[str, list]]:
    """Adds requests and steps until the longest prompt has been computed and some tokens are out."""
    ids = [engine.add(prompt, greedy(NUM_NEW, **options)) for prompt in prompts]
    outputs: dict[str, list] = {request_id: [] for request_id in ids}
    while min(map(len, outputs.values())) < 3:
        collect(outputs, engine.step())
    return ids, outputs


def collect(outputs: dict[str, list], new_outputs: list) -> None:
    for output in new_outputs:
        outputs[output.request_id].append(output)


def finish(engine: Engine, outputs: dict[str, list]) -> None:
    for request_id, more in drain(engine).items():
        outputs[request_id] += more


def pointers(params: Params) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)]


def test_running_requests_continue_with_the_new_arrays_themselves_and_say_which_weights_computed_each_token(engine: Engine):
    compiles = compile_count()
    ids, outputs = start(engine, PROMPTS)
    before = {request_id: tokens_of(found) for request_id, found in outputs.items()}
    assert engine.update_params(new(), version=7) == engine.weight_version == 7
    assert pointers(engine.params) == pointers(new()), "no weight was copied"
    finish(engine, outputs)
    assert compile_count() == compiles
    for request_id, prompt in zip(ids, PROMPTS, strict=True):
        assert len(tokens_of(outputs[request_id])) == NUM_NEW
        versions = [output.weight_version for output in outputs[request_id]]
        assert sorted(versions) == versions
        num_old = versions.count(0)
        assert versions.count(7) == NUM_NEW - num_old > 0
        assert len(before[request_id]) <= num_old <= len(before[request_id]) + 1, "at most the step in flight was old"
        assert tokens_of(outputs[request_id])[:num_old] == run_alone(engine, old(), prompt, NUM_NEW)[:num_old]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((old(), new())))


def test_with_recompute_the_rest_of_an_answer_is_that_of_the_new_weights_alone(engine: Engine):
    ids, outputs = start(engine, PROMPTS)
    kept = {request_id: tokens_of(found) for request_id, found in outputs.items()}
    assert engine.update_params(new(), recompute=True) == 1
    finish(engine, outputs)
    for request_id, prompt in zip(ids, PROMPTS, strict=True):
        num_kept = len(kept[request_id])
        rest = run_alone(engine, new(), prompt + kept[request_id], NUM_NEW - num_kept)
        assert tokens_of(outputs[request_id]) == kept[request_id] + rest
        assert [output.weight_version for output in outputs[request_id]] == [0] * num_kept + [1] * len(rest)


def test_no_request_finds_a_prefix_that_other_weights_computed(engine: Engine):
    (running,), outputs = start(engine, PROMPTS[5:])
    engine.update_params(new())
    finish(engine, outputs)
    again = PROMPTS[5] + tokens_of(outputs[running])
    request_id = engine.add(again, greedy(6))
    answer = drain(engine)[request_id]
    assert answer[-1].num_cached_tokens == 0, "keys of the request above come from both"
    request_id = engine.add(again, greedy(6))
    assert drain(engine)[request_id][-1].num_cached_tokens > 0
    assert tokens_of(answer) == run_alone(engine, new(), again, 6)


def test_log_probabilities_of_a_prompt_come_from_one_version(engine: Engine):
    prompt = np.random.default_rng(9).integers(3, 96, 60).tolist()
    scored = SamplingParams(max_new_tokens=2, ignore_eos=True, do_sample=False, prompt_logprobs=0)
    found = set()
    for num_steps in (1, 3, 7, 8, 9):  # 8 rows of a prompt in each step
        engine.update_params(old())
        request_id = engine.add(prompt, scored)
        outputs = [output for _ in range(num_steps) for output in engine.step()]
        engine.update_params(new())
        outputs += drain(engine).get(request_id, [])
        is_new = outputs[0].weight_version == engine.weight_version
        found.add(is_new)
        engine.update_params(new() if is_new else old())
        (expected,) = engine.score([prompt])
        assert [entry.logprob for entry in outputs[0].prompt_logprobs or ()] == expected.logprobs.tolist()
    assert found == {False, True}


def test_arrays_of_the_right_form_are_not_copied_and_others_once(monkeypatch):
    params, model = tiny_model(stack_layers=True)
    monkeypatch.setattr(native, "available", lambda: False)  # as on an accelerator: matrices are plain arrays
    config = resolve(EngineConfig(token_budget=16, num_blocks=16, stack_layers=True), model)
    assert not config.packed_weights
    current = prepare_params(params, model, config)
    given = jax.tree.map(lambda leaf: leaf + 1, params)
    assert pointers(replacement_params(given, current, model, config)) == pointers(given)
    on_host = jax.tree.map(np.asarray, given)
    copied = replacement_params(on_host, current, model, config)
    assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == b).all(), copied, on_host))


def test_a_pause_that_keeps_requests_stops_them_and_loses_nothing(engine: Engine):
    expected = [run_alone(engine, old(), prompt, NUM_NEW) for prompt in PROMPTS]
    ids, outputs = start(engine, PROMPTS)
    engine.pause()
    assert engine.is_paused
    collect(outputs, engine.step())  # what the step in flight computed
    assert not engine.has_work
    assert engine.step() == []
    late = engine.add(PROMPTS[0], greedy(NUM_NEW))
    outputs[late] = []
    assert not engine.has_work
    with pytest.raises(ValueError, match=r"paused, so that nothing can be scored; call engine\.resume"):
        engine.score(PROMPTS)
    engine.resume()
    finish(engine, outputs)
    assert [tokens_of(outputs[request_id]) for request_id in (*ids, late)] == [*expected, expected[0]]


def test_a_pause_can_end_requests_with_the_tokens_that_they_have(engine: Engine):
    expected = [run_alone(engine, old(), prompt, NUM_NEW) for prompt in PROMPTS]
    ids, outputs = start(engine, PROMPTS)
    engine.pause("abort")
    collect(outputs, engine.step())
    assert not engine.request_ids
    for request_id, answer in zip(ids, expected, strict=True):
        tokens, last = tokens_of(outputs[request_id]), outputs[request_id][-1]
        assert 3 <= len(tokens) < NUM_NEW
        assert tokens == answer[: len(tokens)]
        assert (last.finished, last.finish_reason, last.error) == (True, "abort", None)
        assert last.num_generated_tokens == len(tokens)
    assert engine.scheduler.num_free_blocks == engine.config.num_blocks
    late = engine.add(PROMPTS[1], greedy(NUM_NEW))
    assert not engine.has_work
    engine.resume()
    assert tokens_of(drain(engine)[late]) == expected[1]


def test_a_pause_can_finish_requests_while_later_ones_wait(engine: Engine):
    expected = [run_alone(engine, old(), prompt, NUM_NEW) for prompt in PROMPTS]
    box, ids = Outbox(), []
    for prompt in PROMPTS * 3:  # more than run at the same time
        ids.append(engine.add_request(engine.intake.request(engine.encode(prompt), greedy(NUM_NEW)), box=box))
    add_late = threading.Event()

    def add() -> None:
        assert add_late.wait(60)
        engine.add(PROMPTS[2], greedy(NUM_NEW), request_id="late")

    thread = threading.Thread(target=add)
    thread.start()

    def stepping(box: Outbox) -> list:
        outputs = engine.step(box)
        add_late.set()
        thread.join(60)
        return outputs

    engine._updating.pause("wait", stepping)
    assert engine.is_paused
    assert engine.request_ids == ("late",)
    outputs: dict[str, list] = {request_id: [] for request_id in ids}
    collect(outputs, engine.step(box))
    assert [tokens_of(outputs[request_id]) for request_id in ids] == expected * 3
    assert not engine.has_work
    engine.resume()
    assert tokens_of(drain(engine)["late"]) == expected[2]


def test_an_unknown_mode_or_place_is_refused(engine: Engine):
    with pytest.raises(ValueError, match="mode is 'stop'; choose one of 'keep', 'abort', 'wait'"):
        engine.pause("stop")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="weights is 'disk'; choose one of 'device', 'host', 'dropped'"):
        engine.release_memory(weights="disk")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"version is 1\.5; pass an int"):
        engine.update_params(new(), version=1.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="version is 3, but there are no params"):
        engine.restore_memory(version=3)


def test_a_trainer_takes_the_memory_of_paused_requests_and_gives_new_weights(engine: Engine):
    ids, outputs = start(engine, PROMPTS)
    with pytest.raises(ValueError, match=r"6 requests; memory can be released only while it is idle or paused"):
        engine.release_memory()
    engine.pause()
    engine.release_memory(weights="dropped")
    collect(outputs, engine.step())
    kept = {request_id: tokens_of(found) for request_id, found in outputs.items()}
    assert engine.is_asleep
    late = engine.add(PROMPTS[3], greedy(NUM_NEW))
    assert engine.is_asleep, "the trainer has the memory"
    engine.restore_memory(new(), version=5)
    engine.resume()
    outputs[late] = []
    finish(engine, outputs)
    for request_id, prompt in zip((*ids, late), (*PROMPTS, PROMPTS[3]), strict=True):
        tokens = kept.get(request_id, [])
        assert tokens_of(outputs[request_id]) == tokens + run_alone(engine, new(), prompt + tokens, NUM_NEW - len(tokens))
    assert outputs[late][-1].weight_version == 5


def test_memory_comes_back_with_the_first_resume_that_has_requests(engine: Engine):
    expected = run_alone(engine, old(), PROMPTS[0], NUM_NEW)
    (request_id,), outputs = start(engine, PROMPTS[:1])
    engine.pause()
    engine.release_memory()
    engine.resume()
    assert not engine.is_asleep
    finish(engine, outputs)
    assert tokens_of(outputs[request_id]) == expected


def test_weights_that_a_trainer_donated_pause_the_engine_and_end_no_request(engine: Engine):
    donated = jax.tree.map(lambda leaf: leaf.copy(), old())
    engine.update_params(donated)
    ids, outputs = start(engine, PROMPTS)
    for leaf in jax.tree.leaves(donated):
        leaf.delete()  # what donation does
    with pytest.raises(RuntimeError, match=r"weights of the engine were deleted.*engine\.update_params\(params\)"):
        engine.step()
    assert engine.is_paused
    assert engine.step() == []
    assert not engine.has_work
    kept = {request_id: tokens_of(found) for request_id, found in outputs.items()}
    engine.update_params(new())
    engine.resume()
    finish(engine, outputs)
    for request_id, prompt in zip(ids, PROMPTS, strict=True):
        tokens = kept[request_id]
        assert tokens_of(outputs[request_id]) == tokens + run_alone(engine, new(), prompt + tokens, NUM_NEW - len(tokens))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from destructors
@pytest.mark.parametrize("recompute", [False, True])
def test_an_interrupted_update_can_be_repeated(engine: Engine, recompute: bool):
    points = Points()

    def interrupted(at: int) -> None:
        points.left = at
        try:
            with points.watched():
                engine.update_params(new(), recompute=recompute)
        except KeyboardInterrupt:
            pass

    interrupted(10**9)
    num_points = 10**9 - points.left
    for at in range(1, num_points, max(1, num_points // 8)):
        engine.update_params(old())
        ids, outputs = start(engine, PROMPTS)
        kept = {request_id: tokens_of(found) for request_id, found in outputs.items()}
        interrupted(at)
        engine.update_params(new(), recompute=recompute)
        finish(engine, outputs)
        for request_id, prompt in zip(ids, PROMPTS, strict=True):
            tokens, found = kept[request_id], tokens_of(outputs[request_id])
            assert found[: len(tokens)] == tokens
            assert len(found) == NUM_NEW
            if recompute:
                assert found == tokens + run_alone(engine, new(), prompt + tokens, NUM_NEW - len(tokens))
