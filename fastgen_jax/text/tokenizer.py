"""The tokenizer: text to token ids and back, with the same interface for every format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

from fastgen_jax.json_types import JsonFields
from fastgen_jax.text.chat import ChatTemplate, find_template, render_chat, within_last_message


class Encoder(Protocol):
    """The part that differs between tokenizer formats."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Returns the token ids of a text; the text of a special token becomes that token."""
        ...


@dataclass(frozen=True, kw_only=True, repr=False)
class Tokenizer:
    """A vocabulary, its encoder, and its chat templates. See `load_tokenizer`."""

    kind: str  # format and algorithm, for display
    encoder: Encoder
    texts: Sequence[str | None]  # token id -> its entry in the vocabulary; None if there is none
    pieces: Sequence[bytes]  # token id -> its bytes in a text
    special_ids: frozenset[int]  # control tokens, which are not part of the text
    drops_leading_space: bool  # SentencePiece adds a space before the text; decoding removes it
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    templates: Mapping[str, str] = field(default_factory=dict)  # chat templates by name; the main one is "default"
    template_origins: Mapping[str, str] = field(default_factory=dict)  # where they come from, by name, for messages
    given_template: ChatTemplate | None = None  # a user's choice, for all conversations
    named_tokens: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token, ... for the templates

    def __repr__(self) -> str:
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, bos_token_id={self.bos_token_id}, "
            f"eos_token_ids={self.eos_token_ids}, templates={sorted(self.templates)})"
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; the model's embedding may have further rows as padding."""
        return len(self.pieces)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a text.

        `add_special_tokens` adds the beginning-of-sequence token and other tokens that the tokenizer is configured to
        add. The text of a special token becomes that token, as in transformers.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, got {type(text).__name__}; decode bytes, or join lists of strings")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has a lone surrogate at character {error.start}, which UTF-8 cannot represent; "
                "repair it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
            ) from None
        return self.encoder(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids: their joined bytes decoded as UTF-8, with U+FFFD for invalid ones.

        Ids beyond the vocabulary (padding rows of the embedding) have no text.
        """
        data = b"".join(self.visible_bytes(id, skip_special_tokens=skip_special_tokens) for id in ids)
        text = data.decode("utf-8", "replace")
        return text[1:] if self.drops_leading_space and text.startswith(" ") else text

    def visible_bytes(self, id: int, *, skip_special_tokens: bool) -> bytes:
        """Returns `token_bytes`, or nothing for a special token that is skipped."""
        return b"" if skip_special_tokens and id in self.special_ids else self.token_bytes(id)

    def token_bytes(self, id: int) -> bytes:
        """Returns the bytes of one token; nothing for an id beyond the vocabulary."""
        if id < 0:
            raise ValueError(f"token id {id} is negative; ids are 0 to {self.vocab_size - 1}")
        return self.pieces[id] if id < len(self.pieces) else b""

    def token_text(self, id: int) -> str:
        """Returns a token's entry in the vocabulary ("Ġthe", "▁the", "<0x0A>"); ValueError if it has none."""
        text = self.texts[id] if 0 <= id < len(self.texts) else None
        if text is None:
            raise ValueError(f"token id {id} has no entry in the vocabulary; ids are 0 to {self.vocab_size - 1}")
        return text

    def with_template(self, given: str | None) -> Self:
        """Returns this tokenizer with the user's template; None changes nothing.

        `given` is the path of a file, the text of a template, or the name of one of `templates`. ValueError if it is none of
        these, or does not parse.
        """
        if given is None:
            return self
        named = {name: self._named_template(name) for name in self.templates}
        return replace(self, given_template=find_template(given, named))

    def template(self, *, with_tools: bool = False) -> ChatTemplate | None:
        """The template of a conversation: the user's, else "tool_use" with tools, else "default"; None if there is none."""
        if self.given_template is not None:
            return self.given_template
        name = "tool_use" if with_tools and "tool_use" in self.templates else "default"
        return self._named_template(name) if name in self.templates else None

    def _named_template(self, name: str) -> ChatTemplate:
        return ChatTemplate(name=name, text=self.templates[name], origin=self.template_origins.get(name))

    def apply_chat_template(
        self,
        messages: Sequence[JsonFields],
        /,  # so that `extra` may have any name
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[JsonFields] | None = None,
        chat_template: str | None = None,
        **extra: object,
    ) -> str:
        """Returns the prompt that a chat template renders for a conversation.

        `messages` have a "role" and a "content" (a string, or a list of {"type": "text", "text": ...}, which is joined by
        newlines unless the template loops over it); with `continue_final_message` the prompt ends within the last message,
        and no other is begun; `tools` are JSON schemas; `chat_template` as in `with_template`; `extra`
        are variables of the template (`enable_thinking=False`, `documents=[...]`, ...). Messages may have the form in which
        servers return them, with null fields, arguments of tool calls as text, and reasoning under any of its names.
        Developer messages, tool calls and their results that a template does not support are converted to roles that it
        does. Raises ValueError if there is no template, a message is malformed, or the template refuses it.
        """
        template = self.with_template(chat_template).template(with_tools=bool(tools))
        if template is None:
            named = f" named 'default'; it has {', '.join(map(repr, self.templates))}" if self.templates else ""
            raise ValueError(
                f"this tokenizer has no chat template{named}; pass one as chat_template (a file, a text or a name). The "
                "tokenizer of a base model has none: pass a plain prompt, or use an instruction-tuned checkpoint"
            )
        text = render_chat(
            template,
            messages,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            tools=tools,
            named_tokens=self.named_tokens,
            extra=extra,
        )
        return within_last_message(text, messages) if continue_final_message else text

    def encode_chat(
        self,
        messages: Sequence[JsonFields],
        /,  # so that `extra` may have any name
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        tools: Sequence[JsonFields] | None = None,
        chat_template: str | None = None,
        **extra: object,
    ) -> list[int]:
        """Returns the token ids of `apply_chat_template`. Templates write special tokens: others are rarely due."""
        text = self.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template=chat_template,
            **extra,
        )
        return self.encode(text, add_special_tokens=add_special_tokens)
