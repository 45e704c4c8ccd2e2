"""Vectors of texts, and scores of pairs of texts: /v1/embeddings, /v1/score and /rerank.

A score is the cosine of the two vectors or, for models that were trained to judge a document, the probability that the
answer is "yes".
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from fastapi import FastAPI
from pydantic import Field, model_validator

from fastgen_jax.engine.prompts import TokenIds, in_vocabulary
from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.serving.errors import ApiError, ErrorResponses, unsupported
from fastgen_jax.serving.fields import Body, TokenId
from fastgen_jax.serving.state import ServerState

MAX_TEXTS = 2048  # of one request, as in OpenAI's API
# The texts with which Qwen3-Reranker was trained.
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class EmbeddingsRequest(Body):
    """POST /v1/embeddings."""

    model: str | None = None
    input: str | list[TokenId] | list[str] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="Extension: keep only this many tokens at the end of a text; -1: as many as the model takes."
    )
    add_special_tokens: bool | None = Field(None, description="Extension: false adds no special tokens to a text.")
    user: str | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        """One entry for each text."""
        if isinstance(self.input, str):
            return [self.input]
        ids = [item for item in self.input if isinstance(item, int)]
        return [ids] if ids else [item for item in self.input if not isinstance(item, int)]


class ScoreRequest(Body):
    """POST /v1/score: one text against several, or texts in pairs."""

    model: str | None = None
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = Field(None, description="Another name of text_1.")
    documents: str | list[str] | None = Field(None, description="Another name of text_2.")
    instruction: str | None = Field(None, description="Extension: what makes a document relevant, for rerankers.")
    user: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> ScoreRequest:
        if (self.text_1 is None) == (self.queries is None) or (self.text_2 is None) == (self.documents is None):
            raise ValueError("text_1 and text_2 are required, or queries and documents")
        first, second = self._sides
        if not first or not second or (len(first) not in (1, len(second))):
            raise ValueError(f"text_1 has {len(first)} texts and text_2 {len(second)}; pass one against several, or pairs")
        return self

    @property
    def _sides(self) -> tuple[list[str], list[str]]:
        first = self.queries if self.text_1 is None else self.text_1
        second = self.documents if self.text_2 is None else self.text_2
        return _listed(first or ""), _listed(second or "")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of texts."""
        first, second = self._sides
        return list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))


class RerankRequest(Body):
    """POST /rerank: documents in the order of their relevance to a query."""

    model: str | None = None
    query: str
    documents: Annotated[list[str | JsonObject], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=0)] | None = None
    return_documents: bool | None = None
    instruction: str | None = Field(None, description="Extension: what makes a document relevant, for rerankers.")
    user: str | None = None

    @property
    def texts(self) -> list[str]:
        """The text of each document."""
        texts = [item if isinstance(item, str) else item.get("text") for item in self.documents]
        if not all(isinstance(text, str) for text in texts):
            raise ApiError('documents must be strings, or objects {"text": ...}', param="documents")
        return [str(text) for text in texts]


def add_embeddings(app: FastAPI, server: ServerState, errors: ErrorResponses) -> None:
    """Adds the endpoints."""

    @app.post("/v1/embeddings", responses=errors)
    async def embeddings(body: EmbeddingsRequest) -> JsonFields:
        server.check_model(body.model)
        add = body.add_special_tokens is not False
        ids = await _encoded(server, body.texts, "input", keep=body.truncate_prompt_tokens, add_special_tokens=add)
        size = server.ready().intake.model.embed_dim
        if body.dimensions is not None and body.dimensions > size:
            raise ApiError(f"dimensions is {body.dimensions}, but vectors have {size} numbers", param="dimensions")
        vectors = await _vectors(server, ids, body.dimensions)
        data = [
            {"object": "embedding", "index": i, "embedding": _spelled(vector, body.encoding_format)}
            for i, vector in enumerate(vectors)
        ]
        return {"object": "list", "data": data, "model": server.name_of(body.model), "usage": _usage(ids)}

    @app.post("/score", responses=errors)
    @app.post("/v1/score", responses=errors)
    async def score(body: ScoreRequest) -> JsonFields:
        server.check_model(body.model)
        scores, usage = await _scores(server, body.pairs, body.instruction)
        data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
        head = {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": server.name_of(body.model),
        }
        return {**head, "data": data, "usage": usage}

    @app.post("/rerank", responses=errors)
    @app.post("/v1/rerank", responses=errors)
    @app.post("/v2/rerank", responses=errors)
    async def rerank(body: RerankRequest) -> JsonFields:
        server.check_model(body.model)
        texts = body.texts
        scores, usage = await _scores(server, [(body.query, text) for text in texts], body.instruction)
        order = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n or len(texts)]
        results = [
            {
                "index": i,
                **({} if body.return_documents is False else {"document": {"text": texts[i]}}),
                "relevance_score": scores[i],
            }
            for i in order
        ]
        return {"id": f"rerank-{uuid.uuid4().hex}", "model": server.name_of(body.model), "results": results, "usage": usage}


async def _encoded(
    server: ServerState,
    texts: Sequence[str | list[int]],
    param: str,
    *,
    keep: int | None = None,
    add_special_tokens: bool = True,
) -> list[TokenIds]:
    """The tokens of each text, at most `keep` of them from its end (-1: as many as fit)."""
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise ApiError(f"{param} has {len(texts)} texts; pass 1 to {MAX_TEXTS}", param=param)
    intake = server.ready().intake
    limit = intake.config.longest_sequence if keep == -1 else keep

    def encode() -> list[TokenIds]:
        ids = [
            intake.encode(text, add_special_tokens=add_special_tokens) if isinstance(text, str) else text for text in texts
        ]
        kept = [one if limit is None else one[max(0, len(one) - limit) :] for one in ids]
        return [in_vocabulary(one, param, vocab_size=intake.model.vocab_size) for one in kept]

    try:
        ids = await asyncio.to_thread(encode)
    except ValueError as error:
        raise ApiError(str(error), param=param) from error
    return _checked_lengths(server, ids, param)


def _checked_lengths(server: ServerState, ids: list[TokenIds], param: str) -> list[TokenIds]:
    limit, longest = server.ready().intake.config.longest_sequence, max(map(len, ids))
    if longest > limit:
        raise ApiError(
            f"This model's maximum context length is {limit} tokens. However, {param} has a text of {longest}; shorten it",
            param=param,
            code="context_length_exceeded",
        )
    return ids


async def _vectors(server: ServerState, ids: Sequence[TokenIds], dimensions: int | None) -> np.ndarray:
    """Vectors of length 1, f32[n, dimensions]."""
    pooled = await server.ready().pool(ids, server.model.config.pooling)
    vectors = np.stack([one.hidden for one in pooled])[:, :dimensions]
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


async def _scores(
    server: ServerState, pairs: Sequence[tuple[str, str]], instruction: str | None
) -> tuple[list[float], JsonFields]:
    scoring = server.model.config.scoring
    if scoring is None:
        scoring = "yes-no" if "rerank" in server.model.name.lower() else "cosine"
    if scoring == "yes-no":
        return await _judged(server, pairs, instruction or _INSTRUCTION)
    if instruction is not None:
        raise unsupported("instruction", instruction, "this model compares vectors; write it into the texts")
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    ids = await _encoded(server, texts, "documents")
    vectors = dict(zip(texts, await _vectors(server, ids, None), strict=True))
    return [float(vectors[first] @ vectors[second]) for first, second in pairs], _usage(ids)


async def _judged(server: ServerState, pairs: Sequence[tuple[str, str]], instruction: str) -> tuple[list[float], JsonFields]:
    tokenizer = server.ready().intake.need_tokenizer("a score")
    answers = [tokenizer.encode(word, add_special_tokens=False)[0] for word in ("no", "yes")]

    def encode_pair(query: str, text: str) -> TokenIds:
        question = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {text}"
        messages = [{"role": "system", "content": JUDGE}, {"role": "user", "content": question}]
        ids = tokenizer.encode_chat(messages, enable_thinking=False)
        return in_vocabulary(ids, "the prompt", vocab_size=server.ready().intake.model.vocab_size)

    def encode() -> list[TokenIds]:
        return [encode_pair(query, text) for query, text in pairs]

    if len(pairs) > MAX_TEXTS:
        raise ApiError(f"documents has {len(pairs)} texts; pass at most {MAX_TEXTS}", param="documents")
    ids = _checked_lengths(server, await asyncio.to_thread(encode), "documents")
    pooled = await server.ready().pool(ids, "last", token_ids=tuple(answers))
    return [float(1 / (1 + np.exp(one.logits[0] - one.logits[1]))) for one in pooled], _usage(ids)


def _usage(ids: Sequence[TokenIds]) -> JsonFields:
    count = sum(map(len, ids))
    return {"prompt_tokens": count, "total_tokens": count}


def _spelled(vector: np.ndarray, form: str | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts
