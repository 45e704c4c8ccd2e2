"""Compares conversations rendered with published chat templates by transformers and by this package.

    python tests/reference/compare_chat_templates.py render FOLDER OUT.json    # needs transformers 5.15 and jinja2
    python tests/reference/compare_chat_templates.py compare FOLDER OUT.json   # needs fastgen_jax

FOLDER has the templates as .jinja files: for example vendor/llama.cpp/models/templates of the source distribution of
llama-cpp-python, which are not ours to copy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from conversations import CONVERSATIONS

TOKENS = {"bos_token": "<BOS>", "eos_token": "<EOS>"}


def render(folder: Path) -> dict[str, dict[str, str | None]]:
    """Texts by transformers, by template and conversation; None where the template refuses a conversation."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def text(template: str, given: dict[str, Any]) -> str | None:
        more = {**TOKENS, **given.get("extra", {})}
        try:
            texts, _ = render_jinja_template(
                [given["messages"]], tools=given.get("tools"), chat_template=template, add_generation_prompt=True, **more
            )
        except Exception:  # a template is a program
            return None
        return texts[0]

    return {
        file.stem: {name: text(file.read_text(encoding="utf-8"), given) for name, given in CONVERSATIONS.items()}
        for file in sorted(folder.glob("*.jinja"))
    }


def compare(folder: Path, theirs: dict[str, dict[str, str | None]]) -> None:
    """Prints the counts for each conversation, and the templates that render it differently."""
    from fastgen_jax.text.chat import ChatTemplate, render_chat

    def text(template: ChatTemplate, given: dict[str, Any]) -> str | None:
        try:
            return render_chat(
                template,
                given["messages"],
                add_generation_prompt=True,
                tools=given.get("tools"),
                named_tokens=TOKENS,
                extra=given.get("extra", {}),
            )
        except ValueError:
            return None

    for name, given in CONVERSATIONS.items():
        same, ours_only, refused, differing = 0, 0, 0, []
        for stem, texts in theirs.items():
            template = ChatTemplate(name=stem, text=(folder / f"{stem}.jinja").read_text(encoding="utf-8"))
            ours = text(template, given)
            if ours == texts[name]:
                same, refused = same + (ours is not None), refused + (ours is None)
            elif texts[name] is None:
                ours_only += 1
            else:
                differing.append(stem)
        print(f"{name}: {same} equal, {refused} refused by both, {ours_only} only rendered here, {len(differing)} differ")
        for stem in differing:
            print(f"  {stem}")


def main() -> None:
    """Runs one of the two commands."""
    command, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if command == "render":
        out.write_text(json.dumps(render(folder)))
    else:
        compare(folder, json.loads(out.read_text()))


if __name__ == "__main__":
    main()
