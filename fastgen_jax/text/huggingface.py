"""Tokenizers of Hugging Face directories: tokenizer.json, SentencePiece's tokenizer.model, or tiktoken's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen_jax.checkpoint.huggingface import read_json
from fastgen_jax.json_types import JsonFields
from fastgen_jax.text.pieces import piece_bytes, scheme_of_decoder
from fastgen_jax.text.spm import SentencePieceEncoder, open_model
from fastgen_jax.text.tiktoken import encoder_backend, find_tiktoken, read_tiktoken
from fastgen_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

Settings = JsonFields  # the JSON of tokenizer_config.json
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def load_directory(path: Path) -> Tokenizer:
    """Returns the tokenizer of a checkpoint directory; tokenizer.json takes precedence over other files."""
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
    if (path / "tokenizer.json").exists():
        return _from_json(path, settings)
    if (ranks := find_tiktoken(path)) is not None:
        return _from_tiktoken(path, settings, ranks)
    if (path / "tokenizer.model").exists():
        return _from_sentencepiece(path, settings)
    raise ValueError(
        f"{path} has neither tokenizer.json nor tokenizer.model, *.tiktoken or tekken.json; it has: "
        f"{', '.join(sorted(file.name for file in path.iterdir())) or 'nothing'}"
    )


def _from_json(path: Path, settings: Settings) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    file = path / "tokenizer.json"
    description = read_json(file)
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{file} does not load ({error}); download it again") from error
    backend.no_truncation()  # some files still have these training settings
    backend.no_padding()
    try:
        scheme, drops_space = scheme_of_decoder(description.get("decoder"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    ids = backend.get_vocab(with_added_tokens=True)
    texts: list[str | None] = [None] * (max(ids.values()) + 1)
    for text, id in ids.items():
        texts[id] = text
    added = backend.get_added_tokens_decoder()
    special = frozenset(id for id, token in added.items() if token.special)
    literal = special | (added.keys() if scheme == "byte-level" else set())
    pieces = [
        b"" if text is None else text.encode() if id in literal else piece_bytes(text, scheme)
        for id, text in enumerate(texts)
    ]
    names = _named_tokens(path, settings)

    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        return backend.encode(text, add_special_tokens=add_special_tokens).ids

    kind = f"tokenizer.json ({scheme} {description['model'].get('type', 'BPE')})"
    return _assemble(
        path,
        settings,
        names,
        ids,
        kind=kind,
        encoder=encode,
        texts=texts,
        pieces=pieces,
        special_ids=special,
        drops_leading_space=drops_space,
    )


def _from_tiktoken(path: Path, settings: Settings, file: Path) -> Tokenizer:
    vocabulary = read_tiktoken(file)
    backend, specials = encoder_backend(vocabulary), vocabulary.specials
    first = [specials[vocabulary.bos]] if vocabulary.bos else []

    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        ids = backend.encode(text, add_special_tokens=False).ids
        return [*first, *ids] if add_special_tokens else ids

    return Tokenizer(
        kind=vocabulary.kind,
        encoder=encode,
        texts=[backend.id_to_token(id) for id in range(len(vocabulary.pieces))],
        pieces=vocabulary.pieces,
        special_ids=frozenset(vocabulary.special_ids),
        drops_leading_space=False,
        bos_token_id=first[0] if first else None,
        eos_token_ids=tuple(specials[text] for text in vocabulary.eos),
        templates=_templates(path, settings),
        named_tokens={"eos_token": vocabulary.eos[0]} | ({"bos_token": vocabulary.bos} if vocabulary.bos else {}),
    )


def _from_sentencepiece(path: Path, settings: Settings) -> Tokenizer:
    proto = (path / "tokenizer.model").read_bytes()
    try:
        model = open_model(proto)
    except ValueError as error:
        raise ValueError(f"{path / 'tokenizer.model'}: {error}; download it again") from error
    size = model.get_piece_size()
    texts: list[str | None] = [model.id_to_piece(i) for i in range(size)]
    special = {i for i in range(size) if model.is_control(i) or model.is_unknown(i)}
    added = _added_tokens(path, settings)
    for id, (text, is_special) in added.items():
        texts += [None] * (id + 1 - len(texts))
        texts[id] = text
        special = special | {id} if is_special else special - {id}
    pieces = [
        b"" if text is None else text.encode() if id in added or id in special else piece_bytes(text, "metaspace")
        for id, text in enumerate(texts)
    ]
    ids = {text: id for id, text in enumerate(texts) if text is not None}
    names = {
        "bos_token": _piece(model, model.bos_id()),
        "eos_token": _piece(model, model.eos_id()),
        "unk_token": _piece(model, model.unk_id()),
    }
    names = {name: text for name, text in names.items() if text} | _named_tokens(path, settings)
    ends = {}
    for name, default in (("bos", True), ("eos", False)):
        enabled = settings.get(f"add_{name}_token", default)
        if enabled and names.get(f"{name}_token") not in ids:
            raise ValueError(
                f"{path}: add_{name}_token is set, but the vocabulary has no {name} token; "
                f"set add_{name}_token to false in tokenizer_config.json"
            )
        ends[name] = [ids[names[f"{name}_token"]]] if enabled else []
    encoder = SentencePieceEncoder(
        proto,
        specials={text: ids[text] for text in (texts[i] for i in special | added.keys()) if text},
        prefix_every_part=settings.get("legacy") is not False,  # absent or null: the legacy behavior
        first=ends["bos"],
        last=ends["eos"],
    )
    return _assemble(
        path,
        settings,
        names,
        ids,
        kind="SentencePiece (tokenizer.model)",
        encoder=encoder,
        texts=texts,
        pieces=pieces,
        special_ids=frozenset(special),
        drops_leading_space=model.encode_as_pieces("a")[0].startswith("▁"),
    )


def _assemble(path: Path, settings: Settings, names: dict[str, str], ids: Mapping[str, int], **rest: Any) -> Tokenizer:
    """Completes the tokenizer with what both formats keep in other files."""
    for name in ("bos_token", "eos_token"):
        if name in names and names[name] not in ids:
            raise ValueError(
                f"{path}: {name} is {names[name]!r}, which is not in the vocabulary; correct tokenizer_config.json"
            )
    ends = [ids[names["eos_token"]]] if "eos_token" in names else []
    for file in ("config.json", "generation_config.json"):
        more = read_json(path / file).get("eos_token_id") if (path / file).exists() else None
        ends += [] if more is None else more if isinstance(more, list) else [more]
    return Tokenizer(
        bos_token_id=ids[names["bos_token"]] if "bos_token" in names else None,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        templates=_templates(path, settings),
        named_tokens=names,
        **rest,
    )


def _piece(model: SentencePieceProcessor, id: int) -> str | None:
    return model.id_to_piece(id) if id >= 0 else None


def _named_tokens(path: Path, settings: Settings) -> dict[str, str]:
    """bos_token, eos_token, ...: each is a string, or an object with the string as "content"."""
    older = path / "special_tokens_map.json"
    merged = {**(read_json(older) if older.exists() else {}), **settings}
    found = {}
    for name in _NAMED:
        value = merged.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _added_tokens(path: Path, settings: Settings) -> dict[int, tuple[str, bool]]:
    """Tokens added to the SentencePiece model: id -> (text, whether it is special)."""
    file = path / "added_tokens.json"
    added = {id: (text, False) for text, id in (read_json(file) if file.exists() else {}).items()}
    for id, token in (settings.get("added_tokens_decoder") or {}).items():
        added[int(id)] = (token["content"], bool(token.get("special")))
    return added


def _templates(path: Path, settings: Settings) -> dict[str, str]:
    """Chat templates by name; separate files take precedence over tokenizer_config.json."""
    value = settings.get("chat_template")
    found: dict[str, str] = {}
    if isinstance(value, str):
        found["default"] = value
    elif isinstance(value, list):
        found = {entry["name"]: entry["template"] for entry in value}
    elif isinstance(value, Mapping):
        found = dict(value)
    if (path / "chat_template.jinja").exists():
        found["default"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    return found
