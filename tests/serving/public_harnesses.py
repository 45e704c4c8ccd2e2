"""Runs lm-eval and guidellm, unmodified, against a served model, on local data.

    python -m tests.serving.public_harnesses --folder /tmp/harnesses --model smollm2-135m-instruct
    python -m tests.serving.public_harnesses --folder /tmp/harnesses --url http://127.0.0.1:8000 --model NAME

Each gets an environment of its own in the folder, with the newest version from PyPI, which later runs use again. lm-eval
scores and generates through completions and chats, and holds answers to a JSON schema; guidellm sends concurrent streams.
Exits with 1 if an answer is missing, or does not follow its schema.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fastgen_jax

QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "London"], "answer": 0},
    {"question": "Two plus two is", "choices": ["five", "four"], "answer": 1},
    {"question": "The color of the sky is", "choices": ["blue", "green"], "answer": 0},
]
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "maxLength": 20}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
FREE = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "metric_list": [{"metric": "exact_match"}],
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 64},
}
TASKS = {
    "choice": CHOICE,
    "free": FREE,
    "schema": {**FREE, "generation_kwargs": {"max_gen_toks": 96, "until": ["</s>"], "response_format": FORMAT}},
}
RUNS = (
    ("local-completions", "/v1/completions", ("choice", "free", "schema")),
    ("local-chat-completions", "/v1/chat/completions", ("free", "schema")),
)
REQUESTS, STREAMS = 16, 4


def main() -> int:
    """Runs both and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for environments, tasks and results; kept")
    parser.add_argument("--model", required=True, help="model to serve, or the name of the one that is served at --url")
    parser.add_argument("--url", help="a server that runs already, without /v1")
    parser.add_argument("--harnesses", nargs="+", choices=["lm-eval", "guidellm"], default=["lm-eval", "guidellm"])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = options.folder.resolve()
    wrong: list[str] = []
    with contextlib.nullcontext(options.url) if options.url else serving(options.model) as url:
        if "lm-eval" in options.harnesses:
            wrong += run_lm_eval(folder, url, options.model)
        if "guidellm" in options.harnesses:
            wrong += run_guidellm(folder, url, options.model)
    print("\n".join(wrong) or "all answers are complete")
    return bool(wrong)


def environment(folder: Path, name: str, *packages: str) -> Path:
    """The folder of the programs in an environment with these packages."""
    programs = folder / name / "bin"
    if not (programs / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", *packages], check=True)
    return programs


@contextlib.contextmanager
def serving(model: str) -> Iterator[str]:
    """The URL of a server for the model; it ends with the context."""
    client = fastgen_jax.serve(model, deployment_name="public-harnesses", served_model_name=(model,))
    try:
        yield client.deployment.url
    finally:
        client.terminate_server()


def run_lm_eval(folder: Path, url: str, model: str) -> Iterator[str]:
    """Evaluates the tasks over completions and chats; yields what is wrong with the answers."""
    programs = environment(folder, "lm-eval", "lm-eval[api]")
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    data = tasks / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, fields in TASKS.items():
        base = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        task = {"task": f"own_{name}", **base, "doc_to_text": "{{question}}", **fields}
        (tasks / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    for kind, path, names in RUNS:
        out = folder / "results" / kind
        command = [
            programs / "lm_eval",
            "run",
            "--model",
            kind,
            "--include_path",
            tasks,
            "--log_samples",
            "--output_path",
            out,
        ]
        command += ["--model_args", f"model={model},base_url={url}{path},num_concurrent=4,max_retries=1"]
        command += ["--tasks", ",".join(f"own_{name}" for name in names)]
        chat = ["--apply_chat_template"] if "chat" in kind else []
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "OPENAI_API_KEY": "none"}
        done = subprocess.run([*command, *chat], env={**_without_our_packages(), **offline}, capture_output=True, text=True)
        if done.returncode:
            yield f"lm-eval with {kind} ended with {done.returncode}: {done.stderr[-2000:]}"
            continue
        for name in names:
            newest = max(out.rglob(f"samples_own_{name}_*.jsonl"), key=lambda file: file.stat().st_mtime)
            samples = [json.loads(line) for line in newest.read_text().splitlines()]
            print(f"lm-eval, {kind}, {name}: {len(samples)} of {len(QUESTIONS)} answered", flush=True)
            if len(samples) != len(QUESTIONS):
                yield f"lm-eval, {kind}, {name}: {len(samples)} of {len(QUESTIONS)} questions have an answer"
            for sample in samples if name == "schema" else ():
                answer = json.loads(sample["resps"][0][0])
                if answer.keys() != {"answer", "sure"} or not isinstance(answer["sure"], bool):
                    yield f"lm-eval, {kind}: {answer} does not follow the schema"


def run_guidellm(folder: Path, url: str, model: str) -> Iterator[str]:
    """Sends concurrent streams to the server; yields what is wrong."""
    programs = environment(folder, "guidellm", "guidellm")
    out = folder / "results" / "guidellm"
    out.mkdir(parents=True, exist_ok=True)
    command = [programs / "guidellm", "run", "--backend", f"kind=openai_http,target={url},model={model}"]
    command += ["--profile", f"kind=concurrent,streams={STREAMS}", "--constraint", f"kind=max_requests,count={REQUESTS}"]
    prompts = out / "prompts.jsonl"
    rows = [{"prompt": f"Story {i}: once upon a time", "output_tokens_count": 16} for i in range(REQUESTS)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = out / "report.json"
    command += ["--data", f"kind=json_file,path={prompts}", "--output", f"kind=json,path={report}", "--disable-console"]
    done = subprocess.run(command, env=_without_our_packages(), capture_output=True, text=True)
    if done.returncode:
        yield f"guidellm ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}"
        return
    requests = json.loads(report.read_text())["benchmarks"][0]["requests"]
    counts = {state: len(requests[state]) for state in ("successful", "errored", "incomplete")}
    print(f"guidellm, {STREAMS} streams: {counts}", flush=True)
    if counts != {"successful": REQUESTS, "errored": 0, "incomplete": 0}:
        yield f"guidellm: {counts} of {REQUESTS} requests"


def _without_our_packages() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


if __name__ == "__main__":
    raise SystemExit(main())
