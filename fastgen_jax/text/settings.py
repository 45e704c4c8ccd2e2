"""The files beside a vocabulary in a Hugging Face directory: special tokens, added tokens, chat templates.

Where these files contradict each other, the choice is that of transformers 5.15.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgen_jax.checkpoint.huggingface import read_json
from fastgen_jax.json_types import JsonFields
from fastgen_jax.text.chat import ChatTemplate
from fastgen_jax.text.messages import short

CONFIG_FILE = "tokenizer_config.json"
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token

Flags = Mapping[str, bool]  # the arguments of tokenizers' AddedToken


def read_settings(folder: Path) -> JsonFields:
    """The fields of tokenizer_config.json; if it lists no added tokens, those of special_tokens_map.json replace them."""
    file, older = folder / CONFIG_FILE, folder / "special_tokens_map.json"
    settings = read_json(file) if file.exists() else {}
    if "added_tokens_decoder" in settings or not older.exists():
        return settings
    return {**settings, **read_json(older)}


def named_tokens(settings: JsonFields) -> dict[str, str]:
    """bos_token, eos_token, and other fields named after a token: each is a string, or an object with it as "content"."""
    extra = settings.get("extra_special_tokens")
    fields = {**settings, **(extra if isinstance(extra, Mapping) else {})}
    found = {}
    for name, value in fields.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str) and text and (name in _NAMED or name.endswith("_token")):
            found[name] = text
    return found


def added_tokens(folder: Path, settings: JsonFields) -> dict[int, tuple[str, Flags]]:
    """Tokens beside those of the vocabulary file: id -> (text, how they are found in a text)."""
    found: dict[int, tuple[str, Flags]] = {}
    decoder = settings.get("added_tokens_decoder")
    if decoder is None:
        file = folder / "added_tokens.json"
        special = {*named_tokens(settings).values(), *special_texts(settings)}
        for text, id in (read_json(file) if file.exists() else {}).items():
            _check(isinstance(id, int), file, f"{text!r} has {short(id)}; it must be the token's id")
            found[id] = (text, {"special": text in special})
        return found
    where = folder / CONFIG_FILE
    _check(isinstance(decoder, Mapping), where, f"added_tokens_decoder is {short(decoder)}; it must be an object")
    for id, token in decoder.items():
        known = isinstance(token, Mapping) and isinstance(token.get("content"), str) and id.isdecimal()
        _check(known, where, f'added_tokens_decoder has {id!r}: {short(token)}; it must map an id to {{"content": ...}}')
        found[int(id)] = (token["content"], {name: bool(token[name]) for name in _FLAGS if token.get(name) is not None})
    return found


def special_texts(settings: JsonFields) -> list[str]:
    """The texts of further special tokens that have no name."""
    listed = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    values = [value.get("content") if isinstance(value, Mapping) else value for value in listed]
    return [value for value in values if isinstance(value, str) and value] if not isinstance(listed, Mapping) else []


def read_templates(folder: Path, settings: JsonFields) -> dict[str, ChatTemplate]:
    """Chat templates by name.

    Files take precedence over tokenizer_config.json: chat_template.jinja, and one file per name in
    additional_chat_templates/. chat_template.json, which a model with a processor has, is read if there is no other.
    """
    found = _templates_in(settings.get("chat_template"), folder / CONFIG_FILE)
    if (folder / "chat_template.jinja").exists() or (folder / "additional_chat_templates").is_dir():
        files = [(folder / "chat_template.jinja", "default")]
        files += [(file, file.stem) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))]
        found = {} if files[0][0].exists() else found
        for file, name in files:
            if file.exists():
                found[name] = ChatTemplate(name=name, text=_read_text(file), origin=str(file))
    of_processor = folder / "chat_template.json"
    if "default" not in found and of_processor.exists():
        found = _templates_in(read_json(of_processor).get("chat_template"), of_processor) | found
    return found


def _templates_in(value: Any, file: Path) -> dict[str, ChatTemplate]:
    """The templates of the field "chat_template" in its forms: one, a list of {"name", "template"}, or an object by name."""
    if value is None:
        return {}
    texts: dict[Any, Any] = {"default": value}
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        texts = {entry.get("name"): entry.get("template") for entry in value}
    elif isinstance(value, Mapping):
        texts = dict(value)
    for name, text in texts.items():
        known = isinstance(name, str) and isinstance(text, str)
        _check(known, file, f"chat_template is {short(value)}; it must be a text, or a list of {{'name', 'template'}}")
    return {name: ChatTemplate(name=name, text=text, origin=str(file)) for name, text in texts.items()}


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error}); download it again") from error


def _check(right: bool, file: Path, message: str) -> None:
    if not right:
        raise ValueError(f"{file}: {message}; correct it, or download it again")
