"""Starting the answer to a conversation: its prompt, its grammar, and how its text is read.

Every endpoint for conversations ends here, so that all of them treat tools and reasoning alike.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from fastgen_jax.api.options import DEFAULT_NEW_TOKENS
from fastgen_jax.engine.prompts import Prompt
from fastgen_jax.images import ImagePrompts, PromptParts, take_images
from fastgen_jax.images.messages import has_images
from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.scheduling import ContextLengthError, PromptImage, SamplingParams
from fastgen_jax.serving.answers import ChatAnswer
from fastgen_jax.serving.beams import start_beams
from fastgen_jax.serving.conversation import ChatPrompt, NamedTool
from fastgen_jax.serving.errors import ApiError, context_exceeded, unsupported
from fastgen_jax.serving.guided import Guide
from fastgen_jax.serving.images import image_bytes
from fastgen_jax.serving.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from fastgen_jax.serving.reasoning import (
    ReasoningFormat,
    effort_variables,
    is_open,
    read_reasoning,
    reasoning_format,
)
from fastgen_jax.serving.sampling_fields import Sampling
from fastgen_jax.serving.settings import ServerConfig
from fastgen_jax.serving.state import ServerState
from fastgen_jax.serving.tool_formats import FORMATS, ToolFormat, tool_format
from fastgen_jax.serving.tool_formats.pieces import Reader, Schemas, Source, Steps, until
from fastgen_jax.serving.tools import CALL_ID_LENGTH, guide_of, guide_of_calls, prepare_messages
from fastgen_jax.serving.work import LONG_PROMPT, Backend, Work, beside, start_work, truncated
from fastgen_jax.text import Tokenizer
from fastgen_jax.text.chat import ChatTemplate, variables_of
from fastgen_jax.text.grammar import Grammar, GrammarError

RELAXED = "x-fastgen-schema-relaxed"  # the header that names what is not enforced of a schema
IGNORED = "x-fastgen-ignored"  # the header that names fields that have no effect with this model


@dataclass(frozen=True, kw_only=True)
class AnswerForm:
    """In which form a model answers a request."""

    schemas: Schemas
    """The parameters of the functions that it may call."""
    tools: ToolFormat | None
    """How it writes calls; None if it may not call any."""
    reasoning: ReasoningFormat | None
    """How it marks its reasoning; None if there is none."""
    opened: bool = False
    """Whether the prompt has begun the reasoning."""
    several: bool = True
    """Whether it may call more than one function."""
    only_calls: bool = False
    """Whether it must call a function."""

    def reader(self) -> Reader | None:
        """A reader of one answer; None if all of its text is content."""
        if self.tools is None and self.reasoning is None:
            return None
        return Reader(self._parse, self.schemas, several=self.several, only_calls=self.only_calls)

    def shown_token_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The special tokens that the text of an answer must show, so that it can be read."""
        marks = [*(self.tools.marks if self.tools else ())]
        if self.reasoning is not None:
            marks += [self.reasoning.open, self.reasoning.close]
        ids = {ids[0] for mark in marks if len(ids := tokenizer.encode(mark, add_special_tokens=False)) == 1}
        return tuple(sorted(ids & tokenizer.special_ids))

    def _parse(self, source: Source, schemas: Schemas) -> Steps[None]:
        if self.reasoning is not None and not self.reasoning.channels:
            yield from read_reasoning(source, self.reasoning, opened=self.opened)
        if self.tools is not None:
            yield from self.tools.read(source, schemas)
        yield from until(source, (), "content")


async def start_chat(server: ServerState, body: ChatRequest) -> tuple[Work, ChatAnswer]:
    """Validates a conversation and starts its answer. Raises as `start_work` does."""
    adapter = server.adapter_of(body.model)
    backend = server.ready()
    body = body.model_copy(update={"model": server.name_of(body.model)})
    tokenizer = _with_template(server, backend.intake.need_tokenizer("a chat"), body)
    form = _form(server.model.config, tokenizer, body)
    prompt = await chat_parts(server, tokenizer, body)
    if form.reasoning is not None:
        opened = is_open(form.reasoning, tokenizer, prompt.token_ids)
        form = replace(form, reasoning=None if opened is None else form.reasoning, opened=bool(opened))
    params = body.sampling_params(
        backend.intake,
        max_new_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs or body.selects else None,
        prompt_logprobs=body.prompt_logprobs,
        adapter=adapter,
    )
    guide = await guide_for(body, form.tools, tokenizer)
    try:
        work = await start_answer(
            backend,
            body,
            [prompt.token_ids],
            params,
            guide,
            images=prompt.images,
            grammar=_with_reasoning(form, tokenizer, body, guide.grammar if guide else None),
            shown_token_ids=form.shown_token_ids(tokenizer),
        )
    except ContextLengthError as error:
        raise context_exceeded(error, "messages") from error
    answer = ChatAnswer(
        body,
        work,
        tokenizer,
        make_reader=form.reader,
        id_length=form.tools.id_length if form.tools else CALL_ID_LENGTH,
        fingerprint=server.fingerprint,
        headers=headers_of(guide, ignored_hints(body, tokenizer.template(with_tools=bool(body.described_tools)))),
    )
    return work, answer


def headers_of(guide: Guide | None, ignored: Sequence[str] = ()) -> dict[str, str]:
    """The headers of an answer that name what is not enforced of its schema, and fields that have no effect."""
    told = {RELAXED: guide.relaxed if guide is not None else (), IGNORED: ignored}
    texts = {name: ", ".join(words).encode("ascii", "backslashreplace").decode() for name, words in told.items() if words}
    return {name: text[:1000].replace("\r", " ").replace("\n", " ") for name, text in texts.items()}


async def guide_for(
    body: ChatRequest | CompletionRequest, form: ToolFormat | None = None, tokenizer: Tokenizer | None = None
) -> Guide | None:
    """The grammar that a request demands; `form` is that of the model's calls, if it may write any."""
    if isinstance(body, ChatRequest) and body.forces_tool and form is not None and tokenizer is not None:
        return await beside(guide_of_calls, body, form, tokenizer)
    return await beside(guide_of, body) if body.is_guided else None


async def start_answer(
    backend: Backend,
    body: Sampling,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    guide: Guide | None,
    *,
    grammar: Grammar | None = None,
    add_special_tokens: bool = True,
    shown_token_ids: tuple[int, ...] = (),
    images: tuple[PromptImage, ...] = (),
) -> Work:
    """`start_work` with the fields that all bodies share. `grammar` is that of `guide`, or extends it.

    `images` are those of the only prompt.
    """
    for name in ("use_beam_search", "truncate_prompt_tokens") if images else ():
        if getattr(body, name):
            raise ApiError(f"{name} cannot be combined with images; remove one of them", param=name)
    if body.use_beam_search:
        return await _start_search(backend, body, prompts, params, add_special_tokens=add_special_tokens)
    try:
        return await start_work(
            backend,
            prompts,
            params,
            num_samples=body.num_samples,
            priority=body.priority,
            timeout=body.timeout,
            grammar=grammar or (guide.grammar if guide else None),
            new_tokens=backend.intake.default_new_tokens,
            add_special_tokens=add_special_tokens,
            keep_tokens=body.truncate_prompt_tokens,
            cache_salt=body.cache_salt or "",
            shown_token_ids=shown_token_ids,
            images=images,
        )
    except GrammarError as error:
        raise ApiError(str(error), param=guide.field if guide else None) from None


async def _start_search(
    backend: Backend, body: Sampling, prompts: Sequence[Prompt], params: SamplingParams, *, add_special_tokens: bool
) -> Work:
    intake, (prompt, *others) = backend.intake, prompts
    if others:
        raise ValueError(f"prompt has {len(prompts)} prompts, but beam search takes one; send a request for each")
    encoded = await asyncio.to_thread(intake.encode, prompt, add_special_tokens=add_special_tokens)
    ids = truncated(encoded, body.truncate_prompt_tokens, intake, params)
    limit = intake.default_new_tokens or DEFAULT_NEW_TOKENS
    return start_beams(
        backend,
        ids,
        intake.limited(params, len(ids), limit),
        width=body.num_choices,
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
        priority=body.priority,
        deadline=None if body.timeout is None else time.monotonic() + body.timeout,
        cache_salt=body.cache_salt or "",
    )


async def chat_prompt(server: ServerState, tokenizer: Tokenizer, body: ChatRequest | TokenizeRequest) -> list[int]:
    """Token ids of a conversation."""
    return (await chat_parts(server, tokenizer, body)).token_ids


async def chat_parts(server: ServerState, tokenizer: Tokenizer, body: ChatRequest | TokenizeRequest) -> PromptParts:
    """Token ids and images of a conversation."""
    tokenizer = _with_template(server, tokenizer, body)
    messages, tools = prepare_messages(tokenizer, body.messages or [], body.described_tools)
    template = tokenizer.template(with_tools=bool(tools))
    variables = _template_variables(body)
    if isinstance(body, ChatRequest):
        variables = {**hint_variables(body, template), **variables}
    render = partial(
        tokenizer.apply_chat_template,
        tools=tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        **variables,
    )
    special = bool(body.add_special_tokens)
    if has_images(messages) and (reader := _reader(server)) is not None:
        read = partial(image_bytes, config=server.model.config)

        def encode_images() -> PromptParts:
            texts, sources = take_images(messages, reader.placeholder, read=read)
            return reader.parts(render(texts), sources, add_special_tokens=special)

        return await asyncio.to_thread(encode_images)

    def encode() -> PromptParts:
        return PromptParts(tokenizer.encode(render(messages), add_special_tokens=special), ())

    contents = [message.get("content") or "" for message in messages]
    is_long = any(not isinstance(c, str) for c in contents) or sum(map(len, contents)) > LONG_PROMPT
    return await asyncio.to_thread(encode) if is_long else encode()


def hint_variables(body: ChatRequest, template: ChatTemplate | None) -> JsonObject:
    """The variables of a template that express how much the model is to reason and to say."""
    if template is None or (body.reasoning_effort is None and body.verbosity is None):
        return {}
    known = variables_of(template)
    variables = effort_variables(body.reasoning_effort, known)
    if body.verbosity is not None and "verbosity" in known:
        variables["verbosity"] = body.verbosity
    return variables


def ignored_hints(body: ChatRequest, template: ChatTemplate | None) -> list[str]:
    """The fields that have no effect, because this model cannot be told how much to reason or to say."""
    variables = hint_variables(body, template)
    effort = body.reasoning_effort not in (None, "none") and not variables.keys() - {"verbosity"}
    verbosity = body.verbosity not in (None, "medium") and "verbosity" not in variables
    return [*(["reasoning_effort"] if effort else []), *(["verbosity"] if verbosity else [])]


def _reader(server: ServerState) -> ImagePrompts | None:
    """What reads images; None if the model does not, and ValueError if it could."""
    intake = server.ready().intake
    return intake.images if intake.config.choices.images else intake.need_images()


def _with_template(server: ServerState, tokenizer: Tokenizer, body: ChatPrompt) -> Tokenizer:
    """The tokenizer with the template of the request, if it has one."""
    if body.chat_template is None:
        return tokenizer
    if not server.model.config.trust_request_chat_template:
        raise ApiError(
            "chat_template is set, but this server does not run templates of its clients; start it with --chat-template, "
            "or with --trust-request-chat-template",
            param="chat_template",
            code="unsupported_parameter",
        )
    if "{{" not in body.chat_template and "{%" not in body.chat_template:  # it could be the path of a file
        raise ApiError("chat_template is not the text of a template, which contains {{ or {%", param="chat_template")
    return tokenizer.with_template(body.chat_template)


def _template_variables(body: ChatPrompt) -> JsonFields:
    variables = body.chat_template_kwargs or {}
    if "chat_template" in variables:
        raise ValueError(
            "chat_template_kwargs has 'chat_template', but requests cannot choose the template; "
            "start the server with --chat-template"
        )
    if body.documents is not None:
        variables = {**variables, "documents": body.documents}
    fields = {"messages", "tools", "add_generation_prompt", "continue_final_message", "add_special_tokens"}
    taken = fields & set(variables)
    if taken:
        raise ValueError(f"chat_template_kwargs has {sorted(taken)}; pass them as fields of the request instead")
    return variables


def _form(config: ServerConfig, tokenizer: Tokenizer, body: ChatRequest) -> AnswerForm:
    """The form of the answer, as far as it does not depend on the end of the prompt."""
    tools = body.described_tools
    template = tokenizer.template(with_tools=bool(tools))
    source = template.text if template is not None else ""
    reasoning = reasoning_format(config.reasoning_format, source)
    form = tool_format(config.tool_format, source)
    schemas: dict[str, JsonFields] = {tool.function.name: tool.function.schema_of_arguments for tool in tools}
    if isinstance(body.tool_choice, NamedTool):
        schemas = {body.tool_choice.function.name: schemas[body.tool_choice.function.name]}
    if not tools:
        form = form if form is not None and form.channels else None
    elif form is None and ("tools" not in source or body.forces_tool):
        form = FORMATS["hermes"]
    elif form is None:
        raise unsupported(
            "tool_choice",
            "auto",
            "this model writes tool calls in a format that this server cannot read; use tool_choice='required' or name a "
            "function, which is enforced by a grammar, or start the server with --tool-format",
        )
    return AnswerForm(
        schemas=schemas,
        tools=form,
        reasoning=reasoning,
        only_calls=body.forces_tool,
        several=body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool),
    )


def _with_reasoning(form: AnswerForm, tokenizer: Tokenizer, body: ChatRequest, grammar: Grammar | None) -> Grammar | None:
    """The grammar of an answer whose text, after its reasoning, follows `grammar`."""
    if form.reasoning is None or (grammar is None and body.budget is None):
        return grammar
    limits = form.reasoning.limits(
        tokenizer,
        is_open=form.opened,
        budget=body.budget,
        calls=body.forces_tool,
        constrained=grammar is not None,
    )
    return replace(grammar or Grammar(kind="free", source=""), reasoning=limits)
