"""No request makes the server fail: requests generated from its OpenAPI schema."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.tiny_server import MODEL, engine

schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
EXAMPLES = 4  # per operation; `--run-slow` tries many more
# Schemathesis draws some headers with Python's `random`.
pytestmark = pytest.mark.filterwarnings(
    "default:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning"
)


def operations(url):
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    return [result.ok() for result in schema.get_all_operations()]


def attack(url, examples):
    seen: dict[int, int] = {}
    for operation in operations(url):
        positive = operation.as_strategy()
        negative = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

        @settings(
            max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        @given(case=st.one_of(positive, negative))
        def check(case):
            if isinstance(case.body, dict):
                if "model" in case.body:
                    case.body["model"] = MODEL  # otherwise every request fails with "no such model"
                if isinstance(case.body.get("max_tokens"), int):
                    case.body["max_tokens"] = min(case.body["max_tokens"], 4)
            try:
                response = case.call(base_url=url, timeout=120)
            except Exception as error:  # a request that cannot be sent does not test the server
                if "requests" in type(error).__module__ or "urllib3" in type(error).__module__:
                    return
                raise
            seen[response.status_code] = seen.get(response.status_code, 0) + 1
            assert response.status_code < 500, (case.as_curl_command(), response.text)
            if response.status_code >= 400 and case.operation.path != "/health":
                anthropic = case.operation.path.startswith("/v1/messages")
                fields = {"message", "type"} if anthropic else {"message", "type", "param", "code"}
                assert set(response.json()["error"]) == fields

        check()
    assert httpx.get(f"{url}/health").status_code == 200
    assert engine().num_running == 0
    return seen


def test_generated_requests_are_answered_or_refused(url):
    seen = attack(url, EXAMPLES)
    assert seen[200] > 0
    assert seen[400] > 0


@pytest.mark.slow
def test_many_generated_requests_are_answered_or_refused(url):
    attack(url, 300)
