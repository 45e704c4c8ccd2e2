"""Grammars in the engine: the sampled text follows them, and the tokens of other requests do not change."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from fastgen_jax import SamplingParams
from fastgen_jax.text.filters import TokenFilter
from fastgen_jax.text.grammar import Grammar, GrammarCompiler
from tests.serving.tiny_server import MODEL, ask, engine, events, tokenizer
from tests.tiny import drain, greedy, tokens_of

DIGITS = Grammar(kind="regex", source="[0-9]{3,6}x")
SCHEMA = Grammar.json_schema(
    {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}}, "required": ["a"], "additionalProperties": False}
)
SAMPLED = SamplingParams(max_new_tokens=40, temperature=1.5, seed=5)


def text_of(outputs) -> str:
    return "".join(output.text for output in outputs)


def test_a_mask_has_a_bit_for_each_allowed_token():
    compiler = GrammarCompiler(tokenizer(), vocab_size=130, eos_token_ids=(2,))
    matcher = compiler.matcher(DIGITS)
    words = np.zeros(5, np.int32)
    allowed = []
    for token_id in tokenizer().encode("123x", add_special_tokens=False):
        matcher.fill_mask(words)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        allowed.append("".join(sorted(tokenizer().decode([i]) for i in np.flatnonzero(bits))))
        done = matcher.advance(token_id)
    assert allowed == ["0123456789"] * 3 + ["0123456789x"]
    assert done
    assert matcher.error is None


@pytest.mark.parametrize("kind", ["json_schema", "regex", "lark"])
def test_a_grammar_that_cannot_be_used_is_refused(kind):
    compiler = GrammarCompiler(tokenizer(), vocab_size=96, eos_token_ids=(2,))
    source = {"json_schema": '{"type": "nonsense"}', "regex": "(", "lark": "start: oops"}[kind]
    with pytest.raises(ValueError, match=f"the {kind.replace('_', ' ')} cannot be used"):
        compiler.matcher(Grammar(kind=kind, source=source))


def test_a_token_outside_the_grammar_is_an_error_of_the_matcher():
    matcher = GrammarCompiler(tokenizer(), vocab_size=96, eos_token_ids=(2,)).matcher(DIGITS)
    assert matcher.advance(40)
    assert matcher.error
    words = np.zeros(3, np.int32)
    matcher.fill_mask(words)  # the request ends when its token is read; until then the mask only has to allow some token
    assert words.all()


def test_constrained_and_free_requests_in_one_step_do_not_affect_each_other():
    shared = engine()
    prompts = [[5, 6, 7], [8] * 20, [9, 10]]
    alone = []
    for prompt in prompts:
        request_id = shared.add(prompt, greedy(12))
        alone.append(tokens_of(drain(shared)[request_id]))
    request_id = shared.add([5], SAMPLED, grammar=SCHEMA)
    constrained_alone = tokens_of(drain(shared)[request_id])
    free = [shared.add(prompt, greedy(12)) for prompt in prompts]
    bound = [shared.add([5], SAMPLED, grammar=grammar) for grammar in (SCHEMA, DIGITS)]
    outputs = drain(shared)
    assert [tokens_of(outputs[i]) for i in free] == alone
    assert tokens_of(outputs[bound[0]]) == constrained_alone
    assert json.loads(text_of(outputs[bound[0]]))["a"] in ("x", "yy")
    assert re.fullmatch(DIGITS.source, text_of(outputs[bound[1]]))
    assert [outputs[i][-1].finish_reason for i in bound] == ["stop", "stop"]
    shared.scheduler.check_integrity()
    assert shared.metrics.compiles_while_serving == 0


def test_grammars_survive_preemption_and_exceed_the_size_of_one_call():
    shared = engine()
    many = Grammar(kind="regex", source="([0-9]{8} ){4}")
    preempted = shared.scheduler.stats.num_preemptions
    ids = [shared.add([5 + i] * 9, SamplingParams(max_new_tokens=40, seed=i), grammar=many) for i in range(14)]
    outputs = drain(shared)
    assert shared.scheduler.stats.num_preemptions > preempted, "the cache is not small enough for this test"
    texts = [text_of(outputs[i]) for i in ids]
    assert all(re.fullmatch(many.source, text) for text in texts)
    request_id = shared.add([5] * 9, SamplingParams(max_new_tokens=40, seed=0), grammar=many)
    assert text_of(drain(shared)[request_id]) == texts[0]


def test_an_engine_recovers_from_a_failed_step_with_the_same_tokens(monkeypatch):
    shared = engine()
    prompts = [[5 + i, 6, 7] for i in range(14)]
    want = []
    for prompt in prompts:
        request_id = shared.add(prompt, greedy(10))
        want.append(tokens_of(drain(shared)[request_id]))
    ids = [shared.add(prompt, greedy(10, prompt_logprobs=1)) for prompt in prompts]
    outputs: dict[str, list] = {}
    for _ in range(3):
        for output in shared.step():
            outputs.setdefault(output.request_id, []).append(output)
    monkeypatch.setattr(type(shared.runner), "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shared.step()
    monkeypatch.undo()
    ended = shared.recover()
    assert 0 < len(ended) <= shared.config.max_num_seqs
    shared.scheduler.check_integrity()
    for request_id, more in drain(shared).items():
        outputs.setdefault(request_id, []).extend(more)
    rest = [(i, w) for i, w in zip(ids, want, strict=True) if i not in ended]
    assert len(rest) >= len(ids) - shared.config.max_num_seqs
    assert [tokens_of(outputs[i]) for i, _ in rest] == [w for _, w in rest]
    assert all(len(outputs[i][0].prompt_logprobs) == 2 for i, _ in rest)
    assert shared.scheduler.num_free_blocks == shared.config.num_blocks


def test_a_minimum_length_contradicts_a_grammar():
    with pytest.raises(ValueError, match="a grammar decides when the text ends"):
        engine().add([5], SamplingParams(max_new_tokens=9, min_new_tokens=3), grammar=DIGITS)


# The vocabulary has no tilde.
DEAD_END = Grammar.json_schema({"enum": ["x~", "xz~"]})
DEAD_ENDS = [DEAD_END, Grammar(kind="regex", source="[a-z]{5}~+"), Grammar(kind="regex", source="ab(~|é)")]


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("grammar", DEAD_ENDS)
def test_a_dead_end_of_a_grammar_aborts_the_request(grammar, ignore_eos):
    shared = engine()
    request_id = shared.add([5], SamplingParams(max_new_tokens=30, seed=3, ignore_eos=ignore_eos), grammar=grammar)
    last = drain(shared)[request_id][-1]
    assert last.finish_reason == "abort"
    assert "came to a dead end" in last.error


def test_a_dead_end_is_an_error_with_and_without_streaming():
    schema = {"type": "json_schema", "json_schema": {"schema": json.loads(DEAD_END.source)}}
    body = {"model": MODEL, "prompt": "x", "max_tokens": 30, "temperature": 0, "response_format": schema}
    response = ask("/v1/completions", body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "grammar_failed")
    assert response.headers["x-should-retry"] == "false"
    *before, last = events(ask("/v1/completions", {**body, "stream": True}))
    assert "".join(event["choices"][0]["text"] for event in before).startswith('"x')
    assert all(event["choices"][0]["finish_reason"] is None for event in before)
    assert last["error"]["code"] == "grammar_failed"


def test_a_text_that_completes_its_grammar_at_the_length_limit_is_finished():
    shared, grammar = engine(), Grammar(kind="regex", source="abc")
    for limit, reason in ((2, "length"), (3, "stop"), (9, "stop")):
        request_id = shared.add([5], SamplingParams(max_new_tokens=limit, seed=1), grammar=grammar)
        assert drain(shared)[request_id][-1].finish_reason == reason


def test_a_grammar_may_require_the_text_of_a_special_token():
    shared = engine()
    grammar = Grammar.json_schema({"enum": ["a</s>b"]})
    request_id = shared.add([5], SamplingParams(max_new_tokens=30, seed=1), grammar=grammar)
    assert text_of(drain(shared)[request_id]) == '"a</s>b"'


def test_a_grammar_is_compiled_once_and_its_matchers_are_independent(monkeypatch):
    compiler = GrammarCompiler(tokenizer(), vocab_size=96, eos_token_ids=(2,))
    first = compiler.matcher(DIGITS)
    monkeypatch.setattr(compiler, "_compile", None)
    for token_id in tokenizer().encode("12", add_special_tokens=False):
        assert not first.advance(token_id)
    masks = np.zeros((2, 3), np.int32)
    matchers = (first.restarted(), compiler.matcher(Grammar(kind="regex", source=DIGITS.source)))
    for matcher, words in zip(matchers, masks, strict=True):
        matcher.fill_mask(words)
        assert not matcher.advance(tokenizer().encode("1", add_special_tokens=False)[0])
    assert (masks[0] == masks[1]).all()


def test_a_filter_bans_the_end_of_a_sequence_only_after_its_beginning():
    banned = TokenFilter(vocab_size=40, allowed=[1, 2, 3, 33], banned=[(3,), (1, 2, 33)])
    assert not banned.is_static

    def allowed():
        words = np.zeros(2, np.int32)
        banned.fill_mask(words)
        return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()

    seen = []
    for token_id in (1, 2, 2, 1, 2):
        seen.append(allowed())
        assert not banned.advance(token_id)
    assert seen == [[1, 2, 33], [1, 2, 33], [1, 2], [1, 2, 33], [1, 2, 33]]
    assert allowed() == [1, 2]
    assert TokenFilter(vocab_size=40, allowed=None, banned=[(3,)]).is_static
    banned = banned.restarted()
    assert allowed() == [1, 2, 33]
