"""Snapshots in a bucket of Google Cloud Storage, tested with an emulator: `pip install gcsfs gcp-storage-emulator`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

INSTALLED = all(importlib.util.find_spec(module) for module in ("gcsfs", "gcp_storage_emulator"))


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs gcsfs and gcp-storage-emulator")
def test_a_snapshot_is_written_to_a_bucket_described_and_loaded_from_it():
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.programs.bucket", "checkpoints/sotu-1m"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "wrote gs://bucket/models/tiny" in done.stdout + done.stderr
    assert "LlamaForCausalLM" in done.stdout
    assert "is not empty; choose another directory" in done.stderr
    assert "gs://bucket/absent is not a snapshot (no fastgen.json)" in done.stderr
