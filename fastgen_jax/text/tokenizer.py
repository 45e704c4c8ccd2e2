"""Text to token ids and back, the same for every tokenizer format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastgen_jax.text.chat import render_chat


class Encoder(Protocol):
    """What differs between tokenizer formats."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; the text of a special token becomes that token."""
        ...


@dataclass(frozen=True, kw_only=True, repr=False)
class Tokenizer:
    """A vocabulary, how text is cut into it, and the chat templates that belong to it. See `load_tokenizer`."""

    kind: str  # where it comes from and how it cuts text, for people to read
    encoder: Encoder
    texts: Sequence[str | None]  # token id -> its entry in the vocabulary; None where there is none
    pieces: Sequence[bytes]  # token id -> the bytes that it adds to a text
    special_ids: frozenset[int]  # control tokens: no part of the text unless asked for
    drops_leading_space: bool  # SentencePiece puts a space before the text when encoding; decoding drops it
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    templates: Mapping[str, str] = field(default_factory=dict)  # chat templates by name; the usual one is "default"
    named_tokens: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token, ... for the templates

    def __repr__(self) -> str:
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, bos_token_id={self.bos_token_id}, "
            f"eos_token_ids={self.eos_token_ids}, templates={sorted(self.templates)})"
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; the model's embedding may have more rows, as padding."""
        return len(self.pieces)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text.

        `add_special_tokens` puts the beginning-of-sequence token (and whatever else the tokenizer asks for) around
        it. A special token that is spelled out in the text becomes that token, as in transformers.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, got {type(text).__name__}; decode bytes, join lists of strings")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has a lone surrogate at character {error.start}, which no UTF-8 can express; "
                "repair it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
            ) from None
        return self.encoder(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids: their bytes joined and read as UTF-8, U+FFFD where they are not.

        Ids past the vocabulary (padding rows of the embedding) have no text.
        """
        data = b"".join(self.visible_bytes(id, skip_special_tokens=skip_special_tokens) for id in ids)
        text = data.decode("utf-8", "replace")
        return text[1:] if self.drops_leading_space and text.startswith(" ") else text

    def visible_bytes(self, id: int, *, skip_special_tokens: bool) -> bytes:
        """`token_bytes`, but none for a special token that is to be skipped."""
        return b"" if skip_special_tokens and id in self.special_ids else self.token_bytes(id)

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token; none for an id past the vocabulary."""
        if id < 0:
            raise ValueError(f"token id {id} is negative; ids are 0 to {self.vocab_size - 1}")
        return self.pieces[id] if id < len(self.pieces) else b""

    def token_text(self, id: int) -> str:
        """A token's entry in the vocabulary, spelled as there ("Ġthe", "▁the", "<0x0A>"); ValueError if none."""
        text = self.texts[id] if 0 <= id < len(self.texts) else None
        if text is None:
            raise ValueError(f"token id {id} has no entry in the vocabulary; ids are 0 to {self.vocab_size - 1}")
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,  # so that `extra` may have any name
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt that the model's own chat template makes of a conversation.

        `messages` have a "role" and "content" (a string, or a list of {"type": "text", "text": ...}, which is joined by
        newlines); `tools` are JSON schemas; `extra` reaches the template (`enable_thinking=False`, ...). Messages may be as
        servers answer them, with null fields and arguments of tool calls as text, and where a template knows no developer,
        no tool calls or no results of them, they are put in roles that it knows. ValueError if there is no template, a
        message is malformed, or the template refuses it.
        """
        return render_chat(
            self.templates,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            named_tokens=self.named_tokens,
            extra=extra,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,  # so that `extra` may have any name
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> list[int]:
        """Token ids of `apply_chat_template`. Templates write their own special tokens, so none is added."""
        text = self.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tools=tools, **extra)
        return self.encode(text, add_special_tokens=False)
