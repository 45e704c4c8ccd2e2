"""Sequences of `put`: forked, rolled back, interrupted, and their hidden states."""

from __future__ import annotations

import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgen_jax import Engine, Research
from fastgen_jax.models.decoder import head
from tests.tiny import drain, expected, greedy, tiny_engine, tiny_model, tokens_of

RNG = np.random.default_rng(3)
TEXT = RNG.integers(3, 96, 60).tolist()


def one_program() -> Engine:
    """All steps have the same shape, so that equal results are equal bit for bit."""
    return tiny_engine(token_budget=16, budget_ladder=())


def logits_of(engine: Engine, tokens: list[int]) -> np.ndarray:
    research = Research(engine)
    (logits,) = research.put(["fresh"], [tokens])
    research.flush("fresh")
    return logits


def leave_idle(engine: Engine, *uids: str | int) -> None:
    for uid in uids:
        Research(engine).flush(uid)
    engine.scheduler.check_integrity()
    assert engine.scheduler.num_free_blocks == engine.config.num_blocks


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 22])
def test_a_fork_and_its_origin_continue_independently(length):
    engine = one_program()
    research = Research(engine)
    research.put(["a"], [TEXT[:length]])
    before = engine.scheduler.num_free_blocks
    research.fork("a", "b")
    assert engine.scheduler.num_free_blocks == before, "a fork costs nothing"
    assert research.query("b") == research.query("a")
    a, b = research.put(["a", "b"], [[5, 6], [7]])
    np.testing.assert_array_equal(a, logits_of(engine, [*TEXT[:length], 5, 6]))
    np.testing.assert_array_equal(b, logits_of(engine, [*TEXT[:length], 7]))
    shared = length // 4
    held = research.query("a").num_blocks + research.query("b").num_blocks
    assert engine.config.num_blocks - engine.scheduler.num_free_blocks == held - shared, "full blocks stay shared"
    research.flush("a")
    (b,) = research.put(["b"], [[8, 9]])
    np.testing.assert_array_equal(b, logits_of(engine, [*TEXT[:length], 7, 8, 9]))
    leave_idle(engine, "b")


def test_a_rolled_back_sequence_continues_as_if_it_had_not_grown():
    engine = one_program()
    research = Research(engine)
    research.put(["a"], [TEXT[:30]])
    research.rollback("a", 0)
    research.rollback("a", np.int64(19))
    assert research.query("a")[::2] == (11, 3)
    (a,) = research.put(["a"], [[50, 51]])
    np.testing.assert_array_equal(a, logits_of(engine, [*TEXT[:11], 50, 51]))
    leave_idle(engine, "a")


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["put", "put two", "fork", "rollback", "flush"]), st.integers(0, 99), st.integers(1, 9)),
    max_size=14,
)


@given(operations=OPERATIONS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_series_of_forks_and_rollbacks_returns_the_logits_of_fresh_sequences(operations):
    engine, texts, last = one_program(), {}, {}
    research = Research(engine)
    for number, (operation, choice, count) in enumerate(operations):
        name = sorted(texts)[choice % len(texts)] if texts else None
        new = [(choice + 7 * i) % 90 for i in range(count)]
        if operation == "put two" and len(texts) > 1:
            names = sorted(texts)[:2]
            for name, logits in zip(names, research.put(names, [new, new[::-1]]), strict=True):
                last[name] = logits
            texts[names[0]], texts[names[1]] = texts[names[0]] + new, texts[names[1]] + new[::-1]
        elif operation.startswith("put") or name is None:
            name = name if name and choice % 2 else f"s{number}"
            texts[name] = [*texts.get(name, ()), *new]
            (last[name],) = research.put([name], [new])
        elif operation == "fork":
            research.fork(name, f"s{number}")
            texts[f"s{number}"] = texts[name]
        elif operation == "rollback":
            back = choice % len(texts[name])
            research.rollback(name, back)
            texts[name] = texts[name][: len(texts[name]) - back]
            last.pop(name, None)
        else:
            research.flush(name)
            del texts[name]
            last.pop(name, None)
        engine.scheduler.check_integrity()
    for name, logits in last.items():
        np.testing.assert_array_equal(logits, logits_of(engine, texts[name]))
    for name, text in texts.items():  # what a later write could have damaged
        (logits,) = research.put([name], [[3]])
        np.testing.assert_array_equal(logits, logits_of(engine, [*text, 3]))
    leave_idle(engine, *texts)


@pytest.mark.parametrize("options", [{"kv_dtype": "int8"}, {"stack_layers": True}])
def test_a_block_is_copied_in_every_form_of_cache(options):
    engine = tiny_engine(budget_ladder=(), **options)
    research = Research(engine)
    research.put(["a"], [TEXT[:6]])
    research.fork("a", "b")
    a, b = research.put(["a", "b"], [[5], [7]])
    leave_idle(engine, "a", "b")
    for token, logits in ((5, a), (7, b)):  # in the same steps: attention over 8-bit caches depends on them
        research.put(["fresh"], [TEXT[:6]])
        (alone,) = research.put(["fresh"], [[token]])
        np.testing.assert_array_equal(logits, alone)
        research.flush("fresh")


def test_forks_compile_one_program_whatever_the_blocks():
    engine = one_program()
    research = Research(engine)
    research.put(["a"], [TEXT[:5]])
    for name in ("b", "c", "d"):
        research.fork("a", name)
        research.put([name], [[4]])
    assert engine.runner._copy_block._cache_size() == 1
    leave_idle(engine, "a", "b", "c", "d")


def test_room_for_the_copy_of_a_shared_block_is_counted():
    engine = one_program()
    research = Research(engine)
    research.put(["a", "rest", "more"], [TEXT[:6], [5] * 124, [5] * 124])  # 2 + 31 + 31 blocks of 4
    assert research.query("a").max_new_tokens == 2
    research.fork("a", "b")
    assert research.query("a").max_new_tokens == 0
    assert not research.can_schedule(["a"], [1])
    with pytest.raises(ValueError, match="put needs 1 KV blocks and 0 are free"):
        research.put(["a"], [[5]])
    research.flush("b")
    assert research.can_schedule(["a"], [2])
    leave_idle(engine, "a", "rest", "more")


def test_more_sequences_than_run_at_the_same_time_can_be_put():
    engine = one_program()  # 8 sequences at the same time
    research = Research(engine)
    names = list(range(20))
    logits = research.put(names, [TEXT[i : i + 3] for i in names])
    for i in names:
        np.testing.assert_array_equal(logits[i], logits_of(engine, TEXT[i : i + 3]))
    leave_idle(engine, *names)


@pytest.mark.parametrize(
    "as_input",
    [
        pytest.param(list, id="list"),
        pytest.param(tuple, id="tuple"),
        pytest.param(np.asarray, id="numpy"),
        pytest.param(lambda ids: np.asarray(ids, np.uint8), id="bytes of numpy"),
        pytest.param(jnp.asarray, id="jax"),
        pytest.param(lambda ids: list(np.asarray(ids)), id="list of numpy scalars"),
        pytest.param(lambda ids: list(jnp.asarray(ids)), id="list of jax scalars"),
    ],
)
def test_token_ids_come_in_any_form_of_integers(as_input):
    engine = one_program()
    np.testing.assert_array_equal(logits_of(engine, as_input(TEXT[:5])), logits_of(engine, TEXT[:5]))
    leave_idle(engine)


WRONG_TOKENS = [
    ([1.5], r"tokens\[1\] contains 1.5; pass a list of token ids, which are integers"),
    ([True], r"tokens\[1\] contains True"),
    ([None], r"tokens\[1\] contains None"),
    (["5"], r"tokens\[1\] contains '5'"),
    (np.asarray([1.5]), r"tokens\[1\] is an array of float64; token ids are integers"),
    (np.asarray([True]), r"tokens\[1\] is an array of bool"),
    (np.asarray([[1]]), r"tokens\[1\] is an array of shape \(1, 1\)"),
    (jnp.asarray([1.0]), r"tokens\[1\] is an array of float32"),
    ([], r"tokens\[1\] is empty"),
    (5, r"tokens\[1\] is 5; pass a list of token ids"),
    ("text", r"tokens\[1\] is 'text'; pass a list of token ids"),
    (b"ab", r"tokens\[1\] is b'ab'"),
    ([96], r"tokens\[1\]: token id 96 is outside the vocabulary, 0\.\.95"),
    ([-1], r"tokens\[1\]: token id -1 is outside"),
    ([1] * 129, "129 tokens but max_context_len is 128"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_TOKENS)
def test_wrong_tokens_are_refused_before_anything_changes(wrong: Any, message: str):
    engine = one_program()
    research = Research(engine)
    research.put(["a"], [TEXT[:6]])
    books = dict(engine.manual_sequences.table), engine.scheduler.num_free_blocks
    with pytest.raises(ValueError, match=message):
        research.put(["a", "b"], [[5], wrong])
    assert (dict(engine.manual_sequences.table), engine.scheduler.num_free_blocks) == books
    leave_idle(engine, "a")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.put("ab", [[1], [2]]), "uids is 'ab'; pass a list of sequence ids"),
        (lambda r: r.put(["a", "a"], [[1], [2]]), "repeat"),
        (lambda r: r.put([1.5], [[1]]), "uids contains 1.5; a sequence id is a string or an integer"),
        (lambda r: r.put([True], [[1]]), "uids contains True"),
        (lambda r: r.put(["a"], [[1], [2]]), "1 sequence ids but 2 token lists"),
        (lambda r: r.fork("x", "y"), "no sequence 'x'; known: 'a'"),
        (lambda r: r.fork("a", "a"), "sequence 'a' already exists"),
        (lambda r: r.rollback("x", 1), "no sequence 'x'"),
        (lambda r: r.rollback("a", 6), "num_tokens is 6, but 0..5 tokens of sequence 'a' can be removed; flush it"),
        (lambda r: r.rollback("a", -1), "num_tokens is -1"),
        (lambda r: r.rollback("a", 1.0), "num_tokens is 1.0"),
        (lambda r: r.flush("x"), "no sequence 'x'"),
        (lambda r: r.hidden_states([1, 2], last=3), r"last is 3, but must be an integer in 1\.\.2"),
        (lambda r: r.hidden_states([1.5]), "tokens contains 1.5"),
    ],
)
def test_wrong_calls_are_refused(call: Any, message: str):
    engine = one_program()
    research = Research(engine)
    research.put(["a"], [TEXT[:6]])
    with pytest.raises(ValueError, match=message):
        call(research)
    assert research.query("a").num_tokens == 6
    leave_idle(engine, "a")


@pytest.mark.parametrize("when", range(3))
def test_an_error_in_any_step_of_put_leaves_every_sequence_as_it_was(monkeypatch, when):
    engine = one_program()
    research = Research(engine)
    research.put(["a"], [TEXT[:6]])
    research.fork("a", "b")
    books = dict(engine.manual_sequences.table), engine.scheduler.num_free_blocks
    pack, calls = research._packer.pack, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) > when:
            raise RuntimeError("out of order")
        return pack(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(research._packer, "pack", failing)
        with pytest.raises(RuntimeError, match="out of order"):
            research.put(["b", "new", "a"], [TEXT[6:20], TEXT[:30], [9]])
    assert (dict(engine.manual_sequences.table), engine.scheduler.num_free_blocks) == books
    engine.scheduler.check_integrity()
    a, b = research.put(["a", "b"], [[5], [7]])
    leave_idle(engine, "a", "b")
    for token, logits in ((5, a), (7, b)):  # in the same steps: attention over 8-bit caches depends on them
        research.put(["fresh"], [TEXT[:6]])
        (alone,) = research.put(["fresh"], [[token]])
        np.testing.assert_array_equal(logits, alone)
        research.flush("fresh")


INTERRUPTED = {
    "put": lambda research: research.put(["b", "new"], [TEXT[6:20], TEXT[:9]]),
    "fork": lambda research: research.fork("a", "new"),
    "rollback": lambda research: research.rollback("b", 3),
    "flush": lambda research: research.flush("b"),
    "hidden states": lambda research: research.hidden_states(TEXT[:5]),
}
AFTER = {
    "put": {"a": 6, "b": 20, "new": 9},
    "fork": {"a": 6, "b": 6, "new": 6},
    "rollback": {"a": 6, "b": 3},
    "flush": {"a": 6},
    "hidden states": {"a": 6, "b": 6},
}


def interrupt_at(line: int, call: Any) -> bool:
    """Runs `call`, with an interrupt before the given executed line of the bookkeeping; False if it ended first."""
    lines = iter(range(100_000))

    def trace(frame, event, argument):
        if frame.f_code.co_name in ("settle_blocks", "settle"):
            return None  # it repairs the state: one interrupt at a time
        if not frame.f_code.co_filename.endswith(("research.py", "manual.py", "scheduler.py", "block_pool.py")):
            return None
        if event == "line" and next(lines) == line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("operation", INTERRUPTED)
def test_an_interrupt_at_any_line_leaves_all_sequences_as_before_or_as_after(operation):
    engine = one_program()
    research = Research(engine)
    line = 0
    while True:
        research.put(["a"], [TEXT[:6]])
        research.fork("a", "b")
        interrupted = interrupt_at(line, lambda: INTERRUPTED[operation](research))
        engine.scheduler.check_integrity()
        lengths = {name: len(held.token_ids) for name, held in engine.manual_sequences.table.items()}
        assert lengths in ({"a": 6, "b": 6}, AFTER[operation])
        for name, length in lengths.items():
            assert len(engine.manual_sequences.get(name).block_ids) == -(-length // 4)
        if line % 16 == 0 and "b" in lengths and lengths["b"] == 6:
            np.testing.assert_array_equal(research.put(["b"], [[7]])[0], logits_of(engine, [*TEXT[:6], 7]))
        leave_idle(engine, *lengths)
        if not interrupted:
            break
        line += 1
    assert line > 4


def test_when_the_cache_is_lost_in_the_middle_of_put_the_sequences_are_computed_again(monkeypatch):
    params, model = tiny_model()
    engine = Engine(params, model, one_program().config.choices)  # not shared: its memory is cleared
    research = Research(engine)
    research.put(["a"], [TEXT[:26]])
    research.fork("a", "b")
    run = engine.runner.run

    def losing(packed, bucket):
        memory = engine.runner.kv_cache, engine.runner.state
        run(packed, bucket)
        engine.runner.kv_cache, engine.runner.state = memory  # the interrupt came before the new ones were stored
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", losing)
        with pytest.raises(KeyboardInterrupt):
            research.put(["a"], [[5]])
    engine.runner.reset()
    assert research.query("a") == (26, 102, 0)
    research.rollback("b", 3)
    a, b = research.put(["a", "b"], [[5], [7]])
    np.testing.assert_array_equal(a, logits_of(engine, [*TEXT[:26], 5]))
    np.testing.assert_array_equal(b, logits_of(engine, [*TEXT[:23], 7]))
    leave_idle(engine, "a", "b")


def test_hidden_states_times_the_head_are_the_logits():
    want = expected()
    tokens, logits = want["token_ids"].tolist(), want["logits"]
    engine = tiny_engine()
    research = Research(engine)
    params, model = tiny_model()
    hidden = research.hidden_states(tokens)
    assert (hidden.dtype, hidden.shape) == (np.float32, (len(tokens), model.embed_dim))
    ours = head(jnp.asarray(hidden), params, jnp.int32(len(tokens)), config=model)
    np.testing.assert_allclose(ours, logits, atol=1e-3)  # float32 sums in another order than torch's
    leave_idle(engine)


@pytest.mark.parametrize("last", [1, 7, 30])
def test_the_last_hidden_states_are_those_at_the_end_of_all_and_do_not_depend_on_chunks(last):
    whole = Research(one_program()).hidden_states(TEXT)
    np.testing.assert_array_equal(Research(one_program()).hidden_states(jnp.asarray(TEXT), last=last), whole[-last:])
    # Steps of other sizes are other programs, which may round float32 sums in another order.
    np.testing.assert_allclose(Research(tiny_engine()).hidden_states(TEXT), whole, atol=1e-5)


def test_put_and_requests_do_not_affect_each_other_while_sequences_fork():
    engine = one_program()
    research = Research(engine)
    prompt = TEXT[:20]
    engine.add(prompt, greedy(12), request_id="alone")
    alone = tokens_of(drain(engine)["alone"])
    engine.add(prompt, greedy(12), request_id="concurrent")
    outputs = []
    research.put(["a"], [TEXT[:6]])
    for i in range(8):
        outputs += engine.step()
        research.fork("a", i)
        research.put([i], [[i + 3]])
    outputs += drain(engine).get("concurrent", [])
    assert tokens_of(outputs) == alone
    leave_idle(engine, "a", *range(8))
