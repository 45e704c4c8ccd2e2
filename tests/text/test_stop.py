from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.text import IncrementalDetokenizer, StopStrings, stops_with_tokens

LETTERS = st.text("ab\u0301", max_size=12)  # few letters, so that matches, overlaps and near misses are frequent
STOPS = st.lists(st.text("ab\u0301", min_size=1, max_size=5), max_size=4)


def _first_match(text, stops):
    """The definition: the earliest start, then the longest match."""
    found = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
    return (text[: min(found)[0]], min(found)[2]) if found else (text, None)


def _stream(pieces, stops):
    matcher = StopStrings(stops)
    shown = ""
    for piece in pieces:
        text, matched = matcher.push(piece)
        shown += text
        if matched:
            return shown, matched
    text, matched = matcher.flush()
    return shown + text, matched


@given(pieces=st.lists(LETTERS, max_size=8), stops=STOPS)
def test_the_earliest_then_longest_match_wins_for_every_division_into_pieces(pieces, stops):
    assert _stream(pieces, stops) == _first_match("".join(pieces), stops)
    assert _stream(list("".join(pieces)), stops) == _first_match("".join(pieces), stops)


@given(text=LETTERS, stops=STOPS)
def test_only_text_that_may_begin_a_stop_string_is_held_back(text, stops):
    if any(stop in text for stop in stops):
        return
    shown, _ = StopStrings(stops).push(text)
    held = text[len(shown) :]
    longest = max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
    assert text == shown + held
    assert len(held) == longest


def test_a_stop_string_is_found_across_pieces():
    matcher = StopStrings(["\nUser:"])
    assert matcher.push("Hello\nUs") == ("Hello", None)
    assert matcher.push("er") == ("", None)
    assert matcher.push(": x") == ("", "\nUser:")
    assert matcher.push("more") == ("", "\nUser:")
    assert matcher.flush() == ("", "\nUser:")


def test_a_false_start_is_released():
    matcher = StopStrings(["\nUser:"])
    assert matcher.push("a\nUs") == ("a", None)
    assert matcher.push("ual") == ("\nUsual", None)


def test_a_longer_stop_string_is_awaited_until_the_end_of_the_text():
    matcher = StopStrings(["\n", "\n\n"])
    assert matcher.push("a\n") == ("a", None)
    assert matcher.flush() == ("", "\n")
    matcher = StopStrings(["\n", "\n\n"])
    matcher.push("a\n")
    assert matcher.push("\n") == ("", "\n\n")


def test_a_shorter_stop_string_inside_a_longer_one_waits_for_the_longer_one():
    assert _stream(["xab", "c!"], ["abcd", "b"]) == ("xa", "b")
    assert _stream(["xab", "cd"], ["abcd", "b"]) == ("x", "abcd")


def test_without_stop_strings_text_passes_immediately():
    matcher = StopStrings([])
    assert matcher.push("anything") == ("anything", None)
    assert matcher.flush() == ("", None)


def test_many_long_stop_strings_take_constant_time_per_character():
    stops = ["a" * n + "b" for n in range(1, 300)]
    assert _stream(["a" * 50] * 100, stops) == ("a" * 5000, None)
    assert _stream(["a" * 50] * 100 + ["b"], stops) == ("a" * 4701, "a" * 299 + "b")


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ("END", r"got the single string 'END'; pass \['END'\]"),
        ([""], "non-empty str, got ''"),
        ([3], "got 3"),
    ],
)
def test_malformed_stop_strings_are_refused(stops, message):
    with pytest.raises(ValueError, match=message):
        StopStrings(stops)


@given(pieces=st.lists(st.tuples(LETTERS, st.booleans()), max_size=8), stops=STOPS)
def test_before_the_boundary_a_stop_string_may_begin_but_not_end(pieces, stops):
    pieces = sorted(pieces, key=lambda piece: piece[1])  # the first ones may not end it
    text = "".join(piece for piece, _ in pieces)
    boundary = sum(len(piece) for piece, may_end in pieces if not may_end)
    found = [
        (start, -len(stop), stop)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > boundary
    ]
    matcher, shown = StopStrings(stops), ""
    for piece, may_end in pieces:
        shown += matcher.push(piece, may_end=may_end)[0]
    shown += matcher.flush()[0]
    assert (shown, matcher.matched) == ((text[: min(found)[0]], min(found)[2]) if found else (text, None))


def test_special_tokens_match_as_a_whole_and_are_never_shown(tokenizers):
    tokenizer = tokenizers["json"]
    user, end = tokenizer.encode("<|user|><|end|>", add_special_tokens=False)
    stops, marks = stops_with_tokens(["\n<|user|>", "s", "|u"], tokenizer)
    assert set(marks) == {user}

    def read(*pieces):
        matcher, shown = StopStrings(stops, unseen=marks.values()), ""
        detokenizer = IncrementalDetokenizer(tokenizer, marks=marks)
        for piece in pieces:
            ids = [piece] if isinstance(piece, int) else tokenizer.encode(piece, add_special_tokens=False)
            shown += matcher.push(detokenizer.push(ids))[0]
        return shown + matcher.flush()[0], matcher.matched is not None

    assert read("ab\n", user, "c") == ("ab", True)
    assert read("ab", user, end, "c") == ("abc", False)  # neither the "s" nor the "|u" in its name is text
    assert read("ab\n", end, "c") == ("ab\nc", False)
    assert read("ab\n<|us", "er|>") == ("ab", True)  # spelled out by the model, it is text
