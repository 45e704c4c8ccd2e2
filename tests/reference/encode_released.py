"""What transformers makes of published tokenizers and chat templates, for `tests/checkpoint/released.py`.

    python tests/reference/encode_released.py FOLDER OUT.json      # needs transformers 5.15 and jinja2

FOLDER has a folder ORG--NAME for each checkpoint, with its config.json and any of its tokenizer files and chat template.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import transformers
from conversations import CONVERSATIONS
from texts import ALICE, CODE, DECLARATION, GETTYSBURG, TRICKY_STRINGS
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "merges.txt")
MORE = [
    "",
    " ",
    "  a  b ",
    "Grüße aus Köln!",
    "日本語 テキスト",
    "don't WON'T",
    "1234567890 3.14",
    "<s>x</s>",
    "<|im_end|>\n",
]


def texts() -> list[str]:
    """Prose line by line and whole, code, and strings that tokenizers split differently."""
    prose = [line for text in (GETTYSBURG, DECLARATION, ALICE) for line in [text, *text.split("\n")] if line]
    return list(dict.fromkeys([*prose, CODE, *TRICKY_STRINGS, *MORE]))


def template_of(folder: Path) -> str | None:
    """The text of the default template, from the files in their order of precedence."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).exists():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            if isinstance(found, list):
                found = {each["name"]: each["template"] for each in found}["default"]
            if found:
                return found
    return None


def named_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that a template may write, as named in tokenizer_config.json."""
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    named = {name: fields.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    plain = {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
    return {name: value for name, value in plain.items() if value is not None}


def rendered(template: str, tokens: dict[str, str], given: dict[str, Any]) -> str | None:
    """A conversation; None if the template refuses it."""
    try:
        found, _ = render_jinja_template(
            [given["messages"]],
            tools=given.get("tools"),
            chat_template=template,
            add_generation_prompt=True,
            **{**tokens, **given.get("extra", {})},
        )
    except Exception:  # a template is a program
        return None
    return found[0]


def main() -> None:
    """Encodes and renders everything."""
    found, given = {}, texts()
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        template, tokens, ids = template_of(folder), named_tokens(folder), None
        if any((folder / name).exists() for name in VOCABULARIES):
            try:
                tokenizer = AutoTokenizer.from_pretrained(str(folder))
            except ValueError as error:
                print(f"{folder.name}: {str(error).splitlines()[0]}", flush=True)
            else:
                ids = [tokenizer(text)["input_ids"] for text in given]
        found[folder.name] = {
            "transformers": transformers.__version__,
            "texts": given,
            "ids": ids,
            "template": template,
            "digest": template and hashlib.sha256(template.encode()).hexdigest()[:16],
            "named_tokens": tokens,
            "rendered": template and {name: rendered(template, tokens, each) for name, each in CONVERSATIONS.items()},
        }
        print(folder.name, ids and len(ids), template and len(template), flush=True)
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
