"""The server's application under Ray Serve, on this machine's CPUs."""

from __future__ import annotations

import asyncio
import os
import sys

import httpx
import psutil
import pytest

from tests.serving.checkpoint import write_checkpoint
from tests.serving.tiny_server import eventually, offline

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fastgen_jax[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own warnings
ENGINE = {"token_budget": 32, "budget_ladder": (8,), "max_num_seqs": 8, "block_size": 4, "num_blocks": 64}
BODY = {"model": "tiny", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Two replicas of the tiny model under Ray Serve."""
    from ray import serve

    from fastgen_jax.serving.ray_app import deploy

    checkpoint = write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    timeouts = {f"RAY_SERVE_PROXY_{name}_CHECK_TIMEOUT_S": "120" for name in ("READY", "HEALTH")}  # the machine is shared
    environment = {**timeouts, "PYTHONPATH": ":".join(filter(None, sys.path))}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in timeouts.items():
            patch.setenv(name, value)
        ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": environment})
        try:
            deploy(str(checkpoint), replicas=2, engine=ENGINE, actor_options={"num_cpus": 0.5})
            yield "http://127.0.0.1:8000"
        finally:
            serve.shutdown()
            ray.shutdown()


def replicas() -> list[psutil.Process]:
    """The processes of the replicas, which are descendants of this process."""
    return [
        p
        for p in psutil.Process(os.getpid()).children(recursive=True)
        if any("ServeReplica" in word and "EngineReplica" in word for word in p.cmdline())
    ]


def want(prompt: str) -> str:
    return offline(prompt, max_new_tokens=60, do_sample=False, ignore_eos=True)


def test_replicas_under_ray_give_the_answers_of_the_offline_engine(url):
    prompts = [f"Prompt {i}" for i in range(8)]
    with httpx.Client(base_url=url, timeout=120) as http:
        texts = [http.post("/v1/completions", json={**BODY, "prompt": p}).json()["choices"][0]["text"] for p in prompts]
        with http.stream("POST", "/v1/completions", json={**BODY, "prompt": prompts[0], "stream": True}) as answer:
            pieces = list(answer.iter_raw())
        refused = http.post("/v1/completions", json={**BODY, "prompt": []})
    assert texts == [want(p) for p in prompts]
    assert len(pieces) > 10, "the stream came in one piece"
    assert pieces[-1].endswith(b"data: [DONE]\n\n")
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_killed_replica_is_replaced_and_its_requests_are_answered(url):
    prompts = [f"Number {i} of many" for i in range(24)]
    before = {p.pid for p in replicas()}
    assert len(before) == 2

    async def load() -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            first = asyncio.Event()

            async def ask(prompt: str) -> str:
                answer = await http.post("/v1/completions", json={**BODY, "prompt": prompt})
                first.set()
                return answer.json()["choices"][0]["text"]

            tasks = [asyncio.create_task(ask(p)) for p in prompts]
            await first.wait()
            psutil.Process(min(before)).kill()
            return await asyncio.gather(*tasks)

    assert asyncio.run(load()) == [want(p) for p in prompts]
    eventually(lambda: len({p.pid for p in replicas()} - {min(before)}) == 2, "the replica is restarted")


def test_prompts_with_the_same_start_go_to_the_replica_that_has_cached_it(url):
    starts = ["first " * 12, "other " * 12]  # longer than a piece of a prefix
    cached = []
    with httpx.Client(base_url=url, timeout=120) as http:
        for number in range(8):
            body = {**BODY, "prompt": f"{starts[number % 2]}{number}", "max_tokens": 2}
            usage = http.post("/v1/completions", json=body).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[:2] == [0, 0]
    assert min(cached[2:]) >= 64


def test_a_wrong_option_is_reported_before_anything_is_deployed():
    from fastgen_jax.serving.ray_app import build

    with pytest.raises(ValueError, match="unknown option 'budget'"):
        build("tiny", engine={"budget": 3})
    with pytest.raises(ValueError, match="replicas is 0"):
        build("tiny", replicas=0)
    with pytest.raises(ValueError, match="max_replicas is 1 but replicas, the least number, is 2"):
        build("tiny", replicas=2, max_replicas=1)
    with pytest.raises(ValueError, match="requires max_replicas"):
        build("tiny", autoscaling={"upscale_delay_s": 1})


def test_the_number_of_replicas_follows_the_load(url, tmp_path):
    from ray import serve

    from fastgen_jax.serving.ray_app import deploy

    serve.delete("tiny")
    eventually(lambda: not replicas(), "the fixed replicas are gone")
    pace = {"target_ongoing_requests": 2, "upscale_delay_s": 0.1, "downscale_delay_s": 2, "metrics_interval_s": 0.2}
    checkpoint = write_checkpoint(tmp_path / "tiny")
    options = {"engine": ENGINE, "actor_options": {"num_cpus": 0.5}, "autoscaling": {**pace, "look_back_period_s": 1}}
    deploy(str(checkpoint), replicas=1, max_replicas=2, **options)
    assert len(replicas()) == 1

    async def load(num_clients: int, until: int) -> int:
        """Requests of so many clients, until there are so many replicas; returns how many were answered."""
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:

            async def client(number: int) -> int:
                answered = 0
                while len(replicas()) != until:
                    answer = await http.post("/v1/completions", json={**BODY, "prompt": f"Number {number}"})
                    assert answer.json()["choices"][0]["text"] == texts[number]
                    answered += 1
                return answered

            return sum(await asyncio.gather(*map(client, range(num_clients))))

    texts = [want(f"Number {number}") for number in range(8)]
    for num_clients, until in ((8, 2), (1, 1), (8, 2)):  # requests are answered while a replica comes, goes, and comes again
        assert asyncio.run(asyncio.wait_for(load(num_clients, until), 240)) > 0
    eventually(lambda: len(replicas()) == 1, "the second replica is gone without any request")
