"""Loops of agents through the clients that people use: three tools, twenty turns, every call answered and sent back."""

from __future__ import annotations

import json

import pytest

from tests.serving.tiny_server import MODEL, engine, serving

pytestmark = pytest.mark.slow
TURNS = 20
# The tiny model has a context of 128 characters: its prompt shows the number of tools and the end of the last message.
TEMPLATE = (
    "{# <tool_call> #}{% if tools %}{{ tools | length }}{% endif %}"
    "{% for m in messages[-1:] %}{{ m.role[0] }}:{{ (m.content or '')[-9:] }}\n{% endfor %}a:"
)
UNIT = {"type": "string", "enum": ["C", "F"]}
PARAMETERS = {
    "f": {"type": "object", "properties": {"u": UNIT}, "required": ["u"], "additionalProperties": False},
    "g": {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]},
    "h": {"type": "object", "properties": {}, "additionalProperties": False},
}
PARAMETERS["g"]["additionalProperties"] = False
CHAT_TOOLS = [{"type": "function", "function": {"name": n, "parameters": p}} for n, p in PARAMETERS.items()]
LIMIT = 100  # tokens of an answer, which are characters


@pytest.fixture(scope="module")
def url():
    with serving(engine(TEMPLATE)) as url:
        yield url


def result_of(name, arguments):
    """What the tool returns; fails if the arguments do not follow its schema."""
    if name == "f":
        assert arguments["u"] in ("C", "F")
    elif name == "g":
        assert arguments["n"] in range(10)
    else:
        assert (name, arguments) == ("h", {})
    return f"{name} is fine"


@pytest.mark.parametrize("stream", [False, True])
def test_openai_chats(url, stream):
    openai = pytest.importorskip("openai")
    messages = [{"role": "system", "content": "Use tools."}, {"role": "user", "content": "Go"}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for turn in range(TURNS):
            options = {"model": MODEL, "messages": messages, "tools": CHAT_TOOLS, "tool_choice": "required", "seed": turn}
            options |= {"max_tokens": LIMIT, "parallel_tool_calls": False}
            if stream:
                with client.chat.completions.stream(**options) as events:
                    message = events.get_final_completion().choices[0].message
            else:
                message = client.chat.completions.create(**options).choices[0].message
            (call,) = message.tool_calls
            result = result_of(call.function.name, json.loads(call.function.arguments))
            messages += [message, {"role": "tool", "tool_call_id": call.id, "content": result}]


@pytest.mark.parametrize("stored", [False, True])
def test_openai_responses(url, stored):
    openai = pytest.importorskip("openai")
    tools = [{"type": "function", "name": n, "parameters": p, "strict": True} for n, p in PARAMETERS.items()]
    items, previous = [{"role": "user", "content": "Go"}], None
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for turn in range(TURNS):
            options = {"model": MODEL, "input": items, "tools": tools, "tool_choice": "required", "store": stored}
            options |= {"max_output_tokens": LIMIT, "parallel_tool_calls": False, "extra_body": {"seed": turn}}
            if stored:
                with client.responses.stream(**options, previous_response_id=previous or openai.omit) as events:
                    response = events.get_final_response()
            else:
                response = client.responses.create(**options, include=["reasoning.encrypted_content"])
            (call,) = response.output
            result = result_of(call.name, json.loads(call.arguments))
            output = {"type": "function_call_output", "call_id": call.call_id, "output": result}
            items = [output] if stored else [*items, call, output]
            previous = response.id


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_messages(url, stream):
    anthropic = pytest.importorskip("anthropic")
    tools = [{"name": n, "description": "d", "input_schema": p} for n, p in PARAMETERS.items()]
    messages = [{"role": "user", "content": "Go"}]
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        for turn in range(TURNS):
            options = {"model": MODEL, "max_tokens": LIMIT, "system": "Use tools.", "messages": messages, "tools": tools}
            options |= {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "extra_body": {"seed": turn}}
            if stream:
                with client.messages.stream(**options) as events:
                    message = events.get_final_message()
            else:
                message = client.messages.create(**options)
            assert message.stop_reason == "tool_use"
            (call,) = message.content
            block = {"type": "tool_result", "tool_use_id": call.id, "content": result_of(call.name, call.input)}
            messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [block]}]
        counted = client.messages.count_tokens(model=MODEL, messages=messages, tools=tools)
        assert counted.input_tokens > 0


@pytest.mark.filterwarnings("ignore")  # litellm's own
def test_litellm(url, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise it is downloaded
    litellm = pytest.importorskip("litellm")
    messages = [{"role": "user", "content": "Go"}]
    for turn in range(TURNS):
        answer = litellm.completion(
            model=f"openai/{MODEL}",
            api_base=f"{url}/v1",
            api_key="none",
            messages=messages,
            tools=CHAT_TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=LIMIT,
            seed=turn,
        )
        message = answer.choices[0].message
        (call,) = message.tool_calls
        result = result_of(call.function.name, json.loads(call.function.arguments))
        messages += [message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": result}]
