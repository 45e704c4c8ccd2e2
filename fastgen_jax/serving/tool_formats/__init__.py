"""The formats in which models write calls of functions, and the choice of one by the chat template."""

from __future__ import annotations

from fastgen_jax.serving.tool_formats import deepseek, harmony, hermes, llama, mistral, xml
from fastgen_jax.serving.tool_formats.format import ToolFormat

FORMATS = {
    form.name: form
    for form in (
        harmony.FORMAT,
        deepseek.FENCED,
        deepseek.PLAIN,
        mistral.NAMED,
        mistral.ARRAY,
        xml.QWEN,
        xml.GLM,
        hermes.FORMAT,
        llama.PYTHONIC,
        llama.JSON,
    )
}
"""By name. The first one that recognizes a chat template is used for it."""


def tool_format(name: str | None, template: str) -> ToolFormat | None:
    """The format with that name; without a name, the one of a chat template, None if it is not known."""
    if name is not None:
        return FORMATS[name]
    return next((form for form in FORMATS.values() if form.recognizes(template)), None)
