"""POST /v1/embeddings, /v1/score and /rerank."""

from __future__ import annotations

import asyncio
import base64

import numpy as np
import pytest

from fastgen_jax.api.pooling import pool
from fastgen_jax.api.research import Research
from fastgen_jax.serving.embeddings import JUDGE
from tests.serving.tiny_server import MODEL, SHORT_TEMPLATE, ask, engine, tokenizer, with_server
from tests.tiny import drain, greedy, tokens_of

TEXTS = ["Hello", "The cat sat on the mat and it was glad, very glad.", "x"]


def ids_of(text):
    return tuple(tokenizer().encode(text))


def expected(text, pooling):
    hidden = Research(engine()).hidden_states(ids_of(text))
    vector = hidden[-1] if pooling == "last" else hidden.mean(0)
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_vector_is_that_of_the_last_token_or_the_average(pooling):
    body = {"model": MODEL, "input": TEXTS}
    got = ask("/v1/embeddings", body, pooling=pooling).json()
    for text, entry in zip(TEXTS, got["data"], strict=True):
        np.testing.assert_allclose(entry["embedding"], expected(text, pooling), atol=1e-5)
    assert got["usage"] == {"prompt_tokens": (n := sum(len(ids_of(t)) for t in TEXTS)), "total_tokens": n}


def test_vectors_have_the_form_that_the_client_asks_for():
    whole = np.asarray(ask("/v1/embeddings", {"model": MODEL, "input": "Hello"}).json()["data"][0]["embedding"])
    body = {"model": MODEL, "input": [list(ids_of("Hello"))], "encoding_format": "base64", "dimensions": 3}
    short = np.frombuffer(base64.b64decode(ask("/v1/embeddings", body).json()["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(short, whole[:3] / np.linalg.norm(whole[:3]), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, None),
        ({"input": "a" * 500}, "input"),
        ({"input": "a", "dimensions": 100_000}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": [[999_999]]}, "input"),
    ],
)
def test_inputs_without_a_vector_are_refused(fields, param):
    got = ask("/v1/embeddings", {"model": MODEL, **fields})
    if param is None:  # the beginning of a sequence is a token
        assert got.status_code == 200
        return
    assert got.status_code == 400, got.text
    assert got.json()["error"]["param"] == param, got.text


def test_scores_are_cosines_and_documents_are_sorted_by_them():
    query, *documents = TEXTS
    want = [float(expected(query, "last") @ expected(d, "last")) for d in documents]
    got = ask("/v1/score", {"model": MODEL, "text_1": query, "text_2": documents}).json()
    np.testing.assert_allclose([entry["score"] for entry in got["data"]], want, atol=1e-5)
    paired = ask("/score", {"model": MODEL, "queries": documents, "documents": documents}).json()
    np.testing.assert_allclose([entry["score"] for entry in paired["data"]], 1, atol=1e-5)
    ranked = ask("/rerank", {"model": MODEL, "query": query, "documents": [documents[0], {"text": documents[1]}]}).json()
    assert [r["index"] for r in ranked["results"]] == sorted((0, 1), key=lambda i: -want[i])
    assert ranked["results"][0]["document"]["text"] == documents[ranked["results"][0]["index"]]
    best = ask("/v1/rerank", {"model": MODEL, "query": query, "documents": documents, "top_n": 1}).json()["results"]
    assert [r["index"] for r in best] == [ranked["results"][0]["index"]]
    assert ask("/v1/score", {"model": MODEL, "text_1": ["a", "b"], "text_2": ["c"] * 3}).status_code == 400


def test_a_reranker_answers_yes_or_no():
    shared = engine(SHORT_TEMPLATE)
    body = {"model": MODEL, "query": "q", "documents": ["Hello", "x"]}
    got = ask("/rerank", body, shared=shared, scoring="yes-no").json()["results"]
    research = Research(shared)
    want = {}
    for i, text in enumerate(body["documents"]):
        question = f"<Query>: q\n<Document>: {text}"
        prompt = f"s:{JUDGE[-20:]}\nu:{question[-20:]}\na:<think>"
        (row,) = research.put(["a"], [tokenizer().encode(prompt, add_special_tokens=False)])
        research.flush("a")
        yes, no = (np.exp(row[tokenizer().encode(c, add_special_tokens=False)[0]]) for c in "yn")
        want[i] = yes / (yes + no)
    for entry in got:
        assert entry["relevance_score"] == pytest.approx(want[entry["index"]], abs=1e-5)


def test_vectors_are_computed_between_the_steps_of_requests_and_do_not_change_their_tokens():
    shared = engine()
    request_id = shared.add([5, 6, 7], greedy(40))
    alone = tokens_of(drain(shared)[request_id])
    body = {"model": MODEL, "input": TEXTS * 3}

    async def scenario(client, backend):
        async def generate():
            return [t async for out in backend.generate([5, 6, 7], greedy(40)) for t in out.new_token_ids]

        first, *vectors = await asyncio.gather(generate(), *(client.post("/v1/embeddings", json=body) for _ in range(3)))
        return first, [v.json()["data"] for v in vectors]

    tokens, vectors = with_server(scenario)
    assert tokens == alone
    for data in vectors:
        for text, entry in zip(TEXTS * 3, data, strict=True):
            np.testing.assert_allclose(entry["embedding"], expected(text, "last"), atol=1e-5)


def test_vectors_wait_in_a_queue_of_limited_length():
    async def scenario(client, _):
        got = await asyncio.gather(*(client.post("/v1/embeddings", json={"model": MODEL, "input": "x"}) for _ in range(5)))
        return sorted(response.status_code for response in got)

    assert with_server(scenario, max_queue=2) == [200, 200, 429, 429, 429]


def test_a_failed_step_returns_the_blocks(monkeypatch):
    shared = engine()
    monkeypatch.setattr(type(shared.runner), "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pool(shared, [ids_of(TEXTS[1])], "last")
    monkeypatch.undo()
    assert shared.scheduler.num_free_blocks == shared.config.num_blocks
    assert len(shared.manual_sequences) == 0


def test_long_texts_can_be_cut_and_special_tokens_left_out():
    def vectors(**fields):
        answer = ask("/v1/embeddings", {"input": "Hello", **fields})  # the model may be omitted
        assert answer.status_code == 200, answer.text
        return answer.json()["data"][0]["embedding"], answer.json()["usage"]["prompt_tokens"]

    end, count = vectors(truncate_prompt_tokens=2)
    assert count == 2
    np.testing.assert_allclose(end, vectors(input=list(ids_of("Hello")[-2:]))[0], atol=1e-5)
    assert vectors(add_special_tokens=False)[1] == len(ids_of("Hello")) - 1
    limit = engine().config.longest_sequence
    assert vectors(input="x" * (limit + 9), truncate_prompt_tokens=-1)[1] == limit
    assert ask("/v1/embeddings", {"input": "Hello", "truncate_prompt_tokens": 0}).json()["error"]["param"] == "input"
