"""Files of a checkpoint, and of a user, as they are found: older formats, contradictions, damage."""

from __future__ import annotations

import pytest

from fastgen_jax import Engine, EngineConfig
from fastgen_jax.checkpoint.convert import tokenizer_files
from fastgen_jax.cli import main
from fastgen_jax.engine.config import resolve
from fastgen_jax.engine.intake import Intake
from fastgen_jax.text import load_tokenizer
from fastgen_jax.text.gguf import load_gguf
from tests.checkpoint.tiny_files import write_hf
from tests.text.test_transformers import reference, write
from tests.text.vocabularies import gguf_metadata, write_json, write_spm
from tests.tiny import tiny_model

USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function"}]
OPT = {"config.json": {"model_type": "opt"}, "tokenizer_config.json": {"add_bos_token": True, "bos_token": "</s>"}}


def test_a_tokenizer_of_two_files_is_the_same_in_a_snapshot(tmp_path):
    (tmp_path / "a").mkdir()
    files = {**OPT, "chat_template.json": {"chat_template": "{{ messages[0].content }}"}}
    original = load_tokenizer(write(tmp_path / "a", files))
    for name, content in tokenizer_files(tmp_path / "a").items():
        (tmp_path / name).write_bytes(content)
    converted = load_tokenizer(tmp_path)
    assert converted.kind == original.kind == "vocab.json and merges.txt (byte-level BPE, GPT-2)"
    assert converted.encode("Hello") == original.encode("Hello")
    assert converted.encode("Hello")[0] == reference()["vocab"]["</s>"]
    assert converted.apply_chat_template(USER) == "hi"


def test_added_tokens_keep_the_ids_that_their_file_states(tmp_path):
    size = len(reference()["vocab"])
    write(tmp_path, {**OPT, "added_tokens.json": {"<a>": size + 7, "<b>": size}})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<a><b>", add_special_tokens=False) == [size + 7, size]
    assert tokenizer.vocab_size == size + 8
    assert tokenizer.decode([size + 3]) == ""


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", None, r"vocab\.json does not exist; merges\.txt requires it: download it, or a tokenizer\.json"),
        ("merges.txt", None, r"merges\.txt does not exist; vocab\.json requires it"),
        ("vocab.json", "{", r"vocab\.json is not valid JSON .*download it again"),
        ("vocab.json", "{}", r"vocab\.json has no tokens"),
        ("vocab.json", '{"a": "b"}', r"vocab\.json: 'a' has the id 'b', which is not"),
        ("vocab.json", '{"a": 0}', r"merges\.txt does not match vocab\.json \(.*download it again"),
        ("merges.txt", "#version: 0.2\nt h\nt h e\n", r"merges\.txt, line 3: expected two pieces .* got 't h e'"),
        ("merges.txt", "\N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin-1"), r"merges\.txt is not text in UTF-8"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "CLIPTokenizer"}',
            r"names the class 'CLIPTokenizer'; set .* GPT2Token",
        ),
        (
            "config.json",
            "{}",
            r"does not name the class of its tokenizer; set \"tokenizer_class\" in tokenizer_config\.json",
        ),
        ("added_tokens.json", '{"<a>": "1"}', r"added_tokens\.json: '<a>' has str '1'; it must be the token's id"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": []}',
            r"tokenizer_config\.json: added_tokens_decoder is list \[\]",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {}}}',
            r"tokenizer_config\.json: added_tokens_decoder has 'x'",
        ),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json holds a list, not a JSON object"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja is not text in UTF-8"),
        (
            "chat_template.json",
            '{"chat_template": 3}',
            r"chat_template\.json: chat_template is int 3; it must be a text, or",
        ),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "default"}]}',
            r"tokenizer_config\.json: chat_template is list",
        ),
    ],
)
def test_a_damaged_file_is_named_with_a_remedy(tmp_path, file, content, message):
    write(tmp_path, OPT)
    (tmp_path / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"])
def test_a_clone_without_its_large_files_is_recognized(tmp_path, file):
    write(tmp_path, OPT)
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1\n")
    with pytest.raises(ValueError, match=rf"{file}.*it is a pointer of Git LFS: run `git lfs pull`"):
        load_tokenizer(tmp_path)


def test_chat_template_json_is_used_if_there_is_no_other_default(tmp_path):
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of the processor"}')
    assert load_tokenizer(write_json(tmp_path)).apply_chat_template(USER) == "of the processor"
    named = [{"name": "tool_use", "template": "with tools"}]
    tokenizer = load_tokenizer(write_json(tmp_path, chat_template=named))
    assert [tokenizer.apply_chat_template(USER, tools=tools) for tools in (None, TOOLS)] == [
        "of the processor",
        "with tools",
    ]
    assert load_tokenizer(write_json(tmp_path, chat_template="own")).apply_chat_template(USER) == "own"
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert load_tokenizer(tmp_path).apply_chat_template(USER) == "from a file"


def test_bos_and_eos_of_a_sentencepiece_model_and_of_a_gguf_file_follow_their_settings(tmp_path):
    for bos in (True, False):
        for eos in (True, False):
            settings = {"add_bos_token": bos, "add_eos_token": eos}
            spm = load_tokenizer(write_spm(tmp_path / f"{bos}{eos}", **settings))
            fields = {f"tokenizer.ggml.{name}": value for name, value in settings.items()}
            ggufs = [load_gguf(gguf_metadata(kind, **fields)) for kind in ("llama", "llama-bpe")]
            for tokenizer in (spm, *ggufs):
                plain = tokenizer.encode("x", add_special_tokens=False)
                ends = [[tokenizer.bos_token_id] * bos, list(tokenizer.eos_token_ids[:1]) * eos]
                assert tokenizer.encode("x") == [*ends[0], *plain, *ends[1]]


def test_special_tokens_that_a_sentencepiece_model_lacks_are_added(tmp_path):
    tokenizer = load_tokenizer(write_spm(tmp_path, eos_token="<end>", additional_special_tokens=["<more>"]))
    assert tokenizer.eos_token_ids == (422,)
    assert tokenizer.encode("<end><more>", add_special_tokens=False) == [422, 423]
    assert tokenizer.decode([422, 423]) == ""


def test_a_named_token_without_a_text_is_none(tmp_path):
    for folder in (write_json(tmp_path / "json", bos_token=""), write_spm(tmp_path / "spm", pad_token="", sep_token=None)):
        tokenizer = load_tokenizer(folder)
        assert not {"pad_token", "sep_token"} & tokenizer.named_tokens.keys()
        assert tokenizer.encode("x")
    assert load_tokenizer(tmp_path / "json").bos_token_id is None


# Templates of the user


@pytest.fixture
def named(tmp_path):
    """A tokenizer with three templates."""
    texts = [{"name": name, "template": f"{name} {{{{ messages[0].content }}}}"} for name in ("default", "tool_use", "rag")]
    return load_tokenizer(write_json(tmp_path / "model", chat_template=texts))


def test_a_template_is_given_as_a_file_a_text_or_a_name(tmp_path, named):
    (tmp_path / "own.jinja").write_text("file {{ messages[0].content }}")
    (tmp_path / "own.json").write_text('{"chat_template": "json {{ messages[0].content }}"}')
    given = {
        "file hi": str(tmp_path / "own.jinja"),
        "json hi": str(tmp_path / "own.json"),
        "text hi": "text {{ messages[0].content }}",
        "rag hi": "rag",
        "tool_use hi": "tool_use",
        "default hi": "default",
    }
    for expected, template in given.items():
        assert named.apply_chat_template(USER, chat_template=template) == expected
        assert named.with_template(template).apply_chat_template(USER, tools=TOOLS) == expected  # also instead of "tool_use"
        assert named.with_template(template).with_template(template).apply_chat_template(USER) == expected
    assert named.apply_chat_template(USER, tools=TOOLS) == "tool_use hi"
    assert named.with_template(None).apply_chat_template(USER) == "default hi"
    base = load_tokenizer(write_json(tmp_path / "base"))
    assert base.encode_chat(USER, chat_template="{{ messages[0].content }}") == base.encode("hi", add_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "absent.jinja",
            r"'absent\.jinja'; it must be a file, the name of one of .* \('default', 'tool_use', 'rag'\), or the",
        ),
        ("x" * 5000, r"it must be a file"),
        (
            "{% if %}",
            r"the chat template 'given' does not parse, line 1: .*; correct it, or pass another one as chat_template",
        ),
        ("\n\n{{ messages", r"does not parse, line 3"),
        ("{{ 1 // 0 }}", None),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_at_once(named, template, message):
    if message is None:
        named = named.with_template(template)
        with pytest.raises(
            ValueError, match=r"'given' refuses this conversation \(line 1\): .*division.* by zero; correct the"
        ):
            named.apply_chat_template(USER)
    else:
        with pytest.raises(ValueError, match=message):
            named.with_template(template)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("t.json", b"{", r"t\.json must be a JSON object with a \"chat_template\""),
        ("t.json", b"{}", r"t\.json must be a JSON object with a \"chat_template\" \(KeyError"),
        ("t.json", b'{"chat_template": []}', r"t\.json has list \[\] as \"chat_template\"; it must be a string"),
        ("t.jinja", b"\xff\xfe", r"t\.jinja is not text in UTF-8 .*; pass a \.jinja file"),
        ("t.jinja", b"a\nb\n{% endif %}", r"the chat template 'given' of .*t\.jinja does not parse, line 3"),
    ],
)
def test_a_file_that_is_no_template_is_named(tmp_path, named, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        named.with_template(str(tmp_path / file))


def test_an_error_in_a_template_of_the_checkpoint_names_its_file_and_line(tmp_path):
    write_json(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("a\n{{ messages[0].content.x.y }}")
    refusal = r"'default' of .*chat_template\.jinja refuses this conversation \(line 2\): .*no attribute .x.; correct the"
    with pytest.raises(ValueError, match=refusal):
        load_tokenizer(tmp_path).apply_chat_template(USER)
    (tmp_path / "chat_template.jinja").write_text("a\n\n{% for %}")
    with pytest.raises(ValueError, match=r"'default' of .*chat_template\.jinja does not parse, line 3: "):
        load_tokenizer(tmp_path).apply_chat_template(USER)


def test_the_template_is_an_option_of_an_engine(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("own {{ messages[0].content }}")
    tokenizer, model = load_tokenizer(write_json(tmp_path / "model", chat_template="{{ 1 }}")), tiny_model()[1]
    for given in (file, str(file), "own {{ messages[0].content }}"):
        config = EngineConfig(num_blocks=64, chat_template=given)
        assert Intake(tokenizer, model, resolve(config, model)).tokenizer.apply_chat_template(USER) == "own hi"
    assert len(repr(EngineConfig(chat_template="{{ 1 }}" * 5000))) < 600
    for wrong in ("", 3):
        with pytest.raises(ValueError, match=r"chat_template is .*; pass a file, the text of a template, or the name"):
            EngineConfig(chat_template=wrong)


def test_a_wrong_template_is_reported_before_the_weights_are_read(tmp_path, capsys, monkeypatch):
    write_hf(tmp_path, vocab_size=512)
    write_json(tmp_path)
    monkeypatch.setattr("fastgen_jax.checkpoint.huggingface.HuggingFaceCheckpoint.read", None)
    with pytest.raises(ValueError, match=r"'given' does not parse, line 1"):
        Engine.from_pretrained(tmp_path, chat_template="{% if", compile_cache_dir="")
    assert main(["chat", "--model", str(tmp_path), "--chat-template", "absent.jinja", "--compile-cache-dir", ""]) == 2
    assert "chat_template is 'absent.jinja'; it must be a file" in capsys.readouterr().err
