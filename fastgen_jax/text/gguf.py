"""Tokenizers from the metadata of GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastgen_jax.text.chat import ChatTemplate, template_fields
from fastgen_jax.text.pieces import piece_bytes
from fastgen_jax.text.splits import ADDS_BOS, COMPOSES, IGNORES_MERGES, SPLITS, SYNONYMS
from fastgen_jax.text.spm import SentencePieceEncoder, build_model
from fastgen_jax.text.tokenizer import Encoder, Tokenizer

if TYPE_CHECKING:
    import tokenizers

Metadata = Mapping[str, Any]  # GGUF values: numbers, strings, and lists of them
_PREFIX = "tokenizer.ggml."
_KINDS = {"gpt2": "byte-level BPE", "llama": "SentencePiece", "gemma4": "BPE with byte fallback"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type


def load_gguf(metadata: Metadata) -> Tokenizer:
    """Returns the tokenizer of the metadata; ValueError if it is incomplete or of an unsupported kind."""
    model = metadata.get(_PREFIX + "model")
    if model not in _KINDS:
        raise ValueError(
            f"tokenizer.ggml.model is {model!r}; supported: "
            + ", ".join(f"{name!r} ({what})" for name, what in _KINDS.items())
        )
    texts = _required(metadata, "tokens", list)
    types = metadata.get(_PREFIX + "token_type") or [_NORMAL] * len(texts)
    if len(types) != len(texts):
        raise ValueError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(texts)} tokens")
    ids = {name: _token_id(metadata, name, len(texts)) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    if model == "gpt2":
        pre: str = metadata.get(_PREFIX + "pre", "default")
        body, drops_space, adds_bos = _byte_level_bpe(metadata, texts, types, pre), False, pre in ADDS_BOS
    elif model == "gemma4":
        pre = "newlines"
        body, drops_space, adds_bos = _metaspace_bpe(metadata, texts, types), False, True
    else:
        pre = "none"
        body, drops_space, adds_bos = _sentencepiece(metadata, texts, types, ids)
    first = _boundary(ids["bos"], "bos", enabled=metadata.get(_PREFIX + "add_bos_token", adds_bos))
    last = _boundary(ids["eos"], "eos", enabled=metadata.get(_PREFIX + "add_eos_token", False))

    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        middle = body(text, add_special_tokens=False)
        return [*first, *middle, *last] if add_special_tokens else middle

    scheme = "byte-level" if model == "gpt2" else "metaspace"
    special = frozenset(i for i, kind in enumerate(types) if kind in (_CONTROL, _UNKNOWN))
    literal = special | {i for i, kind in enumerate(types) if kind == _USER_DEFINED and scheme == "byte-level"}
    ends = [ids[name] for name in ("eos", "eot", "eom")]
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return Tokenizer(
        kind=f"{_KINDS[model]} from GGUF, pre-tokenizer {pre}",
        encoder=encode,
        texts=texts,
        pieces=[text.encode() if i in literal else piece_bytes(text, scheme) for i, text in enumerate(texts)],
        special_ids=special,
        drops_leading_space=drops_space,
        bos_token_id=ids["bos"],
        eos_token_ids=tuple(dict.fromkeys(id for id in ends if id is not None)),
        **template_fields(_templates(metadata)),
        named_tokens={new: texts[id] for name, new in names.items() if (id := ids[name]) is not None},
    )


def _boundary(id: int | None, name: str, *, enabled: bool) -> list[int]:
    """The token added at the start or end of every text, if the file enables it."""
    if enabled and id is None:
        raise ValueError(
            f"{_PREFIX}add_{name}_token is set, but {_PREFIX}{name}_token_id is missing; convert the file again"
        )
    return [id] if enabled and id is not None else []


def _required(metadata: Metadata, name: str, kind: type) -> Any:
    value = metadata.get(_PREFIX + name)
    if not isinstance(value, kind) or not value:
        raise ValueError(f"the metadata lacks {_PREFIX}{name}: the file is incomplete; convert it again")
    return value


def _token_id(metadata: Metadata, name: str, vocab_size: int) -> int | None:
    id = metadata.get(f"{_PREFIX}{name}_token_id")
    if id is not None and not 0 <= id < vocab_size:
        raise ValueError(f"{_PREFIX}{name}_token_id is {id}, outside the vocabulary of {vocab_size}; convert the file again")
    return id


def _templates(metadata: Metadata) -> dict[str, ChatTemplate]:
    base = "tokenizer.chat_template"
    found = {"default": metadata[base]} if metadata.get(base) else {}
    found |= {name[len(base) + 1 :]: text for name, text in metadata.items() if name.startswith(base + ".")}
    return {name: ChatTemplate(name=name, text=text, origin="the GGUF file's metadata") for name, text in found.items()}


def _byte_level_bpe(metadata: Metadata, texts: list[str], types: list[int], pre: str) -> Encoder:
    from tokenizers import Regex, normalizers, pre_tokenizers

    splits = SPLITS.get(SYNONYMS.get(pre, pre))
    if splits is None:
        raise ValueError(
            f"tokenizer.ggml.pre is {pre!r}; supported: {', '.join([*SPLITS, *SYNONYMS])}; "
            "use the Hugging Face checkpoint instead, whose tokenizer.json works with any kind"
        )
    tokenizer = _bpe(metadata, texts, ignore_merges=pre in IGNORES_MERGES)
    if pre in COMPOSES:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _with_added_tokens(tokenizer, texts, types)


def _metaspace_bpe(metadata: Metadata, texts: list[str], types: list[int]) -> Encoder:
    """Gemma 4: merges within lines, spaces as in SentencePiece, bytes for characters outside the vocabulary."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    tokenizer = _bpe(metadata, texts, byte_fallback=True)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    return _with_added_tokens(tokenizer, texts, types)


def _bpe(metadata: Metadata, texts: list[str], **options: bool) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, models

    merges = [tuple(merge.split(" ", 1)) for merge in _required(metadata, "merges", list)]
    try:
        return Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, merges, **options))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"the vocabulary and its merges do not match ({error}); convert the file again") from error


def _with_added_tokens(tokenizer: tokenizers.Tokenizer, texts: list[str], types: list[int]) -> Encoder:
    from tokenizers import AddedToken

    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        tokenizer.add_tokens(
            [
                AddedToken(text, normalized=False, special=special)
                for text, type_ in zip(texts, types, strict=True)
                if type_ == kind and text
            ]
        )
    return lambda text, *, add_special_tokens: tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def _sentencepiece(
    metadata: Metadata, texts: list[str], types: list[int], ids: Mapping[str, int | None]
) -> tuple[Encoder, bool, bool]:
    scores = _required(metadata, "scores", list)
    if len(scores) != len(texts):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(texts)} tokens")
    prefix = bool(metadata.get(_PREFIX + "add_space_prefix", True))
    model = build_model(texts, scores, types, unknown_id=ids["unknown"] or 0, add_space_prefix=prefix)
    specials = {text: i for i, (text, kind) in enumerate(zip(texts, types, strict=True)) if kind == _CONTROL}
    return SentencePieceEncoder(model, specials=specials), prefix, True
