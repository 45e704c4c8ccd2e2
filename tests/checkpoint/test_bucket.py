"""Snapshots in a bucket of Google Cloud Storage, as far as an emulator goes: `pip install gcsfs gcp-storage-emulator`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

INSTALLED = all(importlib.util.find_spec(module) for module in ("gcsfs", "gcp_storage_emulator"))

IN_THE_BUCKET = """
import os, sys
import jax
import numpy as np
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

download = objects.download
def with_generation(request, response, storage, *arguments, **options):
    # The service names the generation of what it sends; the emulator forgets to, and TensorStore asks for it.
    download(request, response, storage, *arguments, **options)
    if response.status < 400:
        object = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = str(object["generation"])
objects.download = with_generation

server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
server.start()
address = "http://127.0.0.1:%d" % server._api._httpd.socket.getsockname()[1]
os.environ |= {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address,
               "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
try:
    from fastgen_jax.checkpoint import load_params, open_checkpoint, resolve_model
    from fastgen_jax.cli import main
    from fastgen_jax.text import load_tokenizer

    source, url = sys.argv[1], "gs://bucket/models/tiny"
    assert main(["convert", source, url]) == 0
    assert main(["convert", source, url]) == 2  # not over another
    assert main(["inspect", url]) == 0
    remote, local = open_checkpoint(resolve_model(url)), open_checkpoint(source)
    jax.tree.map(np.testing.assert_array_equal, load_params(remote, dtype="float32"), load_params(local, dtype="float32"))
    text = "gold and silver"
    assert load_tokenizer(remote.tokenizer_source).encode(text) == load_tokenizer(local.tokenizer_source).encode(text)
    assert main(["inspect", "gs://bucket/absent"]) == 2
    if len(sys.argv) > 2:
        assert main(["generate", "--model", url, *sys.argv[2:]]) == 0
finally:
    server.stop()
"""


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs gcsfs and gcp-storage-emulator")
def test_a_snapshot_is_written_to_a_bucket_described_and_loaded_from_it():
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_BUCKET, "checkpoints/sotu-1m"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gs://bucket/models/tiny is ready" in done.stdout + done.stderr
    assert "LlamaForCausalLM" in done.stdout
    assert "is not empty; choose another directory" in done.stderr
    assert "gs://bucket/absent holds no snapshot (no fastgen.json)" in done.stderr
