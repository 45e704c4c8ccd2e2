from __future__ import annotations

import json
from functools import partial
from unicodedata import is_normalized

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from fastgen_jax.text import load_tokenizer
from fastgen_jax.text.gguf import load_gguf
from fastgen_jax.text.pieces import byte_alphabet, piece_bytes, scheme_of_decoder
from tests.text.vocabularies import TRICKY, gguf_metadata, spm_model, write_json, write_spm

# Some tokenizers compose characters before they encode, and ▁ is SentencePiece's space.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=30).filter(partial(is_normalized, "NFC"))


@given(text=TEXTS)
def test_decoding_reverses_encoding(tokenizers, text):
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert all(0 <= id < tokenizer.vocab_size for id in ids)


@pytest.mark.parametrize("text", TRICKY)
def test_tokenizer_json_encodes_and_decodes_as_the_tokenizers_library_does(tmp_path, tokenizers, text):
    theirs = Backend.from_file(str(write_json(tmp_path) / "tokenizer.json"))
    ids = theirs.encode(text).ids
    assert tokenizers["json"].encode(text) == ids
    assert tokenizers["json"].decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


@given(ids=st.lists(st.integers(0, 404), max_size=20))
def test_any_ids_decode_as_in_the_tokenizers_library(tmp_path_factory, tokenizers, ids):
    path = tmp_path_factory.getbasetemp() / "tokenizers0" / "json" / "tokenizer.json"
    theirs = Backend.from_file(str(path))
    for skip in (True, False):
        assert tokenizers["json"].decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", [text for text in TRICKY if "<" not in text])
def test_a_sentencepiece_vocabulary_from_gguf_encodes_as_its_original_model(tokenizers, text):
    model = sentencepiece.SentencePieceProcessor(model_proto=spm_model())
    ids = model.encode(text)
    assert tokenizers["gguf spm"].encode(text, add_special_tokens=False) == ids
    assert tokenizers["spm"].encode(text, add_special_tokens=False) == ids
    assert tokenizers["spm"].decode(ids) == tokenizers["gguf spm"].decode(ids) == model.decode(ids)


def test_a_byte_level_vocabulary_from_gguf_encodes_as_its_original_json(tokenizers):
    from_gguf = load_gguf(gguf_metadata("gpt-2"))
    for text in TRICKY:
        assert from_gguf.encode(text) == tokenizers["json"].encode(text)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("gpt-2", "don't 1234!?", ["don", "'t", "Ġ1234", "!?"]),
        ("smollm", "don't 1234!?", ["don", "'t", "Ġ", "1", "2", "3", "4", "!?"]),
        ("llama-bpe", "DON'T 1234!?\n\n x", ["DON", "'T", "Ġ", "123", "4", "!?ĊĊ", "Ġx"]),
        ("qwen2", "DON'T 1234!?\n\n x", ["DON", "'T", "Ġ", "1", "2", "3", "4", "!?ĊĊ", "Ġx"]),
        ("seed-coder", "DON'T 12!?\n\n x", ["DON", "'T", "Ġ", "1", "2", "!?", "ĊĊ", "Ġx"]),
        ("exaone4", "don't 1234!?", ["don", "'t", "Ġ1234", "!?"]),
        ("default", "don't 1234!?", ["don", "'", "t", "Ġ", "123", "4", "!?"]),
    ],
)
def test_each_kind_of_pre_tokenizer_splits_words_correctly(kind, text, words):
    metadata = gguf_metadata(kind)
    known = [*byte_alphabet(), *dict.fromkeys(word for word in words if len(word) > 1)]
    # Words are merged letter by letter, so a merge across a word boundary would show as a longer token.
    prefixes = dict.fromkeys(word[:n] for word in words for n in range(2, len(word) + 1))
    metadata["tokenizer.ggml.tokens"] = list(dict.fromkeys([*known, *prefixes]))
    metadata["tokenizer.ggml.merges"] = [f"{prefix[:-1]} {prefix[-1]}" for prefix in prefixes]
    metadata["tokenizer.ggml.token_type"] = [1] * len(metadata["tokenizer.ggml.tokens"])
    tokenizer = load_gguf(metadata)
    assert [tokenizer.token_text(id) for id in tokenizer.encode(text, add_special_tokens=False)] == words


def test_special_tokens_are_found_in_text_and_skipped_in_output(tokenizer):
    ids = tokenizer.encode("a</s>b", add_special_tokens=False)
    assert ids.count(tokenizer.eos_token_ids[0]) == 1
    assert "</s>" not in tokenizer.decode(ids)
    assert "</s>" in tokenizer.decode(ids, skip_special_tokens=False)


def test_added_tokens_that_are_not_special_stay_visible(tokenizer):
    ids = tokenizer.encode("<think>x", add_special_tokens=False)
    assert "<think>" in [tokenizer.token_text(id) for id in ids]
    assert tokenizer.decode(ids) == "<think>x"


def test_the_beginning_of_sequence_token_is_added_where_the_format_says_so(tokenizers):
    for name, expected in {"spm": [1], "gguf spm": [1], "gguf bpe": [0], "json": []}.items():
        assert tokenizers[name].encode("x")[:-1][: len(expected)] == expected, name
        assert tokenizers[name].encode("x", add_special_tokens=False)[0] != tokenizers[name].bos_token_id
    configured = load_gguf(
        gguf_metadata("llama", **{"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True})
    )
    assert configured.encode("x")[0] != 1
    assert configured.encode("x")[-1] == 2


def test_only_the_first_part_gets_a_leading_space_unless_the_tokenizer_is_legacy(tmp_path):
    for legacy, pieces in ((True, ["▁x", "<|user|>", "▁x"]), (False, ["▁x", "<|user|>", "x"])):
        tokenizer = load_tokenizer(write_spm(tmp_path / str(legacy), legacy=legacy))
        ids = tokenizer.encode("x<|user|>x", add_special_tokens=False)
        assert "".join(map(tokenizer.token_text, ids)) == "".join(pieces)


def test_the_bytes_of_a_token_are_those_of_its_text():
    assert piece_bytes("ĠGrÃ¼ÃŁe", "byte-level") == " Grüße".encode()
    assert piece_bytes("▁日本", "metaspace") == " 日本".encode()
    assert piece_bytes("<0xE6>", "metaspace") == b"\xe6"
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_ids_beyond_the_vocabulary_have_no_text_and_negative_ids_are_refused(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size, tokenizer.vocab_size + 1000]) == ""
    with pytest.raises(ValueError, match="token id -1 is negative"):
        tokenizer.token_bytes(-1)
    with pytest.raises(ValueError, match=rf"ids are 0 to {tokenizer.vocab_size - 1}"):
        tokenizer.token_text(tokenizer.vocab_size)


def test_bytes_and_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match="must be a str, got bytes"):
        tokenizer.encode(b"x")
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")


def test_end_of_sequence_ids_of_all_files_are_collected(tmp_path):
    write_json(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    assert load_tokenizer(tmp_path).eos_token_ids == (1, 3)
    assert load_gguf(gguf_metadata("llama-bpe", **{"tokenizer.ggml.eot_token_id": 3})).eos_token_ids == (1, 3)


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        ({"type": "ByteLevel"}, ("byte-level", False)),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}, ("metaspace", True)),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}, ("metaspace", False)),
        (
            {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            ("metaspace", True),
        ),
    ],
)
def test_decoders_of_tokenizer_json_are_recognized(decoder, expected):
    assert scheme_of_decoder(decoder) == expected


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece"},
        {"type": "Metaspace", "replacement": "_"},
        {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}},
                {"type": "Strip", "content": " ", "start": 0, "stop": 1},
            ],
        },
    ],
)
def test_decoders_that_cannot_be_streamed_are_refused(decoder):
    with pytest.raises(ValueError, match="supported"):
        scheme_of_decoder(decoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "model is 'bert'; supported: 'gpt2'"),
        ({"tokenizer.ggml.pre": "kimi-k2"}, "pre is 'kimi-k2'; supported: gpt-2, smollm"),
        ({"tokenizer.ggml.tokens": []}, "lacks tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "lacks tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["no such"]}, "do not match"),
        ({"tokenizer.ggml.token_type": [1]}, "has 1 entries for"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000, outside the vocabulary"),
        ({"tokenizer.ggml.bos_token_id": None}, "add_bos_token is set, but"),
    ],
)
def test_incomplete_or_unknown_gguf_metadata_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        load_gguf(gguf_metadata("llama-bpe") | change)


def test_damaged_or_missing_tokenizer_files_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"does not exist"):
        load_tokenizer(tmp_path / "absent.gguf")
    (tmp_path / "tokenizer.model").write_bytes(b"\x00junk")
    with pytest.raises(ValueError, match=r"tokenizer\.model: SentencePiece refuses the model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unheard"}}')
    with pytest.raises(ValueError, match=r"tokenizer\.json does not load"):
        load_tokenizer(tmp_path)


def test_training_settings_do_not_truncate_or_pad_a_prompt(tmp_path, tokenizers):
    path = write_json(tmp_path) / "tokenizer.json"
    backend = Backend.from_file(str(path))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(path))
    assert json.loads(path.read_text())["truncation"]["max_length"] == 3
    assert load_tokenizer(tmp_path).encode("x y z u v w") == tokenizers["json"].encode("x y z u v w")


# Token ids by transformers 5.23 (AutoTokenizer from the same GGUF file).
SMOLLM2 = {
    "Hello world": [19556, 905],
    "12 months": [33, 34, 2704],
    "\u65e5\u672c\u8a9e ok": [23274, 115, 40993, 179, 120, 248, 10907],
    "don't  stop \U0001f600\n\n": [12420, 982, 216, 2853, 40303, 218, 1116],
}


@pytest.mark.parametrize("text", SMOLLM2)
def test_smollm2_is_tokenized_as_in_transformers(smollm2, text):
    assert smollm2.encode(text) == SMOLLM2[text]
    assert smollm2.decode(SMOLLM2[text]) == text


def test_smollm2_has_its_own_chat_template_and_end_token(smollm2):
    ids = smollm2.encode_chat([{"role": "user", "content": "Hi 😀"}])
    assert smollm2.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi 😀<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(smollm2.bos_token_id) == 3
    assert [smollm2.token_text(id) for id in smollm2.eos_token_ids] == ["<|im_end|>"]
