"""The parts of a body that become the prompt of a conversation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.serving.fields import Body


class Function(Body):
    """A function that the model may call; `parameters` is a JSON schema. The chat template sees further fields."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,64}$")]
    description: str | None = None
    parameters: JsonObject | None = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> JsonFields:
        """The schema of the arguments: an object, without any property if `parameters` describes none."""
        given = self.parameters or {}
        schema: JsonFields = {"type": "object", **given}
        describes = {name for name in given if name not in _ANNOTATIONS and given[name] not in ({}, [])}
        return schema if describes else {**schema, "additionalProperties": False}


# Words of a schema that describe no property.
_ANNOTATIONS = frozenset({"type", "title", "description", "$schema", "$id", "$defs", "definitions", "strict"})


class Tool(Body):
    """A tool; functions are the only kind. The chat template sees further fields, except `cache_control`."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: Function
    cache_control: object = Field(None, exclude=True, description="Means nothing here.")


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatPrompt(Body):
    """The fields of a conversation that become its prompt."""

    add_generation_prompt: bool = Field(True, description="Extension: end the prompt with the start of an answer.")
    continue_final_message: bool = Field(False, description="Extension: continue the last message.")
    add_special_tokens: bool | None = Field(
        None, description="Extension: true adds the tokenizer's special tokens to those that the template writes."
    )
    chat_template: str | None = Field(
        None, description="Extension: replaces the model's template, if the server allows that."
    )
    chat_template_kwargs: JsonObject | None = Field(None, description="Extension: variables for the chat template.")
    documents: list[JsonObject] | None = Field(None, description="Extension: the template's variable of that name.")
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None

    @model_validator(mode="after")
    def _one_end(self) -> ChatPrompt:
        # As in vLLM, whose clients set both because add_generation_prompt is true by default.
        if self.continue_final_message and self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other; set one of them to false")
        return self

    @property
    def described_tools(self) -> list[Tool]:
        """The tools that are described to the model."""
        return self.tools or []
