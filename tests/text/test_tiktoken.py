from __future__ import annotations

import base64
import itertools
import json
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from fastgen_jax.text import load_tokenizer
from fastgen_jax.text.splits import SPLITS
from fastgen_jax.text.tiktoken import _QWEN_SPECIALS, _TEKKEN_SPECIALS, read_tiktoken
from tests.text.vocabularies import TEKKEN_PATTERN, TRICKY, ranks, write_qwen, write_tekken

TEXTS = st.text(st.one_of(st.sampled_from("the dog in 123 qüu\n日 ver"), st.characters(codec="utf-8")), max_size=30)


def _by_definition(word: bytes, ranked: dict[bytes, int]) -> list[int]:
    """tiktoken's rule: a word with a rank is one token, else the neighbors with the lowest rank merge, leftmost first."""
    if word in ranked:
        return [ranked[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranked[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranked]
        if not pairs:
            return [ranked[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@given(text=TEXTS)
def test_ids_follow_tiktokens_rule_word_by_word(tokenizers, text):
    # hypothesis also tries literals of our source, and the text of a special token becomes that token
    assume(not any(special in text for special in (*_QWEN_SPECIALS, *_TEKKEN_SPECIALS, "<SPECIAL_")))
    for name, pattern, offset, pieces in (
        ("tiktoken", SPLITS["qwen2"][0], 0, ranks()),
        ("tekken", TEKKEN_PATTERN, 30, ranks()[:-1]),
    ):
        ranked = {piece: rank + offset for rank, piece in enumerate(pieces)}
        composed = unicodedata.normalize("NFC", text) if name == "tiktoken" else text
        words = [word.encode() for word, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(composed)]
        expected = [id for word in words for id in _by_definition(word, ranked)]
        assert tokenizers[name].encode(text, add_special_tokens=False) == expected
        assert tokenizers[name].decode(expected) == composed


def test_special_tokens_have_the_ids_of_the_original_programs(tokenizers):
    qwen, tekken = tokenizers["tiktoken"], tokenizers["tekken"]
    size = len(ranks())
    assert qwen.encode("<|im_start|>the<|im_end|>") == [size + 1, ranks().index(b"the"), size + 2]
    assert qwen.vocab_size == size + 208
    assert qwen.eos_token_ids == (size, size + 2)
    assert tekken.encode("the")[0] == tekken.bos_token_id == 1
    assert tekken.token_text(29) == "<SPECIAL_29>"
    assert tekken.vocab_size == 29 + size
    assert tekken.decode(tekken.encode("[INST]the[/INST]")) == "the"


@pytest.mark.parametrize("name", ["tiktoken", "tekken"])
def test_decoding_reverses_encoding(tokenizers, name):
    for text in TRICKY:
        if "<s>" not in text and "</s>" not in text:
            ids = tokenizers[name].encode(text, add_special_tokens=False)
            composed = unicodedata.normalize("NFC", text) if name == "tiktoken" else text
            assert tokenizers[name].decode(ids) == composed


def test_the_model_file_of_llama_3_is_distinguished_from_sentencepieces(tmp_path):
    pieces = [base64.b64encode(bytes([i % 256, i // 256 % 256, i // 65536, 1])) + f" {i}\n".encode() for i in range(128_000)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(pieces))
    vocabulary = read_tiktoken(tmp_path / "tokenizer.model")
    assert vocabulary.kind == "tiktoken (Llama 3)"
    assert (vocabulary.specials["<|begin_of_text|>"], vocabulary.specials["<|eot_id|>"]) == (128_000, 128_009)
    assert vocabulary.special_ids.stop == 128_256
    (tmp_path / "tokenizer.model").write_bytes(b"".join(pieces[:1000]))
    with pytest.raises(ValueError, match="has 1,000 ranks; only the special tokens of Llama 3"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\n!!! 1\n", r"line 2: expected a piece in base64"),
        (b"IQ== 0\nIg== 2\n", "gaps in its ranks"),
        (b"", "gaps in its ranks, or none"),
    ],
)
def test_broken_ranks_are_refused(tmp_path, content, message):
    (write_qwen(tmp_path) / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_broken_tekken_file_is_refused(tmp_path):
    file = write_tekken(tmp_path) / "tekken.json"
    file.write_text(json.dumps({"config": {}}))
    with pytest.raises(ValueError, match=r"tekken.json is broken .*download it again"):
        load_tokenizer(tmp_path)
