"""What a server keeps for its clients: chats and responses that can be asked for again."""

from __future__ import annotations

import json

import pytest

from fastgen_jax.serving.errors import ApiError
from fastgen_jax.serving.kept import Kept, page_of
from fastgen_jax.serving.responses import store
from fastgen_jax.serving.responses.items import messages_of
from tests.serving.test_responses import typed_events
from tests.serving.tiny_server import MODEL, events, with_server

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0, "store": True}
PATH = "/v1/chat/completions"


def test_a_stored_chat_is_found_labeled_and_deleted():
    async def scenario(client, _):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        conversation = [*CHAT["messages"], {"role": "assistant", "content": "x"}, {"role": "user", "content": parts}]
        first = (await client.post(PATH, json={**CHAT, "metadata": {"team": "a"}})).json()
        second = (await client.post(PATH, json={**CHAT, "messages": conversation})).json()
        await client.post(PATH, json={**CHAT, "store": False})
        chats = (await client.get(PATH)).json()
        assert [chat["id"] for chat in chats["data"]] == [first["id"], second["id"]]
        assert chats["data"][0] == {**first, "metadata": {"team": "a"}}
        page = (await client.get(PATH, params={"limit": 1, "order": "desc"})).json()
        assert (page["data"][0]["id"], page["has_more"]) == (second["id"], True)
        for query, found in (({"metadata[team]": "a"}, 1), ({"metadata[team]": "b"}, 0), ({"model": "other"}, 0)):
            assert len((await client.get(PATH, params=query)).json()["data"]) == found
        path = f"{PATH}/{second['id']}"
        assert (await client.post(path, json={"metadata": {"team": "b"}})).json()["metadata"] == {"team": "b"}
        assert (await client.get(path)).json()["metadata"] == {"team": "b"}
        messages = (await client.get(f"{path}/messages")).json()["data"]
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert (messages[2]["content"], messages[2]["content_parts"]) == ("a\nb", parts)
        after = (await client.get(f"{path}/messages", params={"after": messages[0]["id"]})).json()["data"]
        assert after == messages[1:]
        assert (await client.delete(path)).json()["deleted"]
        gone = await client.get(path)
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "chat_not_found")

    with_server(scenario)


def test_a_streamed_chat_is_stored_as_the_complete_answer():
    async def scenario(client, _):
        whole = (await client.post(PATH, json=CHAT)).json()
        streamed = events(await client.post(PATH, json={**CHAT, "stream": True}))
        stored = (await client.get(f"{PATH}/{streamed[0]['id']}")).json()
        assert stored["object"] == "chat.completion"
        assert (stored["choices"], stored["usage"]) == (whole["choices"], whole["usage"])

    with_server(scenario)


def test_a_client_finds_only_what_was_stored_with_its_key():
    async def scenario(client, _):
        headers = [{"Authorization": f"Bearer {key}"} for key in ("k", "m")]
        chat = (await client.post(PATH, json=CHAT, headers=headers[0])).json()
        return [len((await client.get(PATH, headers=h)).json()["data"]) for h in headers] + [
            (await client.get(f"{PATH}/{chat['id']}", headers=h)).status_code for h in headers
        ]

    assert with_server(scenario, api_key=("k", "m")) == [1, 0, 200, 404]


def test_objects_that_were_not_used_for_longest_are_dropped():
    kept: Kept[str] = Kept(max_objects=3, max_bytes=1000)
    for name in "abcd":
        kept.add(name, name, 10)
    assert kept.values() == ["b", "c", "d"]
    assert kept.get("b") == "b"
    kept.add("e", "e", 10)
    assert kept.values() == ["b", "d", "e"]
    kept.add("d", "new", 985)
    assert kept.values() == ["new", "e"]
    kept.add("f", "f", 1001)
    assert kept.values() == ["new", "e"]


def test_pages_of_a_list_follow_each_other():
    items = [{"id": i} for i in "abc"]
    first = page_of(items, after=None, limit=2, order="desc")
    assert ([item["id"] for item in first["data"]], first["has_more"]) == (["c", "b"], True)
    second = page_of(items, after=first["last_id"], limit=2, order="desc")
    assert ([item["id"] for item in second["data"]], second["has_more"]) == (["a"], False)
    with pytest.raises(ApiError, match="after is 'x'"):
        page_of(items, after="x", limit=2, order="asc")


# Responses

RESPONSE = {"model": MODEL, "input": "Hi", "max_output_tokens": 20, "temperature": 0, "ignore_eos": True}


async def streamed(client, path, **query):
    """The events of the stream of a stored response."""
    answer = await client.get(path, params={"stream": True, **query})
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: ")]


def test_a_response_in_the_background_is_generated_without_its_client():
    async def scenario(client, _):
        whole = (await client.post("/v1/responses", json=RESPONSE)).json()
        begun = (await client.post("/v1/responses", json={**RESPONSE, "background": True})).json()
        assert (begun["status"], begun["background"]) == ("in_progress", True)
        path = f"/v1/responses/{begun['id']}"
        early = await client.post("/v1/responses", json={**RESPONSE, "previous_response_id": begun["id"]})
        assert early.json()["error"]["code"] == "response_in_progress"
        assert (await client.get(f"{path}/input_items")).json()["data"][0]["content"][0]["text"] == "Hi"
        followed = await streamed(client, path)  # waits for its end
        assert [event["sequence_number"] for event in followed] == [*range(len(followed))]
        assert followed[-1]["type"] == "response.completed" if whole["status"] == "completed" else "response.incomplete"
        got = (await client.get(path)).json()
        assert got["output"][0]["content"] == whole["output"][0]["content"]
        assert got["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
        assert await streamed(client, path) == followed
        assert await streamed(client, path, starting_after=4) == followed[5:]
        assert await streamed(client, path, starting_after=400) == []
        assert (await client.post(f"{path}/cancel")).json() == got

    with_server(scenario)


def test_a_response_in_the_background_ends_when_it_is_cancelled_or_deleted():
    async def scenario(client, backend):
        long = {**RESPONSE, "max_output_tokens": 100, "background": True}
        for request in (client.post, client.delete):
            begun = (await client.post("/v1/responses", json=long)).json()
            path = f"/v1/responses/{begun['id']}"
            if request == client.post:
                got = (await client.post(f"{path}/cancel")).json()
                assert got["status"] == "cancelled"
                assert (await client.get(path)).json() == got
            else:
                assert (await client.delete(path)).json()["deleted"]
                assert (await client.get(path)).status_code == 404
            assert backend.num_unfinished == 0

    with_server(scenario)


def test_responses_in_the_background_have_bounded_memory(monkeypatch):
    monkeypatch.setattr(store, "MAX_BACKGROUND_TOKENS", 120)

    async def scenario(client, _):
        body = {**RESPONSE, "max_output_tokens": 100, "background": True}
        first = (await client.post("/v1/responses", json=body)).json()
        refused = await client.post("/v1/responses", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "background_full")
        await client.delete(f"/v1/responses/{first['id']}")
        second = await client.post("/v1/responses", json=body)
        assert second.status_code == 200
        await client.delete(f"/v1/responses/{second.json()['id']}")

    with_server(scenario)


def test_a_stored_response_is_streamed_as_its_items():
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"c": {"enum": ["A"]}}}}

    async def scenario(client, _):
        for fields in ({}, {"tools": [tool], "tool_choice": "required", "max_output_tokens": 100}):
            whole = (await client.post("/v1/responses", json={**RESPONSE, **fields})).json()
            replayed = await streamed(client, f"/v1/responses/{whole['id']}")
            assert replayed[-1]["response"] == whole
            done = [event["item"] for event in replayed if event["type"] == "response.output_item.done"]
            assert done == whole["output"]
            live = typed_events(await client.post("/v1/responses", json={**RESPONSE, **fields, "stream": True}))
            kinds = list(dict.fromkeys(event["type"] for event in live))
            assert list(dict.fromkeys(event["type"] for event in replayed)) == kinds

    with_server(scenario)


def test_the_messages_before_a_summary_become_one():
    items = [
        {"type": "message", "role": "developer", "content": "D"},
        {"type": "message", "role": "user", "content": "a"},
        {"type": "message", "role": "assistant", "content": "b"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "c"}]},
        {"type": "compaction", "encrypted_content": "S"},
        {"type": "message", "role": "user", "content": "d"},
    ]
    messages = messages_of(items)
    assert [message["role"] for message in messages] == ["developer", "user", "assistant", "user"]
    assert [part["text"] for part in messages[1]["content"]] == ["a", "c"]
    assert messages[2]["content"].endswith("S")
    with pytest.raises(ApiError, match=r"input\[0\].encrypted_content"):
        messages_of([{"type": "compaction"}])
