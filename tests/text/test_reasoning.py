"""Matchers of answers with reasoning."""

from __future__ import annotations

import numpy as np
import pytest

from fastgen_jax.text.grammar import Grammar, GrammarCompiler, ReasoningLimits
from fastgen_jax.text.reasoning import ReasoningMatcher
from tests.serving.tiny_server import tokenizer

EOS, NEWLINE = 2, tokenizer().encode("\n", add_special_tokens=False)[0]


def ids(text):
    return tuple(tokenizer().encode(text, add_special_tokens=False))


def matcher(*, opened=True, budget=None, constrained=True):
    limits = ReasoningLimits(
        opening=() if opened else ids("<t>"),
        closing=ids("</t>"),
        blanks=(NEWLINE,),
        forced=ids("</t>!"),
        then=ids("!") if constrained else (),
        budget=budget,
    )
    compiler = GrammarCompiler(tokenizer(), vocab_size=96, eos_token_ids=(EOS,))
    after = compiler.matcher(Grammar(kind="regex", source="[0-9]x")) if constrained else None
    return ReasoningMatcher(limits, after, eos_token_ids=(EOS,))


def allowed(made):
    words = np.zeros(3, np.int32)
    made.fill_mask(words)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def follow(made, text):
    """Consumes a text, each token of which must be allowed; returns whether it is complete."""
    ended = False
    for token_id in ids(text):
        assert token_id in allowed(made), (text, token_id)
        ended = made.advance(token_id)
    return ended


@pytest.mark.parametrize("restart", [False, True])
def test_a_text_follows_its_grammar_after_the_reasoning(restart):
    made = matcher()
    if restart:
        follow(made, "abc")
        made = made.restarted()
    assert EOS not in allowed(made)  # the text must come first
    follow(made, "thoughts 1</t>")
    assert allowed(made) == set(ids("!"))
    follow(made, "!")
    assert allowed(made) == set(ids("0123456789"))
    assert follow(made, "7x")
    assert made.is_complete


@pytest.mark.parametrize("budget", [0, 3])
def test_a_budget_forces_the_end_of_the_reasoning(budget):
    made = matcher(budget=budget, constrained=False)
    follow(made, "abc"[:budget])
    for token_id in ids("</t>!"):
        assert allowed(made) == {token_id}
        made.advance(token_id)
    assert len(allowed(made)) == 96
    assert not made.advance(ids("a")[0])
    assert not made.is_complete


def test_a_model_may_reason_or_not():
    made = matcher(opened=False)
    assert allowed(made) == {*ids("0123456789<"), NEWLINE}
    assert follow(made, "5x")
    made = matcher(opened=False)
    follow(made, "\n<")
    assert allowed(made) == set(ids("t"))
    follow(made, "t>so</t>!5")
    assert follow(made, "x")


def test_a_free_text_that_begins_like_reasoning_is_not_limited():
    made = matcher(opened=False, budget=1, constrained=False)
    follow(made, "<b>abc")
    assert len(allowed(made)) == 96
    made = matcher(opened=False, budget=1, constrained=False)
    follow(made, "\n<t>a")
    assert allowed(made) == {ids("<")[0]}


def test_an_error_of_the_grammar_is_one_of_the_text():
    made = matcher()
    follow(made, "</t>!")
    assert made.advance(ids("a")[0])
    assert made.error
