"""The server's application under Ray Serve, on this machine's CPUs."""

from __future__ import annotations

import os
import sys

import pytest

from tests.serving.checkpoint import write_checkpoint
from tests.serving.house import offline

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own warnings
ENGINE = {"token_budget": 32, "budget_ladder": (8,), "max_num_seqs": 8, "block_size": 4, "num_blocks": 64}


def test_replicas_under_ray_give_the_offline_answers(tmp_path, monkeypatch):
    for name in ("READY_CHECK", "HEALTH_CHECK"):  # a machine that is shared may need longer than five seconds
        monkeypatch.setenv(f"RAY_SERVE_PROXY_{name}_TIMEOUT_S", "120")
    ray = pytest.importorskip("ray", reason="pip install 'fastgen_jax[ray]'")
    import httpx
    from ray import serve

    from fastgen_jax.serving.ray_app import deploy

    checkpoint = write_checkpoint(tmp_path / "tiny")
    environment = {name: os.environ[name] for name in os.environ if name.startswith("RAY_SERVE_PROXY")}
    environment["PYTHONPATH"] = ":".join(filter(None, sys.path))
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": environment})
    try:
        deploy(str(checkpoint), replicas=2, engine=ENGINE, actor_options={"num_cpus": 0.5})
        body = {"model": "tiny", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        prompts = [f"Prompt {i}" for i in range(8)]
        with httpx.Client(base_url="http://127.0.0.1:8000", timeout=120) as http:
            texts = [http.post("/v1/completions", json={**body, "prompt": p}).json()["choices"][0]["text"] for p in prompts]
            streamed = http.post("/v1/completions", json={**body, "prompt": prompts[0], "stream": True}).text
            assert http.post("/v1/completions", json={**body, "prompt": []}).status_code == 400
        assert texts == [offline(p, max_new_tokens=8, do_sample=False, ignore_eos=True) for p in prompts]
        assert streamed.endswith("data: [DONE]\n\n")
    finally:
        serve.shutdown()
        ray.shutdown()


def test_a_wrong_option_shows_before_anything_is_deployed():
    pytest.importorskip("ray", reason="pip install 'fastgen_jax[ray]'")
    from fastgen_jax.serving.ray_app import build

    with pytest.raises(ValueError, match="unknown option 'budget'"):
        build("tiny", engine={"budget": 3})
    with pytest.raises(ValueError, match="replicas is 0"):
        build("tiny", replicas=0)
