"""HTTPS: clients that trust the certificate connect, others do not; invalid files are refused before the model loads."""

from __future__ import annotations

import ssl

import httpx
import openai
import pytest

import fastgen_jax
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.serving.server import run_server
from fastgen_jax.serving.settings import ServerConfig
from tests.serving.checkpoint import write_checkpoint
from tests.serving.tiny_server import offline

trustme = pytest.importorskip("trustme", reason="pip install trustme")
ENGINE = {"token_budget": 32, "budget_ladder": (8,), "max_num_seqs": 8, "block_size": 4, "num_blocks": 64}


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority, tmp_path_factory):
    """Paths of a certificate for this machine and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert("127.0.0.1", "localhost")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    issued.private_key_pem.write_to_path(key)
    for blob in issued.cert_chain_pems:
        blob.write_to_path(certificate, append=True)
    return str(certificate), str(key)


@pytest.mark.slow
def test_clients_that_trust_the_certificate_connect_and_others_do_not(authority, files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    certificate, key = files
    checkpoint = write_checkpoint(tmp_path / "tiny")
    client = fastgen_jax.serve(
        checkpoint, deployment_name="safe", tls_certificate=certificate, tls_key=key, timeout=300, **ENGINE
    )
    try:
        assert client.deployment.url.startswith("https://127.0.0.1:")
        want = offline("Once", max_new_tokens=6, do_sample=False, ignore_eos=True)
        assert client.generate("Once", max_new_tokens=6, do_sample=False, ignore_eos=True)[0].generated_text == want
        context = ssl.create_default_context()
        authority.configure_trust(context)
        with openai.OpenAI(
            base_url=f"{client.deployment.url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(verify=context)
        ) as api:
            stream = api.completions.create(
                model="tiny", prompt="Once", max_tokens=6, temperature=0, stream=True, extra_body={"ignore_eos": True}
            )
            assert "".join(chunk.choices[0].text for chunk in stream) == want
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{client.deployment.url}/health", verify=ssl.create_default_context())
        with pytest.raises(httpx.TransportError):
            httpx.get(client.deployment.url.replace("https", "http") + "/health")
    finally:
        client.terminate_server()
        client.close()


def test_invalid_certificates_and_keys_are_refused_immediately(authority, files, tmp_path):
    certificate, key = files
    other = tmp_path / "other.pem"
    authority.issue_cert("other").private_key_pem.write_to_path(other)
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    for pair in ((certificate, str(other)), (str(text), key), (certificate, str(tmp_path / "nothing")), (key, certificate)):
        config = ServerConfig(port=0, tls_certificate=pair[0], tls_key=pair[1])
        with pytest.raises(ValueError, match=r"cannot be used .*pass PEM files"):
            run_server("nowhere", config, EngineConfig())
    with pytest.raises(ValueError, match="tls_certificate and tls_key belong together"):
        ServerConfig(tls_certificate=certificate)
