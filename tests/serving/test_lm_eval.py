"""EleutherAI's evaluation harness runs against the server, on local tasks, so that nothing is downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from fastgen_jax import Research
from tests.serving.tiny_server import MODEL, engine, offline, tokenizer

pytest.importorskip("lm_eval", reason="pip install 'lm_eval[api]'")
pytestmark = pytest.mark.slow

QUESTIONS = [("The capital of France is", ["Paris", "London"], 0), ("Two plus two is", ["five", "four"], 1)]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
CHOICE = "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]\n"
FREE = (
    "doc_to_target: '{{choices[answer]}}'\nmetric_list: [{metric: exact_match}]\n"
    "generation_kwargs: {until: ['9'], max_gen_toks: 16}\n"
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": q, "choices": c, "answer": a}) + "\n" for q, c, a in QUESTIONS))
    for name, kind, rest in (("choice", "multiple_choice", CHOICE), ("free", "generate_until", FREE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=f"own_{name}", data=data, kind=kind) + rest)
    return folder


def evaluate(tasks, url: str, model: str, path: str, names: str, *more: str) -> dict[str, list]:
    """Returns the answers that lm_eval received, by task."""
    out = tasks / path.replace("/", "_")
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        model,
        "--model_args",
        f"model={MODEL},base_url={url}{path},num_concurrent=4,max_retries=1",
        "--tasks",
        names,
        "--include_path",
        str(tasks),
        "--log_samples",
        "--output_path",
        str(out),
        *more,
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none", "HF_HOME": str(tasks)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list] = {}
    for file in out.rglob("samples_*.jsonl"):
        task = next(name for name in names.split(",") if name in file.name)
        rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
        found[task] = [row["resps"] for row in rows]
    return found


def score(question: str, choice: str) -> float:
    """Returns the log-probability of a continuation, computed by the engine itself."""
    ids = [tokenizer().encode(text, add_special_tokens=False) for text in (question, " " + choice)]
    shared, total = engine(), 0.0
    for i, token_id in enumerate(ids[1]):
        (logits,) = Research(shared).put([f"score {i}"], [[*ids[0], *ids[1][:i]]])
        Research(shared).flush(f"score {i}")
        total += float(jax.nn.log_softmax(np.asarray(logits, np.float32))[token_id])
    return total


def test_likelihoods_and_texts_are_those_of_the_engine(tasks, url):
    got = evaluate(tasks, url, "local-completions", "/v1/completions", "own_choice,own_free")
    for (question, choices, _), resps, free in zip(QUESTIONS, got["own_choice"], got["own_free"], strict=True):
        for choice, ((value, _),) in zip(choices, resps, strict=True):
            assert float(value) == pytest.approx(score(question, choice), abs=1e-3)
        ids = tokenizer().encode(question, add_special_tokens=False)
        assert free == [[offline(ids, max_new_tokens=16, do_sample=False, stop=("9", "</s>"))]]


def test_chats_can_be_evaluated_too(tasks, url):
    got = evaluate(tasks, url, "local-chat-completions", "/v1/chat/completions", "own_free", "--apply_chat_template")
    for (question, _, _), free in zip(QUESTIONS, got["own_free"], strict=True):
        ids = tokenizer().encode(f"u:{question}\na:", add_special_tokens=False)
        assert free == [[offline(ids, max_new_tokens=16, do_sample=False, stop="9")]]
