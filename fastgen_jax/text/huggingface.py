"""Tokenizers of Hugging Face directories: tokenizer.json, vocab.json, SentencePiece's tokenizer.model, tiktoken's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen_jax.checkpoint.huggingface import how_to_replace, read_json
from fastgen_jax.json_types import JsonFields
from fastgen_jax.text import byte_level
from fastgen_jax.text.chat import ChatTemplate, template_fields
from fastgen_jax.text.pieces import Scheme, piece_bytes, scheme_of_decoder
from fastgen_jax.text.settings import added_tokens, named_tokens, read_settings, read_templates, special_texts
from fastgen_jax.text.spm import SentencePieceEncoder, open_model
from fastgen_jax.text.tiktoken import encoder_backend, find_tiktoken, read_tiktoken
from fastgen_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers
    from sentencepiece import SentencePieceProcessor

Settings = JsonFields  # the JSON of tokenizer_config.json


def load_directory(path: Path) -> Tokenizer:
    """Returns the tokenizer of a checkpoint directory; tokenizer.json takes precedence over other files."""
    settings = read_settings(path)
    if (path / "tokenizer.json").exists():
        return _from_json(path, settings)
    if (ranks := find_tiktoken(path)) is not None:
        return _from_tiktoken(path, settings, ranks)
    if (path / "tokenizer.model").exists():
        return _from_sentencepiece(path, settings)
    if (path / "vocab.json").exists() or (path / "merges.txt").exists():
        return _from_merges(path, settings)
    raise ValueError(
        f"{path} has neither tokenizer.json nor tokenizer.model, vocab.json with merges.txt, *.tiktoken or tekken.json; "
        f"it has: {', '.join(sorted(file.name for file in path.iterdir())) or 'nothing'}"
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
    names = named_tokens(settings)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    further = {id: token for id, token in added_tokens(path, settings).items() if token[0] not in known}
    _add_tokens(backend, further, [*names.values(), *special_texts(settings)])

    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        # The file's own post-processor adds tokens: add_bos_token and add_eos_token beside it have no effect.
        return backend.encode(text, add_special_tokens=add_special_tokens).ids

    kind = f"tokenizer.json ({scheme} {description['model'].get('type', 'BPE')})"
    vocabulary = _vocabulary(backend, scheme)
    return _assemble(path, settings, names, kind=kind, encoder=encode, drops_leading_space=drops_space, **vocabulary)


def _from_merges(path: Path, settings: Settings) -> Tokenizer:
    added, names = added_tokens(path, settings), named_tokens(settings)
    family = byte_level.family_of(path, settings)
    backend = byte_level.read_backend(path, family, added, prefix_space=bool(settings.get("add_prefix_space")))
    names = byte_level.default_tokens(family, settings, backend) | names
    _add_tokens(backend, added, [*names.values(), *special_texts(settings)])
    ends = {}
    for name in ("bos", "eos"):
        token = names.get(f"{name}_token")
        ends[name] = [backend.token_to_id(token)] if settings.get(f"add_{name}_token") and token is not None else []

    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        ids = backend.encode(text, add_special_tokens=False).ids
        return [*ends["bos"], *ids, *ends["eos"]] if add_special_tokens else ids

    return _assemble(
        path,
        settings,
        names,
        kind=f"vocab.json and merges.txt (byte-level BPE, {family})",
        encoder=encode,
        drops_leading_space=False,
        **_vocabulary(backend, "byte-level"),
    )


def _add_tokens(
    backend: tokenizers.Tokenizer, added: Mapping[int, tuple[str, Mapping[str, bool]]], special: list[str]
) -> None:
    """Adds tokens in order of their ids, then special tokens. One that is in the vocabulary keeps its id."""
    from tokenizers import AddedToken

    backend.add_tokens([AddedToken(text, **flags) for _, (text, flags) in sorted(added.items())])
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])


def _vocabulary(backend: tokenizers.Tokenizer, scheme: Scheme) -> dict[str, Any]:
    """The fields of a `Tokenizer` that list its tokens."""
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
    return {"ids": ids, "texts": texts, "pieces": pieces, "special_ids": special}


def _from_tiktoken(path: Path, settings: Settings, file: Path) -> Tokenizer:
    vocabulary = read_tiktoken(file)
    backend, specials = encoder_backend(vocabulary), vocabulary.specials
    first = [specials[vocabulary.bos]] if vocabulary.bos else []
    templates = read_templates(path, settings)
    if "default" not in templates and vocabulary.conversations is not None:
        template = ChatTemplate(name="default", text=vocabulary.conversations, origin=f"the format that {file} names")
        templates = {"default": template, **templates}

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
        **template_fields(templates),
        named_tokens={"eos_token": vocabulary.eos[0]} | ({"bos_token": vocabulary.bos} if vocabulary.bos else {}),
    )


def _from_sentencepiece(path: Path, settings: Settings) -> Tokenizer:
    proto = (path / "tokenizer.model").read_bytes()
    try:
        model = open_model(proto)
    except ValueError as error:
        file = path / "tokenizer.model"
        raise ValueError(f"{file}: {error}; {how_to_replace(file)}") from error
    size = model.get_piece_size()
    texts: list[str | None] = [model.id_to_piece(i) for i in range(size)]
    special = {i for i in range(size) if model.is_control(i) or model.is_unknown(i)}
    added = added_tokens(path, settings)
    for id, (text, flags) in added.items():
        texts += [None] * (id + 1 - len(texts))
        texts[id] = text
        special = special | {id} if flags.get("special") else special - {id}
    names = {
        "bos_token": _piece(model, model.bos_id()),
        "eos_token": _piece(model, model.eos_id()),
        "unk_token": _piece(model, model.unk_id()),
    }
    names = {name: text for name, text in names.items() if text} | named_tokens(settings)
    for text in dict.fromkeys([*names.values(), *special_texts(settings)]):
        if text not in texts:
            special, texts = special | {len(texts)}, [*texts, text]
    pieces = [
        b"" if text is None else text.encode() if id in added or id in special else piece_bytes(text, "metaspace")
        for id, text in enumerate(texts)
    ]
    ids = {text: id for id, text in enumerate(texts) if text is not None}
    ends = {}
    for name, default in (("bos", "bos_token" in names), ("eos", False)):
        enabled = settings.get(f"add_{name}_token", default)
        if enabled and f"{name}_token" not in names:
            raise ValueError(
                f"{path}: add_{name}_token is set, but there is no {name} token; "
                f"set {name}_token, or set add_{name}_token to false, in tokenizer_config.json"
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
        ids=ids,
        kind="SentencePiece (tokenizer.model)",
        encoder=encoder,
        texts=texts,
        pieces=pieces,
        special_ids=frozenset(special),
        drops_leading_space=model.encode_as_pieces("a")[0].startswith("▁"),
    )


def _assemble(path: Path, settings: Settings, names: dict[str, str], *, ids: Mapping[str, int], **rest: Any) -> Tokenizer:
    """Completes the tokenizer with what all formats keep in other files."""
    ends = [ids[names["eos_token"]]] if "eos_token" in names else []
    for file in ("config.json", "generation_config.json"):
        more = read_json(path / file).get("eos_token_id") if (path / file).exists() else None
        ends += [] if more is None else more if isinstance(more, list) else [more]
    return Tokenizer(
        bos_token_id=ids[names["bos_token"]] if "bos_token" in names else None,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        **template_fields(read_templates(path, settings)),
        named_tokens=names,
        **rest,
    )


def _piece(model: SentencePieceProcessor, id: int) -> str | None:
    return model.id_to_piece(id) if id >= 0 else None
