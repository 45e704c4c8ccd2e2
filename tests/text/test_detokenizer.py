from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.text import IncrementalDetokenizer

IDS = st.lists(st.integers(0, 500), max_size=40)  # includes byte pieces, special tokens and ids beyond the vocabulary


def _cut(ids, borders):
    edges = sorted({0, len(ids), *(border % (len(ids) + 1) for border in borders)})
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


@given(ids=IDS, borders=st.lists(st.integers(0, 100)), skip=st.booleans())
def test_pieces_join_to_the_decoded_text_for_every_division_of_the_tokens(tokenizers, ids, borders, skip):
    for tokenizer in tokenizers.values():
        stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
        text = "".join([*map(stream.push, _cut(ids, borders)), stream.flush()])
        assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@given(prompt=IDS, ids=IDS)
def test_after_a_prompt_the_pieces_are_what_decoding_adds_to_its_text(tokenizers, prompt, ids):
    for tokenizer in tokenizers.values():
        stream = IncrementalDetokenizer(tokenizer, prompt_ids=prompt)
        text = "".join([*(stream.push([id]) for id in ids), stream.flush()])
        before = IncrementalDetokenizer(tokenizer).push(prompt)  # everything except an unfinished character
        assert before + text == tokenizer.decode([*prompt, *ids])


@pytest.mark.parametrize("text", ["日本語", "👩‍👩‍👧‍👦🇩🇪", "e\u0301 Grüße", "a😀b"])
def test_a_character_appears_only_when_it_is_complete(tokenizer, text):
    stream = IncrementalDetokenizer(tokenizer)
    deltas = [stream.push([id]) for id in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(deltas) == text
    assert "\ufffd" not in "".join(deltas)
    assert stream.flush() == ""


@pytest.mark.parametrize(
    ("data", "shown", "left"),
    [
        (b"\xe6\x97", "", "\ufffd"),  # cut short: one replacement, at the end only
        (b"\xe6A", "\ufffdA", ""),  # interrupted by a letter
        (b"\x80\xff", "\ufffd\ufffd", ""),  # cannot start a character
        (b"\xf0\x9f\x98", "", "\ufffd"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd", ""),  # a surrogate
        (b"\xc0\xaf", "\ufffd\ufffd", ""),  # an overlong slash
    ],
)
def test_invalid_bytes_become_replacement_characters(tokenizers, data, shown, left):
    tokenizer = tokenizers["spm"]
    ids = [tokenizer.texts.index(f"<0x{byte:02X}>") for byte in data]
    stream = IncrementalDetokenizer(tokenizer)
    assert "".join(stream.push([id]) for id in ids) == shown
    assert stream.flush() == left
    assert tokenizer.decode(ids) == shown + left


def test_sentencepieces_leading_space_is_dropped_at_the_start_and_kept_after_a_prompt(tokenizers):
    tokenizer = tokenizers["spm"]
    ids = tokenizer.encode("the dog", add_special_tokens=False)
    assert IncrementalDetokenizer(tokenizer).push(ids) == "the dog"
    assert IncrementalDetokenizer(tokenizer, prompt_ids=tokenizer.encode("see")).push(ids) == " the dog"
    assert IncrementalDetokenizer(tokenizer, prompt_ids=[1]).push(ids) == "the dog"  # BOS has no text


def test_special_tokens_are_shown_only_on_request(tokenizer):
    end = tokenizer.eos_token_ids[0]
    assert IncrementalDetokenizer(tokenizer).push([end]) == ""
    assert IncrementalDetokenizer(tokenizer, skip_special_tokens=False).push([end]) == "</s>"


def test_the_work_per_token_does_not_grow_with_the_text(tokenizers):
    for name, tokenizer in tokenizers.items():
        calls = 0

        class Counting(type(tokenizer)):
            def token_bytes(self, id):
                nonlocal calls
                calls += 1
                return super().token_bytes(id)

        fields = {field: getattr(tokenizer, field) for field in tokenizer.__dataclass_fields__}
        stream = IncrementalDetokenizer(Counting(**fields))
        for _ in range(1000):
            stream.push([50])
        assert calls == 1000, name
